"""Budgets: how much a search may spend, what it has spent, and runs that are made only where they fit.

A run is one forward of one prompt: an intervention on a pair, an untouched run, or a control; a backward counts as
two. Before anything runs its cost is known from ``Experiment.plan``: runs exactly, floating-point operations by the
engine's own count. Seconds are foretold from the runs before, with half as much again to be safe.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from causalpatch.base.errors import SettingError
from causalpatch.engine import Plan
from causalpatch.experiment import Experiment
from causalpatch.experiment.subset import with_pairs
from causalpatch.pairs import Pairs
from causalpatch.patches import Intervention, Value
from causalpatch.results.effects import Effects
from causalpatch.sweeps.localize.values import Filling

Unit = Literal["runs", "seconds", "FLOP"]
_UNITS: Final[dict[str, tuple[Unit, float]]] = {
    **dict.fromkeys(("", "run", "runs", "forward", "forwards", "row", "rows"), ("runs", 1.0)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
    **{f"{prefix}flop": ("FLOP", times) for prefix, times in (("", 1.0), ("g", 1e9), ("t", 1e12), ("p", 1e15))},
}
_WRITTEN = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]*)?(?:e\+?[0-9]+)?)\s*([a-z]*)")
_SAFE: Final = 1.5  # times what the runs before took


@dataclass(frozen=True)
class Budget:
    """How much may be spent.

    Args:
        amount: How much.
        unit: ``"runs"`` (forwards of one prompt), ``"seconds"`` or ``"FLOP"`` (two per multiplication and addition).
    """

    amount: float
    unit: Unit

    @classmethod
    def of(cls, asked: "Budget | int | float | str") -> "Budget":
        """Read a budget: a number of runs, or a text such as ``"5 min"``.

        Raises:
            SettingError: It is none, or nothing can be had for it.
        """
        if isinstance(asked, Budget):
            return asked
        found = _WRITTEN.fullmatch(str(asked).strip().lower()) if not isinstance(asked, bool) else None
        if found is None or found[2] not in _UNITS or not float(found[1].replace(",", "").replace("_", "")) > 0:
            raise SettingError(
                f"budget={asked!r} is not a budget",
                facts=[("units", "runs (or forwards), s, min, h, FLOP, GFLOP, TFLOP, PFLOP")],
                fix='budget=2000, or budget="5 min"',
            )
        unit, times = _UNITS[found[2]]
        return cls(float(found[1].replace(",", "").replace("_", "")) * times, unit)

    def __str__(self) -> str:
        amount = f"{self.amount:.4g}" if self.unit == "FLOP" else f"{self.amount:,.{0 if self.amount >= 10 else 1}f}"
        return f"{amount} {self.unit}"


@dataclass
class Meter:
    """Makes runs of an experiment as far as a budget allows, and counts what they take.

    Args:
        experiment: Model, pairs, metric and direction.
        budget: What may be spent.
        value: What is put in; None for what interventions say themselves.
        reserve: What is kept for later, in the budget's unit.
    """

    experiment: Experiment
    budget: Budget
    value: Value | None = None
    reserve: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: {"runs": 0.0, "seconds": 0.0, "FLOP": 0.0})
    effects: Effects | None = None
    is_stopped: bool = False

    def __post_init__(self) -> None:
        self.filling = Filling(self.experiment, self.value)
        self._started = time.perf_counter()
        self._per_run, self._per_call = 0.0, 0.0  # seconds of the last runs, and of the quickest call
        self._tier = ""
        self._whole = 0.0  # floating-point operations of a forward of one prompt

    @property
    def left(self) -> float:
        """What may still be spent now, in the budget's unit."""
        if self.budget.unit == "seconds":
            self.spent["seconds"] = time.perf_counter() - self._started
        return self.budget.amount - self.spent[self.budget.unit] - self.reserve

    def cost(self, interventions: Sequence[Intervention], pairs: Pairs | None = None) -> float:
        """Return what some runs take, in the budget's unit; at least, where it is seconds and nothing has run yet."""
        plan = self._on(pairs).plan(self.filling.plain(interventions))
        self._whole = plan.flops / max(plan.rows, 1)
        n_to_fit = self.filling.n_to_fit(interventions)
        if self.budget.unit == "runs":
            return float(plan.rows + n_to_fit)
        if self.budget.unit == "FLOP":
            return _flops(plan, self._tier or plan.tier) + self.flops_of(n_to_fit)
        return max((plan.rows + n_to_fit) * self._per_run * _SAFE, self._per_call, plan.seconds or 0.0)

    def flops_of(self, runs: float) -> float:
        """Return the floating-point operations of so many forwards of a prompt, on the mean over pairs."""
        return self._whole * runs

    def has(self, runs: float) -> bool:
        """Say whether so many whole forwards of a prompt may still be made."""
        cost = {"runs": runs, "FLOP": self.flops_of(runs), "seconds": runs * self._per_run * _SAFE}
        return cost[self.budget.unit] <= self.left

    def fitting(self, interventions: Sequence[Intervention], pairs: Pairs | None = None) -> int:
        """Return how many of some interventions, the first ones, can be run."""
        if self.is_stopped or not interventions:
            return 0
        left, fits, too_many = self.left, 0, len(interventions) + 1
        tried = len(interventions)
        while fits + 1 < too_many:
            cost = self.cost(interventions[:tried], pairs)
            fits, too_many = (tried, too_many) if cost <= left else (fits, tried)
            # Costs grow evenly but for what every call adds, so that the share that fits is nearly known.
            guess = int(tried * left / cost) if cost > left > 0 else (fits + too_many) // 2
            tried = min(max(guess, fits + 1), max(too_many - 1, fits + 1))
        return fits

    def run(self, interventions: Sequence[Intervention], names: Sequence[str], pairs: Pairs | None = None) -> Effects:
        """Make runs, which must fit, and count them."""
        experiment = self._on(pairs)
        n_to_fit = self.filling.n_to_fit(interventions)
        started = time.perf_counter()
        filled = self.filling.filled(interventions)
        plan = experiment.plan(filled)
        found = experiment.run(filled, axes={"intervention": list(names)}, title="parts of the model")
        self.is_stopped |= not found.is_complete
        self._tier = str(found.provenance["engine"].get("tier") or plan.tier)
        n_runs, flops = found.provenance["cost"]["rows"] + n_to_fit, _flops(plan, self._tier) + self.flops_of(n_to_fit)
        self.count(n_runs, flops, time.perf_counter() - started)
        self.effects = self.effects or found
        return found

    def count_baseline(self) -> None:
        """Make the untouched runs, and count them, two of each pair."""
        started = time.perf_counter()
        n_runs = 2 * len(self.experiment.baseline.clean[0])
        self.count(n_runs, self.flops_of(n_runs), time.perf_counter() - started)

    def count(self, runs: float, flops: float, seconds: float) -> None:
        """Count what was made elsewhere."""
        self.spent["runs"] += runs
        self.spent["FLOP"] += flops
        self._per_run = seconds / max(runs, 1)
        self._per_call = min(self._per_call or seconds, seconds)
        self.spent["seconds"] = time.perf_counter() - self._started

    def _on(self, pairs: Pairs | None) -> Experiment:
        return self.experiment if pairs is None else with_pairs(self.experiment, pairs)


def plain(experiment: Experiment) -> Experiment:
    """Return an experiment with its first metric, at the precision of the model: a screen would hide small effects."""
    made = experiment.measuring(experiment.metrics[:1])
    made.precision = None
    return made


def _flops(plan: Plan, tier: str) -> float:
    """Return the operations of a plan by an engine; those of whole forwards where they are not known."""
    return float(plan.flops_of.get(tier, plan.flops))
