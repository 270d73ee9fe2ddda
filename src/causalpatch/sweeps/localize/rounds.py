"""Runs in rounds: pairs are drawn by independent component, and candidates leave the race when they are decided."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from causalpatch.base.seeds import generator
from causalpatch.experiment import Experiment
from causalpatch.experiment.towards import towards
from causalpatch.patches import Intervention
from causalpatch.statistics.racing import Racing, rounds
from causalpatch.sweeps.localize.budget import Meter


def bounds_of(experiment: Experiment) -> tuple[float, float] | None:
    """Return between which values the effect on a component lies, in the metric's unit; None where that is open.

    Pairs of a component count together, as ``sum over its pairs * n_components / n_pairs``.
    """
    bounds = experiment.metrics[0].bounds
    if bounds is None or not np.isfinite(bounds).all():
        return None
    _, sizes = np.unique(experiment.pairs.components, return_counts=True)
    span = float(bounds[1] - bounds[0]) * float(sizes.max()) * len(sizes) / float(sizes.sum())
    return -span, span


@dataclass(eq=False)
class Rounds:
    """What a race has measured.

    Args:
        racing: The race, ended.
        n_pairs: Pairs that each candidate was measured on, (candidate,).
        gaps: Gap of each pair that was seen, in the metric's unit, in the order in which they were drawn.
        n_clipped: How many values were clipped.
        n_values: Of how many.
        moved: Effects of each candidate in the direction of the gap, in the metric's unit, (candidate, pair); NaN where
            it was not measured.
        is_whole: Whether it ended by itself, not for lack of budget.
    """

    racing: Racing
    n_pairs: np.ndarray
    moved: np.ndarray
    gaps: list[float] = field(default_factory=list)
    n_clipped: int = 0
    n_values: int = 0
    is_whole: bool = True


def run_rounds(
    meter: Meter,
    interventions: Sequence[Intervention],
    names: Sequence[str],
    racing: Racing,
    clip: tuple[float, float] | None = None,
) -> Rounds:
    """Race interventions on components of the experiment's pairs, drawn in random order by its seed.

    Args:
        meter: Makes the runs, as far as the budget allows.
        interventions: The candidates.
        names: Their names.
        racing: The race, not begun.
        clip: Values of a component outside are moved to the nearer end, in the metric's unit.
    """
    experiment = meter.experiment
    components = experiment.pairs.components
    order = generator(experiment.seed, "race").permutation(np.unique(components))
    weight = len(order) / len(components)
    shape = len(interventions), len(components)
    made = Rounds(racing, np.zeros(shape[0], dtype=np.int64), np.full(shape, np.nan))
    begin = 0
    for size in rounds(len(order)):
        rows, drawn = racing.running, order[begin : begin + size]
        if not len(rows):
            break
        chosen = np.flatnonzero(np.isin(components, drawn))
        pairs = experiment.pairs.take(chosen)
        asked = [interventions[row] for row in rows]
        if meter.fitting(asked, pairs) < len(asked):
            made.is_whole = False
            break
        effects = meter.run(asked, [names[row] for row in rows], pairs)
        if not effects.is_complete:
            made.is_whole = False
            break
        moved = towards(experiment, effects)
        made.moved[np.ix_(rows, chosen)] = moved
        member = components[chosen][None] == drawn[:, None]
        values = weight * moved @ member.T
        if clip is not None:
            made.n_clipped += int(((values < clip[0]) | (values > clip[1])).sum())
            values = np.clip(values, *clip)
        made.n_values += values.size
        racing.add(values)
        made.n_pairs[rows] += len(chosen)
        data = effects.to_xarray()
        made.gaps += (data["baseline_clean"] - data["baseline_corrupt"]).values.reshape(-1).tolist()
        begin += size
    racing.stop()
    return made
