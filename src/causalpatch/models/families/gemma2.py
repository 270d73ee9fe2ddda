"""Gemma 2: Llama's projections between two pairs of norms.

Each sublayer is followed by a norm before it is added to the stream, so ``attn_out`` and ``mlp_out`` are the outputs of
those norms, while ``head_out`` is before them. The name ``post_attention_layernorm`` is the norm before the MLP in
Llama and the norm after attention here. The embedding module scales its own output; the soft-cap on the logits is in
the model's output.
"""

from dataclasses import replace

from causalpatch.models.families.family import At, SumOf
from causalpatch.models.families.llama import LLAMA

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    model_types=("gemma2",),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    sites={
        **LLAMA.sites,
        "attn_out": At("post_attention_layernorm", "output"),
        "resid_mid": SumOf(changed=At("post_attention_layernorm", "output"), kept=At("", "input")),
        "mlp_out": At("post_feedforward_layernorm", "output"),
    },
)
