"""The layers of an unmodified model: looked at in one run, left out of others.

Where nothing is patched before some layer, the layers before it would only compute once more what the base run has.
``entering`` lets the model's own forward run without them: their forwards are replaced by one that hands the stream
through, and the input of the first layer that is run is replaced by what the base run had there. Masks, position
tables, embeddings and heads remain the model's own affair.

That is right only if the stream is all that a layer leaves to the next one. ``look_at`` watches a run and refuses
models that change the stream between layers, share something mutable among them, or return more than the stream.
One thing more may be handed on: what the first layer makes and the others pass on as they got it, as T5 does with the
bias of its scores. Then the first layer is always run, and those that are left out pass on what they get.

Layers of an encoder stand before those of its decoder. A run that begins in the decoder is given what the encoder
returned in the base run, and the encoder is left out as a whole.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported, SiteUnsupported
from causalpatch.engine.bypass import bypassed, in_this_thread
from causalpatch.engine.capture import Captured, capture
from causalpatch.engine.hooks import quiet
from causalpatch.engine.ports import pick_input, pick_output, put_input
from causalpatch.models import Model, Port
from causalpatch.pairs import Batch
from causalpatch.sites import ModelShape, ModuleRef, Site

BEHIND = ("final_norm", "logits")  # behind all layers of a stream
_PLAIN = (bool, int, float, str, bytes, Enum, torch.dtype, torch.device, torch.Size)


def streams_into_layers(model: Model) -> list[Site]:
    """Return the stream into each layer, in the order in which they run: an encoder's before its decoder's."""
    parts: list[tuple[str | None, ModelShape]] = [*model.shape.halves.items()] or [(None, model.shape)]
    return [Site("resid_pre", layer, stream=name) for name, part in parts for layer in range(part.n_layers)]


class Layers:
    """The layers of a model, and how each returns the stream.

    Args:
        model: The model; its layers are known by name.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sites = streams_into_layers(model)
        self.ports = [model.tap(site).port for site in self.sites]
        self.modules = [model.module.get_submodule(port.path) for port in self.ports]
        # How many items stand behind the stream in the tuple that a layer returns; None where it returns the stream.
        self.extras: dict[int, int | None] = {}
        # Which of these items the next layer is given, and under which of its arguments.
        self.handed: dict[int, dict[int, int | str]] = {}
        parts = model.shape.halves
        self.n_before = parts["encoder"].n_layers if parts else 0
        self.encoder_output = _encoder_output(model)

    def __len__(self) -> int:
        return len(self.ports)

    def of(self, site: Site) -> int | None:
        """Return the number of a named site's layer among all; None for what is outside of all layers."""
        if site.stream == "vision":  # beside a language model, whose layers these are
            return None
        first = 0 if site.stream == "encoder" else self.n_before
        if site.name in BEHIND:
            return (self.n_before or len(self)) - 1 if site.stream == "encoder" else len(self) - 1
        return None if site.layer is None else first + site.layer

    def is_last(self, layer: int) -> bool:
        """Tell whether no other layer comes behind a layer in its stream."""
        return layer + 1 in (self.n_before, len(self))

    def first_of(self, layer: int) -> int:
        """Return the first layer of a layer's stream."""
        return 0 if layer < self.n_before else self.n_before

    def kept_for(self, entry: int) -> list[Site]:
        """Return what has to be known of the base run for runs that begin at a layer."""
        if entry == self.first_of(entry):
            return [self.encoder_output] if entry and self.encoder_output else []
        before = [self.encoder_output] if entry > self.n_before and self.encoder_output else []
        return [*before, self.sites[entry]]

    def holding(self, path: str) -> int | None:
        """Return the layer in which a module stands; None for what is outside of all layers."""
        for layer, port in enumerate(self.ports):
            if path == port.path or path.startswith(f"{port.path}."):
                return layer
        return None


def look_at(layers: Layers, batch: Batch, sites: Collection[Site]) -> Captured:
    """Run a batch as it is, keep what sites need, and make sure that layers can be left out of such a run.

    Args:
        layers: The layers; how they return the stream is noted there.
        batch: Prompts.
        sites: The sites to keep.

    Raises:
        ModelUnsupported: Layers leave more to the next ones than the stream.
    """
    watch = _Watch(layers, batch)
    with quiet(layers.model), ExitStack() as hooks:
        for layer, module in enumerate(layers.modules):
            # The stream between two layers is what comes behind a reader's own hooks on the one and before those on
            # the other; how a layer's forward returns it is seen before any hook.
            on_input, on_result, on_output = (
                in_this_thread(partial(see, layer)) for see in (watch.on_input, watch.on_result, watch.on_output)
            )
            before = module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=True)
            own = module.register_forward_hook(on_result, prepend=True, with_kwargs=True)
            after = module.register_forward_hook(on_output)
            for handle in (before, own, after):
                hooks.callback(handle.remove)
        captured = capture(layers.model, batch, sites)
    if watch.n_run != len(layers):
        refuse_layers(layers.model, "it did not run", watch.n_run)
    return captured


