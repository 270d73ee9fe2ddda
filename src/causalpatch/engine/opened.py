"""A model whose attention is laid open while it runs, by whichever way its modules attend.

1. Modules that attend by the interface of transformers call a kernel of ours, which goes step by step (``attention``).
2. A module that spells attention out by itself has a softmax over keys among its operations. That one is met on its
   way: what goes in are scores, what comes out is a pattern. Its queries and keys are not met.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine.attention import Door, attend_openly
from causalpatch.engine.bypass import bypassed
from causalpatch.models import Model, Port
from causalpatch.models.attention import attending
from causalpatch.models.taps import Side

_SOFTMAX = frozenset({torch.softmax, functional.softmax, Tensor.softmax})


@contextmanager
def opened(
    model: Model, modules: Collection[nn.Module], step: Callable[[nn.Module, Side, Tensor], Tensor]
) -> Iterator[None]:
    """Compute a model's attention step by step in this thread.

    Args:
        model: The model, already quiet.
        modules: Attention modules that are looked into; those that spell attention out are met in no others.
        step: Sees the tensor at each step of a module, and returns what goes on.
    """
    by_interface: set[nn.Module] = set()
    with attending(model.module, partial(_attend, by_interface, step)), ExitStack() as undo:
        for module in modules:
            is_met = partial(by_interface.__contains__, module)
            undo.enter_context(_within(module, _Softmax(partial(step, module), model, is_met)))
        yield


def _attend(
    by_interface: set[nn.Module],
    step: Callable[[nn.Module, Side, Tensor], Tensor],
    module: nn.Module,
    *call: Any,
) -> Tensor:
    by_interface.add(module)
    query, key, value, mask, more = call
    return attend_openly(query, key, value, mask, more, partial(step, module))


def not_met(model: Model, port: Port) -> SiteUnsupported:
    """Return the error for a port inside attention that nothing passed."""
    spelt_out = "" if port.side in ("query", "key") else ", nor through a softmax over keys of its own"
    return SiteUnsupported(
        f"attention of '{model.name}' cannot be looked into",
        facts=[
            ("module", port.path),
            ("reason", f"it does not go through the attention interface of transformers{spelt_out}"),
        ],
        fix="use sites outside of attention, such as q, k, v and z",
    )


class _Softmax(TorchFunctionMode):
    """Meets the softmax of a module that spells attention out; acts in the thread that enters it alone.

    Args:
        door: Sees each tensor by its side of a port, and returns what goes on.
        model: The model: a softmax over keys is of ``[row, head, query, key]``, masks are made of its least number.
        is_met: Says whether the module turned out to call the interface, where its steps are met already.
    """

    def __init__(self, door: Door, model: Model, is_met: Callable[[], bool]) -> None:
        super().__init__()
        self.door, self.is_met, self.n_heads = door, is_met, model.n_heads
        self.least = torch.finfo(model.dtype).min / 2

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a torch function; a softmax over keys between two doors."""
        kwargs = kwargs or {}
        if function not in _SOFTMAX or self.is_met() or not self._is_over_keys(*args, **kwargs):
            return function(*args, **kwargs)
        scores: Tensor = args[0]
        self.door("visible", self._sees(scores).transpose(1, 2))
        scores = self.door("scores", scores.transpose(1, 2)).transpose(1, 2)
        pattern: Tensor = function(scores, *args[1:], **kwargs)
        return self.door("pattern", pattern.transpose(1, 2)).transpose(1, 2)

    def _is_over_keys(self, scores: Any = None, dim: Any = None, *_: Any, **named: Any) -> bool:
        is_last = named.get("dim", dim) in (-1, 3)
        return is_last and isinstance(scores, Tensor) and scores.ndim == 4 and scores.shape[1] == self.n_heads

    def _sees(self, scores: Float[Tensor, "row head query key"]) -> Bool[Tensor, "row one query key"]:
        return (scores > self.least).any(1, keepdim=True)


@contextmanager
def _within(module: nn.Module, mode: AbstractContextManager[Any]) -> Iterator[None]:
    """Let a module's forward run within another context, in this thread."""
    before = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return before(*args, **kwargs)

    with bypassed(module, forward):
        yield
