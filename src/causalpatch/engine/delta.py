"""Delta linears: a layer on patched rows, its linear maps rounded relative to the effect and not to the activation.

A patched row differs little from the row of the base run that it started from. With ``x_base`` and ``y_base`` of the
base run known,

    y = y_base + (x - x_base) W'

is the same map, and a product in few bits now errs by a share of ``x - x_base``. Everything else stays float32.

1. ``record``: the unmodified layer runs on the base rows; each of its linear calls leaves ``x_base`` and ``y_base``.
   ``recording`` does so for all layers in the model's own run.
2. ``replay``: the same layer runs on patched rows. The n-th call with a weight finds the n-th record of that weight,
   gathers its rows by index, multiplies the difference in few bits (``products.py``) and adds ``y_base``.

Calls are seen by a ``TorchFunctionMode`` over ``torch.nn.functional.linear`` and ``addmm`` (GPT-2's Conv1D). Modes
belong to a thread and leave with their context, so other threads, and the model itself, are never touched. Products of
attention (``matmul``, ``@``, ``einsum``) are left alone, and so is every call whose weight is not a plain float32
parameter (half precision, quantised, adapted, a slice of a parameter), whose rows are not the layer's (experts), or
which is too small to gain.

Assumption: the base rows' numbers belong to the weights that are there at the replay; weights changed in between are
refused. The index need not be right for the result to be: the identity holds for any base row, and a poor one only
makes the difference, and with it the rounding, larger.

Errors of effects, relative to each cell's own (against float64; resid_pre, median / 90 %), of whole-sequence runs whose
linear maps are all replayed: three trained models of 0.1 to 1 million weights (1,610 cells), and the shape of GPT-2
small with random weights (48 cells):

=======================  =================  ================  ================  ================
linear maps              nano-sort-gpt2     stories260k       babyllama-105     GPT-2's shape
=======================  =================  ================  ================  ================
float32                  1e-6 / 3e-5        6e-5 / 2e-3       8e-6 / 8e-5       4e-5 / 3e-4
bfloat16, no difference  5e-3 / 8e-2        3e-1 / 8          6e-2 / 6e-1
bf16                     9e-4 / 3e-3        6e-3 / 4e-2       4e-3 / 3e-2       6e-3 / 3e-2
bf16x3                   3e-6 / 3e-5        8e-5 / 1e-3       1e-5 / 1e-4       3e-5 / 2e-4
int8                     2e-3 / 7e-3        2e-2 / 2e-1       2e-2 / 1e-1       2e-2 / 1e-1
=======================  =================  ================  ================  ================

Cost: ``rows of the base x (n_in + n_out) x 4`` bytes per linear map; maps of one input share its copy. Per patched row
two gathers, a difference and a sum in float32 beside the product.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.linear_calls import Call, read_call, why_left
from causalpatch.engine.products import Casts, Parts, Product, add_product, is_possible, prepare, stamp

MIN_WEIGHTS = 1 << 17
"""Fewest weights of a linear map that is not left as it is.