@contextmanager
def entering(layers: Layers, entry: int, stream: Float[Tensor, "row position width"]) -> Iterator[None]:
    """Within the context, one run of the model begins at a layer.

    Args:
        layers: The layers; the model is held quiet.
        entry: The first layer that is run, not the first of its stream.
        stream: Its input. Hooks registered within the context see and may change it.

    Raises:
        ModelUnsupported: The layers did not run one after the other.
    """
    calls: list[int] = []
    first = layers.first_of(entry)
    with ExitStack() as undo:
        for layer in range(first, entry):
            module = layers.modules[layer]
            is_run = layer == first and bool(layers.handed.get(layer + 1))
            makes = partial(_run_first, calls, layer, module.forward) if is_run else None
            undo.enter_context(bypassed(module, makes or partial(_hand_through, calls, layers, layer)))
        hook = in_this_thread(partial(_on_entry, calls, entry, layers.ports[entry], stream))
        undo.callback(layers.modules[entry].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
    if calls != list(range(first, entry + 1)):
        refuse_layers(layers.model, "layers do not run one after the other, each once")


def refuse_layers(model: Model, problem: str, layer: int | None = None) -> NoReturn:
    """Raise the error for a model from which no layers can be left out.

    Raises:
        ModelUnsupported: Always.
    """
    where = [] if layer is None else [("layer", layer)]
    raise ModelUnsupported(
        f"layers of '{model.name}' cannot be left out of a run",
        facts=[("problem", problem), *where],
        fix='run whole models: engine="rows"',
    )


@dataclass
class _Watch:
    """What is seen of the layers in one run."""

    layers: Layers
    batch: Batch
    n_run: int = 0
    stream: Tensor | None = None
    items: tuple[Any, ...] = ()

    def on_input(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer != self.n_run:
            refuse_layers(self.layers.model, "layers do not run one after the other, each once", layer)
        self.n_run += 1
        if layer == self.layers.first_of(layer):
            self.stream, self.items = None, ()
        self._note_handed(layer, _named(args, kwargs))
        shape = tuple(self.batch.of(self.layers.sites[layer].stream).ids.shape)
        try:
            stream = pick_input(self.layers.ports[layer], args, kwargs)
        except SiteUnsupported:
            refuse_layers(self.layers.model, "its input is no tensor", layer)
        if tuple(stream.shape[:2]) != shape:
            refuse_layers(self.layers.model, f"its input has shape {tuple(stream.shape)} for {shape} tokens", layer)
        for name, held in (*enumerate(args), *kwargs.items()):
            kind = _mutable_in(held)
            if kind is not None:
                refuse_layers(
                    self.layers.model, f"it is given a {kind} ({name}), which layers can change and share", layer
                )
        if self.stream is not None and not _are_equal(self.stream, stream):
            refuse_layers(self.layers.model, "its input is not what the layer before it returned", layer)

    def _note_handed(self, layer: int, given: Mapping[int | str, Any]) -> None:
        """Note which items behind the stream the layer before gave to this one."""
        found: dict[int, int | str] = {}
        for item, held in enumerate(self.items):
            names = [name for name, each in given.items() if each is held and isinstance(held, Tensor)]
            found |= {item: names[0]} if names else {}
        self.layers.handed[layer] = found

    def on_result(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given = _named(args, kwargs)
        for item, name in self.layers.handed[layer].items():
            if not (type(output) is tuple and len(output) > item + 1 and output[item + 1] is given[name]):
                refuse_layers(self.layers.model, f"it changes something else that it is given ({name})", layer)
        self.items = output[1:] if type(output) is tuple else ()
        if isinstance(output, Tensor):
            self.layers.extras[layer] = None
        # Weights of attention may come behind the stream, for the caller alone; a layer that is left out gives none.
        elif type(output) is tuple and output and all(item is None or isinstance(item, Tensor) for item in output[1:]):
            self.layers.extras[layer] = len(output) - 1
        else:
            refuse_layers(self.layers.model, f"it returns more than the stream: a {type(output).__name__}", layer)

    def on_output(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.stream = pick_output(Port(self.layers.ports[layer].path, "output"), output).clone()


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """Return a call's arguments by place or name."""
    found: dict[int | str, Any] = dict(enumerate(args))
    found.update(kwargs)
    return found


def _mutable_in(held: Any) -> str | None:
    """Return the type of something among a layer's arguments that layers may use to pass each other more."""
    if held is None or isinstance(held, (Tensor, *_PLAIN)):
        return None
    if type(held) is tuple:
        return next((kind for kind in map(_mutable_in, held) if kind is not None), None)
    return type(held).__name__


def _are_equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.isclose(a.to(b.device), b, rtol=0, atol=0, equal_nan=True).all())


def _hand_through(calls: list[int], layers: Layers, layer: int, *args: Any, **kwargs: Any) -> Any:
    calls.append(layer)
    stream, extras = pick_input(layers.ports[layer], args, kwargs), layers.extras[layer]
    if extras is None:
        return stream
    given, handed = _named(args, kwargs), layers.handed[layer]
    return (stream, *(given[handed[item]] if item in handed else None for item in range(extras)))


def _run_first(calls: list[int], layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    calls.append(layer)
    return forward(*args, **kwargs)


def _encoder_output(model: Model) -> Site | None:
    """Return what an encoder hands to its decoder; None where there is no encoder."""
    if model.streams is None:
        return None
    path = model.streams.encoder.place.base
    return Site("module", module=ModuleRef(path, "output", ("last_hidden_state",), ("position", "width")))


def _on_entry(
    calls: list[int],
    entry: int,
    port: Port,
    stream: Tensor,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    calls.append(entry)
    return put_input(port, args, kwargs, stream)
