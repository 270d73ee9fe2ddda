"""StarCoder 2: Llama's projections with biases and layer norms, and an MLP without a gate."""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, Parted
from causalpatch.models.families.llama import LLAMA

STARCODER2 = replace(
    LLAMA,
    name="starcoder2",
    model_types=("starcoder2",),
    sites={
        **LLAMA.sites,
        "mlp_pre": Parted("mlp.c_fc", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.c_proj", "input"),
    },
)
