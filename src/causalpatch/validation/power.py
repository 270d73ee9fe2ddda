"""Power: how many new independent components of pairs a claim needs, from a pilot's spread and its uncertainty."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from causalpatch.attribution.confirm import COARSE, FINE
from causalpatch.base.errors import PairError, SettingError
from causalpatch.results.claim import TOGETHER, Claim
from causalpatch.results.effects import Effects
from causalpatch.results.labels import cell_text
from causalpatch.results.planning import Power
from causalpatch.statistics.clusters import group_sums
from causalpatch.statistics.power import groups_for, power_with, spread_interval

_CURVE: Final = (10, 15, 20, 30, 40, 60, 80, 120, 200, 400)
_LEVEL: Final = 0.8
_FEWEST: Final = 3  # groups of a pilot: with two a spread is anyone's guess


def power(
    pilot: Effects | Claim,
    *,
    effect: float | None = None,
    delta: float | None = None,
    alpha: float = 0.05,
    n_components: int | None = None,
    target: float = 0.8,
) -> Power:
    """Say how many independent components of new pairs it takes to find a share of a given size.

    No power is computed for what the pilot found: the size is yours to name, and the pilot only says how far shares
    spread.

    Args:
        pilot: Effects of a sweep on other pairs, for its largest cells; or a claim, for its components.
        effect: The share of the gap to be found; twice ``delta`` by default.
        delta: Share that does not count; as for ``confirm``, or the claim's own.
        alpha: Probability of even one wrong *supported*.
        n_components: How many components will be sent to confirmation; five of a sweep by default.
        target: The power.

    Raises:
        PairError: The pilot has fewer than three independent components of pairs.
        SettingError: The effect does not lie beyond ``delta``, or a number is impossible.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> pilot = cp.sweep(cp.Experiment(model, cp.load_pairs("ioi", model)[:12]), "z@-1")
        >>> plan = cp.power(pilot, n_components=2)
        >>> plan.needed <= plan.needed_at_most
        True
    """
    names, effects, gap, group, own, origin = _pilot(pilot, n_components)
    delta = own if delta is None else delta
    effect = 2 * delta if effect is None else effect
    if not effect > delta >= 0 or not 0 < target < 1 or not 0 < alpha < 0.5:
        raise SettingError(
            "no number of pairs finds that",
            facts=[("effect", f"{effect:g}, needed: above delta {delta:g}"), ("power", f"{target:g}, between 0 and 1")],
            fix="power(pilot, effect=0.2, delta=0.1, target=0.8)",
        )
    n_groups = len(np.unique(group))
    if n_groups < _FEWEST:
        raise PairError(
            f"a pilot of {n_groups} independent components says nothing of how far shares spread",
            facts=[("needed", f"{_FEWEST} or more, better 10")],
            fix="measure more independent pairs",
        )
    n_tests = len(names) + (len(names) > 1)  # all together are tested too
    rows: list[dict[str, Any]] = []
    for name, spread in zip(names, _spreads(effects, gap, group, effect - delta), strict=True):
        low, high = spread_interval(spread, n_groups, _LEVEL)
        needed = [
            groups_for(each, effect - delta, target, n_tests=n_tests, alpha=alpha) for each in (spread, low, high)
        ]
        told = dict(zip(("needed", "needed_low", "needed_high"), needed, strict=True))
        rows.append({"component": name, "spread": spread, "low": low, "high": high, **told})
    widest = max(rows, key=lambda row: row["spread"])
    curve: list[dict[str, Any]] = []
    for n in _CURVE:
        ends = [
            power_with(widest[end], effect - delta, n, n_tests=n_tests, alpha=alpha)
            for end in ("spread", "high", "low")
        ]
        curve.append(dict(zip(("n", "power", "low", "high"), (n, *ends), strict=True)))
    about = {**origin, "n_components": n_groups}
    return Power(tuple(rows), tuple(curve), effect, delta, alpha, target, _LEVEL, about)


def _spreads(effects: np.ndarray, gap: np.ndarray, group: np.ndarray, margin: float) -> list[float]:
    """Return each share's standard deviation between groups, were it ``margin`` beyond delta."""
    known = np.isfinite(effects)
    bottom = (known * gap).sum(-1, keepdims=True)
    share = np.where(known, effects, 0.0).sum(-1, keepdims=True) / bottom
    data = group_sums((effects - share * gap + margin * gap, gap), group)
    (moves, _), (_, mean_gap) = data.moves(), data.means()
    return [float(each) for each in np.sqrt(data.n_groups * (moves**2).sum(-1)) / np.abs(mean_gap)]


def _pilot(
    pilot: Effects | Claim, n_components: int | None
) -> tuple[Sequence[str], np.ndarray, np.ndarray, np.ndarray, float, dict[str, str]]:
    """Return names, effects and gap of a pilot, its groups, its own delta, and the name of its pairs."""
    if isinstance(pilot, Claim):
        single = [place for place, each in enumerate(pilot.findings) if each.component != TOGETHER]
        names = [pilot.findings[place].component for place in single]
        return names, pilot.effects[single], pilot.gap, pilot.group, pilot.delta, {"name": pilot.spec["pairs"]["name"]}
    whole = pilot.over_draws()
    one = whole.metric(whole.metrics[0])
    share = np.abs(one.recovered().values.reshape(-1))
    effects = one.effect(per_pair=True).values.reshape(len(share), -1) * (1 if one.direction == "denoise" else -1)
    data = one.to_xarray()
    gap = (data["baseline_clean"] - data["baseline_reference"]).values
    count = 5 if n_components is None else n_components
    order = np.argsort(-np.nan_to_num(share), kind="stable")[: max(count, 1)]
    places = np.unravel_index(order, tuple(data.sizes[axis] for axis in one.axes))
    held = [
        {axis: data[axis].values[at[n]] for axis, at in zip(one.axes, places, strict=True)} for n in range(len(order))
    ]
    fine = bool({"neuron", "feature"} & set(one.axes))
    origin = {"name": str(pilot.provenance["pairs"]["name"])}
    names = [cell_text(cell, {}) for cell in held]
    return names, effects[order], gap, data["component"].values, FINE if fine else COARSE, origin
