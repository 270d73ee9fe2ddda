"""Phi 1 and 2: separate projections with biases, attention and MLP in parallel behind one norm."""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, PARALLEL, At, Parted, ShareOf
from causalpatch.models.families.llama import LLAMA

PHI = replace(
    LLAMA,
    name="phi",
    model_types=("phi",),
    norms=("input_layernorm",),
    extras=("resid_dropout",),
    sites={
        **LLAMA.sites,
        "resid_mid": PARALLEL,
        "z": Parted("self_attn.dense", "input"),
        "head_out": ShareOf("self_attn.dense"),
        "mlp_pre": Parted("mlp.fc1", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.fc2", "input"),
        "final_norm": At("final_layernorm", "output"),
    },
)
