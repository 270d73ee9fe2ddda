"""Parts of a model that tuning may change: from components to rows and columns of its own projections.

==========================  =====================================================================================
component                   its weights
==========================  =====================================================================================
``z.L.H``, ``head_out``     the head's rows of the query, key and value projections, its columns of the output's
``mlp_post.L.N``            the neuron's rows of the up (and gate) projection, its column of the down projection
``attn_out.L``              all heads of the layer, and the output projection's bias
``mlp_out.L``               all neurons of the layer, and the down projection's bias
``q.L.H``, ``k``, ``v``,    these rows alone
``mlp_pre``, ``mlp_gate``
==========================  =====================================================================================

Where they lie is what the model's taps say: a site at a projection's output is rows of it, a site at its input columns,
whether queries, keys and values are fused or the weight is transposed. With a row goes its entry of the bias.

Heads may share keys and values (grouped queries). Rows that serve heads outside the selection would change these too,
so they are left alone unless all heads that they serve are selected, or ``shared="take"`` is asked for.

Positions of a site say where it was patched; weights have none.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from causalpatch.base.errors import ModelUnsupported, SettingError, SiteUnsupported
from causalpatch.circuits.circuit import Circuit
from causalpatch.engine.wiring import graph_of
from causalpatch.models import Columns, Model, input_width, output_width, plain_rows, projection_rows, why_not_plain
from causalpatch.results.claim import Claim
from causalpatch.results.words import counted, joined
from causalpatch.sites import Site
from causalpatch.validation.components import Asked, Node, Wire, members_of

Places = NDArray[np.int64]
SHARED: Final = ("leave", "take")
_ROWS_OF: Final[Mapping[str, tuple[str, ...]]] = {"z": ("q", "k", "v"), "mlp_post": ("mlp_pre", "mlp_gate")}
_WHOLE: Final = {"attn_out": "z", "mlp_out": "mlp_post"}
_ALONE: Final = ("q", "k", "v", "mlp_pre", "mlp_gate")
KNOWN: Final = "z.L.H mlp_post.L.N attn_out.L mlp_out.L q k v mlp_pre mlp_gate"


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows and columns of projections.

    Args:
        sites: The components that they are of.
        rows: Outputs of each projection, by its path, sorted.
        columns: Inputs of each projection, likewise.
        biases: Projections whose whole bias belongs to them, beside their columns.
        notes: What was left out, and why.
    """

    sites: tuple[Site, ...]
    rows: Mapping[str, Places]
    columns: Mapping[str, Places]
    biases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> list[str]:
        """Paths of the projections."""
        return list(dict.fromkeys([*self.rows, *self.columns]))

    def n_weights(self, root: nn.Module) -> int:
        """Count the weights, biases among them."""
        total = 0
        for path, places in self.rows.items():
            module = root.get_submodule(path)
            total += len(places) * ((input_width(module) or 0) + (getattr(module, "bias", None) is not None))
        for path, places in self.columns.items():
            total += len(places) * (output_width(root.get_submodule(path)) or 0)
        return total + sum(output_width(root.get_submodule(path)) or 0 for path in self.biases)


def sites_of(asked: Asked | Claim | Circuit, model: Model) -> tuple[Site, ...]:
    """Return the sites that components are, each once.

    Args:
        asked: A claim (of the components those that are supported, else all), the table of ``Effects.top(k)``, a
            circuit (its heads and MLPs), a localisation, sites or their texts.
        model: The model.

    Raises:
        SettingError: Nothing is named, or an edge is.
        ModelUnsupported: A claim or a circuit is of other weights.
        SiteNotFound: A site is not in the model.
    """
    _require_model(asked, model)
    if isinstance(asked, Claim):
        asked = asked.supported or asked.components
    elif isinstance(asked, Circuit):
        asked = [site for node in _nodes(asked, model) if (site := _site_of_node(node)) is not None]
    found: dict[Site, None] = {}
    for member in _members(asked, model):
        if isinstance(member, Wire):
            raise SettingError(
                f"the edge '{member.name}' has no weights of its own",
                facts=[("known", KNOWN)],
                fix=f"name the heads and MLPs at its ends, such as {_site_of_node(member.name.split(' ')[0])}",
            )
        found[member.site.at(None)] = None
    return tuple(found)


