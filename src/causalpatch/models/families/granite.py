"""Granite: Llama's modules, with a multiplier on what each sublayer adds to the stream.

``attn_out`` and ``mlp_out`` are what is added, after the multiplier; ``head_out`` is in front of it. The embedding, the
scores and the logits have multipliers too, outside of these modules.
"""

from dataclasses import replace

from causalpatch.models.families.family import At, SumOf
from causalpatch.models.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    name="granite",
    model_types=("granite",),
    needs_config=True,
    sites={
        **LLAMA.sites,
        "attn_out": At("self_attn", "output", times="residual_multiplier"),
        "resid_mid": SumOf(changed=At("self_attn", "output", times="residual_multiplier"), kept=At("", "input")),
        "mlp_out": At("mlp", "output", times="residual_multiplier"),
    },
)
