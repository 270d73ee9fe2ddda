"""Distributed alignment search: a subspace learnt through patched runs, in which an interchange does what is wanted.

    R* = argmin_R  mean over pairs of loss(run with the site set to  current + R' M R (source - current))

R has orthonormal rows (``torch.nn.utils.parametrizations.orthogonal``), M is a mask over its rows.

1. With a dimension k, R has k rows and M is the identity. *Boundless*, R is square and M soft: row i counts with
   sigmoid((b width - i - 1/2) / temperature). The boundary b, a share of the width, is learnt too and adds
   ``boundary_cost * b`` to the loss; the temperature falls to a tenth of a dimension, and rows of more than a half are
   kept in the end.
2. Adam in steps of a few pairs, in an order drawn from the seed, the rotation's rate falling to a tenth. After each
   epoch the loss of all pairs is measured with the rotation held still.
3. With a dimension, the rotation of the least loss is kept, and the search stops after ``patience`` epochs without a
   lesser one. Boundless it goes on to the end, since only then is the mask hard.

Cost: a forward and a backward of every pair per epoch, and a further forward; two forwards per pair before. A square
rotation takes width^3 operations per step.

References:
    Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations", 2303.02536; Wu et al. 2023, "Interpretability at Scale: Identifying Causal Mechanisms in Alpaca",
    2305.08809 (boundless).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from causalpatch.base.errors import NotFinite, SettingError
from causalpatch.base.seeds import generator
from causalpatch.engine.batches import in_batches
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.gradient import differentiable, measure_rows, room_for
from causalpatch.engine.job import Cost, Job, batches_of_pairs, lay_rows
from causalpatch.engine.means import Means
from causalpatch.engine.memory import exhausted, is_out_of_memory, release_memory
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.untouched import Untouched, run_untouched
from causalpatch.engine.values import Row
from causalpatch.metrics import Metric
from causalpatch.patches import Function

SOFTEST = 50.0
"""Temperature at the start in dimensions, as in Wu et al.; of narrow sites an eighth of their width."""
HARDEST = 0.1
"""Temperature at the end, in dimensions, as there."""
TINY = 1e-4
"""A loss that is less by no larger share than this is no lesser one."""


@dataclass(frozen=True)
class RotationSearch:
    """How a subspace is searched for.

    Args:
        epochs: Most passes over the pairs.
        batch: Pairs in a step.
        rate: Size of the first steps of the rotation.
        patience: Epochs without a lesser loss after which the search stops.
        restarts: Searches from different starts, of which the one of the least loss is kept.
        boundary_rate: Size of the steps of the boundary, as a share of the width; boundless only.
        boundary_cost: Loss of keeping the whole width, in nats; boundless only.

    Raises:
        SettingError: Nothing would be learnt.
    """

    epochs: int = 60
    batch: int = 32
    rate: float = 0.02
    patience: int = 8
    restarts: int = 1
    boundary_rate: float = 0.02
    boundary_cost: float = 1.0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("epochs", "batch", "patience", "restarts")}
        rates = {name: getattr(self, name) for name in ("rate", "boundary_rate")}
        bad = {name: number for name, number in counts.items() if number < 1}
        bad |= {name: number for name, number in rates.items() if not 0 < number < np.inf}
        bad |= {} if 0 <= self.boundary_cost < np.inf else {"boundary_cost": self.boundary_cost}
        if bad:
            name, number = next(iter(bad.items()))
            raise SettingError(
                f"no subspace can be searched for with {name}={number:g}",
                facts=[("needed", "counts of 1 or more, rates above 0, a cost of 0 or more, all finite")],
                fix="RotationSearch(epochs=60, batch=32, rate=0.02)",
            )


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to.

    Args:
        loss: Mean loss over the pairs, in nats.
        dimension: Rows of the mask above a half.
        temperature: Temperature of the mask; None where there is none.
    """

    loss: float
    dimension: int
    temperature: float | None = None


@dataclass(frozen=True, eq=False)
class Rotation:
    """A subspace that was learnt.

    Args:
        basis: Orthonormal directions, (dimension, the site's value axes), float64.
        epochs: What each epoch of the search came to, that before the first included.
        before: Mean loss with the first, random rotation.
        after: Mean loss with this one.
    """

    basis: np.ndarray
    epochs: tuple[Epoch, ...]
    before: float
    after: float


