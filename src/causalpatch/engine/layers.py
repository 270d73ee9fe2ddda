"""The layers of an unmodified model: looked at in one run, left out of others.

Where nothing is patched before some layer, the layers before it would only compute once more what the base run has.
``entering`` lets the model's own forward run without them: their forwards are replaced by one that hands the stream
through, and the input of the first layer that is run is replaced by what the base run had there. Masks, position
tables, embeddings and heads remain the model's own affair.

That is right only if the stream is all that a layer leaves to the next one. ``look_at`` watches a run and refuses
models that change the stream between layers, share something mutable among them, or return more than the stream.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported, SiteUnsupported
from causalpatch.engine.capture import Captured, capture
from causalpatch.engine.hooks import in_this_thread, quiet, standing_in
from causalpatch.engine.ports import pick_input, pick_output, put_input
from causalpatch.models import Model, Port
from causalpatch.pairs import Batch
from causalpatch.sites import Site

_PLAIN = (bool, int, float, str, bytes, Enum, torch.dtype, torch.device, torch.Size)


class Layers:
    """The layers of a model, and how each returns the stream.

    Args:
        model: The model; its layers are known by name.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sites = [Site("resid_pre", layer) for layer in range(model.shape.n_layers)]
        self.ports = [model.tap(site).port for site in self.sites]
        self.modules = [model.module.get_submodule(port.path) for port in self.ports]
        # How many items stand behind the stream in the tuple that a layer returns; None where it returns the stream.
        self.extras: dict[int, int | None] = {}

    def __len__(self) -> int:
        return len(self.ports)

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
    watch = _Watch(layers, tuple(batch.ids.shape))
    with quiet(layers.model), ExitStack() as hooks:
        for layer, module in enumerate(layers.modules):
            # The stream between two layers is what comes behind a reader's own hooks on the one and before those on
            # the other; how a layer's forward returns it is seen before any hook.
            on_input, on_result, on_output = (
                in_this_thread(partial(see, layer)) for see in (watch.on_input, watch.on_result, watch.on_output)
            )
            before = module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=True)
            own = module.register_forward_hook(on_result, prepend=True)
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
        entry: The first layer that is run, 1 or more.
        stream: Its input. Hooks registered within the context see and may change it.

    Raises:
        ModelUnsupported: The layers did not run one after the other.
    """
    calls: list[int] = []
    with ExitStack() as undo:
        for layer in range(entry):
            forward = partial(_hand_through, calls, layer, layers.ports[layer], layers.extras[layer])
            undo.callback(_replace_forward(layers.modules[layer], forward))
        hook = in_this_thread(partial(_on_entry, calls, entry, layers.ports[entry], stream))
        undo.callback(layers.modules[entry].register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
    if calls != list(range(entry + 1)):
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
    shape: tuple[int, ...]
    n_run: int = 0
    stream: Tensor | None = None

    def on_input(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer != self.n_run:
            refuse_layers(self.layers.model, "layers do not run one after the other, each once", layer)
        self.n_run += 1
        try:
            stream = pick_input(self.layers.ports[layer], args, kwargs)
        except SiteUnsupported:
            refuse_layers(self.layers.model, "its input is no tensor", layer)
        if tuple(stream.shape[:2]) != self.shape:
            refuse_layers(
                self.layers.model, f"its input has shape {tuple(stream.shape)} for {self.shape} tokens", layer
            )
        for name, held in (*enumerate(args), *kwargs.items()):
            kind = _mutable_in(held)
            if kind is not None:
                refuse_layers(
                    self.layers.model, f"it is given a {kind} ({name}), which layers can change and share", layer
                )
        if self.stream is not None and not _are_equal(self.stream, stream):
            refuse_layers(self.layers.model, "its input is not what the layer before it returned", layer)

    def on_result(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self.layers.extras[layer] = None
        # Weights of attention may come behind the stream, for the caller alone; a layer that is left out gives none.
        elif type(output) is tuple and output and all(item is None or isinstance(item, Tensor) for item in output[1:]):
            self.layers.extras[layer] = len(output) - 1
        else:
            refuse_layers(self.layers.model, f"it returns more than the stream: a {type(output).__name__}", layer)

    def on_output(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.stream = pick_output(Port(self.layers.ports[layer].path, "output"), output).clone()


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


def _hand_through(calls: list[int], layer: int, port: Port, extras: int | None, *args: Any, **kwargs: Any) -> Any:
    calls.append(layer)
    stream = pick_input(port, args, kwargs)
    return stream if extras is None else (stream, *(None,) * extras)


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


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace a module's forward; return what puts the old one back, its class's or one of its own."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = standing_in(module, forward)

    def undo() -> None:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own

    return undo
