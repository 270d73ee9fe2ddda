"""Double dissociation: one component does for one behaviour what another one does for another, as one contrast.

    contrast = [share of a - share of b] on the first behaviour + [share of b - share of a] on the second

Two claims on pairs of their own have measured everything that it takes: nothing is run and no pairs are opened again.
Each holds both components, or one, whose effect on the other behaviour its specificity has measured. Differences within
a behaviour are ratios of means on the same pairs; the behaviours are independent, so that their variances add up.
Supported: the interval lies wholly above ``2 delta``.

References:
    Welch (1947), The generalization of Student's problem when several different population variances are involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from causalpatch.base.errors import PairError, SettingError
from causalpatch.base.extras import lazy
from causalpatch.results import dissociation_chart
from causalpatch.results.claim import Claim
from causalpatch.results.words import joined, percent
from causalpatch.statistics.clusters import group_sums
from causalpatch.statistics.intervals import ENOUGH_GROUPS
from causalpatch.statistics.verdicts import INCONCLUSIVE, SUPPORTED

if TYPE_CHECKING:
    from scipy import special

    from causalpatch.results.pictures import Picture
else:
    special = lazy("scipy.special")


@dataclass(frozen=True)
class Dissociation:
    """A double dissociation of two components by two behaviours.

    Args:
        first: The component of the first behaviour.
        second: That of the second.
        shares: Share of the gap of each component in each behaviour, ``{behaviour: {component: share}}``.
        ends: Ends of the interval of each of these by itself, likewise.
        contrast: The interaction contrast, a share of the gap.
        low: Lower end of its interval.
        high: Upper end.
        delta: Share that does not count; the contrast must lie beyond twice of it.
        level: Coverage of the interval.
        n_components: Independent components of pairs in each behaviour.
        verdict: *supported* or *inconclusive*.
        why: Why it is inconclusive.
    """

    first: str
    second: str
    shares: Mapping[str, Mapping[str, float]]
    ends: Mapping[str, Mapping[str, tuple[float, float]]]
    contrast: float
    low: float
    high: float
    delta: float
    level: float
    n_components: tuple[int, int]
    verdict: str
    why: str = ""

    def plot(self) -> Picture:
        """Draw each component's share of each behaviour with its interval, and the contrast against ``2 delta``."""
        rows = [
            {"behaviour": behaviour, "component": name, "share": share, "low": low, "high": high}
            for behaviour, shares in self.shares.items()
            for (name, share), (low, high) in zip(shares.items(), self.ends[behaviour].values(), strict=True)
        ]
        numbers = {"contrast": self.contrast, "low": self.low, "high": self.high}
        independent = joined([f"{n} of '{name}'" for name, n in zip(self.shares, self.n_components, strict=True)])
        lines = [
            f"{percent(self.level)} intervals, each by itself · independent components: {independent}",
            f"grey: up to delta, {self.delta:g} of the gap; of the contrast up to twice that",
            *([f"inconclusive because {self.why}"] if self.why else []),
        ]
        title = f"{self.verdict}: double dissociation of {self.first} and {self.second}"
        return dissociation_chart.draw(rows, numbers, self.delta, title=title, lines=lines)

    def __str__(self) -> str:
        lines = [
            f"{self.verdict}: double dissociation of {self.first} and {self.second}, contrast {self.contrast:.3f} "
            f"({percent(self.level)} interval {self.low:.3f} to {self.high:.3f}), against {2 * self.delta:g}"
        ]
        for behaviour, shares in self.shares.items():
            lines.append(f"  '{behaviour}': " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
        lines += [f"inconclusive because {self.why}"] if self.why else []
        if min(self.n_components) < ENOUGH_GROUPS:
            lines.append(f"limit: approximate, with {' and '.join(map(str, self.n_components))} independent components")
        return "\n".join(lines)


def dissociate(first: Claim, second: Claim, a: str, b: str) -> Dissociation:
    """Test the double dissociation of two components by two claims.

    Args:
        first: A claim on the behaviour that ``a`` is for. It holds both components; or it holds ``a``, and ``second``
            was made with this claim's pairs among ``unrelated=``.
        second: A claim on the behaviour that ``b`` is for, likewise.
        a: The component of the first behaviour.
        b: That of the second.

    Raises:
        SettingError: A component was not measured on both behaviours, or the claims are of different models, directions
            or deltas.
        PairError: Both claims are on the same pairs.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> heads = ["z.3.1@-1", "z.3.2@-1"]
        >>> def on(task):
        ...     experiment = cp.Experiment(model, cp.load_pairs(task, model))
        ...     return cp.confirm(experiment, heads, ledger="openings.jsonl", checks=cp.Checks.none())
        >>> cp.dissociate(on("ioi"), on("agreement"), "z.3.2@-1", "z.3.1@-1").verdict in ("supported", "inconclusive")
        True
    """
    _require_alike(first, second, a, b)
    parts = [_difference(*asked) for asked in ((first, second, (a, b)), (second, first, (b, a)))]
    contrast = sum(part.difference for part in parts)
    variances = np.array([part.variance for part in parts])
    freedoms = np.array([part.n - 1 for part in parts])
    total = float(variances.sum())
    freedom = total**2 / float((variances**2 / freedoms).sum()) if total > 0 else float(freedoms.min())
    alpha, delta = float(first.spec["alpha"]), first.delta
    wide = float(special.stdtrit(freedom, 1 - alpha / 2)) * np.sqrt(total)
    low, high = float(contrast - wide), float(contrast + wide)
    why = "reused hold-out" if first.reused or second.reused else ""
    if not why and not low > 2 * delta:
        why = f"the interval does not lie above {2 * delta:g}"
    return Dissociation(
        first=a,
        second=b,
        shares={part.behaviour: {name: part.shares[name] for name in (a, b)} for part in parts},
        ends={part.behaviour: {name: part.ends(name, alpha) for name in (a, b)} for part in parts},
        contrast=float(contrast),
        low=low,
        high=high,
        delta=delta,
        level=1 - alpha,
        n_components=(parts[0].n, parts[1].n),
        verdict=INCONCLUSIVE if why else SUPPORTED,
        why=why,
    )


@dataclass(frozen=True)
class _Difference:
    """The difference of two shares in one behaviour.

    Args:
        behaviour: Its name.
        shares: Of both components.
        errors: Their standard errors.
        difference: Of the first and the second.
        variance: Of the difference.
        n: Independent components of pairs.
    """

    behaviour: str
    shares: Mapping[str, float]
    errors: Mapping[str, float]
    difference: float
    variance: float
    n: int

    def ends(self, name: str, alpha: float) -> tuple[float, float]:
        """Return the ends of the interval of a share by itself."""
        wide = float(special.stdtrit(self.n - 1, 1 - alpha / 2)) * self.errors[name]
        return self.shares[name] - wide, self.shares[name] + wide


def _difference(claim: Claim, other: Claim, names: tuple[str, str]) -> _Difference:
    """Return the difference of two shares on a claim's pairs."""
    both = np.stack([_measured(claim, other, name) for name in names])
    data = group_sums((np.concatenate([both, both[:1] - both[1:]]), claim.gap), claim.group)
    (top, bottom), (of_top, of_bottom) = data.means(), data.moves()
    share = top / bottom
    variance = (((of_top - share[:, None] * of_bottom) / bottom[:, None]) ** 2).sum(-1)
    return _Difference(
        behaviour=str(claim.spec["pairs"]["name"]),
        shares=dict(zip(names, share.tolist(), strict=False)),
        errors=dict(zip(names, np.sqrt(variance).tolist(), strict=False)),
        difference=float(share[2]),
        variance=float(variance[2]),
        n=int(data.n_groups[2]),
    )


def _measured(claim: Claim, other: Claim, name: str) -> np.ndarray:
    """Return the effect of a component on each of a claim's pairs: its own, or what the other claim measured there.

    Raises:
        SettingError: Neither measured it.
    """
    if name in claim.components:
        found: np.ndarray = claim.effects[claim.components.index(name)]
        return found
    wanted = {"pairs": claim.spec["pairs"]["hash"], **{key: claim.spec[key] for key in ("metric", "direction")}}
    held = [check for check in other.checks if check.name == "specificity"]
    for one in (one for check in held for one in check.about.get("measured", ())):
        if wanted.items() <= one.items() and name in one["components"]:
            return np.array(one["effects"][one["components"].index(name)], dtype=np.float64)
    raise SettingError(
        f"nothing says what {name!r} does on '{claim.spec['pairs']['name']}'",
        facts=[
            (f"claim on '{each.spec['pairs']['name']}'", f"holds {', '.join(each.components)}")
            for each in (claim, other)
        ],
        fix="confirm both on both behaviours, or give each claim the other's pairs: confirm(…, unrelated=[…])",
    )


def _require_alike(first: Claim, second: Claim, a: str, b: str) -> None:
    if a == b:
        raise SettingError(
            f"one component twice: {a!r}",
            facts=[("holds", ", ".join(first.components))],
            fix="name the component of each behaviour",
        )
    for what, one, other in (
        ("model", first.spec["model"]["hash"], second.spec["model"]["hash"]),
        ("direction", first.spec["direction"], second.spec["direction"]),
        ("delta", first.spec["delta"], second.spec["delta"]),
    ):
        if one != other:
            raise SettingError(
                f"the two claims are of different {what}s"
                if what != "delta"
                else "the two claims have different deltas",
                facts=[("first", one), ("second", other)],
                fix="confirm both in the same way",
            )
    if _inputs(first) & _inputs(second) or first.spec["pairs"]["hash"] == second.spec["pairs"]["hash"]:
        raise PairError(
            "the two claims share pairs, and are not independent",
            facts=[("pairs", " and ".join(f"'{each.spec['pairs']['name']}'" for each in (first, second)))],
            fix="confirm each behaviour on pairs of its own",
        )


def _inputs(claim: Claim) -> set[tuple[int, ...]]:
    rows = claim.held_out["rows"] if claim.held_out is not None else ()
    return {tuple(row[side]) for row in rows for side in ("clean", "corrupt")}
