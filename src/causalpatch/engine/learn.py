"""Optimal ablation: for each component the constant that harms the model least, learnt by gradient descent.

    a* = argmin_a  mean over pairs of loss(run with the component set to a)

A component is a site of an intervention. Its constant is the same at all tokens that are patched; constants of sites
that one intervention patches together are learnt together. Interventions are independent of each other and share
forwards.

1. Start at the site's mean over all tokens of the base's prompts; steps are counted in its standard deviations there.
2. Adam on all pairs at once, its rate falling to a tenth. Nothing is drawn, so that the result is reproducible.
3. Of all steps the constants of the smallest loss are kept, by intervention; the mean is among them, so that the loss
   is never above that of mean ablation on the same pairs.

Cost: ``steps`` forwards and backwards of every (intervention, pair), and two forwards per pair.

References:
    Li & Janson 2024, "Optimal ablation for interpretability", 2409.09951.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import NotFinite, SettingError
from causalpatch.engine.batches import in_batches
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.gradient import differentiable, measure_rows, room_for
from causalpatch.engine.job import Cost, Job, batches_of_pairs, lay_rows
from causalpatch.engine.means import Means
from causalpatch.engine.memory import is_out_of_memory, release_memory
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.untouched import Untouched, run_untouched
from causalpatch.engine.values import Row
from causalpatch.metrics import named_metric
from causalpatch.patches import Function, Optimal

Place = tuple[int, Target]
"""A target of an intervention, by the intervention's number."""
_NAME = "constant that is learnt"


@dataclass(frozen=True, eq=False)
class Learnt:
    """Constants that were learnt.

    Args:
        of: The constant of each place, over the site's value axes.
        before: Loss of each intervention with the means, ``(intervention,)``; NaN where nothing was learnt.
        after: The same with the constants.
    """

    of: dict[Place, np.ndarray]
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True, eq=False)
class Start:
    """Where the search for a constant begins.

    Args:
        mean: The site's mean, over its value axes.
        spread: Its standard deviation, the unit of a step.
    """

    mean: Float[Tensor, "*axes"]
    spread: float


