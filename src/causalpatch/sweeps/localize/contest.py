"""``race``: the top candidates, or those above a threshold, from as few pairs as decide it."""

from collections.abc import Iterable

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import SettingError
from causalpatch.experiment import Experiment
from causalpatch.experiment.requests import Request, as_interventions
from causalpatch.experiment.towards import gap_to_source, numbers_towards
from causalpatch.results.race import Race
from causalpatch.statistics.racing import BURN_IN, Racing
from causalpatch.sweeps.localize.budget import Budget, Meter, plain
from causalpatch.sweeps.localize.rounds import Rounds, bounds_of, run_rounds


def race(
    experiment: Experiment,
    candidates: Iterable[Request] | Request,
    *,
    k: int | None = None,
    above: float | None = None,
    alpha: float = 0.05,
    tie: float = 0.0,
    clip: tuple[float, float] | None = None,
) -> Race:
    """Find the ``k`` candidates of the largest |effect|, or all above a threshold, and drop the others early.

    Pairs are drawn in rounds, by independent component and without replacement; after each round candidates are
    accepted, dropped or stay, by intervals that hold for all of them and at all times together. What cannot be told
    apart before the pool ends is *not separable*.

    Args:
        experiment: Model, the pool of pairs, metric and direction; of several metrics the first.
        candidates: Interventions, as for ``Experiment.run``.
        k: How many are looked for; or
        above: the |effect| above which they are, as a share of the pool's gap.
        alpha: Probability that any interval misses its candidate's mean over the pool.
        tie: Width below which intervals count as one, as a share of the gap; the race then ends.
        clip: Effects of a component are moved between these, as shares of the gap, which makes them bounded; the
            target is then the mean of clipped effects, and the share that was clipped is noted.

    Returns:
        How it ended.

    Raises:
        SettingError: Neither or both of ``k`` and ``above`` are given; candidates are alike; or the metric has no
            bounds and the pairs fewer than 31 independent components, so that there are no intervals.
        NoGap: A share of the gap is asked for, and there is none.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model), show_progress=False)
        >>> found = cp.race(experiment, [f"z.3.{head}" for head in range(4)], k=1)
        >>> found.top
        ['z.3.2']

    Cost:
        One run per candidate and pair while it is in the race, and three per pair; at most those of the full grid, and
        two more per pair where ``above``, ``tie`` or ``clip`` need the gap of the pool.

    References:
        See ``causalpatch.statistics.racing``.
    """
    asked, made = as_interventions(candidates), plain(experiment)
    n_components = len(np.unique(made.pairs.components))
    names = [each.label for each in asked]
    bounds = bounds_of(made) if clip is None else (0.0, 1.0)
    _check(names, bounds, n_components)
    with undisturbed():
        gap = _gap(made) if above is not None or tie or clip is not None else 1.0
        if clip is not None:
            bounds = (clip[0] * gap, clip[1] * gap)
        racing = Racing(
            len(asked),
            n_components,
            k=k,
            above=None if above is None else above * gap,
            alpha=alpha,
            bounds=bounds,
            tie=tie * gap,
            by_magnitude=True,
        )
        meter = Meter(made, Budget(np.inf, "runs"))
        raced = run_rounds(meter, asked, names, racing, clip=bounds if clip is not None else None)
    if gap != 1.0:
        meter.spent["runs"] += 2 * len(made.pairs)
    return _result(meter, names, raced, k, above, clip)


def _result(
    meter: Meter,
    names: list[str],
    raced: Rounds,
    k: int | None,
    above: float | None,
    clip: tuple[float, float] | None,
) -> Race:
    racing = raced.racing
    how = (
        "intervals by betting, on bounded values" if racing.bounds else "asymptotic intervals: the metric has no bounds"
    )
    record = dict(meter.effects.provenance) if meter.effects else {}
    notes = list(map(str, record.get("notes", [])))
    if clip is not None:
        share = raced.n_clipped / max(raced.n_values, 1)
        notes.append(f"effects were clipped to {clip[0]:g} and {clip[1]:g} of the gap: {share:.2%} of them")
    if not raced.is_whole:
        notes.append("stopped by the user: what was undecided is not separable")
    n_pairs = len(meter.experiment.pairs)
    record |= {
        "looked_for": f"the top {k}" if above is None else f"all above {above:g} of the gap",
        "above": above,
        "alpha": racing.alpha,
        "intervals": how,
        "gap": abs(float(np.mean(raced.gaps))) if raced.gaps else float("nan"),
        "saved": float(1 - raced.n_pairs.sum() / (len(names) * n_pairs)),
        "runs": int(meter.spent["runs"]),
        "pairs": {**record.get("pairs", {}), "name": meter.experiment.pairs.name, "n": n_pairs},
        "notes": notes,
    }
    numbers = {"status": racing.status, "values": racing.mean, "low": racing.low, "high": racing.high}
    return Race(names, {**numbers, "n_pairs": raced.n_pairs}, racing.best, record)


def _gap(experiment: Experiment) -> float:
    """Return the mean gap of the pool.

    Raises:
        NoGap: There is none.
    """
    gap = gap_to_source(experiment)
    numbers_towards(experiment, gap[None], gap, instead="race(…, k=3)").require_gap()
    return abs(float(gap.mean()))


def _check(names: list[str], bounds: tuple[float, float] | None, n_components: int) -> None:
    if len(names) < 2 or len(set(names)) < len(names):
        raise SettingError(
            "a race needs two candidates or more with different names",
            facts=[("given", ", ".join(names[:6]))],
            fix='race(experiment, ["z.3.0", "z.3.1"], k=1)',
        )
    if bounds is None and n_components <= BURN_IN:
        raise SettingError(
            f"{n_components} independent components are too few for a race by a metric without bounds",
            facts=[("needed", f"more than {BURN_IN}, or a bounded metric, such as probability or top1")],
            fix="measure all of them: experiment.run(candidates)",
        )
