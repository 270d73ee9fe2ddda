"""GPT-Neo: GPT-J's modules one after the other, with learned positions and windows in every other layer.

Attention stands in a module of its own within ``attn``.
"""

from dataclasses import replace

from causalpatch.models.families.family import NOT_TURNED, At, Parted, ShareOf, SumOf
from causalpatch.models.families.gptj import GPTJ

GPT_NEO = replace(
    GPTJ,
    name="gpt_neo",
    model_types=("gpt_neo",),
    norms=("ln_1", "ln_2"),
    sites={
        **GPTJ.sites,
        "pos_embed": At("wpe", "output"),
        "resid_mid": SumOf(changed=At("attn", "output"), kept=At("", "input")),
        "q": Parted("attn.attention.q_proj", "output"),
        "k": Parted("attn.attention.k_proj", "output"),
        "v": Parted("attn.attention.v_proj", "output"),
        "q_rot": NOT_TURNED,
        "k_rot": NOT_TURNED,
        "z": Parted("attn.attention.out_proj", "input"),
        "head_out": ShareOf("attn.attention.out_proj"),
        "mlp_pre": Parted("mlp.c_fc", "output"),
        "mlp_post": Parted("mlp.c_proj", "input"),
    },
)
