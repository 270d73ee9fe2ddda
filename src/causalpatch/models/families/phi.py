"""Phi 1 and 2: separate projections with biases, attention and MLP in parallel behind one norm."""

from dataclasses import replace

from causalpatch.models.families.family import Absent, At, Parted, ShareOf
from causalpatch.models.families.llama import LLAMA

PHI = replace(
    LLAMA,
    name="phi",
    model_types=("phi",),
    norms=("input_layernorm",),
    extras=("resid_dropout",),
    sites={
        **LLAMA.sites,
        "resid_mid": Absent("attention and MLP read the same stream (parallel blocks); use resid_pre or resid_post"),
        "z": Parted("self_attn.dense", "input"),
        "head_out": ShareOf("self_attn.dense"),
        "mlp_post": Parted("mlp.fc2", "input"),
        "final_norm": At("final_layernorm", "output"),
    },
)
