"""How components of a decoder are wired: what each adds to the stream, and through what each input reads it.

The family says where q, k, v, z, what attention adds and what the MLP adds are found. What stands between these and the
stream is seen in one run of a short prompt, by which tensors are the same bit for bit:

1. From a projection back to the stream there is a *chain* of modules, each reading what the next gives: the projection
   and the norm before it, or the projection alone.
2. The MLP is read by one module that is handed the stream (its norm, or the MLP itself), and then the chain is empty;
   or, where one norm serves attention and MLP, by the MLP behind that norm.
3. What the output projection gives is what is added, or goes through one module (a post-norm) first.

The last stream must be the first one and all that is added. A model that is wired otherwise is refused here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported, SiteUnsupported
from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.engine.ports import pick_input, pick_output
from causalpatch.engine.structure import Findings
from causalpatch.models import Columns, Model, Port, Tap
from causalpatch.models.families.family import PARALLEL
from causalpatch.models.table import attention_path, join
from causalpatch.models.views import Scaled
from causalpatch.pairs import Pairs
from causalpatch.sites import Site
from causalpatch.sites.graph import KINDS, Graph

_KNOWN: "Findings[tuple[tuple[Wired, ...], Port]]" = Findings()
_NEEDED = ("resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z")


@dataclass(frozen=True, eq=False)
class Input:
    """What a receiver reads the stream through.

    Args:
        port: Where what the chain makes of the stream stands.
        chain: Modules from the port back to the stream; none where the stream itself stands at the port.
        starts: First column of each unit at the port, of ``width`` columns each; None for an MLP.
        width: Columns of a unit.
    """

    port: Port
    chain: tuple[nn.Module, ...]
    starts: tuple[int, ...] | None = None
    width: int = 0


@dataclass(frozen=True, eq=False)
class Wired:
    """One layer.

    Args:
        heads: The inputs of its heads, by kind; units of keys and values are kv_heads.
        mlp: The input of its MLP.
        z: What its heads hand to the output projection.
        starts: First column of each head in ``z``.
        project: The output projection.
        after: The module that its output goes through before it is added, or None.
        times: What that is multiplied by.
        attends: Path of the module that attends.
        mlp_out: What its MLP adds.
        stream: The stream into it.
    """

    heads: Mapping[str, Input]
    mlp: Input
    z: Port
    starts: tuple[int, ...]
    project: nn.Module
    after: nn.Module | None
    times: float
    attends: str
    mlp_out: Tap
    stream: Port


@dataclass(frozen=True, eq=False)
class Wiring:
    """A model's components.

    Args:
        model: The model.
        graph: Its graph.
        layers: Its layers.
        last: The stream behind them.
    """

    model: Model
    graph: Graph
    layers: tuple[Wired, ...]
    last: Port

    @property
    def end(self) -> Input:
        """The input of the logits."""
        return Input(self.last, ())

    @property
    def n_shared(self) -> int:
        """How many heads share a key and a value."""
        return self.graph.n_heads // self.model.n_kv_heads


def graph_of(model: Model) -> Graph:
    """Return the graph of a model's components, by its family's table alone.

    Raises:
        ModelUnsupported: The family has no such components, or its stream is not the sum of what they add.
    """
    family, refused = model.family, model.shape.refused
    if family is None:
        raise _refused(model, f"its layers are not known by name: {model.family_note}")
    if model.streams is not None:
        raise _refused(model, "it has an encoder and a decoder, each with a stream of its own")
    for name in _NEEDED:
        if name in refused:
            raise _refused(model, f"it has no '{name}': {refused[name]}")
    if family.post_norms:
        raise _refused(model, "the stream goes through norms, so that it is not the sum of what components add")
    is_parallel = refused.get("resid_mid") == PARALLEL.reason
    if "resid_mid" in refused and not is_parallel:
        raise _refused(model, f"it has no 'resid_mid': {refused['resid_mid']}")
    return Graph(model.shape.n_layers, model.n_heads, is_parallel)


def wiring_of(model: Model, pairs: Pairs) -> Wiring:
    """Find how a model's components are wired; once for as long as the model is made of the same things.

    Args:
        model: The model.
        pairs: Pairs; the shortest prompt is run.

    Raises:
        ModelUnsupported: The family has no such components, or they are wired in a way that is not known.
    """
    graph = graph_of(model)
    layers, last = _KNOWN.of(model, "wiring", partial(_find, model, pairs, graph))
    return Wiring(model, graph, layers, last)


def _find(model: Model, pairs: Pairs, graph: Graph) -> tuple[tuple[Wired, ...], Port]:
    shortest = int(np.argmin(pairs.lengths("clean")))
    inputs = inputs_of(model, pairs.batch("clean", [shortest]))
    seen = _Seen(model, inputs)
    layers = tuple(_Layer(model, seen, layer, graph).find() for layer in range(graph.n_layers))
    last = model.tap(Site("resid_post", graph.n_layers - 1)).port
    _check_sum(model, seen, layers, last)
    return layers, last


class _Seen:
    """What went into every module of one run, and what came out.

    Args:
        model: The model.
        inputs: Arguments of its forward.
    """

    def __init__(self, model: Model, inputs: Mapping[str, Any]) -> None:
        self.of: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.model = model
        with ExitStack() as hooks:
            for path, module in model.module.named_modules():
                see = in_this_thread(partial(self._see, path))
                hooks.callback(module.register_forward_hook(see, with_kwargs=True).remove)
            run_with_hooks(model, inputs)

    def at(self, port: Port) -> Tensor:
        """Return the tensor at a port.

        Raises:
            ModelUnsupported: There was none.
        """
        found = self.of.get(port.path, (None, None))[port.side == "output"]
        if found is None:
            raise _refused(self.model, f"no tensor is met at the {port.side} of '{port.path}'")
        return found

    def value(self, tap: Tap) -> Tensor:
        """Return the value of a site that has no unit."""
        return tap.view.read(self.at(tap.port), tuple(self.at(port) for port in tap.companions))

    def _see(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.of.setdefault(
            path, (_met(pick_input, path, "input", args, kwargs), _met(pick_output, path, "output", output))
        )


def _met(pick: Callable[..., Tensor], path: str, side: str, *held: Any) -> Tensor | None:
    try:
        return pick(Port(path, "input" if side == "input" else "output"), *held).detach().clone()
    except SiteUnsupported:
        return None


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer whose wiring is looked for."""

    model: Model
    seen: _Seen
    layer: int
    graph: Graph

    def find(self) -> Wired:
        """Return how the layer is wired."""
        model, layer = self.model, self.layer
        stream = model.tap(Site("resid_pre", layer)).port
        z, starts = self._units("z", model.n_heads)
        project = model.module.get_submodule(z.path)
        added, given = model.tap(Site("attn_out", layer)), self.seen.at(Port(z.path, "output"))
        family = model.family
        attends = "" if family is None else attention_path(family)
        return Wired(
            {kind: self._head_input(kind) for kind in KINDS},
            self._mlp_input(stream),
            z,
            starts,
            project,
            self._after(added, given),
            added.view.factor if isinstance(added.view, Scaled) else 1.0,
            join(self._path, attends),
            model.tap(Site("mlp_out", layer)),
            stream,
        )

    @property
    def _path(self) -> str:
        return self.model.tap(Site("resid_post", self.layer)).port.path

    def _units(self, name: str, n_units: int) -> tuple[Port, tuple[int, ...]]:
        """Return the port of units and the first column of each."""
        taps = [self.model.tap(Site(name, self.layer, unit)) for unit in range(n_units)]
        views = [tap.view for tap in taps if isinstance(tap.view, Columns)]
        if len(views) < n_units or taps[0].port.like is not None:
            raise _refused(self.model, f"the units of '{name}' do not lie side by side")
        return taps[0].port, tuple(view.start for view in views)

    def _head_input(self, kind: str) -> Input:
        n_units = self.model.n_heads if kind == "q" else self.model.n_kv_heads
        port, starts = self._units(kind, n_units)
        chain = self._chain(port.path, self.seen.at(self.model.tap(Site("resid_pre", self.layer)).port))
        width = self.model.sizes(kind)["head_width"]
        return Input(port, chain, starts, width)

    def _chain(self, path: str, stream: Tensor) -> tuple[nn.Module, ...]:
        """Return the modules from one back to the stream.

        Raises:
            ModelUnsupported: There is something else in between.
        """
        found = [path]
        reached = self.seen.at(Port(path, "input"))
        while not _same(reached, stream):
            before = [name for name, (given, made) in self._inside() if _same(made, reached) and given is not None]
            outermost = [name for name in before if name not in found]
            if not outermost:
                raise _refused(
                    self.model, f"between the stream into layer {self.layer} and '{path}' stands more than modules"
                )
            found.append(outermost[0])
            reached = self.seen.at(Port(outermost[0], "input"))
        return tuple(map(self.model.module.get_submodule, found))

    def _inside(self) -> Iterator[tuple[str, tuple[Tensor | None, Tensor | None]]]:
        start = f"{self._path}."
        return ((path, both) for path, both in self.seen.of.items() if path.startswith(start))

    def _mlp_input(self, stream: Port) -> Input:
        """Return what the MLP reads the stream through."""
        heads = [self.model.tap(Site(kind, self.layer, 0)).port.path for kind in KINDS]
        if self.graph.is_parallel:
            read = self.seen.at(stream)
        else:
            read = self.seen.value(self.model.tap(Site("resid_mid", self.layer)))
        readers = self._readers(read, heads)
        if len(readers) == 1:
            return Input(self._read_at(readers[0], stream), ())
        if not readers and self.graph.is_parallel:
            norm = self._chain(heads[0], read)[1:]
            behind = self._readers(self.seen.at(Port(heads[0], "input")), heads)
            if norm and len(behind) == 1:
                return Input(self._read_at(behind[0], stream), norm)
        raise _refused(self.model, f"the MLP of layer {self.layer} is read by {len(readers)} modules")

    def _read_at(self, path: str, stream: Port) -> Port:
        """Return the input of a module, which may be handed tokens without their rows."""
        port = Port(path, "input")
        return port if self.seen.at(port).ndim == self.seen.at(stream).ndim else Port(path, "input", like=stream)

    def _readers(self, read: Tensor, heads: Sequence[str]) -> list[str]:
        """Return the outermost modules that are handed a tensor and do not lead to the heads' projections."""
        before: set[str] = set()
        if self.graph.is_parallel:  # else the heads have read their own stream before
            before = {name for name, (_, made) in self._inside() for path in heads if _same(made, self._given(path))}
        attends = tuple(f"{head.rpartition('.')[0]}." for head in heads)
        found: list[str] = []
        for path, (given, _) in sorted(self._inside()):
            is_heads = path in before or f"{path}.".startswith(attends) or any(h.startswith(f"{path}.") for h in heads)
            if _same(given, read) and not is_heads and not any(path.startswith(f"{outer}.") for outer in found):
                found.append(path)
        # A norm that does nothing hands the stream on: then its reader is who is meant.
        doing = [path for path in found if not _same(*self.seen.of[path])]
        return doing or found

    def _given(self, path: str) -> Tensor | None:
        return self.seen.of.get(path, (None, None))[0]

    def _after(self, added: Tap, given: Tensor) -> nn.Module | None:
        """Return the module that the output projection's output goes through."""
        if _same(self.seen.at(added.port), given):
            return None
        if _same(self._given(added.port.path), given):
            return self.model.module.get_submodule(added.port.path)
        raise _refused(self.model, f"what attention adds in layer {self.layer} is not what its output projection gives")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Say whether two tensors are the same bit for bit, however their tokens lie."""
    if one is None or other is None or one.shape[-1:] != other.shape[-1:] or one.numel() != other.numel():
        return False
    return torch.equal(one.reshape(-1), other.reshape(-1))


def _check_sum(model: Model, seen: _Seen, layers: Sequence[Wired], last: Port) -> None:
    """Make sure that the stream is the sum of what is added to it."""
    total = seen.at(layers[0].stream).double()
    for layer, wired in enumerate(layers):
        total = total + seen.value(model.tap(Site("attn_out", layer))).double().reshape(total.shape)
        total = total + seen.value(wired.mlp_out).double().reshape(total.shape)
    end = seen.at(last).double()
    tolerance = 64 * torch.finfo(model.dtype).eps * max(1.0, float(total.abs().amax()))
    if not bool(((total - end).abs() <= tolerance).all()):
        raise _refused(model, "its stream is not the sum of what its components add")


def _refused(model: Model, why: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"'{model.name}' has no graph of edges",
        facts=[("why", why), ("needed", "heads and MLPs that read a stream and add to it")],
        fix="take scores of nodes: attribute(experiment, 'resid_pre')",
    )
