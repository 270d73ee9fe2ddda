"""The stack of layers of a model, run once whole and then again on packed rows, by the unmodified layer modules.

1. *Capture*: one forward of a batch of prompts, padded on the right, up to the final norm. Kept are each layer's input,
   the arguments of its call, keys and values as attention sees them, the mask, and what the patches need.
2. *Replay*: a layer's module is called on rows, tokens of many runs side by side as ``[1, row, width]``. What the call
   holds per token is gathered by each row's prompt and position; the mask is left out, attention looks it up itself.

Every tensor of a layer's call is per token, a single number or the mask. Anything else is refused, and so is a model in
which a layer's output is not the next layer's input, or in which a token sees later ones: what happens there would be
lost.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from causalpatch.base.errors import EnoughError, ModelUnsupported
from causalpatch.engine.attention import attend_openly, unknown_arguments
from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.delta import DeltaLinears, recording
from causalpatch.engine.few_bits import FewBits
from causalpatch.engine.fused import fused
from causalpatch.engine.hooks import hooked, kept_if_once, quiet
from causalpatch.engine.ports import pick_input
from causalpatch.engine.rows import KeysValues, attend_whole
from causalpatch.engine.segments import DOWN, PROJECTION, UP
from causalpatch.engine.shelf import OnShelf, Shelf, Where
from causalpatch.models import Model, Port
from causalpatch.models.attention import Attend, attending
from causalpatch.models.taps import Side
from causalpatch.pairs import Batch
from causalpatch.sites import Site

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """The parts of a layer that replay needs.

    Args:
        path: The layer.
        module: The layer.
        z: Port of what attention hands to its output projection.
        mlp_post: Port of what the MLP hands to its down projection.
        up: Ports of what the MLP's activation function and product are given.
        attention: Path of the attention module.
        mlp: Path of the MLP module; the layer's own where its projections stand in the layer itself.
    """

    path: str
    module: nn.Module
    z: Port
    mlp_post: Port
    up: tuple[Port, ...]
    attention: str
    mlp: str


@dataclass
class StackRun:
    """A batch of prompts, run once.

    Args:
        batch: The prompts, padded on the right.
        shelf: Where its tensors are kept.
        inputs: Each layer's input by its number, then the final norm's, ``[prompt, position, width]``.
        calls: Arguments of each layer's call.
        attention: What attention saw in each layer, as it is kept; ``seen`` hands it out.
        visible: For each layer, which keys each token sees, ``(prompt or 1, query_position, key_position)``.
        kept: Tensors at further ports.
        returns_tuple: Whether the layer, attention or MLP at a path returns a tuple.
        deltas: What is known of each layer's linear calls, where they are replayed in few bits.
    """

    batch: Batch
    shelf: Shelf
    inputs: Mapping[int, Tensor] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    attention: list[KeysValues] = field(default_factory=list)
    visible: list[np.ndarray] = field(default_factory=list)
    kept: Mapping[Port, Tensor] = field(default_factory=dict)
    returns_tuple: dict[str, bool] = field(default_factory=dict)
    deltas: Sequence[DeltaLinears] = ()

    def seen(self, layer: int) -> KeysValues:
        """Return what attention saw in a layer, on the model's device."""
        seen = self.attention[layer]
        return replace(seen, keys=self.shelf.on_device(seen.keys), values=self.shelf.on_device(seen.values))

    def is_causal(self, layer: int) -> bool:
        """Say whether each real token sees all tokens up to itself and no more."""
        visible, real = self.visible[layer], self.batch.mask
        is_so = (visible == np.tri(visible.shape[-1], dtype=bool)) | ~(real[:, :, None] & real[:, None, :])
        return bool(is_so.all())

    def replaying(self, layer: int, place: "Place", *, is_partial: bool) -> AbstractContextManager[None]:
        """Replay a layer's linear calls on rows by differences, if that was asked for."""
        if not self.deltas:
            return nullcontext()
        index = place.slot * self.batch.ids.shape[1] + place.position
        return self.deltas[layer].replay(index, is_partial=is_partial)


