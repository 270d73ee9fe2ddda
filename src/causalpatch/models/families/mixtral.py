"""Mixtral and the mixtures of experts laid out like it: Llama, with a router and experts in place of the MLP.

The experts' weights are fused in one tensor and no module holds the activations of one token, so there is no
``mlp_pre``, ``mlp_gate`` or ``mlp_post``. ``expert_out`` is what one expert adds, its weight included; ``mlp_out`` is
what the experts of a token, and any shared one, add together.

A patch in front of the router may change which experts are chosen, and that belongs to its effect, unless ``router``
keeps what the base run has. Some layers may have one MLP instead: these have no ``router`` and no ``expert_out``.
"""

from dataclasses import replace

from causalpatch.models.families.family import Absent, RoutedBy, TermOf
from causalpatch.models.families.llama import LLAMA

FUSED = Absent("the weights of the experts are fused, and no module holds a token's neurons; use expert_out or mlp_out")

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    model_types=("mixtral",),
    needs_config=True,
    sites={
        **LLAMA.sites,
        **dict.fromkeys(("mlp_pre", "mlp_gate", "mlp_post", "mlp_bias"), FUSED),
        "router": RoutedBy("mlp.gate"),
        "expert_out": TermOf("mlp.experts", router="mlp.gate"),
    },
)

QWEN2_MOE = replace(MIXTRAL, name="qwen2_moe", model_types=("qwen2_moe",))
QWEN3_MOE = replace(MIXTRAL, name="qwen3_moe", model_types=("qwen3_moe",))

# Sinks: each head has a score that takes its share of the attention and gives nothing.
GPT_OSS = replace(
    MIXTRAL,
    name="gpt_oss",
    model_types=("gpt_oss",),
    sites={
        **MIXTRAL.sites,
        "router": RoutedBy("mlp.router"),
        "expert_out": TermOf("mlp.experts", router="mlp.router"),
    },
)
