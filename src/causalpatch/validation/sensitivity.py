"""How far a claim depends on choices: the metric, what stands for absence, how much of the source is put in.

1. *Other metrics*: the same runs, read by others; one run feeds them all.
2. *Other corruptions*: components ablated in clean runs by other pairs' values, or by means that were fitted on the
   discovery pairs. Shares are of the pairs' own gap, so that corruptions can be compared with each other.
3. *Dose*: ``base + dose (source - base)``, for each component and for the set.
"""

from collections.abc import Sequence
from typing import Any, Final

from causalpatch.base.errors import CausalPatchError, NoGap, PairError
from causalpatch.experiment import Experiment
from causalpatch.experiment.requests import as_metrics, reads_both_answers
from causalpatch.metrics import Metric
from causalpatch.pairs import Pairs
from causalpatch.patches import Fitted, Interpolate, Mean, Resample, Subspace, Value
from causalpatch.patches.value import as_value, needs_fitting
from causalpatch.results.claim import Check
from causalpatch.validation.bench import Bench
from causalpatch.validation.components import Member, Wire
from causalpatch.validation.controls import with_joint
from causalpatch.validation.findings import interval_rows, numbers_of

_MORE_METRICS: Final = ("log_probability", "probability_difference")


def with_more_metrics(experiment: Experiment, asked: Sequence[Metric | str] | None) -> Experiment:
    """Return the experiment with further metrics behind its own.

    Args:
        experiment: The experiment.
        asked: The further ones; by default those that read the same answers, if its first metric reads both of one
            token each.
    """
    own = experiment.metrics
    if asked is None:
        first = own[0]
        fits = reads_both_answers(first, experiment.pairs) and first.generates is None and bool(first.answers)
        at = "" if first.position == -1 else f"@{first.position}"
        asked = [f"{name}{at}" for name in _MORE_METRICS] if fits else []
    known = {metric.name for metric in own}
    more = [metric for metric in (as_metrics(list(asked)) if asked else ()) if metric.name not in known]
    return experiment.measuring([*own, *more])


def other_metrics(bench: Bench, members: Sequence[Member], value: Value | None, test: dict[str, Any]) -> Check:
    """Read the claim's own runs by the other metrics."""
    names, sets = with_joint(members)
    rows: list[dict[str, Any]] = []
    for number, metric in enumerate(bench.experiment.metrics):
        if number == 0:
            continue
        try:
            numbers_of(bench, bench.gap(number)[None], number).require_gap()
        except NoGap as error:
            rows.append({"metric": metric.name, "component": names[-1], "share": None, "problem": error.what})
            continue
        made = interval_rows(bench.effects(sets, value, number), bench.gap(number), bench.group, test)
        rows += [{"metric": metric.name, "component": name, **row} for name, row in zip(names, made, strict=True)]
    return Check("other metrics", tuple(rows), skipped="" if rows else "no other metric reads these answers")


def other_corruptions(
    bench: Bench,
    members: Sequence[Member],
    asked: Sequence[Value | str] | None,
    found_on: Pairs | None,
    test: dict[str, Any],
) -> tuple[Check, int]:
    """Ablate components in clean runs by other values than the pairs' own.

    Args:
        bench: For the experiment.
        members: The set.
        asked: The values; by default other pairs' values, and means where there are discovery pairs to fit them on.
        found_on: The discovery pairs.
        test: Of the minimum-effect test.

    Returns:
        The check, and how many runs it took.

    Raises:
        PairError: A value would be fitted on the pairs that are measured.
    """
    name = "other corruptions"
    if isinstance(members[0], Wire):
        return Check(name, skipped="edges carry values of the source run"), 0
    if asked is None:
        means = [] if found_on is None else [_mean_for(bench.experiment.pairs, found_on)]
        asked = [Resample(seed=bench.experiment.seed), *means]
    if not asked:
        return Check(name, skipped="none was asked for"), 0
    noising = Bench(bench.experiment.turned("noise").measuring(bench.experiment.metrics[:1]), found_on=found_on)
    names, sets = with_joint(members)
    rows: list[dict[str, Any]] = []
    for value in map(as_value, asked):
        require_not_fitted_here(value, noising.experiment.pairs, found_on)
        try:
            effects = noising.effects(sets, value)
        except CausalPatchError as error:
            rows.append({"value": str(value), "component": names[-1], "share": None, "problem": error.what})
            continue
        made = interval_rows(effects, noising.gap(), noising.group, test)
        rows += [{"value": str(value), "component": one, **row} for one, row in zip(names, made, strict=True)]
    return Check(name, tuple(rows)), noising.n_runs


def dose_response(bench: Bench, members: Sequence[Member], doses: Sequence[float], test: dict[str, Any]) -> Check:
    """Put in a part of the way from base to source.

    Args:
        bench: Where sets are measured.
        members: The set.
        doses: Shares of the way.
        test: Of the minimum-effect test, for the intervals at each dose.
    """
    if not doses or isinstance(members[0], Wire):
        return Check("dose", skipped="none was asked for, or edges are meant")
    names, sets = with_joint(members)
    rows: list[dict[str, Any]] = []
    for dose in sorted({*map(float, doses), 1.0}):
        effects = bench.effects(sets, None if dose == 1 else Interpolate(dose))
        made = interval_rows(effects, bench.gap(), bench.group, test)
        rows += [{"component": name, "dose": dose, **row} for name, row in zip(names, made, strict=True)]
    return Check("dose", tuple(sorted(rows, key=lambda row: (names.index(row["component"]), row["dose"]))))


def _mean_for(pairs: Pairs, found_on: Pairs) -> Mean:
    """Return the mean that prompts can have: by position, unless some are longer than all that it is fitted on."""
    if pairs.kind == "arrays":
        return Mean()
    has_all = pairs.lengths("clean").max() <= found_on.lengths("corrupt").max()
    return Mean() if has_all else Mean("positions")


def require_not_fitted_here(value: Value, pairs: Pairs, found_on: Pairs | None) -> None:
    """Make sure that a value was not, and is not, fitted on the pairs that it is measured on.

    Args:
        value: The value.
        pairs: The held-out pairs.
        found_on: The discovery pairs, on which what is not fitted yet would be.

    Raises:
        PairError: It was fitted on these pairs, or there are no others to fit it on.
    """
    held = value.of if isinstance(value, Subspace) else value
    records = [one.on for one in (value, held) if isinstance(one, Subspace | Fitted) and one.on is not None]
    here = next((record for record in records if record.hash == pairs.content_hash), None)
    if here is not None:
        raise PairError(
            f"'{value}' was fitted on the pairs that shall confirm it",
            facts=[("pairs", f"{here.n_pairs} of '{here.name}'")],
            fix="fit it on discovery pairs: experiment.fit(…), learn_subspace(…)",
        )
    if needs_fitting(value) and found_on is None:
        raise PairError(
            f"'{value}' would be fitted on the pairs that shall confirm it",
            facts=[("discovery pairs", "none were given")],
            fix="confirm(…, found_on=discovery)",
        )
