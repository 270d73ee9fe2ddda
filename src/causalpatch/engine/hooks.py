"""One instrumented forward: tensors replaced and kept at ports of an unmodified model.

1. Every port that is written, kept or read along the way gets a forward hook on its module (pre-hook for inputs).
2. When the module runs, writes are applied to a private copy of the tensor, in order, and the copy goes on.
3. Kept tensors are copied after the writes, so that they are what the rest of the model saw.
4. Ports inside attention have no module's door: while the model runs, its attention is computed by the arithmetic of
   ``attention``, which hands every step to the port that stands there. A module that spells attention out by itself
   is met at its softmax.
5. After the forward, each port must have run exactly once: a patch that did not fire is an error, never a zero.

Only our own hooks are removed, also after an exception; the user's stay and run. Models are shared objects, so one
forward of ours at a time runs on each, under a lock; hooks act in the thread that set them alone.
"""

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported, PatchDidNotFire, SiteUnsupported
from causalpatch.engine.before import Before
from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.checkpoint import recompute
from causalpatch.engine.full_precision import full_precision
from causalpatch.engine.memory import is_out_of_memory
from causalpatch.engine.opened import not_met, opened
from causalpatch.engine.ports import pick_input, pick_output, put_input, put_output, with_rows
from causalpatch.engine.recorders import note_last, own_hooks
from causalpatch.engine.steps import steps_of, stepwise
from causalpatch.models import Model, Port, Tap
from causalpatch.models.taps import STEPS, Side
from causalpatch.models.views import take

_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()


@dataclass(frozen=True)
class Write:
    """New values for some elements of a site.

    Args:
        tap: Where the site is read and written.
        index: Index tensors over the leading axes of the site's tensor: rows, and columns where it has positions.
        value: The new values ``[element, *value_axes]``, or a function from the current ones to them.
        is_whole: The function takes a private copy of the whole tensor, and what it returns goes on.
    """

    tap: Tap
    index: tuple[Tensor, ...]
    value: Tensor | Callable[[Tensor], Tensor]
    is_whole: bool = False


@dataclass
class _PortState:
    """What happens at one port during one forward, and what came of it."""

    port: Port
    store: Callable[[Tensor], Tensor]
    writes: list[tuple[int, Write]] = field(default_factory=list)  # with their places in the order of all
    is_kept: bool = False
    times_run: int = 0
    tensor: Tensor | None = None


@contextmanager
def quiet(model: Model) -> Iterator[None]:
    """Hold a model in eval mode, without gradients, in full float32, alone; put everything back afterwards."""
    with _lock_of(model.module), full_precision():
        in_training = [module for module in model.module.modules() if module.training]
        try:
            for module in in_training:
                module.training = False
            with torch.no_grad():
                yield
        finally:
            for module in in_training:
                module.training = True


def users_hooks(model: Model) -> list[str]:
    """Return the modules on which someone else's forward hooks stand, in words."""
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return ["all modules"]
    with quiet(model):  # no hooks of ours, from another thread, are on the model meanwhile
        return [f"'{name}'" if name else "the model" for name, part in model.module.named_modules() if own_hooks(part)]


def run_with_hooks(
    model: Model,
    inputs: Mapping[str, Any],
    writes: Sequence[Write] = (),
    keep: Collection[Port] = (),
    *,
    opens_attention: bool = False,
    with_gradient: bool = False,
    recomputed: Sequence[nn.Module] = (),
) -> tuple[Any, dict[Port, Tensor]]:
    """Run one forward with writes applied and tensors kept.

    Args:
        model: The model.
        inputs: Arguments of its forward, by name.
        writes: What to replace; at one port they are applied in order, later ones over earlier ones.
        keep: Ports whose tensors are returned.
        opens_attention: Whether attention is computed step by step, also where no port stands inside it: base and
            patched runs must use one kernel.
        with_gradient: Whether what is written can be differentiated; see ``gradient``.
        recomputed: Layers whose insides are not kept for the backward; see ``checkpoint``.

    Returns:
        The model's output, and a private copy of the tensor at each kept port.

    Raises:
        ModelUnsupported: The model's own forward failed on these inputs.
        PatchDidNotFire: The module of a port did not run, so nothing was replaced or kept there.
        SiteUnsupported: The module ran more than once, or there is no tensor with one row per run at the port.
    """
    with (
        quiet(model),
        torch.set_grad_enabled(with_gradient),
        hooked(model, writes, keep, opens_attention=opens_attention, recomputed=recomputed) as kept,
    ):
        output = _call(model, inputs)
    return output, kept