def learn_rotation(
    job: Job,
    metric: Metric,
    dimension: int | None,
    search: RotationSearch,
    seed: int,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> Rotation:
    """Learn a subspace of the one site of a job's one intervention.

    Args:
        job: The job; its first intervention has one target.
        metric: The loss, which is made small.
        dimension: Dimensions of the subspace; None learns them too.
        search: How it is searched for.
        seed: Seed of the start and of the order of the pairs.
        advance: Is told when epochs are done.

    Raises:
        SettingError: The dimension is not one of the site, or the loss has no gradient.
        NotFinite: The loss is not a number.
        MemoryExhausted: One pair does not fit into memory.
    """
    (target,) = job.interventions[0]
    gauge = Gauge([metric], job.pairs, job.model)
    runs = _Runs(job, gauge, target)
    width = int(np.prod(runs.axes))
    if not runs.axes or (dimension is not None and not 1 <= dimension <= width):
        raise SettingError(
            f"'{target.site}' has no subspace of dimension {dimension}",
            facts=[("site", f"{width} numbers per token" if runs.axes else "one number per token")],
            fix=f"dimension=1 to {width}" if runs.axes else "patch it whole, or take all units of its layer",
        )
    found = [_search(runs, dimension, search, (seed, number), advance) for number in range(search.restarts)]
    return min(found, key=lambda one: one.after)


def _search(
    runs: "_Runs", dimension: int | None, search: RotationSearch, seed: tuple[int, int], advance: Callable[[int], None]
) -> Rotation:
    width = int(np.prod(runs.axes))
    turn = _Turn(width, dimension, runs.start(seed, dimension or width))
    runs.change = turn
    groups = [{"params": list(turn.layer.parameters()), "lr": search.rate}]
    groups += [{"params": [turn.boundary], "lr": search.boundary_rate}] if dimension is None else []
    optimizer = torch.optim.Adam(groups)
    before = runs.loss()
    epochs = [Epoch(before, turn.dimension, turn.temperature)]
    best, least, since = turn.basis(), before, 0
    for number in range(search.epochs):
        share = number / search.epochs
        # The boundary must still follow the temperature at the end, so that its rate stays.
        optimizer.param_groups[0]["lr"] = search.rate * (1 - 0.9 * share)
        turn.cool(share)
        for rows in runs.steps(search.batch, generator(seed[0], "rotation", seed[1], number)):
            optimizer.zero_grad()
            runs.backward(rows)
            turn.backward(search.boundary_cost)
            optimizer.step()
            turn.clamp()
        turn.cool((number + 1) / search.epochs)
        loss = runs.loss()
        advance(1)
        epochs.append(Epoch(loss, turn.dimension, turn.temperature))
        since += 1
        if dimension is None or loss < least - TINY * abs(least):
            best, least, since = turn.basis(), loss, 0
        if since >= search.patience:
            advance(search.epochs - number - 1)
            break
    basis = best.reshape(len(best), *runs.axes)
    return Rotation(basis, tuple(epochs), before, least)


class _Turn:
    """The change that is learnt: the part of the source inside a subspace is put in.

    Args:
        width: Numbers per token.
        dimension: Rows of the rotation; None for all of them with a mask.
        start: The first rotation, ``[dimension, width]``.
    """

    def __init__(self, width: int, dimension: int | None, start: Float[Tensor, "dimension width"]) -> None:
        self.width = width
        self.is_bounded = dimension is not None
        self.temperature: float | None = None if self.is_bounded else min(SOFTEST, width / 8)
        self._softest = self.temperature or 0.0
        self.layer = _Rows(start)
        self.boundary = torch.full((), 0.5, dtype=start.dtype, device=start.device, requires_grad=True)

    def __call__(self, current: Tensor, source: Tensor) -> Tensor:
        """Return the new values of some elements; gradients go to the rotation and the boundary."""
        rows = self.layer.weight
        moves = (source - current).reshape(len(current), -1).to(rows.dtype) @ rows.T
        moves = moves if self.is_bounded else moves * self._mask()
        return current + (moves @ rows).reshape(current.shape).to(current.dtype)

    @property
    def dimension(self) -> int:
        """Rows that would be kept now, one at least."""
        return len(self.layer.weight) if self.is_bounded else max(1, int((self._mask() > 0.5).sum()))

    def basis(self) -> np.ndarray:
        """Return the rows that would be kept now, ``(dimension, width)``."""
        with torch.no_grad():
            rows: np.ndarray = self.layer.weight[: self.dimension].double().cpu().numpy()
        return rows

    def cool(self, share: float) -> None:
        """Set the temperature after a share of the search."""
        if not self.is_bounded:
            self.temperature = self._softest + share * (min(HARDEST, self._softest) - self._softest)

    def backward(self, cost: float) -> None:
        """Add the gradient of what the boundary costs."""
        if not self.is_bounded:
            torch.autograd.backward(cost * self.boundary)

    def clamp(self) -> None:
        """Keep the boundary within the width, half a dimension at least."""
        with torch.no_grad():
            self.boundary.clamp_(0.5 / self.width, 1.0)

    def _mask(self) -> Float[Tensor, " dimension"]:
        places = torch.arange(self.width, dtype=self.boundary.dtype, device=self.boundary.device) + 0.5
        return torch.sigmoid((self.boundary * self.width - places) / (self.temperature or HARDEST))


class _Rows(nn.Module):
    """Rows that stay orthonormal whatever is added to them.

    Args:
        start: The rows at first, orthonormal, ``[dimension, width]``.
    """

    def __init__(self, start: Float[Tensor, "dimension width"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())
        # Around a base, torch fills few rows up to a square matrix, at random; Householder's product needs no base.
        is_square = start.shape[0] == start.shape[1]
        orthogonal(self, "weight", None if is_square else "householder", use_trivialization=is_square)


class _Runs:
    """Patched runs of all pairs by a change that is learnt: their loss and its gradient.

    Args:
        job: The job.
        gauge: The loss.
        target: What is patched.
    """

    def __init__(self, job: Job, gauge: Gauge, target: Target) -> None:
        self.change: Callable[[Tensor, Tensor], Tensor] = lambda current, source: current
        # Called through a name of its own: the change is another one in each search.
        value = Function(lambda current, source: self.change(current, source), "subspace that is learnt")
        opened = (replace(target, value=value, inside=None),)
        self.job = replace(job, interventions=[opened], reference=None, n_controls=0)
        self.gauge = gauge
        placer = Placer(job.pairs, job.base)
        self._batches: list[tuple[Untouched, Sequence[Row]]] = []
        for batch in in_batches(
            self.job, batches_of_pairs(job), partial(run_untouched, self.job, gauge, Means(), Cost())
        ):
            rows, _ = lay_rows(self.job, placer, batch.indices)
            batch.known.tried.add(id(value))  # rotations do not look at other tokens
            self._batches.append((batch.lean(gauge), rows))
        self._n_rows = sum(len(rows) for _, rows in self._batches)
        if not self._n_rows:
            raise SettingError(
                f"no pair of '{job.pairs.name}' has a token for '{target.site}'",
                fix="align the pairs, or name a position that every prompt has, such as @-1",
            )
        self._room = room_for(self.job)
        self.axes = self._find_axes(target)

    def _find_axes(self, target: Target) -> tuple[int, ...]:
        batch, _ = self._batches[0]
        shape = tuple(batch.known.source.value(target.site).shape)
        return shape[1 + int(target.has_position) :]

    def start(self, seed: tuple[int, int], dimension: int) -> Float[Tensor, "dimension width"]:
        """Return a random rotation."""
        width = int(np.prod(self.axes))
        drawn = generator(seed[0], "start of a rotation", seed[1]).standard_normal((width, dimension))
        rows = np.linalg.qr(drawn)[0].T
        dtype = torch.promote_types(self.job.model.dtype, torch.float32)
        return torch.as_tensor(np.ascontiguousarray(rows), dtype=dtype, device=self.job.model.device)

    def steps(self, size: int, draw: np.random.Generator) -> Iterator[list[tuple[Untouched, list[Row]]]]:
        """Yield all rows in steps of a few, in a drawn order."""
        numbered = [(number, row) for number, (_, rows) in enumerate(self._batches) for row in range(len(rows))]
        order = draw.permutation(len(numbered))
        for some in np.array_split(order, -(-len(order) // size)):
            chosen: dict[int, list[Row]] = {}
            for place in some.tolist():
                number, row = numbered[place]
                chosen.setdefault(number, []).append(self._batches[number][1][row])
            yield [(self._batches[number][0], rows) for number, rows in chosen.items()]

    def backward(self, step: Sequence[tuple[Untouched, list[Row]]]) -> None:
        """Add up the gradient of the mean loss of a step."""
        n_rows = sum(len(rows) for _, rows in step)
        for batch, rows in step:
            self._total(batch, rows, 1.0 / n_rows)

    def loss(self) -> float:
        """Return the mean loss of all pairs.

        Raises:
            NotFinite: It is NaN or infinite.
        """
        total = sum(self._total(batch, rows, None) for batch, rows in self._batches) / self._n_rows
        if not np.isfinite(total):
            raise NotFinite(
                f"the loss of a subspace that is learnt is {total}",
                facts=[("model", f"'{self.job.model.name}' in {self.job.model.dtype}")],
                fix="learn more slowly: RotationSearch(rate=0.002), or open the model in float32",
            )
        return total

    def _total(self, batch: Untouched, rows: Sequence[Row], weight: float | None) -> float:
        """Return the sum of losses, in forwards as large as memory allows; with a weight add up gradients."""
        total, begin = 0.0, 0
        while begin < len(rows):
            some = rows[begin : begin + self._room.rows]
            found = self._try(batch, some, weight)
            if found is None:
                release_memory()
                continue
            total, begin = total + found, begin + len(some)
        return total

    def _try(self, batch: Untouched, rows: Sequence[Row], weight: float | None) -> float | None:
        """Return the sum of the losses of some rows; None where memory ran out and may not the next time."""
        is_tight = self._room.is_checkpointed and weight is not None
        try:
            with differentiable(self.job.model):
                losses = measure_rows(self.job, self.gauge, batch, rows, is_checkpointed=is_tight)[0].double()
                if weight is not None:
                    if not losses.requires_grad:
                        raise SettingError(
                            f"a subspace cannot be learnt by {self.gauge.metrics[0].name!r}, which has no gradient",
                            fix="take a site from which a gradient reaches the logits",
                        )
                    torch.autograd.backward(weight * losses.sum())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tighter = self._room.tighter(len(rows))
            if tighter is None:
                raise exhausted(self.job.model, self.job.pairs, rows[0].pair) from error
            self._room = tighter
            return None
        return float(losses.detach().sum())
