"""Gemma 1 and 3: Llama's projections around heads that need not be as wide as the stream over their number.

The embedding module scales its own output. Gemma 1 has Llama's norms, Gemma 3 those of Gemma 2, with a norm of each
head's queries and keys behind ``q`` and ``k``, and windows in most layers.
"""

from dataclasses import replace

from causalpatch.models.families.gemma2 import GEMMA2
from causalpatch.models.families.llama import LLAMA

GEMMA = replace(LLAMA, name="gemma", model_types=("gemma",))
GEMMA3 = replace(GEMMA2, name="gemma3", model_types=("gemma3_text",))
