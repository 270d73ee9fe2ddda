"""Terms that are added to what modules take or return while they run, differentiable in whatever they are made of.

1. A term at an *input* sees what the module is given, and its sum with it is what the module gets.
2. A term at an *output* sees what the module is given and what it returns; what it returns itself goes on.
3. Weights of the module stay as they are. So the gradient reaches what the terms are made of and nothing else, and no
   optimizer knows of any other weight.

Only our own hooks are removed, also after an exception; they act in the thread that set them alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.ports import pick_input, pick_output, put_input, put_output
from causalpatch.engine.recorders import note_last
from causalpatch.models import Port

AtInput: TypeAlias = Callable[[Tensor], Tensor]
"""From what a module is given to what it gets."""
AtOutput: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From what a module is given, and what it returns, to what goes on."""


@contextmanager
def added(
    root: nn.Module, inputs: Mapping[str, AtInput] | None = None, outputs: Mapping[str, AtOutput] | None = None
) -> Iterator[None]:
    """Let modules take or return something else inside the context.

    Args:
        root: The whole model.
        inputs: By the path of a module, what is made of its first argument.
        outputs: By the path of a module, what is made of its output, or of the first item of a tuple.

    Raises:
        SiteUnsupported: A module is given or returns no tensor.
    """
    with ExitStack() as hooks:
        for path, change in (inputs or {}).items():
            before = in_this_thread(partial(_on_input, Port(path, "input"), change))
            handle = root.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True)
            hooks.callback(handle.remove)
        for path, replace in (outputs or {}).items():
            module = root.get_submodule(path)
            behind = in_this_thread(partial(_on_output, path, replace))
            hooks.callback(module.register_forward_hook(behind, with_kwargs=True).remove)
            note_last(module)
        yield


def _on_input(
    port: Port, change: AtInput, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    return put_input(port, args, kwargs, change(pick_input(port, args, kwargs)))


def _on_output(
    path: str, change: AtOutput, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    del module
    port = Port(path, "output")
    given = pick_input(Port(path, "input"), args, kwargs)
    return put_output(port, output, change(given, pick_output(port, output)))