Measured with int8 at 1,024 rows on a CPU without tiles for bfloat16, in float32's time: a square map of 128 takes 2.4,
of 256 1.1, of 384 .9, of 768 .55; below, gathers and casts cost more than the product.
"""

_FIX = 'measure in float32: leave out precision="screen"'


@dataclass(frozen=True)
class _Record:
    """What a linear call took and returned on the base rows; x and y are None where the call is left as it is."""

    constants: tuple[object, ...]
    x: Float[Tensor, "base_row n_in"] | None = None
    y: Float[Tensor, "base_row n_out"] | None = None


@dataclass(frozen=True)
class _Weight:
    """The calls of one weight, in order."""

    weight: weakref.ref[Tensor]
    records: list[_Record]


class DeltaLinears:
    """The linear maps of one layer on the base rows of one chunk of pairs, to be replayed on patched rows.

    Args:
        casts: The weights in few bits, shared by all layers and chunks of a sweep.
        product: How differences are multiplied by weights.
        min_weights: Fewest weights of a map that is not left as it is.

    Examples:
        >>> import torch
        >>> from causalpatch.engine.delta import DeltaLinears
        >>> from causalpatch.engine.products import Casts
        >>> layer = torch.nn.Linear(8, 8)
        >>> base = torch.randn(3, 8)
        >>> rows = base[[0, 0, 2]] + 0.01 * torch.randn(3, 8)
        >>> delta = DeltaLinears(Casts(), "bf16", min_weights=0)
        >>> with torch.no_grad():
        ...     with delta.record(n_rows=3):
        ...         y_base = layer(base)
        ...     with delta.replay(torch.tensor([0, 0, 2])):
        ...         screened = layer(rows)
        ...     float((screened - layer(rows)).abs().max()) < 1e-3
        True
    """

    def __init__(self, casts: Casts, product: Product = "bf16", *, min_weights: int = MIN_WEIGHTS) -> None:
        self.casts = casts
        self.product = product
        self.min_weights = min_weights
        self.n_rows = 0
        self.left: Mapping[str, int] = {}
        self._weights: dict[int, _Weight] = {}

    @property
    def n_bytes(self) -> int:
        """Memory that the records hold."""
        tensors = [t for each in self._weights.values() for r in each.records for t in (r.x, r.y) if t is not None]
        return sum(t.nbytes for t in {id(t): t for t in tensors}.values())

    @contextmanager
    def record(self, n_rows: int) -> Iterator[None]:
        """Record the linear calls of whatever runs inside; an exception leaves what was recorded before.

        Args:
            n_rows: Rows of the layer: a call whose leading axes do not hold as many is left as it is at replay.
        """
        mode = _Recording(self, n_rows)
        with mode:
            yield
        self.n_rows, self._weights, self.left = n_rows, mode.weights, dict(mode.left)

    @contextmanager
    def replay(self, index: Int[Tensor, " row"], *, is_partial: bool = False) -> Iterator[None]:
        """Replay the recorded calls on patched rows, in whatever runs inside.

        Args:
            index: The base row of each row.
            is_partial: Only some of the layer's modules run inside, so that calls may be missing.

        Raises:
            ModelUnsupported: The calls inside are not those recorded: others, more or fewer, in other shapes or on
                weights changed since; or a gradient is asked for.
        """
        mode = _Replaying(self, self._weights, index)
        with mode:
            yield
        if not is_partial:
            mode.check_complete()


@contextmanager
def recording(layers: Mapping[nn.Module, DeltaLinears], n_rows: int) -> Iterator[None]:
    """Record the linear calls of several layers while the model's own forward runs inside, the base run say.

    Args:
        layers: For each layer's module, what keeps its calls. Each must run at most once, and none inside another.
        n_rows: Rows of the run, ``pairs x positions``: row ``pair * positions + position`` is a token's.
    """
    # The thread that is inside runs the model alone, as whoever holds it quiet does.
    with ExitStack() as undo:
        for layer, delta in layers.items():
            undo.callback(_record_when_run(layer, delta, n_rows))
        yield


def _record_when_run(layer: nn.Module, delta: DeltaLinears, n_rows: int) -> Callable[[], None]:
    """Replace a layer's forward by one that is recorded; return what puts the old one back."""
    own, forward = layer.__dict__.get("forward"), layer.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with delta.record(n_rows):
            return forward(*args, **kwargs)

    def put_back() -> None:
        if own is None:
            del layer.__dict__["forward"]
        else:
            layer.__dict__["forward"] = own

    layer.__dict__["forward"] = recorded
    return put_back