class Stack:
    """A model's layers.

    Args:
        model: A model with a family.
        few_bits: How linear maps are multiplied on rows, or None for what the layers do.

    Raises:
        ModelUnsupported: The model has no named layers.
    """

    def __init__(self, model: Model, few_bits: FewBits | None = None) -> None:
        if model.family is None or not model.shape.n_layers:
            raise ModelUnsupported(
                f"'{model.name}' has no layers that are known by name", fix='run it by full forwards: engine="rows"'
            )
        self.model = model
        self.weights = model.weights
        self.few_bits = few_bits
        self.n_layers = model.shape.n_layers
        self.blocks = [self._block(layer) for layer in range(self.n_layers)]
        self.attentions = {model.module.get_submodule(block.attention) for block in self.blocks}
        self.final_norm = Port(model.tap(Site("final_norm")).port.path, "input")
        self.is_parallel = "resid_mid" in model.shape.refused

    def _block(self, layer: int) -> Block:
        path = self.model.tap(Site("resid_pre", layer)).port.path
        z, down = (self.model.tap(Site(name, layer, 0)).port for name in ("z", "mlp_post"))
        attention, mlp = z.path.rpartition(".")[0], down.path.rpartition(".")[0]
        given = [name for name in ("mlp_pre", "mlp_gate") if self._has(name)]
        up = tuple(dict.fromkeys(self.model.tap(Site(name, layer, 0)).port for name in given))
        return Block(path, self.model.module.get_submodule(path), z, down, up, attention, mlp)

    def kept_for(self, block: Block, stage: int) -> list[Port]:
        """Return what a replay needs of the base run that enters a layer at a stage."""
        if stage == PROJECTION:
            more = [Port(block.mlp, "output")] if self.is_parallel else []
            return [block.z, Port(block.attention, "output"), *more]
        if stage == UP:
            return [*block.up, Port(block.attention, "output")]
        return [block.mlp_post, Port(block.attention, "output")] if stage == DOWN else []

    @contextmanager
    def running(self, attend: Attend | None = None) -> Iterator[None]:
        """Hold the model still, with attention computed by a function.

        Raises:
            ModelUnsupported: The model's attention cannot be switched to another kernel.
        """
        model = self.model
        # Quiet first: no other thread may run the model while its kernel is another.
        with quiet(model), attending(model.module, attend or _no_attention) as is_switched, fused(model):
            if not is_switched:
                raise self.refusal("the kernel of its attention cannot be switched")
            yield

    def run(
        self, batch: Batch, keep: Sequence[Port] = (), projected: Sequence[Port] = (), where: Where = "device"
    ) -> StackRun:
        """Run a batch up to the final norm and keep what replay needs.

        Args:
            batch: The prompts, padded on the right.
            keep: Further ports whose tensors are kept.
            projected: Outputs of modules that are kept too, of those that run once.
            where: Where tensors are kept.

        Raises:
            MemoryExhausted: They are to be kept on disk, and it is full.
            ModelUnsupported: The model's layers cannot be replayed one by one; the message says why.
        """
        deltas = self.few_bits.deltas(self.n_layers) if self.few_bits else []
        recorded = {block.module: delta for block, delta in zip(self.blocks, deltas, strict=False)}
        shelf = Shelf(self.model.device, where)
        state = Capture(self, StackRun(batch, shelf, deltas=deltas), {port for port in keep if port.is_inside})
        keep = [port for port in keep if not port.is_inside]
        ports = [*(Port(block.path, "input") for block in self.blocks), self.final_norm]
        model = self.model
        with self.running(state.attend), ExitStack() as hooks:
            kept = hooks.enter_context(hooked(model, keep=[*ports, *keep], store=shelf.keep))
            more = hooks.enter_context(kept_if_once(model, set(projected) - set(keep), shelf.keep))
            for block in self.blocks:
                see_call = in_this_thread(state.see_call)
                hooks.callback(block.module.register_forward_pre_hook(see_call, with_kwargs=True).remove)
                for path in (block.path, block.attention, block.mlp):
                    part = model.module.get_submodule(path)
                    hooks.callback(part.register_forward_hook(in_this_thread(state.see_output(path))).remove)
            norm = model.module.get_submodule(self.final_norm.path)
            see_end = in_this_thread(state.see_end(stops=not self.behind & set(keep)))
            hooks.callback(norm.register_forward_pre_hook(see_end, with_kwargs=True).remove)
            with recording(recorded, batch.ids.size), suppress(EnoughError):
                model.module(**inputs_of(model, batch))
        state.run.inputs = OnShelf(shelf, {number: kept[port] for number, port in enumerate(ports)})
        state.run.kept = OnShelf(shelf, kept | more | state.inside)
        state.check()
        return state.run

    @cached_property
    def behind(self) -> set[Port]:
        """Ports behind the last layer."""
        return {self.model.tap(Site(name)).port for name in ("final_norm", "logits") if self._has(name)}

    def _has(self, name: str) -> bool:
        return name not in self.model.shape.refused

    def refusal(self, why: str) -> ModelUnsupported:
        """Return the error that says why the model cannot be replayed."""
        return ModelUnsupported(
            f"'{self.model.name}' cannot be replayed layer by layer: {why}", fix='let causalpatch choose: engine="auto"'
        )


