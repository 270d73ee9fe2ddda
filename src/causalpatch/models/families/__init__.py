"""Families of models, each a table of facts with no logic: where each site is found in the unmodified modules."""

from typing import Final

from causalpatch.models.families.bart import BART, MARIAN, MBART, PEGASUS, WHISPER
from causalpatch.models.families.bert import BERT, ROBERTA
from causalpatch.models.families.bloom import BLOOM
from causalpatch.models.families.clip import CLIP_TEXT, CLIP_VISION, SIGLIP_TEXT, SIGLIP_VISION
from causalpatch.models.families.cohere import COHERE, COHERE2
from causalpatch.models.families.deepseek_v3 import DEEPSEEK_V3, DEEPSEEK_V3_FULL_QUERIES
from causalpatch.models.families.falcon import FALCON, FALCON_GROUPED, FALCON_GROUPED_ONE_NORM, FALCON_SEQUENTIAL
from causalpatch.models.families.family import (
    NO_CROSS,
    Absent,
    At,
    Fact,
    Family,
    Parted,
    Pictures,
    Positional,
    RoutedBy,
    ShareOf,
    SumOf,
    TermOf,
)
from causalpatch.models.families.gemma import GEMMA, GEMMA3
from causalpatch.models.families.gemma2 import GEMMA2
from causalpatch.models.families.gemma3n import GEMMA3N
from causalpatch.models.families.gpt2 import GPT2
from causalpatch.models.families.gpt_bigcode import GPT_BIGCODE
from causalpatch.models.families.gpt_neo import GPT_NEO
from causalpatch.models.families.gpt_neox import GPT_NEOX, GPT_NEOX_SEQUENTIAL
from causalpatch.models.families.gptj import GPTJ
from causalpatch.models.families.granite import GRANITE
from causalpatch.models.families.jamba import JAMBA
from causalpatch.models.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from causalpatch.models.families.mamba import MAMBA, MAMBA2
from causalpatch.models.families.mixtral import GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE
from causalpatch.models.families.modernbert import MODERNBERT
from causalpatch.models.families.mpt import MPT
from causalpatch.models.families.olmo2 import OLMO2
from causalpatch.models.families.opt import OPT, OPT_POST_NORM
from causalpatch.models.families.phi import PHI
from causalpatch.models.families.phi3 import PHI3
from causalpatch.models.families.stablelm import STABLELM, STABLELM_PARALLEL
from causalpatch.models.families.starcoder2 import STARCODER2
from causalpatch.models.families.t5 import T5, T5_GATED
from causalpatch.models.families.vit import DEIT, DINOV2, DINOV2_GATED, DINOV2_REGISTERS, DINOV2_REGISTERS_GATED, VIT

# Variants that share a configuration's name stand in the order in which they are tried.
FAMILIES: Final[tuple[Family, ...]] = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GPT2, GPT_NEOX, GPT_NEOX_SEQUENTIAL),
    *(GEMMA, GEMMA3, OLMO2, PHI3, SMOLLM3),
    *(FALCON, FALCON_GROUPED, FALCON_GROUPED_ONE_NORM, FALCON_SEQUENTIAL, BLOOM, MPT, GPTJ, GPT_NEO),
    *(OPT, OPT_POST_NORM, PHI, STABLELM, STABLELM_PARALLEL, COHERE, COHERE2, GPT_BIGCODE, STARCODER2, GRANITE),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V3_FULL_QUERIES, DEEPSEEK_V3, GPT_OSS),
    *(GEMMA3N, MAMBA, MAMBA2, JAMBA),
    *(BERT, ROBERTA, MODERNBERT),
    *(T5, T5_GATED, BART, MARIAN, MBART, PEGASUS, WHISPER),
    *(VIT, DEIT, DINOV2, DINOV2_GATED, DINOV2_REGISTERS, DINOV2_REGISTERS_GATED),
    *(CLIP_VISION, CLIP_TEXT, SIGLIP_VISION, SIGLIP_TEXT),
)

__all__ = [
    "FAMILIES",
    "NO_CROSS",
    "Absent",
    "At",
    "Fact",
    "Family",
    "Parted",
    "Pictures",
    "Positional",
    "RoutedBy",
    "ShareOf",
    "SumOf",
    "TermOf",
]
