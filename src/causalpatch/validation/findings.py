"""From effects on every pair to what is found of each component: share, interval, p, verdict, and how pairs spread."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from causalpatch.experiment.towards import numbers_towards
from causalpatch.results.claim import Finding
from causalpatch.results.claim_words import why_inconclusive
from causalpatch.results.shares import Numbers, component_sums
from causalpatch.statistics.agreement import sign_agreement
from causalpatch.statistics.intervals import MIN_GROUPS, NO_GAP, TOO_FEW
from causalpatch.statistics.verdicts import INCONCLUSIVE, MinimumEffect, minimum_effect
from causalpatch.validation.bench import Bench


def find(
    names: Sequence[str],
    effects: np.ndarray,
    gap: np.ndarray,
    group: np.ndarray,
    tested: MinimumEffect,
    discovery: Sequence[float | None],
) -> list[Finding]:
    """Return what is found of each component.

    Args:
        names: Of the components, the set as the last where there is one.
        effects: Effects in the direction of the gap, (component, pair).
        gap: Gap of each pair.
        group: Independent component of each pair.
        tested: The test of all of them.
        discovery: Share of each on the pairs that it was found on, where known.
    """
    own = own_shares(effects, gap)
    agreement = sign_agreement(effects)
    verdicts = tested.verdicts
    found = []
    for place, name in enumerate(names):
        known = own[place][np.isfinite(own[place])]
        low, high, p = (float(each[place]) for each in (tested.low, tested.high, tested.p))
        note = TOO_FEW if tested.n_groups[place] < MIN_GROUPS else NO_GAP
        why = why_inconclusive(low, high, p, tested.delta, tested.alpha, note)
        p10, p50, p90 = np.quantile(known, (0.1, 0.5, 0.9)).tolist() if len(known) else (np.nan,) * 3
        side = np.sign(tested.share[place])
        found.append(
            Finding(
                component=name,
                share=float(tested.share[place]),
                low=low,
                high=high,
                low_inner=float(tested.low_inner[place]),
                high_inner=float(tested.high_inner[place]),
                p=p,
                verdict=verdicts[place],
                why=why if verdicts[place] == INCONCLUSIVE else "",
                agreement=float(agreement[place]),
                p10=p10,
                p50=p50,
                p90=p90,
                beyond=float((side * known > tested.delta).mean()) if len(known) else np.nan,
                spread=_spread(effects[place], gap, group),
                skew=float(tested.skew[place]),
                is_approximate=bool(tested.is_approximate[place]),
                n_pairs=int(np.isfinite(effects[place]).sum()),
                n_components=int(tested.n_groups[place]),
                discovery=discovery[place],
            )
        )
    return found


def numbers_of(bench: Bench, effects: np.ndarray, metric: int = 0) -> Numbers:
    """Return effects as the numbers of a sweep, to ask whether there is a gap.

    Args:
        bench: Where they were measured.
        effects: Effects in the direction of the gap, (set, pair).
        metric: Number of the metric.
    """
    return numbers_towards(bench.experiment, effects, bench.gap(metric), metric)


def share_of(effects: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Return shares, (set,): ratios of means over the pairs that were measured; NaN where none was."""
    known = np.isfinite(effects)
    top, bottom = np.where(known, effects, 0.0).sum(-1), (known * gap).sum(-1)
    share: np.ndarray = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom != 0)
    return share


def own_shares(effects: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Return each pair's own share, (set, pair); NaN where its gap is below a thousandth of the mean |gap|."""
    least = 1e-3 * float(np.abs(gap).mean())
    own: np.ndarray = effects / np.where(np.abs(gap) < least, np.nan, gap)
    return own


def interval_rows(
    effects: np.ndarray, gap: np.ndarray, group: np.ndarray, test: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return share, simultaneous interval and verdict of each row of effects, as a table.

    Args:
        effects: Effects in the direction of the gap, (row, pair).
        gap: Gap of each pair.
        group: Independent component of each pair.
        test: ``delta``, ``alpha``, ``n_draws`` and ``seed`` of the test.
    """
    tested = minimum_effect(effects, gap, group, **test)
    return [
        {"share": float(share), "low": float(low), "high": float(high), "verdict": str(verdict)}
        for share, low, high, verdict in zip(tested.share, tested.low, tested.high, tested.verdicts, strict=True)
    ]


def _spread(effects: np.ndarray, gap: np.ndarray, group: np.ndarray) -> float:
    """Return the standard deviation of the shares of independent components."""
    known = np.isfinite(effects)
    top = component_sums(np.where(known, effects, 0.0)[None], group)[0]
    bottom = component_sums((known * gap)[None], group)[0]
    shares = top[bottom > 0] / bottom[bottom > 0]
    return float(shares.std(ddof=1)) if len(shares) > 1 else float("nan")
