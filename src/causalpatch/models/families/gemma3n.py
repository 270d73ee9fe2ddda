"""Gemma 3n: four streams that take turns (AltUp), embeddings of the tokens in every layer, shared keys and values.

A layer takes and returns all four streams as one tensor whose first axis counts them, and mixes them in front of and
behind what attention and MLP do: there is no one stream between layers. ``attn_out`` and ``mlp_out`` are what the
sublayers add to the active stream, behind their norms. In the first layers most of what the gate gives is cut off in
front of the activation function, by a threshold over all neurons. Later layers take over keys and values of an earlier
one.
"""

from dataclasses import replace

from causalpatch.models.families.family import Absent
from causalpatch.models.families.gemma2 import GEMMA2

_STREAMS = Absent(
    "layers hand on several streams at once, mixed on the way (AltUp); use attn_out, mlp_out or "
    "module(PATH).output of a layer with its axes"
)
_SHARED = Absent("later layers take over keys and values of an earlier one; use z, or module(PATH).output where it is")

GEMMA3N = replace(
    GEMMA2,
    name="gemma3n",
    model_types=("gemma3n_text",),
    reads_ids=True,
    thins_gates=True,
    needs_config=True,
    sites={
        **GEMMA2.sites,
        "resid_pre": _STREAMS,
        "resid_mid": _STREAMS,
        "resid_post": _STREAMS,
        "k": _SHARED,
        "v": _SHARED,
    },
)
