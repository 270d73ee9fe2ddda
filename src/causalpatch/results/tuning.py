"""Reports of targeted tuning: what each arm of a comparison reached and what it broke, and whether locating helped.

A report is plain data, saved as one JSON file. Its verdict follows from its numbers:

1. *located better than random*: of the random draws so few did as little damage that the rank p is at most alpha, and
   the interval of the contrast located - random lies wholly below 0 (or no random draw reached the target at all).
2. *located worse than random*: the same, the other way round.
3. *no evidence of advantage*: neither; also where so few matched sets exist that no p could be small enough.

Damage is the mean KL(base || tuned) per retain token, in nats, at matched target success: an arm that does not reach
it has infinite damage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from causalpatch.base.errors import ResultsNotFound, SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.spec import finite, to_plain
from causalpatch.results import tuning_charts, tuning_words
from causalpatch.results.json_file import JsonFile
from causalpatch.statistics.binomial import clopper_pearson
from causalpatch.statistics.intervals import Interval, mean_interval

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.pictures import Picture
else:
    pd = lazy("pandas")

FILE: Final = JsonFile("report", "causalpatch tuning report", "1", fix="write it again: report.save(path)")
BETTER: Final = "located better than random"
NO_EVIDENCE: Final = "no evidence of advantage"
WORSE: Final = "located worse than random"
WITHIN, BEYOND, NOT_SHOWN = "within", "beyond", "not shown"


@dataclass(frozen=True)
class Margins:
    """What may change at most, set before anything is measured.

    Args:
        kl_mean: Mean KL(base || tuned) per retain token, nats.
        kl_p95: Its 95th percentile over tokens.
        kl_p99: Its 99th percentile.
        perplexity: Rise of -log p per retain token, nats: .02 is 2 % of the perplexity.
        accuracy: Share of right answers that may be lost, of each other behaviour.
        evaluation: Drop of the user's own evaluation, in its unit.

    Raises:
        SettingError: One is negative.
    """

    kl_mean: float = 0.02
    kl_p95: float = 0.1
    kl_p99: float = 0.5
    perplexity: float = 0.02
    accuracy: float = 0.02
    evaluation: float = 0.02

    def __post_init__(self) -> None:
        wrong = next((name for name, value in asdict(self).items() if not value >= 0), None)
        if wrong:
            raise SettingError(f"a margin of {wrong}={getattr(self, wrong)} lets nothing be within it", fix="Margins()")


@dataclass(frozen=True)
class Endpoint:
    """One thing that must not change, held against its margin.

    Args:
        name: Which.
        estimate: How much it changed; larger is worse.
        low: Lower end of the one-sided 95 % interval; NaN where there is none.
        high: Upper end, likewise.
        margin: How much it may.
        unit: Of the numbers.
        n_groups: Independent documents or components.
        note: What is to be known of the interval.
    """

    name: str
    estimate: float
    low: float
    high: float
    margin: float
    unit: str
    n_groups: int
    note: str = ""

    @property
    def verdict(self) -> str:
        """*within* the margin, *beyond* it, or *not shown*."""
        if self.high <= self.margin:
            return WITHIN
        return BEYOND if self.low > self.margin else NOT_SHOWN


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm of a comparison.

    Args:
        name: What it is called, such as ``random 3``.
        kind: ``base``, ``located``, ``random``, ``same layers``, ``lowest effect``, ``spread``, ``full``, ``prefix`` or
            ``steering``.
        components: What was changed.
        n_trained: Numbers that were trained.
        n_trainings: Trainings that it took, of all rates and seeds.
        rate: The rate that validation chose; NaN where nothing was trained.
        reached: Whether enough validation pairs succeeded, by seed.
        success: Share of the test pairs that succeed, by seed.
        moved: Mean KL per retain token, nats, by seed.
        paraphrased: Share of the paraphrases that succeed, by seed; empty where there are none.
        documents: Sum of KL over seeds' mean, and number of tokens, of each retain document, ``(document, 2)``.
        endpoints: What must not change, over all seeds.
        ended: How its trainings ended, where one did not go well; else empty.
        n_tested: Independent components of the test pairs; 0 where that is not known.
        enough: Share of the pairs that is the target.
    """

    name: str
    kind: str
    components: tuple[str, ...]
    n_trained: int
    n_trainings: int
    rate: float
    reached: tuple[bool, ...]
    success: tuple[float, ...]
    moved: tuple[float, ...]
    paraphrased: tuple[float, ...]
    documents: np.ndarray
    endpoints: tuple[Endpoint, ...]
    ended: str = ""
    n_tested: int = 0
    enough: float = 0.0

    @property
    def is_matched(self) -> bool:
        """Whether the target was reached: on validation pairs by every seed, and test pairs do not show otherwise.

        They do where the one-sided 95 % bound of the share that succeeds lies below the target.
        """
        if not all(self.reached) or not self.success or not self.n_tested:
            return all(self.reached)
        n_right = round(float(np.mean(self.success)) * self.n_tested)
        return clopper_pearson(n_right, self.n_tested, 0.9)[1] >= self.enough

    @property
    def damage(self) -> float:
        """Mean KL per retain token over seeds; infinite where the target was not reached."""
        return float(np.mean(self.moved)) if self.is_matched else math.inf

    @property
    def verdict(self) -> str:
        """*not disrupted*, *disrupted*, or *not shown to be undisturbed*."""
        verdicts = {each.verdict for each in self.endpoints}
        if BEYOND in verdicts:
            return tuning_words.DISRUPTED
        return tuning_words.NOT_DISRUPTED if verdicts == {WITHIN} else tuning_words.UNCLEAR

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain data, for JSON: what is no number is None."""
        held = {name: getattr(self, name) for name in self.__dataclass_fields__}
        held |= {"documents": self.documents.tolist(), "endpoints": [asdict(one) for one in self.endpoints]}
        return dict(finite(to_plain(held)))

    @classmethod
    def of_plain(cls, content: Mapping[str, Any]) -> Arm:
        """Return an arm from what ``to_plain`` returned.

        Args:
            content: The plain data, perhaps read from JSON.
        """
        held = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        held["endpoints"] = tuple(Endpoint(**_numbers(each)) for each in content["endpoints"])
        held["documents"] = np.array(content["documents"], dtype=np.float64)
        return cls(**_numbers(held))


@dataclass(frozen=True)
class Contrast:
    """Damage of the located arm minus that of another, over retain documents.

    Args:
        against: The other arm, or ``random``: the mean of the draws that reached the target.
        estimate: The difference, nats per token; NaN where one of the two did not reach the target.
        low: Lower end of its 95 % interval; NaN where there is none.
        high: Upper end, likewise.
        note: What is to be known of it.
    """

    against: str
    estimate: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class TuningReport:
    """What targeted tuning did, beside what changing anything else of the same size did.

    Args:
        spec: What was asked, as plain data: components, way, data, schedule, margins, arms, alpha.
        arms: The arms, the base first.
        mechanism: Looks at the mechanism afterwards: by name a table's rows.
        notes: What must be said with it.
        record: How it was made.
        is_complete: Whether all arms were made.
    """

    spec: Mapping[str, Any]
    arms: tuple[Arm, ...]
    mechanism: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    is_complete: bool = True

    def arm(self, name: str) -> Arm:
        """Return an arm.

        Args:
            name: Such as ``located``.

        Raises:
            ResultsNotFound: There is none of this name.
        """
        found = next((each for each in self.arms if each.name == name), None)
        if found is None:
            known = ", ".join(each.name for each in self.arms)
            raise ResultsNotFound(f"no arm named {name!r} in this report", facts=[("known", known)], fix="report.arms")
        return found

    def of_kind(self, kind: str) -> list[Arm]:
        """Return the arms of a kind."""
        return [each for each in self.arms if each.kind == kind]

    @property
    def located(self) -> Arm:
        """The arm in which what was located was changed."""
        return self.arm("located")

    @property
    def p_better(self) -> float:
        """Rank p of the located arm doing as little damage as it does, were it a random draw: (1 + k) / (1 + R)."""
        return self._rank_p([each.damage <= self.located.damage for each in self.of_kind("random")])

    @property
    def p_worse(self) -> float:
        """Rank p of its doing as much damage as it does."""
        return self._rank_p([each.damage >= self.located.damage for each in self.of_kind("random")])

    @property
    def smallest_p(self) -> float:
        """The smallest rank p that so many random draws can give."""
        return 1 / (1 + len(self.of_kind("random")))

    def contrast(self, against: str) -> Contrast:
        """Return the damage of the located arm minus that of another one.

        Args:
            against: Name of an arm, or ``random``: the mean over the draws that reached the target.
        """
        draws = self.of_kind("random") if against == "random" else [self.arm(against)]
        reached = [each for each in draws if math.isfinite(each.damage)]
        note = (
            f"{len(draws) - len(reached)} of {len(draws)} did not reach the target" if len(reached) < len(draws) else ""
        )
        if not reached or not math.isfinite(self.located.damage):
            who = "located" if not math.isfinite(self.located.damage) else against
            return Contrast(against, math.nan, math.nan, math.nan, note or f"{who} did not reach the target")
        own = self.located.documents
        other = np.mean([each.documents[:, 0] for each in reached], axis=0)
        interval = _over_documents(own[:, 0] - other, own[:, 1])
        return Contrast(
            against, interval.estimate, interval.low, interval.high, "; ".join(filter(None, (note, interval.note)))
        )

    @property
    def verdict(self) -> str:
        """*located better than random*, *no evidence of advantage* or *located worse than random*."""
        alpha, draws = float(self.spec["alpha"]), self.of_kind("random")
        if not self.is_complete or not draws:
            return NO_EVIDENCE
        contrast = self.contrast("random")
        none_reached = all(math.isinf(each.damage) for each in draws)
        if self.p_better <= alpha and (contrast.high < 0 or none_reached):
            return BETTER
        if self.p_worse <= alpha and (contrast.low > 0 or math.isinf(self.located.damage)):
            return WORSE
        return NO_EVIDENCE

    @property
    def reasons(self) -> list[str]:
        """Why there is no evidence, in words; empty where there is some."""
        return tuning_words.reasons(self)

    @property
    def statement(self) -> str:
        """What was found, in fixed words."""
        return tuning_words.statement(self)

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per arm."""
        return pd.DataFrame([tuning_words.row(each) for each in self.arms])

    def endpoints(self) -> pd.DataFrame:
        """Return a row per arm and endpoint, with its interval, margin and verdict."""
        rows = [{"arm": arm.name, **asdict(one), "verdict": one.verdict} for arm in self.arms for one in arm.endpoints]
        return pd.DataFrame(rows)

    def plot(self) -> Picture:
        """Draw target success against retain damage, an arm a point: up and to the left is better."""
        return tuning_charts.draw(self)

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON.

        Args:
            path: The file; folders are made where they are missing.
        """
        return FILE.save(path, json.loads(json.dumps(_plain(self))))

    @classmethod
    def load(cls, path: str | Path) -> TuningReport:
        """Read what ``save`` wrote.

        Raises:
            ResultsNotFound: There is no such file.
            StoreCorrupt: It is no report, or was changed since.
        """
        return FILE.load(path, _of_plain)

    def __str__(self) -> str:
        return "\n".join(tuning_words.describe(self))

    def __repr__(self) -> str:
        return f"TuningReport({self.verdict}: {', '.join(self.located.components)})"

    def _rank_p(self, as_extreme: Sequence[bool]) -> float:
        return (1 + sum(as_extreme)) / (1 + len(as_extreme))


def _over_documents(sums: np.ndarray, tokens: np.ndarray) -> Interval:
    """Return the interval of a mean per token, the document as the unit."""
    has = tokens > 0
    values = np.repeat(sums[has] / tokens[has], tokens[has].astype(int))
    return mean_interval(values, np.repeat(np.arange(int(has.sum())), tokens[has].astype(int)))


def _plain(report: TuningReport) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "verdict": report.verdict,
        "statement": report.statement,
        "spec": report.spec,
        "arms": [arm.to_plain() for arm in report.arms],
        "mechanism": {name: list(rows) for name, rows in report.mechanism.items()},
        "notes": list(report.notes),
        "record": report.record,
        "is_complete": report.is_complete,
    }
    return dict(finite(to_plain(plain)))


def _of_plain(content: Mapping[str, Any]) -> TuningReport:
    return TuningReport(
        content["spec"],
        tuple(map(Arm.of_plain, content["arms"])),
        {name: tuple(rows) for name, rows in content["mechanism"].items()},
        tuple(content["notes"]),
        content["record"],
        content["is_complete"],
    )


def _numbers(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with NaN for what there was not."""
    return {name: math.nan if value is None else value for name, value in held.items()}