@contextmanager
def hooked(
    model: Model,
    writes: Sequence[Write] = (),
    keep: Collection[Port] = (),
    store: Callable[[Tensor], Tensor] | None = None,
    *,
    opens_attention: bool = False,
    recomputed: Sequence[nn.Module] = (),
) -> Iterator[dict[Port, Tensor]]:
    """Apply writes and keep tensors in whatever of the model runs inside the context; each port must run once.

    Args:
        model: The model, already quiet.
        writes: What to replace.
        keep: Ports whose tensors are kept.
        store: Makes the private copy of a kept tensor; by default beside the tensor itself.
        opens_attention: Whether attention is computed step by step, also where no port stands inside it.
        recomputed: Layers whose insides are not kept for a backward; see ``checkpoint``.

    Yields:
        The kept tensors; filled when the context is left.

    Raises:
        PatchDidNotFire: The module of a port did not run.
        SiteUnsupported: The module ran more than once, or there is no tensor with one row per run at the port.
    """
    kept: dict[Port, Tensor] = {}
    companions = [port for write in writes for port in write.tap.companions]
    asked = [*companions, *keep, *(write.tap.port for write in writes)]
    likes = [port.like for port in asked if port.like is not None]
    states = {port: _PortState(port, store or torch.clone) for port in (*likes, *asked)}
    for place, write in enumerate(writes):
        states[write.tap.port].writes.append((place, write))
    for port in (*likes, *companions, *keep):
        states[port].is_kept = True
    with ExitStack() as hooks:
        _stand_up(model, states, hooks, opens_attention=opens_attention)
        recompute(recomputed, partial(_again, model, states, opens_attention=opens_attention), hooks)
        finish = _open_steps(model.module, states, hooks)
        yield kept
        finish()
    for each in states.values():
        if each.port.is_inside and each.times_run == 0:
            raise not_met(model, each.port)
        _check_ran_once(each)
    kept.update({port: each.tensor for port, each in states.items() if each.tensor is not None})