class _Recording(TorchFunctionMode):
    """Runs linear calls as they are and keeps what goes in and comes out."""

    def __init__(self, owner: DeltaLinears, n_rows: int) -> None:
        super().__init__()
        self._owner = owner
        self._n_rows = n_rows
        self._last: tuple[Tensor, int, Tensor] | None = None
        self.weights: dict[int, _Weight] = {}
        self.left: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep the rows of a linear call."""
        kwargs = kwargs or {}
        call = read_call(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        reason = why_left(call)
        if reason:
            self.left[reason] += 1
            return func(*args, **kwargs)
        reason = self._why_not(call)
        x = None if reason else self._copy(call.x)
        y = func(*args, **kwargs)
        if not reason and y.dtype != torch.float32:
            reason = "output is not float32"
        known = self.weights.setdefault(id(call.weight), _Weight(weakref.ref(call.weight), []))
        if reason:
            self.left[reason] += 1
            known.records.append(_Record(call.constants))
        else:
            known.records.append(_Record(call.constants, x, y.detach().reshape(self._n_rows, -1).clone()))
        return y

    def _why_not(self, call: Call) -> str:
        n_out, n_in = call.weight.shape[::-1] if call.is_transposed else call.weight.shape
        if call.weight.numel() < self._owner.min_weights:
            return "small"
        if call.x.shape[:-1].numel() != self._n_rows:
            return "other rows than the layer's"
        if not is_possible(self._owner.product, call.x.device, n_in, n_out):
            return f"no {self._owner.product} product here"
        return ""

    def _copy(self, x: Tensor) -> Tensor:
        """Copy the rows of an input once for all the maps that read it one after the other."""
        version = stamp(x)[1]
        if self._last is None or self._last[0] is not x or self._last[1] != version or x.is_inference():
            self._last = (x, version, x.detach().reshape(self._n_rows, -1).clone())
        return self._last[2]


class _Replaying(TorchFunctionMode):
    """Answers recorded linear calls by differences from their base rows."""

    def __init__(self, owner: DeltaLinears, weights: Mapping[int, _Weight], index: Tensor) -> None:
        super().__init__()
        self._owner = owner
        self._weights = weights
        self._index = index
        self._n_run: Counter[int] = Counter()
        self._last: tuple[Tensor, int, Tensor, list[Parts]] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer a linear call from its record."""
        kwargs = kwargs or {}
        call = read_call(func, args, kwargs)
        if call is None or why_left(call):
            return func(*args, **kwargs)
        record = self._record_of(call)
        if record.x is None or record.y is None:
            return func(*args, **kwargs)
        return self._answer(call, record.x, record.y)

    def check_complete(self) -> None:
        """Make sure that every recorded call was answered.

        Raises:
            ModelUnsupported: Some were not.
        """
        missing = sum(len(known.records) - self._n_run[key] for key, known in self._weights.items())
        if missing:
            raise ModelUnsupported(
                "a layer called fewer linear maps on patched rows than on base rows",
                facts=[("missing", missing), ("called", self._n_run.total())],
                fix=_FIX,
            )

    def _record_of(self, call: Call) -> _Record:
        known = self._weights.get(id(call.weight))
        if known is None or known.weight() is not call.weight:
            raise _unlike("a linear map ran on patched rows and not on base rows", call, "none")
        number = self._n_run[id(call.weight)]
        if number >= len(known.records):
            raise _unlike("a linear map ran more often on patched rows than on base rows", call, len(known.records))
        record = known.records[number]
        if record.constants != call.constants:
            raise _unlike("a weight, bias or scale changed between base rows and patched rows", call, number + 1)
        self._n_run[id(call.weight)] += 1
        return record

    def _answer(self, call: Call, x_base: Tensor, y_base: Tensor) -> Tensor:
        rows = call.x.shape[:-1]
        if rows.numel() != len(self._index):
            raise _unlike(f"a linear map got {tuple(call.x.shape)} for {len(self._index)} rows", call, "rows differ")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (call.x, call.weight, call.bias)):
            raise _unlike("delta linears have no gradient", call, "requires_grad")
        index = self._index.to(call.x.device)
        weight = self._owner.casts.of(call.weight, self._owner.product, is_transposed=call.is_transposed)
        y = y_base.new_empty(len(index), y_base.shape[1])
        blocks = torch.split(index, _rows_at_once(index.device))
        start = 0
        for block, difference in zip(blocks, self._differences(call.x, x_base, blocks), strict=True):
            piece = torch.index_select(y_base, 0, block, out=y[start : start + len(block)])
            add_product(piece, difference, weight, self._owner.product, call.scale)
            start += len(block)
        return y.view(*rows, y.shape[1])

    def _differences(self, x: Tensor, x_base: Tensor, blocks: Sequence[Tensor]) -> list[Parts]:
        """Return x - x_base in few bits, once for all the maps that read it one after the other."""
        version = stamp(x)[1]
        last = self._last
        if last is not None and last[0] is x and last[1] == version and last[2] is x_base and not x.is_inference():
            return last[3]
        parts = []
        pieces = torch.split(x.detach().reshape(-1, x_base.shape[1]), [len(block) for block in blocks])
        for block, piece in zip(blocks, pieces, strict=True):
            difference = x_base.index_select(0, block)
            parts.append(prepare(torch.sub(piece, difference, out=difference), self._owner.product))
        self._last = (x, version, x_base, parts)
        return parts


def _rows_at_once(device: torch.device) -> int:
    # Measured on a CPU at GPT-2's shapes: with 256 rows per core the passes around the product stay in its cache, and
    # an int8 map takes a quarter less time than with all 2,048 rows at once; below 128 the product itself is slower.
    return 256 * torch.get_num_threads() if device.type == "cpu" else 1 << 62


def _unlike(what: str, call: Call, recorded: object) -> ModelUnsupported:
    facts = [("weight", tuple(call.weight.shape)), ("input", tuple(call.x.shape)), ("recorded", recorded)]
    return ModelUnsupported(what, facts=facts, fix=_FIX)
