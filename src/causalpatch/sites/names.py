"""The closed table of site names: which indices each takes and which axes its value has."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from causalpatch.base.errors import SiteNotFound
from causalpatch.base.suggest import closest


@dataclass(frozen=True)
class SiteName:
    """What a name means in every model.

    Args:
        name: The name as it is written.
        has_layer: Whether a layer follows the name.
        unit_axis: The axis that a unit counts on (``head``, ``kv_head``, ``neuron``), or None.
        value_axes: Axes of one site's value after pair and position, in order; a module says its own. Where there are
            keys among them, the position is the query's.
        note: What the site is, in a line.
    """

    name: str
    has_layer: bool
    unit_axis: str | None
    value_axes: tuple[str, ...]
    note: str

    @property
    def has_keys(self) -> bool:
        """Whether the value is a row over keys, so that the position is a query's."""
        return "key_position" in self.value_axes

    @property
    def position_axis(self) -> str:
        """Name of the axis that the position counts on."""
        return "query_position" if self.has_keys else "position"


_ROWS: tuple[tuple[str, bool, str | None, tuple[str, ...], str], ...] = (
    ("embed", False, None, ("width",), "output of the token embedding"),
    ("pos_embed", False, None, ("width",), "output of the position embedding"),
    ("resid_pre", True, None, ("width",), "residual stream into the layer"),
    ("resid_mid", True, None, ("width",), "residual stream between attention and MLP; not in parallel blocks"),
    ("resid_post", True, None, ("width",), "residual stream out of the layer"),
    ("attn_out", True, None, ("width",), "what attention adds to the stream, after any post-norm"),
    ("mlp_out", True, None, ("width",), "what the MLP adds to the stream, after any post-norm"),
    ("q", True, "head", ("head_width",), "output of the query projection, before QK-norm and rotary"),
    ("k", True, "kv_head", ("head_width",), "output of the key projection, before QK-norm and rotary"),
    ("v", True, "kv_head", ("head_width",), "output of the value projection"),
    ("q_rot", True, "head", ("head_width",), "queries as attention compares them: after QK-norm and rotary"),
    ("k_rot", True, "kv_head", ("head_width",), "keys as attention compares them: after QK-norm and rotary"),
    ("scores", True, "head", ("key_position",), "scores of a query's keys, as the softmax gets them"),
    ("pattern", True, "head", ("key_position",), "weights that a query gives its keys, as the softmax gives them"),
    ("z", True, "head", ("head_width",), "input of attention's output projection"),
    ("head_out", True, "head", ("width",), "one head's slice of the output projection, before any post-norm"),
    ("cross_q", True, "head", ("head_width",), "output of cross-attention's query projection"),
    ("cross_k", True, "head", ("head_width",), "output of cross-attention's key projection, of the encoder's tokens"),
    ("cross_v", True, "head", ("head_width",), "output of cross-attention's value projection, of the encoder's tokens"),
    ("cross_scores", True, "head", ("key_position",), "scores of the encoder's tokens, as the softmax gets them"),
    ("cross_pattern", True, "head", ("key_position",), "weights that a query gives the encoder's tokens"),
    ("cross_z", True, "head", ("head_width",), "input of cross-attention's output projection"),
    ("cross_head_out", True, "head", ("width",), "one head's slice of cross-attention's output projection"),
    ("cross_attn_out", True, None, ("width",), "what cross-attention adds to the decoder's stream"),
    ("mlp_pre", True, "neuron", (), "output of the MLP's up projection"),
    ("mlp_gate", True, "neuron", (), "output of a gated MLP's gate projection, before the activation function"),
    ("mlp_post", True, "neuron", (), "input of the MLP's down projection"),
    ("router", True, None, ("expert",), "weights that a token's experts get, after top-k: 0 for those not chosen"),
    ("expert_out", True, "expert", ("width",), "what one expert adds to the MLP's output, its weight included"),
    ("q_bias", True, "head", ("head_width",), "bias of the query projection, at each token"),
    ("k_bias", True, "kv_head", ("head_width",), "bias of the key projection, at each token"),
    ("v_bias", True, "kv_head", ("head_width",), "bias of the value projection, at each token"),
    ("attn_bias", True, None, ("width",), "bias of attention's output projection, at each token"),
    ("mlp_bias", True, None, ("width",), "bias of the MLP's down projection, at each token"),
    ("final_norm", False, None, ("width",), "output of the last norm"),
    ("logits", False, None, ("vocab",), "the model's output"),
    ("feature", True, "feature", (), "feature(NAME): activation of a feature of a dictionary, such as an SAE's"),
    ("feature_error", True, None, ("width",), "feature_error(NAME): what a dictionary does not explain"),
    ("module", False, None, (), "module(PATH).output or .input: any module's tensors, with their own axes"),
)

NAMES: Final[Mapping[str, SiteName]] = MappingProxyType({row[0]: SiteName(*row) for row in _ROWS})

ATTENTION_SITES: Final = frozenset({"q_rot", "k_rot", "scores", "pattern", "cross_scores", "cross_pattern"})
"""Sites on the way through attention, between what its modules give and what they take."""

FEATURE_SITES: Final = frozenset({"feature", "feature_error"})
"""Sites of a dictionary, whose name stands in parentheses."""

CROSS_SITES: Final = frozenset(name for name in NAMES if name.startswith("cross_"))
"""Sites of the attention by which a decoder reads its encoder."""

ONCE: Final = CROSS_SITES | {"logits"}
"""Sites that a model with an encoder and a decoder has once, in the decoder; all others stand in one of its streams."""

OF_ENCODER_TOKENS: Final = frozenset({"cross_k", "cross_v"})
"""Sites of the decoder's layers that have a value for each token of the encoder."""

# Names of the same things elsewhere in the field, for suggestions only.
_MEANT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attention": "attn_out",
        "cross_attention": "cross_attn_out",
        "cross_attentions": "cross_pattern",
        "attn": "attn_out",
        "attn_scores": "scores",
        "attn_weights": "pattern",
        "attention_weights": "pattern",
        "gate": "mlp_gate",
        "head": "z",
        "heads": "z",
        "hidden": "resid_post",
        "hidden_states": "resid_post",
        "key": "k",
        "ln_f": "final_norm",
        "mlp": "mlp_out",
        "neuron": "mlp_post",
        "neurons": "mlp_post",
        "query": "q",
        "resid": "resid_pre",
        "residual": "resid_pre",
        "unembed": "logits",
        "value": "v",
    }
)


def describe(name: str, text: str | None = None) -> SiteName:
    """Return what ``name`` means.

    Args:
        name: A site's name, without indices.
        text: The whole text that it came from, to be quoted in the error.

    Raises:
        SiteNotFound: No site has this name; the message lists the names that exist, the closest first.
    """
    if name in NAMES:
        return NAMES[name]
    near = ([_MEANT[name.lower()]] if name.lower() in _MEANT else []) + closest(name.lower(), NAMES)
    ordered = list(dict.fromkeys([*near, *NAMES]))
    whole = text if text is not None else name
    facts = [("name", repr(name))] if whole != name else []
    if "." in whole and not near:
        fix = "the output of a module of the model is written module(PATH).output"
    else:
        fix = f"did you mean {near[0]!r}?" if near else "use one of these names"
    raise SiteNotFound(f"no site named {whole!r}", facts=[*facts, ("names", " ".join(ordered))], fix=fix)