@contextmanager
def kept_if_once(
    model: Model, ports: Collection[Port], store: Callable[[Tensor], Tensor]
) -> Iterator[dict[Port, Tensor]]:
    """Keep what modules return inside the context; those that do not run once, or return no tensor, are left out.

    Args:
        model: The model, already quiet.
        ports: Outputs of modules.
        store: Makes the private copy of a kept tensor.

    Yields:
        The kept tensors; filled when the context is left.
    """
    seen: dict[Port, list[Tensor | None]] = {port: [] for port in ports}
    kept: dict[Port, Tensor] = {}

    def see(found: list[Tensor | None], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(store(output) if isinstance(output, Tensor) and not found else None)

    with ExitStack() as hooks:
        for port, found in seen.items():
            hook = in_this_thread(partial(see, found))
            hooks.callback(model.module.get_submodule(port.path).register_forward_hook(hook).remove)
        yield kept
    kept.update({port: found[0] for port, found in seen.items() if len(found) == 1 and found[0] is not None})


def _call(model: Model, inputs: Mapping[str, Any]) -> Any:
    """Run the module; where it fails on its inputs, say what they were."""
    try:
        return model.module(**inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        shapes = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in inputs.items() if isinstance(x, Tensor))
        raise ModelUnsupported(
            f"the forward of '{model.name}' failed",
            facts=[("inputs", shapes), ("error", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")],
            fix="check that the inputs have the shape and range that the model was made for",
        ) from error


def _stand_up(model: Model, states: dict[Port, _PortState], hooks: ExitStack, *, opens_attention: bool) -> None:
    _register(model.module, states, hooks)
    if opens_attention or any(port.is_inside for port in states):
        _open_attention(model, states, hooks)


@contextmanager
def _again(model: Model, states: dict[Port, _PortState], *, opens_attention: bool) -> Iterator[None]:
    """Do at the ports what was done in a forward that is over; nothing is counted or kept."""
    with ExitStack() as hooks:
        copies = {port: replace(state) for port, state in states.items()}
        _stand_up(model, copies, hooks, opens_attention=opens_attention)
        yield


def _register(root: nn.Module, states: dict[Port, _PortState], hooks: ExitStack) -> None:
    by_call: dict[tuple[str, str], list[_PortState]] = {}
    for port, state in states.items():
        if port.is_inside or port.side in STEPS:
            continue
        by_call.setdefault((port.path, port.side), []).append(state)
    for (path, side), group in by_call.items():
        module = root.get_submodule(path)
        if side == "input":
            hook = in_this_thread(partial(_on_input, group, states))
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            handle = module.register_forward_hook(in_this_thread(partial(_on_output, group, states)))
            note_last(module)
        hooks.callback(handle.remove)


def _open_attention(model: Model, states: dict[Port, _PortState], hooks: ExitStack) -> None:
    """Compute all attention step by step, and let the ports inside it see each step."""
    inside: dict[nn.Module, dict[Side, list[_PortState]]] = {}
    for port, state in states.items():
        if port.is_inside:
            sides = inside.setdefault(model.module.get_submodule(port.path), {})
            sides.setdefault(port.side, []).append(state)

    hooks.enter_context(opened(model, inside, partial(_on_step, inside, states)))


def _open_steps(root: nn.Module, states: dict[Port, _PortState], hooks: ExitStack) -> Callable[[], None]:
    """Run recurrent modules step by step, where a state of theirs is met; return what is called after the run."""
    if not any(port.side in STEPS for port in states):
        return lambda: None

    def change(ports: Collection[Port], tensor: Tensor) -> Tensor:
        for _, writes in _in_order([states[port] for port in ports]):
            tensor = _written(writes, tensor, states)
        return tensor

    def end(ports: Collection[Port], tensor: Tensor) -> None:
        for port in ports:
            _pass(states[port], tensor)

    writes = {port: [write for _, write in each.writes] for port, each in states.items() if port.side in STEPS}
    n_steps = {port: max((steps_of(w.index, w.value) for w in every), default=0) for port, every in writes.items()}
    return stepwise(root, n_steps, change, end, hooks)


def _on_step(
    inside: Mapping[nn.Module, Mapping[Side, list[_PortState]]],
    states: dict[Port, _PortState],
    module: nn.Module,
    side: Side,
    tensor: Tensor,
) -> Tensor:
    """Let ports see, and change, a tensor on its way through attention."""
    group = inside.get(module, {}).get(side, [])
    for _, writes in _in_order(group):
        tensor = _written(writes, tensor, states)
    for state in group:
        _pass(state, tensor)
    return tensor


def _on_input(
    group: list[_PortState],
    states: dict[Port, _PortState],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for port, writes in _in_order(group):
        tensor = pick_input(port, args, kwargs)
        written = _written(writes, _apart(port, tensor, states), states)
        args, kwargs = put_input(port, args, kwargs, written.reshape(tensor.shape))
    for state in group:
        _pass(state, _apart(state.port, pick_input(state.port, args, kwargs), states))
    return args, kwargs


def _on_output(
    group: list[_PortState], states: dict[Port, _PortState], module: nn.Module, args: tuple[Any, ...], output: Any
) -> Any:
    for port, writes in _in_order(group):
        tensor = pick_output(port, output)
        written = _written(writes, _apart(port, tensor, states), states)
        output = put_output(port, output, written.reshape(tensor.shape))
    for state in group:
        _pass(state, _apart(state.port, pick_output(state.port, output), states))
    return output


def _apart(port: Port, tensor: Tensor, states: dict[Port, _PortState]) -> Tensor:
    """Return a port's tensor with rows and positions as its first two axes, where another port shows how many."""
    return tensor if port.like is None else with_rows(port, tensor, states[port.like].tensor)


def _in_order(group: list[_PortState]) -> Iterator[tuple[Port, list[Write]]]:
    """Yield the writes of one side of a module in their order, those in a row at one port together.

    Two ports may be two spellings of one tensor (``output`` and ``output[0]``): then the later write counts, too.
    """
    every = [(place, state.port, write) for state in group for place, write in state.writes]
    for port, some in groupby(sorted(every, key=itemgetter(0)), key=itemgetter(1)):
        yield port, [write for _, _, write in some]


def _written(writes: list[Write], tensor: Tensor, states: dict[Port, _PortState]) -> Tensor:
    """Apply writes of a port to a copy of its tensor."""
    written, before = tensor.clone(), None
    for write in writes:
        if write.is_whole and callable(write.value) and len(written) == len(write.index[0]):
            written = write.value(written)
            continue
        before = Before.of(written, write.tap.view, before)
        _apply(write, written, states, before)
    return written


def _pass(state: _PortState, tensor: Tensor) -> None:
    """Note that a port was passed, and keep its tensor if asked."""
    state.times_run += 1
    if state.is_kept:
        state.tensor = state.store(tensor)


def _apply(write: Write, tensor: Tensor, states: dict[Port, _PortState], before: Before | None) -> None:
    companions = tuple(_tensor_of(states[port], write) for port in write.tap.companions)
    rows, value = write.index[0], write.value
    if tensor.shape[0] <= int(rows.max()):
        raise SiteUnsupported(
            f"site '{write.tap.site}' has no row for each run in this model",
            facts=[("its tensor", f"shape {tuple(tensor.shape)}"), ("rows", int(rows.max()) + 1)],
            fix="patch a site further down, whose first axis is the batch",
        )
    if before is None:
        new = value if isinstance(value, Tensor) else value(take(write.tap.view, tensor, companions, write.index))
        write.tap.view.write(tensor, companions, write.index, new.to(tensor))
    else:
        before.write(write.tap.view, tensor, companions, write.index, value)


def _tensor_of(state: _PortState, write: Write) -> Tensor:
    if state.tensor is None:
        raise PatchDidNotFire(
            f"site '{write.tap.site}' needs a tensor that was not there in time",
            facts=[("needed", f"{state.port.side} of {state.port.path}")],
            fix="report the model's class: its modules run in another order than its family says",
        )
    return state.tensor


def _check_ran_once(state: _PortState) -> None:
    if state.times_run == 1:
        return
    sites = (
        ", ".join(sorted({str(write.tap.site) for _, write in state.writes}))
        or f"module({state.port.path}).{state.port.side}"
    )
    if state.times_run == 0:
        raise PatchDidNotFire(
            f"nothing was written at '{sites}'" if state.writes else f"nothing was read at '{sites}'",
            facts=[("module", state.port.path), ("ran", "0 times in this forward")],
            fix="choose a module that runs in the model's forward",
        )
    raise SiteUnsupported(
        f"'{sites}' is ambiguous: its module runs {state.times_run} times in one forward",
        facts=[("module", state.port.path)],
        fix="choose a module that runs once, such as the one before or after it",
    )


def _lock_of(module: nn.Module) -> threading.RLock:
    with _GUARD:
        return _LOCKS.setdefault(module, threading.RLock())
