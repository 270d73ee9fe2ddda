"""The closed list of axis names, used in docstrings, shape annotations, dims of results and messages."""

from typing import Final

AXES: Final[tuple[str, ...]] = (
    "pair",
    "layer",
    "source_layer",
    "position",
    "head",
    "kv_head",
    "neuron",
    "expert",
    "feature",
    "width",
    "head_width",
    "query_position",
    "key_position",
    "vocab",
    "intervention",
    "sender",
    "receiver",
    "draw",
    "seed",
    "channel",
    "height",
    "column",
)
