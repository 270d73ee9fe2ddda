"""A batch of prompts captured one layer at a time, so that the next layer's weights need be there only then.

The stack runs a batch through the whole model at once (``Stack.run``). Where weights are fetched layer by layer, many
batches are to meet each layer together:

1. *Front*: the model's own forward with its layers passed by. It gives the stream into the first layer and the
   arguments of every layer's call, which hold no more than masks, position tables and settings.
2. *Layers*: each layer's module is called with the stream and its arguments; the same is kept as in a whole run.
3. *Behind*: where something behind the layers is wanted, the forward once more, the stream put in at the last layer.

Assumes that the stream is all that layers leave to each other: ``Stack`` refuses models in which the front shows that
it is not, and the check of the engine compares with full forwards.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress

import numpy as np
from torch import Tensor, nn

from causalpatch.base.errors import EnoughError
from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.head import passing_layers
from causalpatch.engine.hooks import hooked, kept_if_once, quiet
from causalpatch.engine.shelf import OnShelf, Shelf, Where
from causalpatch.engine.stack import Capture, Stack, StackRun, layer_of
from causalpatch.models import Port
from causalpatch.pairs import Batch


class LayeredCapture:
    """One batch on its way through the layers.

    Args:
        stack: The layers.
        batch: The prompts, padded on the right.
        keep: Further ports whose tensors are kept.
        projected: Outputs of modules that are kept too, of those that run once.
        where: Where tensors are kept.
    """

    def __init__(
        self, stack: Stack, batch: Batch, keep: Sequence[Port], projected: Sequence[Port], where: Where
    ) -> None:
        self.stack, self.batch = stack, batch
        self.shelf = Shelf(stack.model.device, where)
        self.run = StackRun(batch, self.shelf)
        self.state = Capture(stack, self.run, {port for port in keep if port.is_inside})
        self._keep = [port for port in keep if not port.is_inside]
        self._projected = set(projected) - set(keep)
        self._into = [*(Port(block.path, "input") for block in stack.blocks), stack.final_norm]
        self._streams: dict[Port, Tensor] = {}
        self._kept: dict[Port, Tensor] = {}
        self._returns_tuple: dict[str, bool] = {}

    def begin(self) -> None:
        """Make the stream into the first layer, and the arguments of each layer's call.

        The first layer's weights are wanted, for a look at what it returns.

        Raises:
            ModelUnsupported: The stream changes between layers.
        """
        stack, model = self.stack, self.stack.model
        returns = _returns_tuple(stack, self.batch)
        self._returns_tuple = {block.path: returns for block in stack.blocks}
        into: list[Tensor] = []

        def see_stream(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            into.append(args[0] if args else kwargs["hidden_states"])  # type: ignore[arg-type]

        with stack.running(self.state.attend), ExitStack() as hooks:
            first = stack.blocks[0].module
            hooks.callback(first.register_forward_pre_hook(in_this_thread(see_stream), with_kwargs=True).remove)
            kept = hooks.enter_context(hooked(model, keep=self._ports(None), store=self.shelf.keep))
            for block in stack.blocks:
                see_call = in_this_thread(self.state.see_call)
                hooks.callback(block.module.register_forward_pre_hook(see_call, with_kwargs=True).remove)
                see_output = in_this_thread(self.state.see_output(block.path))
                hooks.callback(block.module.register_forward_hook(see_output).remove)
            norm = model.module.get_submodule(stack.final_norm.path)
            see_end = in_this_thread(self.state.see_end(stops=True))
            hooks.callback(norm.register_forward_pre_hook(see_end, with_kwargs=True).remove)
            hooks.enter_context(passing_layers(stack, self._returns_tuple, lambda hidden: hidden))
            with suppress(EnoughError):
                model.module(**inputs_of(model, self.batch))
        self._kept |= kept
        if len(self.run.calls) != stack.n_layers or not into:
            raise stack.refusal(f"{len(self.run.calls)} of its {stack.n_layers} layers ran in a forward")
        self._streams[self._into[0]] = self.shelf.keep(into[0])

    def step(self, layer: int) -> None:
        """Run a layer, all before it having run."""
        stack, model, block = self.stack, self.stack.model, self.stack.blocks[layer]
        args, kwargs = self.run.calls[layer]
        stream = self.shelf.on_device(self._streams[self._into[layer]])
        with stack.running(self.state.attend), ExitStack() as hooks:
            kept = hooks.enter_context(hooked(model, keep=self._ports(layer), store=self.shelf.keep))
            mine = {port for port in self._projected if layer_of(model, port.path) == layer}
            more = hooks.enter_context(kept_if_once(model, mine, self.shelf.keep))
            for path in (block.path, block.attention, block.mlp):
                see = in_this_thread(self.state.see_output(path))
                hooks.callback(model.module.get_submodule(path).register_forward_hook(see).remove)
            if args:
                output = block.module(stream, *args[1:], **kwargs)
            else:
                output = block.module(**(kwargs | {"hidden_states": stream}))
        self._kept |= kept | more
        self.state.output = None  # which would stay in memory until the next layer
        if isinstance(output, tuple) != self._returns_tuple[block.path]:
            raise stack.refusal(f"layer {layer} returns the stream in another way than layer 0")
        self._streams[self._into[layer + 1]] = self.shelf.keep(output[0] if isinstance(output, tuple) else output)

    def end(self) -> StackRun:
        """Return the run, all layers having run.

        Raises:
            ModelUnsupported: The model's layers cannot be replayed one by one; the message says why.
        """
        stack, model, run = self.stack, self.stack.model, self.run
        behind = [port for port in self._keep if port in stack.behind]
        if behind:
            last = self.shelf.on_device(self._streams[stack.final_norm])
            with (
                stack.running(),
                hooked(model, keep=behind, store=self.shelf.keep) as kept,
                passing_layers(stack, self._returns_tuple, lambda hidden: last),
            ):
                model.module(**inputs_of(model, self.batch))
            self._kept |= kept
        run.inputs = OnShelf(self.shelf, {number: self._streams[port] for number, port in enumerate(self._into)})
        run.kept = OnShelf(self.shelf, self._kept | self._streams | self.state.inside)
        self.state.check()
        return run

    def _ports(self, layer: int | None) -> list[Port]:
        """Return what is kept in a layer, or in front of all, but for the streams into layers."""
        own = (port for port in self._keep if port not in self._into and port not in self.stack.behind)
        return [port for port in own if layer_of(self.stack.model, port.path) == layer]


def _returns_tuple(stack: Stack, batch: Batch) -> bool:
    """Say whether the first layer returns the stream in a tuple; it runs on one prompt."""
    found: list[bool] = []

    def see(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        found.append(isinstance(output, tuple))
        raise EnoughError

    with quiet(stack.model), ExitStack() as hooks:
        hooks.callback(stack.blocks[0].module.register_forward_hook(in_this_thread(see)).remove)
        with suppress(EnoughError):
            stack.model.module(**inputs_of(stack.model, batch.take(np.zeros(1, dtype=np.int64))))
    return bool(found) and found[0]