def parts_of(sites: Iterable[Site], model: Model, *, shared: str = "leave", outputs_alone: bool = False) -> Parts:
    """Return the rows and columns of components.

    Args:
        sites: The components.
        model: The model.
        shared: What is done with keys and values that also serve heads outside the selection.
        outputs_alone: Whether of heads and neurons only the columns count that they are put out through.

    Raises:
        SettingError: There is no component.
        SiteUnsupported: A component has no weights of its own, or the model does not have it.
    """
    wanted = tuple(sites)
    if not wanted:
        raise SettingError(
            "no component was named to tune", facts=[("known", KNOWN)], fix='tune(experiment, ["z.4.4"], data)'
        )
    if shared not in SHARED:
        raise SettingError(f"shared={shared!r} is none", facts=[("known", " ".join(SHARED))], fix='shared="leave"')
    units = list(dict.fromkeys(unit for site in wanted for unit in _units(site, model)))
    rows: dict[str, set[int]] = {}
    columns: dict[str, set[int]] = {}
    notes: list[str] = []
    heads: dict[Site, list[int]] = {}
    for site in units:
        if site.name in _ALONE:
            _put(rows, site, model, "output")
            continue
        _put(columns, site, model, "input")
        if outputs_alone:
            continue
        for name in _ROWS_OF[site.name]:
            if name in _shape(model, site).refused:
                if name != "mlp_gate":
                    notes.append(f"{name} of {site} has no rows of its own: {_shape(model, site).refused[name]}")
            elif name in ("k", "v"):
                group = _serving(site, model)
                heads.setdefault(replace(site, name=name, unit=group), []).append(site.unit or 0)
            else:
                _put(rows, replace(site, name=name), model, "output")
    for site, served in heads.items():
        every = _served(site, model)
        others = sorted(set(every) - set(served))
        if others and shared == "leave":
            listed = joined([str(head) for head in others])
            notes.append(f"{site} is left as it is: it serves {'heads' if len(others) > 1 else 'head'} {listed} too")
        else:
            _put(rows, site, model, "output")
    biases = [path for site in wanted if site.name in _WHOLE for path in _biased(site, model)]
    once = (tuple(dict.fromkeys(biases)), tuple(dict.fromkeys(notes)))
    return Parts(wanted, _sorted(rows), _sorted(columns), *once)


def _sorted(held: Mapping[str, set[int]]) -> dict[str, Places]:
    return {path: np.array(sorted(at), dtype=np.int64) for path, at in held.items()}


def require_plain(parts: Parts, model: Model, way: str) -> None:
    """Make sure that the weights of parts can be changed.

    Raises:
        ModelUnsupported: One is quantised, or its module is of a kind of its own.
    """
    for path in parts.modules:
        reason = why_fixed(model.module.get_submodule(path))
        if reason is not None:
            raise ModelUnsupported(
                f"way='{way}' cannot change the weights of '{path}' of '{model.name}'",
                facts=[("reason", f"it {reason}")],
                fix='open the model in float32 or bfloat16, or tune(…, way="offset"), which changes no weight',
            )


