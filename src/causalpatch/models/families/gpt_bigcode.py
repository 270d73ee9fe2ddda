"""GPT-BigCode (StarCoder 1): GPT-2's modules with plain linear maps, and one key and value for all heads."""

from dataclasses import replace

from causalpatch.models.families.gpt2 import GPT2

GPT_BIGCODE = replace(
    GPT2,
    name="gpt_bigcode",
    model_types=("gpt_bigcode",),
    # With keys and values for every head they are fused head by head.
    when={"add_cross_attention": False, "multi_query": True},
    kv_heads=1,
    needs_config=True,
)
