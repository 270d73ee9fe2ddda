"""Double dissociation: one component does for one behaviour what another one does for another, as one contrast.

    contrast = [share of a - share of b] on the first behaviour + [share of b - share of a] on the second

Two claims that each hold both components, on pairs of their own, have measured everything that it takes: nothing is run
and no pairs are opened again. Differences within a behaviour are ratios of means on the same pairs; the behaviours are
independent, so that their variances add up. Supported: the interval lies wholly above ``2 delta``.

References:
    Welch (1947), The generalization of Student's problem when several different population variances are involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import PairError, SettingError
from causalpatch.base.extras import lazy
from causalpatch.results.claim import Claim
from causalpatch.results.words import percent
from causalpatch.statistics.clusters import group_sums
from causalpatch.statistics.intervals import ENOUGH_GROUPS
from causalpatch.statistics.verdicts import INCONCLUSIVE, SUPPORTED

if TYPE_CHECKING:
    from scipy import special
else:
    special = lazy("scipy.special")


@dataclass(frozen=True)
class Dissociation:
    """A double dissociation of two components by two behaviours.

    Args:
        first: The component of the first behaviour.
        second: That of the second.
        shares: Share of the gap of each component in each behaviour, ``{behaviour: {component: share}}``.
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
    contrast: float
    low: float
    high: float
    delta: float
    level: float
    n_components: tuple[int, int]
    verdict: str
    why: str = ""

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
    """Test the double dissociation of two components that two claims have in common.

    Args:
        first: A claim on the behaviour that ``a`` is for, which holds both components.
        second: A claim on the behaviour that ``b`` is for, which holds both too.
        a: The component of the first behaviour.
        b: That of the second.

    Raises:
        SettingError: A claim does not hold both components, or they are of different models, directions or deltas.
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
    parts = [_difference(claim, *names) for claim, names in ((first, (a, b)), (second, (b, a)))]
    contrast = sum(part["difference"] for part in parts)
    variances = np.array([part["variance"] for part in parts])
    freedoms = np.array([part["n"] - 1 for part in parts])
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
        shares={str(claim.spec["pairs"]["name"]): _shares(claim, a, b) for claim in (first, second)},
        contrast=float(contrast),
        low=low,
        high=high,
        delta=delta,
        level=1 - alpha,
        n_components=(int(parts[0]["n"]), int(parts[1]["n"])),
        verdict=INCONCLUSIVE if why else SUPPORTED,
        why=why,
    )


def _difference(claim: Claim, one: str, other: str) -> dict[str, Any]:
    """Return the difference of two shares in a claim, its variance, and the number of independent components."""
    places = [claim.components.index(name) for name in (one, other)]
    data = group_sums(((claim.effects[places[0]] - claim.effects[places[1]])[None], claim.gap), claim.group)
    (top, bottom), (of_top, of_bottom) = data.means(), data.moves()
    share = top / bottom
    moves = (of_top - share[:, None] * of_bottom) / bottom[:, None]
    return {"difference": float(share[0]), "variance": float((moves**2).sum()), "n": int(data.n_groups[0])}


def _shares(claim: Claim, *names: str) -> dict[str, float]:
    return {name: claim.findings[claim.components.index(name)].share for name in names}


def _require_alike(first: Claim, second: Claim, a: str, b: str) -> None:
    for claim in (first, second):
        lost = next((name for name in (a, b) if name not in claim.components), None)
        if lost is not None or a == b:
            raise SettingError(
                f"the claim on '{claim.spec['pairs']['name']}' does not hold {lost!r}"
                if lost
                else "one component twice",
                facts=[("holds", ", ".join(claim.components))],
                fix="confirm both components on both behaviours, in one claim each",
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
