"""StableLM: Llama's projections with layer norms; attention and MLP in parallel where the configuration says so.

``q`` and ``k`` are in front of the norm that some models have for each head.
"""

from dataclasses import replace

from causalpatch.models.families.family import PARALLEL
from causalpatch.models.families.llama import LLAMA

STABLELM = replace(
    LLAMA, name="stablelm", model_types=("stablelm",), extras=("dropout",), when={"use_parallel_residual": False}
)

STABLELM_PARALLEL = replace(
    STABLELM,
    name="stablelm_parallel",
    norms=("input_layernorm",),
    when={"use_parallel_residual": True},
    sites={
        **LLAMA.sites,
        "resid_mid": PARALLEL,
    },
)
