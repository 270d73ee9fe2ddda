"""DeepSeek-V3: keys and values from one narrow latent vector (MLA), and a mixture of experts behind the first layers.

A query is one part without and one with rotary positions, ``q`` holds both. A key is a part of its head's own, from the
latent vector, and a rotary part that all heads share: no tensor in front of attention holds one head's key. Values are
narrower than queries; each stands behind its head's part of the key. ``z`` is as wide as a value.
"""

from dataclasses import replace

from causalpatch.models.families.family import Absent, Parted
from causalpatch.models.families.mixtral import MIXTRAL

DEEPSEEK_V3 = replace(
    MIXTRAL,
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    query_width=("qk_nope_head_dim", "qk_rope_head_dim"),
    sites={
        **MIXTRAL.sites,
        "q": Parted("self_attn.q_b_proj", "output"),
        "k": Absent(
            "a key is a part of its head's own beside one that all heads share (latent attention); "
            "use module(PATH).output of self_attn.kv_b_proj or self_attn.kv_a_proj_with_mqa"
        ),
        "v": Parted("self_attn.kv_b_proj", "output", part=1, parts=2, by_unit=True, is_folded=True),
    },
)

# Small models take queries from the stream at once.
DEEPSEEK_V3_FULL_QUERIES = replace(
    DEEPSEEK_V3,
    name="deepseek_v3_full_queries",
    when={"q_lora_rank": None},
    sites={**DEEPSEEK_V3.sites, "q": Parted("self_attn.q_proj", "output")},
)