def learn_constants(job: Job, value: Optimal, starts: dict[Place, Start], means: Means) -> Learnt:
    """Learn the constants of all places whose value is ``value``.

    Args:
        job: The job; its interventions have no value that is still to be fitted or drawn but this.
        value: The objective and how many steps are made.
        starts: Where the search begins, by place.
        means: Means that other patches of the interventions put in.

    Raises:
        SettingError: The objective spells out answers of several tokens, or has no gradient; or gradients are off for
            good (``torch.inference_mode``).
        NotFinite: The loss is not a number.
        MemoryExhausted: One row does not fit into memory.
    """
    if torch.is_inference_mode_enabled():
        raise SettingError(
            "constants cannot be learnt inside torch.inference_mode(), where nothing has a gradient",
            fix="leave it for this call; inside torch.no_grad() they can be learnt",
        )
    metric = named_metric(value.objective)
    gauge = Gauge([metric], job.pairs, job.model)
    if gauge.forks:
        raise SettingError(
            f"constants cannot be learnt by {metric.name!r}, which spells out answers of several tokens",
            facts=[("pairs", f"'{job.pairs.name}'")],
            fix='Optimal(objective="kl_from_base")',
        )
    sign = -1.0 if metric.is_higher_when_clean("noise" if job.base == "clean" else "denoise") else 1.0
    steps = {place: torch.zeros_like(start.mean, requires_grad=True) for place, start in starts.items()}
    constants = {place: partial(_constant, starts[place], step) for place, step in steps.items()}
    numbers = sorted({number for number, _ in starts})
    opened = [tuple(_open(t, constants.get((number, t))) for t in job.interventions[number]) for number in numbers]
    search = replace(job, interventions=opened, reference=None, n_controls=0)
    descent = _Descent(search, gauge, sign, means)
    best = {place: step.detach().clone() for place, step in steps.items()}
    before, after = (np.full(len(job.interventions), np.nan) for _ in range(2))
    optimizer = torch.optim.Adam(list(steps.values()), lr=value.rate)
    for count in range(value.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = value.rate * (1 - 0.9 * count / max(1, value.steps))
        optimizer.zero_grad()
        losses = descent.losses(with_gradient=count < value.steps)
        for number, loss in zip(numbers, losses, strict=True):
            if count == 0:
                before[number] = loss
            if count == 0 or loss < after[number]:
                after[number] = loss
                best |= {place: step.detach().clone() for place, step in steps.items() if place[0] == number}
        if count < value.steps:
            optimizer.step()
    made = {place: _constant(starts[place], step).double().cpu().numpy() for place, step in best.items()}
    return Learnt(made, before, after)


def _constant(start: Start, step: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return start.mean + start.spread * step


def _open(target: Target, constant: "partial[Tensor] | None") -> Target:
    """Return a target that is given its constant as it is at each step."""
    if constant is None:
        return target

    def give(current: Tensor, _: Tensor) -> Tensor:
        return constant().to(current).expand_as(current)

    return replace(target, value=Function(give, _NAME, needs_source=False))


def _is_ours(target: Target) -> bool:
    return isinstance(target.value, Function) and target.value.name == _NAME


class _Descent:
    """The losses of interventions on all pairs, and their gradients.

    Args:
        job: The interventions, with the constants as they are at each step.
        gauge: The objective.
        sign: 1 where a smaller value of the objective is wanted, else -1.
        means: Means that patches put in.
    """

    def __init__(self, job: Job, gauge: Gauge, sign: float, means: Means) -> None:
        self.job, self.gauge, self.sign = job, gauge, sign
        placer = Placer(job.pairs, job.base)
        self._batches: list[tuple[Untouched, Sequence[Row]]] = []
        counts = np.zeros(len(job.interventions))
        own = {id(target.value) for group in job.interventions for target in group if _is_ours(target)}
        for batch in in_batches(job, batches_of_pairs(job), partial(run_untouched, job, gauge, means, Cost())):
            rows, _ = lay_rows(job, placer, batch.indices)
            batch.known.tried.update(own)  # constants do not look at other tokens
            self._batches.append((batch, rows))
            counts += np.bincount([row.intervention for row in rows], minlength=len(counts))
        self._counts = torch.as_tensor(np.maximum(counts, 1), device=job.model.device)
        self._room = room_for(job)

    def losses(self, *, with_gradient: bool) -> np.ndarray:
        """Return the mean loss of each intervention over its pairs; add up gradients.

        Raises:
            NotFinite: A loss is NaN or infinite.
        """
        total = torch.zeros(len(self._counts), dtype=torch.float64, device=self._counts.device)
        for batch, rows in self._batches:
            begin = 0
            while begin < len(rows):
                some = rows[begin : begin + self._room.rows]
                found = self._try(batch, some, with_gradient=with_gradient)
                if found is None:
                    release_memory()
                    continue
                total.index_add_(0, torch.tensor([row.intervention for row in some], device=total.device), found)
                begin += len(some)
        losses: np.ndarray = (total / self._counts).cpu().numpy()
        if not np.isfinite(losses).all():
            raise NotFinite(
                f"the loss {self.gauge.metrics[0].name!r} of an optimal constant is {losses[~np.isfinite(losses)][0]}",
                facts=[("model", f"'{self.job.model.name}' in {self.job.model.dtype}")],
                fix="learn more slowly: Optimal(rate=0.01), or open the model in float32",
            )
        return losses

    def _try(self, batch: Untouched, rows: Sequence[Row], *, with_gradient: bool) -> Float[Tensor, " row"] | None:
        """Return the losses of some rows; None where memory ran out and may not the next time."""
        numbers = torch.tensor([row.intervention for row in rows], device=self._counts.device)
        try:
            with differentiable(self.job.model):
                is_tight = self._room.is_checkpointed and with_gradient
                found = measure_rows(self.job, self.gauge, batch, rows, is_checkpointed=is_tight)
                losses = self.sign * found[0].double()
                if not losses.requires_grad:
                    raise SettingError(
                        f"constants cannot be learnt by {self.gauge.metrics[0].name!r}, which has no gradient",
                        fix='Optimal(objective="kl_from_base")',
                    )
                if with_gradient:
                    torch.autograd.backward((losses / self._counts[numbers]).sum())
        except Exception as error:
            tighter = self._room.tighter(len(rows)) if is_out_of_memory(error) else None
            if tighter is None:
                raise
            self._room = tighter
            return None
        return losses.detach()