def why_fixed(module: nn.Module) -> str | None:
    """Say why the weight of a projection cannot be changed, or None where it is multiplied as it stands."""
    reason = why_not_plain(module)
    if reason is not None or plain_rows(module) is not None:
        return reason
    # A kind of its own that says it is a linear map is tried.
    weight, bias = projection_rows(module).detach(), getattr(module, "bias", None)
    x = torch.linspace(-1, 1, weight.shape[0], device=weight.device, dtype=weight.dtype)[None]
    with torch.no_grad():
        found, wanted = module(x), x @ weight + (0 if bias is None else bias)
    is_same = torch.is_tensor(found) and torch.allclose(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
    return None if is_same else f"is {type(module).__name__}, which does not return the plain product with its weight"


def _members(asked: Any, model: Model) -> Sequence[Node | Wire]:
    if isinstance(asked, list | tuple) and not asked:
        return []
    if isinstance(asked, list | tuple) and all(isinstance(one, Site) for one in asked):
        return [Node(site) for site in asked]
    return members_of(asked, model)


def _require_model(asked: Any, model: Model) -> None:
    """Make sure that components that know the weights they were found in were found in these."""
    records = (getattr(asked, name, None) for name in ("spec", "record", "provenance"))
    record: Any = next((held for held in records if isinstance(held, Mapping)), {}).get("model")
    own = record.get("hash") if isinstance(record, Mapping) else None
    if own is not None and own.partition("+")[0] != model.content_hash:
        raise ModelUnsupported(
            f"these components are of another model than '{model.name}'",
            facts=[
                ("found in", f"'{record['name']}', weights {own[:12]}"),
                ("given", f"'{model.name}', weights {model.content_hash[:12]}"),
            ],
            fix="open the checkpoint that they were found in, or name sites of this one",
        )


def _nodes(circuit: Circuit, model: Model) -> list[str]:
    graph = graph_of(model)
    into = [graph.receiver_label(int(each)).partition("<")[0] for each in np.flatnonzero(circuit.mask.any(0))]
    return list(dict.fromkeys([*circuit.nodes(), *into]))


def _site_of_node(node: str) -> Site | None:
    """Return the site of a node's output: ``a0.h3`` or ``m2``; None for the embedding and the logits."""
    if node.startswith("a") and ".h" in node:
        layer, _, head = node[1:].partition(".h")
        return Site("z", int(layer), int(head))
    return Site("mlp_out", int(node[1:])) if node[0] == "m" and node[1:].isdigit() else None


def _units(site: Site, model: Model) -> Iterator[Site]:
    """Yield the heads and neurons of a component, as ``z`` and ``mlp_post``, or rows that stand for themselves."""
    name = {"head_out": "z"}.get(site.name, site.name)
    plain = replace(site.at(None), name=name)
    if name in _WHOLE:
        first = Site(_WHOLE[name], site.layer, 0, stream=site.stream)
        _require(first, model, site)
        n_units = _shape(model, site).units["head" if first.name == "z" else "neuron"]
        yield from (replace(first, unit=unit) for unit in range(n_units))
    elif name in ("z", "mlp_post", *_ALONE):
        _require(plain, model, site)
        yield plain
    else:
        raise SiteUnsupported(
            f"'{site}' has no weights of its own to tune", facts=[("known", KNOWN)], fix="name heads, neurons or MLPs"
        )


def _require(site: Site, model: Model, asked: Site) -> None:
    reason = _shape(model, site).refused.get(site.name)
    if reason is not None:
        raise SiteUnsupported(
            f"'{model.name}' has no weights for '{asked}' that tuning knows",
            facts=[("reason", reason)],
            fix="name other components: causalpatch doctor MODEL lists what it has",
        )


def _put(held: dict[str, set[int]], site: Site, model: Model, side: str) -> None:
    tap = model.tap(site)
    if not (isinstance(tap.view, Columns) and tap.port.side == side and not tap.port.items):
        raise SiteUnsupported(
            f"'{site}' does not lie at a projection of '{model.name}'",
            facts=[("found", f"{tap.port.side} of '{tap.port.path}', {type(tap.view).__name__}")],
            fix="name other components",
        )
    held.setdefault(tap.port.path, set()).update(range(tap.view.start, tap.view.start + tap.view.width))


def _shape(model: Model, site: Site) -> Any:
    return model.shape.parts[site.stream or "decoder"] if model.streams else model.shape


def _group(site: Site, model: Model) -> int:
    units = _shape(model, site).units
    return int(units["head"] // units["kv_head"])


def _serving(site: Site, model: Model) -> int:
    return (site.unit or 0) // _group(site, model)


def _served(site: Site, model: Model) -> range:
    size, unit = _group(site, model), site.unit or 0
    return range(unit * size, (unit + 1) * size)


def _biased(site: Site, model: Model) -> list[str]:
    path = model.tap(Site(_WHOLE[site.name], site.layer, 0, stream=site.stream)).port.path
    return [path] if getattr(model.module.get_submodule(path), "bias", None) is not None else []


def spread(n_weights: int, model: Model, seed: int) -> Parts:
    """Return as many weights as are asked for, as rows drawn over all projections of all layers, in equal shares.

    Args:
        n_weights: How many.
        model: The model.
        seed: Seed of the draw.
    """
    everything = parts_of([Site(name, layer) for layer in range(model.shape.n_layers) for name in _WHOLE], model)
    share = n_weights / max(1, everything.n_weights(model.module))
    return _thinned(everything, model, share, seed)


def _thinned(parts: Parts, model: Model, share: float, seed: int) -> Parts:
    """Return a share of the rows and columns, at least one of each projection."""
    draw = np.random.default_rng(seed)

    def some(places: Places) -> Places:
        n = max(1, round(share * len(places)))
        return np.sort(draw.choice(places, n, replace=False))

    rows = {path: some(places) for path, places in parts.rows.items()}
    columns = {path: some(places) for path, places in parts.columns.items()}
    made = Parts(parts.sites, rows, columns)
    n_units = len(parts.modules)
    return replace(made, notes=(f"{share:.2%} of the rows and columns of {counted(n_units, 'projection')}",))
