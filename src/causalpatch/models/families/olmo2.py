"""OLMo 2 and 3: no norm in front of a sublayer, one behind it.

Attention and the MLP read the stream as it is, and what they return goes through a norm before it is added:
``attn_out`` and ``mlp_out`` are the outputs of these norms, ``head_out`` is in front of them. ``q`` and ``k`` are in
front of a norm over all heads together.
"""

from dataclasses import replace

from causalpatch.models.families.gemma2 import GEMMA2

OLMO2 = replace(
    GEMMA2,
    name="olmo2",
    model_types=("olmo2", "olmo3"),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
