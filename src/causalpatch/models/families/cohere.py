"""Cohere (Command R): Llama's projections, attention and MLP in parallel behind one norm, scaled logits.

``q`` and ``k`` are in front of the norm that some models have for each head. Cohere 2 has windows in most layers.
"""

from dataclasses import replace

from causalpatch.models.families.family import PARALLEL
from causalpatch.models.families.llama import LLAMA

COHERE = replace(
    LLAMA,
    name="cohere",
    model_types=("cohere",),
    norms=("input_layernorm",),
    sites={
        **LLAMA.sites,
        "resid_mid": PARALLEL,
    },
)

COHERE2 = replace(COHERE, name="cohere2", model_types=("cohere2",))
