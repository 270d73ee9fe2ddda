"""Families of models, each a table of facts with no logic: where each site is found in the unmodified modules."""

from typing import Final

from causalpatch.models.families.family import Absent, At, Fact, Family, Parted, ShareOf, SumOf
from causalpatch.models.families.gemma2 import GEMMA2
from causalpatch.models.families.gpt2 import GPT2
from causalpatch.models.families.gpt_neox import GPT_NEOX, GPT_NEOX_SEQUENTIAL
from causalpatch.models.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

FAMILIES: Final[tuple[Family, ...]] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GPT2, GPT_NEOX, GPT_NEOX_SEQUENTIAL)

__all__ = ["FAMILIES", "Absent", "At", "Fact", "Family", "Parted", "ShareOf", "SumOf"]
