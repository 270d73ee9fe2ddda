"""Phi-3: Llama with q, k and v fused side by side, as wide as their heads are many, and gate and up fused."""

from dataclasses import replace

from causalpatch.models.families.family import Parted
from causalpatch.models.families.llama import LLAMA

PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    extras=("resid_attn_dropout", "resid_mlp_dropout"),
    sites={
        **LLAMA.sites,
        "q": Parted("self_attn.qkv_proj", "output", part=0, parts=3),
        "k": Parted("self_attn.qkv_proj", "output", part=1, parts=3),
        "v": Parted("self_attn.qkv_proj", "output", part=2, parts=3),
        "mlp_gate": Parted("mlp.gate_up_proj", "output", part=0, parts=2),
        "mlp_pre": Parted("mlp.gate_up_proj", "output", part=1, parts=2),
    },
)
