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
        value_axes: Axes of one site's value after pair and position, in order; a module says its own.
        note: What the site is, in a line.
    """

    name: str
    has_layer: bool
    unit_axis: str | None
    value_axes: tuple[str, ...]
    note: str


_ROWS: tuple[tuple[str, bool, str | None, tuple[str, ...], str], ...] = (
    ("embed", False, None, ("width",), "output of the token embedding"),
    ("resid_pre", True, None, ("width",), "residual stream into the layer"),
    ("resid_mid", True, None, ("width",), "residual stream between attention and MLP; not in parallel blocks"),
    ("resid_post", True, None, ("width",), "residual stream out of the layer"),
    ("attn_out", True, None, ("width",), "what attention adds to the stream, after any post-norm"),
    ("mlp_out", True, None, ("width",), "what the MLP adds to the stream, after any post-norm"),
    ("q", True, "head", ("head_width",), "output of the query projection, before QK-norm and rotary"),
    ("k", True, "kv_head", ("head_width",), "output of the key projection, before QK-norm and rotary"),
    ("v", True, "kv_head", ("head_width",), "output of the value projection"),
    ("z", True, "head", ("head_width",), "input of attention's output projection"),
    ("head_out", True, "head", ("width",), "one head's slice of the output projection, before any post-norm"),
    ("mlp_post", True, "neuron", (), "input of the MLP's down projection"),
    ("final_norm", False, None, ("width",), "output of the last norm"),
    ("logits", False, None, ("vocab",), "the model's output"),
    ("module", False, None, (), "module(PATH).output or .input: any module's tensors, with their own axes"),
)

NAMES: Final[Mapping[str, SiteName]] = MappingProxyType({row[0]: SiteName(*row) for row in _ROWS})

# Names of the same things elsewhere in the field, for suggestions only.
_MEANT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attention": "attn_out",
        "attn": "attn_out",
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