def layer_of(model: Model, path: str) -> int | None:
    """Return the layer of a model that a module is or stands in, or None."""
    layers = model.tap(Site("resid_pre", 0)).port.path.rpartition(".")[0]
    number = path.removeprefix(f"{layers}.").partition(".")[0]
    return int(number) if path.startswith(f"{layers}.") and number.isdigit() else None


def _no_attention(*_: Any) -> Tensor:
    raise EnoughError  # nothing but the layers attends, and these are passed by


class Capture:
    """Sees one forward go by.

    Args:
        stack: The layers.
        run: What is seen is kept there.
        wanted: Ports inside attention.
    """

    def __init__(self, stack: Stack, run: StackRun, wanted: Set[Port]) -> None:
        self.stack = stack
        self.run = run
        self.wanted = wanted
        self.inside: dict[Port, Tensor] = {}
        self.output: Tensor | None = None  # of the layer that ran last
        self.breaks: list[int] = []
        self.visible: dict[int, np.ndarray] = {}  # by mask; the run keeps all masks, so that no number is used twice

    def see_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a layer's call."""
        self._compare(args, kwargs)
        named = {name: None if name == "hidden_states" else held for name, held in kwargs.items()}
        self.run.calls.append(((None, *args[1:]) if args else (), named))

    def see_end(self, *, stops: bool) -> Callable[..., None]:
        """Return what to do where the final norm begins: go no further, unless something behind it is wanted."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._compare(args, kwargs)
            if stops:
                raise EnoughError

        return see

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note where the stream is not what the layer before has put out."""
        if self.output is not None and not torch.equal(self.output, pick_input(self.stack.final_norm, args, kwargs)):
            self.breaks.append(len(self.run.calls) - 1)
        self.output = None

    def see_output(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Return what notes how the module at a path returns its output."""
        layers = {block.path for block in self.stack.blocks}

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.run.returns_tuple[path] = isinstance(output, tuple)
            if path in layers:
                self.output = output[0] if isinstance(output, tuple) else output

        return see

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
    ) -> Tensor:
        """Compute a layer's attention, and keep what it sees."""
        if module not in self.stack.attentions:  # of a vision tower, whose run is over when the layers begin
            return attend_openly(query, key, value, mask, more, lambda _, tensor: tensor)
        unknown = unknown_arguments(more)
        if unknown:
            raise self.stack.refusal(f"its attention takes an argument that is not known: {', '.join(unknown)}")
        if mask is None or not mask.is_floating_point() or mask.shape[-2:] != (query.shape[2], key.shape[2]):
            raise self.stack.refusal("its attention has no additive mask over queries and keys")
        scaling = more.get("scaling")
        seen = KeysValues(
            key,
            value,
            mask,
            query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            more.get("softcap"),
            more.get("s_aux"),
        )
        keys, values = (self.run.shelf.keep(part, is_private=True) for part in (key, value))
        self.run.attention.append(replace(seen, keys=keys, values=values))
        if id(mask) not in self.visible:
            self.visible[id(mask)] = self._visible(mask)
        visible = self.visible[id(mask)]
        self.run.visible.append(visible)
        path = self.stack.blocks[len(self.run.attention) - 1].attention
        self._keep(path, "query", query)
        self._keep(path, "key", key)
        sees = torch.as_tensor(visible, device=query.device)[:, None].expand(len(query), -1, -1, -1)
        self._keep(path, "visible", sees)
        is_seen = {Port(path, "scores"), Port(path, "pattern")} & self.wanted
        step = partial(self._keep, path) if is_seen else None
        return attend_whole(query, seen, is_causal=self.run.is_causal(len(self.run.visible) - 1), step=step)

    def _keep(self, path: str, side: Side, tensor: Tensor) -> None:
        """Keep a tensor inside attention if it is wanted; heads come before positions."""
        port = Port(path, side)
        if port in self.wanted:
            self.inside[port] = self.run.shelf.keep(tensor.transpose(1, 2))

    def check(self) -> None:
        """Make sure that layers follow each other and see nothing but the past."""
        stack, run = self.stack, self.run
        if len(run.calls) != stack.n_layers or len(run.attention) != stack.n_layers:
            raise stack.refusal(f"{len(run.attention)} of its {stack.n_layers} layers attend by the interface")
        for layer in self.breaks:
            raise stack.refusal(f"the stream changes between layers {layer} and {layer + 1}")

    def _visible(self, mask: Tensor) -> Bool[np.ndarray, "batch query_position key_position"]:
        if mask.shape[1] != 1:
            raise self.stack.refusal("its mask differs by head")
        is_seen = mask[:, 0] > torch.finfo(mask.dtype).min / 2
        if (mask[:, 0] != 0)[is_seen].any():
            raise self.stack.refusal("its mask holds more than what is seen and what is not")
        real = torch.as_tensor(self.run.batch.mask, device=mask.device)
        future = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
        if (is_seen & future & real[:, :, None] & real[:, None, :]).any():
            raise self.stack.refusal("its tokens see later ones")
        visible: np.ndarray = is_seen.cpu().numpy()
        return visible


@dataclass(frozen=True)
class Place:
    """Prompt and position of each row of a call, on the model's device.

    Args:
        slot: The prompt.
        position: The real token.
    """

    slot: Int[Tensor, " row"]
    position: Int[Tensor, " row"]

    @classmethod
    def of(cls, slot: np.ndarray, token: np.ndarray, device: torch.device) -> "Place":
        """Move prompts and tokens to a device."""
        return cls(torch.as_tensor(slot, device=device), torch.as_tensor(token, device=device))

    def rows_of(self, tensor: Shaped[Tensor, "prompt position *axes"]) -> Shaped[Tensor, "row *axes"]:
        """Return each row's part of a tensor of whole prompts."""
        return tensor[self.slot, self.position]


def call_layer(
    stack: Stack, run: StackRun, layer: int, hidden: Float[Tensor, "row width"], place: Place, *, is_partial: bool
) -> Tensor:
    """Call a layer's own module on rows; attention is whatever ``attending`` was told.

    Args:
        stack: The layers.
        run: The captured run.
        layer: Which layer.
        hidden: The stream into the layer.
        place: Where each row belongs.
        is_partial: Some of the layer's modules are passed by.

    Returns:
        The stream out of the layer, ``[row, width]``.
    """
    args, kwargs = run.calls[layer]
    shape, mask = run.inputs[layer].shape[:2], run.attention[layer].mask
    named = {name: _for_rows(held, place, shape, mask) for name, held in kwargs.items() if name != "hidden_states"}
    module = stack.blocks[layer].module
    with run.replaying(layer, place, is_partial=is_partial):
        if args:
            output = module(hidden[None], *(_for_rows(x, place, shape, mask) for x in args[1:]), **named)
        else:
            output = module(hidden_states=hidden[None], **named)
    out: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
    return out


def _for_rows(held: Any, place: Place, shape: Sequence[int], mask: Tensor) -> Any:
    """Return an argument of a layer's call for rows instead of prompts."""
    if held is None or isinstance(held, bool | int | float | str):
        return held
    if isinstance(held, tuple):
        return tuple(_for_rows(item, place, shape, mask) for item in held)
    if isinstance(held, Tensor):
        n_prompts, n_tokens = shape
        if held.ndim == 4 and held.data_ptr() == mask.data_ptr():
            return None  # attention has it from the captured run
        if held.ndim >= 2 and held.shape[0] in (1, n_prompts) and held.shape[1] == n_tokens:
            return (held[0, place.position] if held.shape[0] == 1 else place.rows_of(held))[None]
        if held.ndim == 1 and held.shape[0] == n_tokens:
            return held[place.position]
        if held.ndim == 0:
            return held
    raise ModelUnsupported(
        f"a layer is called with a {type(held).__name__} that rows cannot share",
        fix='let causalpatch choose: engine="auto"',
    )
