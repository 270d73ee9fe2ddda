"""Claims: what was shown of some components on held-out pairs, with the numbers, the controls and the limits.

A claim is plain data. It is saved as one JSON file that another program can read, that prints the same sentence
everywhere, and that ``recheck`` measures again in another checkpoint. Its verdict follows from its numbers:

1. *supported*: every component is supported (``statistics.verdicts``).
2. *absent up to delta*: every component is absent up to delta.
3. *inconclusive*: neither, or the pairs were opened before (*reused hold-out*), whatever the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from causalpatch.base.errors import ResultsNotFound
from causalpatch.base.extras import lazy
from causalpatch.base.spec import content_hash, finite, to_plain
from causalpatch.base.suggest import closest
from causalpatch.results import claim_charts, claim_words
from causalpatch.results.json_file import JsonFile
from causalpatch.statistics.verdicts import ABSENT, INCONCLUSIVE, SUPPORTED

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.pictures import Picture
else:
    pd = lazy("pandas")

FILE: Final = JsonFile("claim", "causalpatch claim", "1", fix="confirm it again, on new pairs")
REUSED: Final = "reused hold-out"
TOGETHER: Final = "together"


@dataclass(frozen=True)
class Finding:
    """What was found of one component, or of all of them together.

    Args:
        component: Its name; ``together`` for the set.
        share: Share of the gap that it restores (removes), a ratio of means over the held-out pairs.
        low: Lower end of its simultaneous interval; NaN where there is none.
        high: Upper end, likewise.
        low_inner: Lower end of the narrower interval that *absent* is judged by.
        high_inner: Upper end, likewise.
        p: p of the share being within delta, adjusted over all that was sent.
        verdict: *supported*, *absent up to delta* or *inconclusive*.
        why: Why it is inconclusive, in words; else empty.
        agreement: Share of pairs whose effect has the sign of the mean.
        p10: Tenth percentile of the pairs' own shares.
        p50: Their median.
        p90: Their ninetieth percentile.
        beyond: Share of pairs whose own share lies beyond delta on the side of the mean.
        spread: Standard deviation of the shares of independent components.
        skew: Skewness between independent components.
        is_approximate: Whether there are few independent components, or skewed ones.
        n_pairs: Pairs that were measured.
        n_components: Independent components among them.
        discovery: The share on the pairs that it was found on, where known: larger, for it was chosen there.
    """

    component: str
    share: float
    low: float
    high: float
    low_inner: float
    high_inner: float
    p: float
    verdict: str
    why: str
    agreement: float
    p10: float
    p50: float
    p90: float
    beyond: float
    spread: float
    skew: float
    is_approximate: bool
    n_pairs: int
    n_components: int
    discovery: float | None = None


@dataclass(frozen=True)
class Check:
    """A control or a further look: a table and what is to be known of it.

    Args:
        name: What it is: ``matched sets``, ``backup``, ….
        rows: The table, a row per case.
        about: What is to be known of it.
        skipped: Why it was not made; empty where it was.
    """

    name: str
    rows: tuple[Mapping[str, Any], ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    skipped: str = ""


@dataclass(frozen=True, eq=False)
class Claim:
    """A statement on some components, with its evidence and its limits.

    Args:
        spec: What was asked, fixed before any number was seen: components, value, metric, direction, delta, alpha,
            model, pairs, discovery pairs, rules.
        findings: What was found of each component, and at last of all together where there are several.
        effects: Effect of each in the direction of the gap, in the metric's unit, (finding, pair); NaN where a pair
            was not measured.
        gap: Gap of each pair, (pair,).
        group: Independent component of each pair, (pair,).
        pair_ids: Name of each pair.
        checks: Controls and further looks.
        limits: What must be said with it.
        reused: How many of these pairs were opened before with this model, by the spec hash of the claim that did it.
        record: How the runs were made.
        held_out: The pairs themselves as plain data, where they can be written so; ``recheck`` needs them.
    """

    spec: Mapping[str, Any]
    findings: tuple[Finding, ...]
    effects: np.ndarray
    gap: np.ndarray
    group: np.ndarray
    pair_ids: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    limits: tuple[str, ...] = ()
    reused: Mapping[str, int] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[str, Any] | None = None

    @cached_property
    def spec_hash(self) -> str:
        """Hash of the spec, by which the ledger knows the claim."""
        return content_hash(self.spec)

    @property
    def components(self) -> list[str]:
        """The components that were sent to confirmation."""
        return [str(name) for name in self.spec["components"]]

    @property
    def supported(self) -> list[str]:
        """The components that are supported by themselves."""
        return [each.component for each in self._single if each.verdict == SUPPORTED]

    @property
    def delta(self) -> float:
        """Share of the gap that does not count yet."""
        return float(self.spec["delta"])

    @property
    def verdict(self) -> str:
        """*supported*, *absent up to delta* or *inconclusive*."""
        verdicts = {each.verdict for each in self._single}
        if self.reused or len(verdicts) > 1:
            return INCONCLUSIVE
        return SUPPORTED if verdicts == {SUPPORTED} else ABSENT if verdicts == {ABSENT} else INCONCLUSIVE

    @property
    def reasons(self) -> list[str]:
        """Why the verdict is inconclusive; empty where it is not."""
        if self.verdict != INCONCLUSIVE:
            return []
        if self.reused:
            return [claim_words.on_reuse(self.reused, self.spec)]
        found = [f"of {each.component} {each.why}" for each in self._single if each.why]
        return found or [claim_words.on_mixture(self._single)]

    @property
    def statement(self) -> str:
        """What is claimed, in fixed words."""
        return claim_words.statement(self.spec, self.findings, self.verdict, self.reasons)

    @property
    def next_step(self) -> str:
        """What to do next, in one line."""
        return claim_words.next_step(self.verdict, self.spec, is_reused=bool(self.reused))

    def check(self, name: str) -> Check:
        """Return a control or a further look.

        Args:
            name: Such as ``matched sets``.

        Raises:
            ResultsNotFound: There is none of this name.
        """
        for each in self.checks:
            if each.name == name:
                return each
        known = [each.name for each in self.checks]
        near = closest(name, known, 1)
        raise ResultsNotFound(
            f"no check named {name!r} in this claim",
            facts=[("known", ", ".join(known) or "none")],
            fix=f"claim.check({near[0]!r})" if near else "claim.checks",
        )

    def table(self, name: str) -> pd.DataFrame:
        """Return the table of a check.

        Args:
            name: Such as ``matched sets``.

        Raises:
            ResultsNotFound: There is none of this name.
        """
        return pd.DataFrame([dict(row) for row in self.check(name).rows])

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per finding: how pairs spread first, then the share with its interval, p and verdict."""
        order = claim_words.COLUMNS
        rows = [{name: getattr(each, name) for name in order} for each in self.findings]
        frame = pd.DataFrame(rows)
        return frame if frame["discovery"].notna().any() else frame.drop(columns="discovery")

    def own_shares(self) -> np.ndarray:
        """Return each pair's own share, (finding, pair); NaN where its gap is below a thousandth of the mean gap."""
        least = 1e-3 * float(np.abs(self.gap).mean())
        gap = np.where(np.abs(self.gap) < least, np.nan, self.gap)
        found: np.ndarray = self.effects / gap
        return found

    def plot(self, kind: str = "effects") -> Picture:
        """Draw the claim.

        Args:
            kind: ``"effects"``: shares with their simultaneous intervals, delta and the controls; ``"pairs"``: the
                share of every pair.

        Raises:
            SettingError: There is no such kind.
        """
        return claim_charts.draw(self, kind)

    def save(self, path: str | Path) -> Path:
        """Write the claim as JSON, numbers that there are not as null.

        Args:
            path: The file; folders are made where they are missing.
        """
        return FILE.save(path, self._plain())

    @classmethod
    def load(cls, path: str | Path) -> Claim:
        """Read what ``save`` wrote, number by number.

        Raises:
            ResultsNotFound: There is no such file.
            StoreCorrupt: It is no claim, or was changed since.
        """
        return FILE.load(path, cls._of_plain)

    def __str__(self) -> str:
        return "\n".join(claim_words.describe(self))

    def __repr__(self) -> str:
        return f"Claim({self.verdict}: {', '.join(self.components)})"

    @property
    def _single(self) -> Sequence[Finding]:
        return [each for each in self.findings if each.component != TOGETHER]

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "verdict": self.verdict,
            "statement": self.statement,
            "spec_hash": self.spec_hash,
            "spec": self.spec,
            "findings": [{each.name: getattr(one, each.name) for each in fields(one)} for one in self.findings],
            "effects": self.effects.tolist(),
            "gap": self.gap.tolist(),
            "group": self.group.tolist(),
            "pair_ids": list(self.pair_ids),
            "checks": [
                {"name": one.name, "rows": list(one.rows), "about": one.about, "skipped": one.skipped}
                for one in self.checks
            ],
            "limits": list(self.limits),
            "reused": dict(self.reused),
            "record": self.record,
            "held_out": self.held_out,
        }
        return dict(finite(to_plain(plain)))

    @classmethod
    def _of_plain(cls, content: Mapping[str, Any]) -> Claim:
        findings = []
        for one in content["findings"]:
            held: dict[str, Any] = {name: np.nan if value is None else value for name, value in one.items()}
            findings.append(Finding(**{**held, "discovery": one["discovery"]}))
        return cls(
            spec=content["spec"],
            findings=tuple(findings),
            effects=np.array(content["effects"], dtype=np.float64),
            gap=np.array(content["gap"], dtype=np.float64),
            group=np.array(content["group"], dtype=np.int64),
            pair_ids=tuple(content["pair_ids"]),
            checks=tuple(
                Check(one["name"], tuple(one["rows"]), one["about"], one["skipped"]) for one in content["checks"]
            ),
            limits=tuple(content["limits"]),
            reused=content["reused"],
            record=content["record"],
            held_out=content["held_out"],
        )
