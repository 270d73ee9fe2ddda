"""How faithful circuits are: f at each size, its interval and spread, beside complements and random circuits.

1. ``f[c] = (mean_i m(c)[i] - mean_i m(0)[i]) / (mean_i m(N)[i] - mean_i m(0)[i])`` for circuit ``c`` and pairs ``i``,
   where in ``m(c)`` all edges but those of c are ablated, in ``m(0)`` all, in ``m(N)`` none. A ratio of means.
2. Its interval is Fieller's, with independent groups of pairs as the unit; under 10 of them there is none.
3. A pair's own f is NaN where its gap is below a thousandth of the mean |gap|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from causalpatch.base.counts import require_positive
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results import arrays, curves
from causalpatch.results.shares import Numbers
from causalpatch.results.top import readable
from causalpatch.results.words import counted
from causalpatch.statistics.areas import Areas, areas_under
from causalpatch.statistics.hypothesis import dependence, non_equivalence, smallest_dependence
from causalpatch.statistics.intervals import Interval, ratio_intervals

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.pictures import Picture
else:
    pd = lazy("pandas")

CIRCUIT, COMPLEMENT, RANDOM = "circuit", "complement", "random"
DELTA = 0.1  # f within 1 +- delta is called faithful, and a complement up to delta empty, unless another is given


class Evaluation(arrays.Saved):
    """Runs of circuits, their complements and random circuits, on every pair.

    Args:
        runs: For each run its ``kind`` (circuit, complement, random), the ``order`` that the circuit is of (how it was
            found), the ``fraction`` of edges asked for, ``n_edges`` of the circuit, and the ``draw`` of random ones.
        values: The metric, axes (run, pair).
        clean: The metric with nothing ablated, (pair,).
        empty: The metric with everything ablated, (pair,).
        group: Independent component of each pair.
        provenance: How they came to be.
    """

    format = "causalpatch evaluation"

    def __init__(
        self,
        runs: Sequence[Mapping[str, Any]],
        values: np.ndarray,
        clean: np.ndarray,
        empty: np.ndarray,
        group: np.ndarray,
        provenance: Mapping[str, Any],
    ) -> None:
        self.runs = [dict(run) for run in runs]
        self.values, self.clean, self.empty = values, clean, empty
        self.group = group
        self.provenance = dict(provenance)

    @property
    def metric(self) -> str:
        """The metric that was measured."""
        return str(self.provenance["metrics"][0])

    @property
    def n_components(self) -> int:
        """Independent components among the pairs."""
        return self._numbers.n_groups

    @property
    def notes(self) -> list[str]:
        """What must be said with the numbers."""
        return [str(note) for note in self.provenance.get("notes", [])]

    @property
    def is_complete(self) -> bool:
        """Whether all runs were made; those that the user stopped say in a note which were."""
        return bool(self.provenance.get("complete", True))

    @cached_property
    def _numbers(self) -> Numbers:
        rising = self.provenance.get("higher_is_better", {}).get(self.metric, True)
        return Numbers(
            metric=self.metric,
            effect=self.values - self.clean,
            gap=self.clean - self.empty,
            clean=self.clean,
            reference=self.empty,
            group=self.group,
            sign=-1,
            rising=1 if rising else -1,
            instead="evaluation.values",
        )

    def f(self) -> np.ndarray:
        """Return the faithfulness of every run, (run,): a ratio of means over pairs.

        Raises:
            NoGap: The model and what is left of it without any edge do not differ, so f means nothing.
        """
        self._numbers.require_gap()
        share: np.ndarray = (self.values - self.empty).mean(-1) / (self.clean - self.empty).mean()
        return share

    def f_per_pair(self) -> np.ndarray:
        """Return every pair's own f, axes (run, pair); NaN where its gap is below a thousandth of the mean |gap|."""
        return 1 - self._numbers.recovered_per_pair(self._numbers.smallest_gap)

    def intervals(self, *, level: float = 0.95) -> list[Interval]:
        """Return the interval of f of every run, as ``ratio_interval`` describes it.

        Args:
            level: Nominal coverage of each.
        """
        seed = int(self.provenance.get("seed") or 0)
        return ratio_intervals(self.values - self.empty, self.clean - self.empty, self.group, level=level, seed=seed)

    def areas(self, order: str = "importance") -> Areas:
        """Return the areas under f of circuits of one order, over the shares of edges that were asked for.

        Args:
            order: How they were found.

        Raises:
            SettingError: There are no such circuits, or only of one size.
        """
        chosen = [number for number, run in enumerate(self.runs) if run["kind"] == CIRCUIT and run["order"] == order]
        if not chosen:
            raise SettingError(
                f"no circuits found by {order!r} were evaluated",
                facts=[("known", ", ".join(self.orders))],
                fix=f"areas({self.orders[0]!r})",
            )
        chosen.sort(key=lambda number: self.runs[number]["fraction"])
        return areas_under([self.runs[number]["fraction"] for number in chosen], self.f()[chosen])

    @property
    def orders(self) -> list[str]:
        """How the circuits were found."""
        return list(dict.fromkeys(run["order"] for run in self.runs if run["kind"] == CIRCUIT))

    @property
    def cpr(self) -> float:
        """Area under f of circuits taken by importance."""
        return self.areas("importance").cpr

    @property
    def cmd(self) -> float:
        """Area under |1 - f| of circuits taken by magnitude."""
        return self.areas("magnitude").cmd

    def summary(self, *, level: float = 0.95) -> pd.DataFrame:
        """Return a row per circuit.

        Columns: the order, the share and number of edges; ``f``, ``low`` and ``high``; ``complement``, f of all other
        edges; ``random_low`` and ``random_high``, the least and the most f of random circuits of the size; ``p10`` and
        ``p90`` of the pairs' own f, ``off_p90``, the 90th percentile of their |1 - f|; pairs and components.

        Args:
            level: Nominal coverage of each interval.

        Raises:
            NoGap: There is nothing that f is a share of.
        """
        f, own, intervals = self.f(), self.f_per_pair(), self.intervals(level=level)
        rows = []
        for number, run in enumerate(self.runs):
            if run["kind"] != CIRCUIT:
                continue
            same = [f[other] for other, each in enumerate(self.runs) if _is_random_of(each, run)]
            rest = [f[other] for other, each in enumerate(self.runs) if _is_complement_of(each, run)]
            pairs = own[number][np.isfinite(own[number])]
            spread = np.quantile(pairs, (0.1, 0.9)) if len(pairs) else (np.nan, np.nan)
            rows.append(
                {
                    "order": run["order"],
                    "fraction": run["fraction"],
                    "n_edges": run["n_edges"],
                    "f": f[number],
                    "low": intervals[number].low,
                    "high": intervals[number].high,
                    "complement": rest[0] if rest else np.nan,
                    "random_low": min(same, default=np.nan),
                    "random_high": max(same, default=np.nan),
                    "p10": spread[0],
                    "p90": spread[1],
                    "off_p90": np.quantile(np.abs(1 - pairs), 0.9) if len(pairs) else np.nan,
                    "n_pairs": len(pairs),
                    "n_components": self.n_components,
                }
            )
        frame = pd.DataFrame(rows)
        frame.attrs["notes"] = [*self.notes, *dict.fromkeys(each.note for each in intervals if each.note)]
        return frame

    def equivalence(self, *, delta: float = DELTA, level: float = 0.95) -> pd.DataFrame:
        """Test whether f is within 1 - delta and 1 + delta, by two one-sided tests.

        Args:
            delta: How far f may be off.
            level: 1 - alpha of each test; the interval has coverage 2 level - 1.

        Returns:
            A row per circuit: ``f``, the interval's ``low`` and ``high``, and ``verdict``: ``within``, ``outside``
            where the interval lies beyond, ``not shown`` where it does neither, or why there is none.

        Raises:
            SettingError: delta is not above 0.

        References:
            Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power approach".
        """
        require_positive("delta", delta, usual=DELTA)
        f, intervals = self.f(), self.intervals(level=2 * level - 1)
        rows = []
        for number, run in enumerate(self.runs):
            if run["kind"] == CIRCUIT:
                at = intervals[number]
                row = {"order": run["order"], "fraction": run["fraction"], "n_edges": run["n_edges"], "f": f[number]}
                rows.append({**row, "low": at.low, "high": at.high, "verdict": _verdict(at, delta)})
        return pd.DataFrame(rows)

    def hypotheses(self) -> pd.DataFrame:
        """Return the p of two tests by Shi et al. for each circuit, under their names and nulls.

        ``p_non_equivalence``: small where the circuit differs from the model. ``p_dependence``: small where the
        complement's metric depends on the model's. What is not rejected is not shown: see ``equivalence`` for that.
        ``smallest_non_equivalence`` and ``smallest_dependence`` are the least that so many independent groups can give.

        References:
            Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs", 2410.13032.
        """
        seed = int(self.provenance.get("seed") or 0)
        apart = np.ones_like(self.clean)
        least = {
            "smallest_non_equivalence": non_equivalence(apart, 0 * apart, self.group),
            "smallest_dependence": smallest_dependence(self.n_components),
        }
        rows = []
        for number, run in enumerate(self.runs):
            if run["kind"] != CIRCUIT:
                continue
            rest = next(n for n, each in enumerate(self.runs) if _is_complement_of(each, run))
            rows.append(
                {
                    **{key: run[key] for key in ("order", "fraction", "n_edges")},
                    "p_non_equivalence": non_equivalence(self.values[number], self.clean, self.group),
                    "p_dependence": dependence(self.values[rest], self.clean, self.group, seed=seed),
                    **least,
                }
            )
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per run and pair: the run, the pair's component, the metric, and the pair's own f."""
        n_pairs = len(self.clean)
        frame = pd.DataFrame([run for run in self.runs for _ in range(n_pairs)])
        return frame.assign(
            pair=np.tile(np.arange(n_pairs), len(self.runs)),
            component=np.tile(self.group, len(self.runs)),
            metric=self.values.reshape(-1),
            f=self.f_per_pair().reshape(-1),
        )

    def plot(self, *, level: float = 0.95) -> Picture:
        """Draw f over the size of circuits, with their intervals, their complements and the band of random circuits.

        Args:
            level: Nominal coverage of each interval.

        Raises:
            NoGap: There is nothing that f is a share of.
        """
        lines = [self._words, *self._areas(), *self.notes]
        if not any(each.is_bounded for each in self.intervals(level=level)):
            lines.append(f"no intervals: {self.intervals(level=level)[0].note}")
        return curves.faithfulness(self.summary(level=level), title=self._title, lines=lines, level=level)

    def _parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        held = {"values": self.values, "clean": self.clean, "empty": self.empty, "group": self.group}
        return held, {"runs": self.runs, "provenance": self.provenance}

    @classmethod
    def _of_parts(cls, held: dict[str, np.ndarray], about: dict[str, Any]) -> Self:
        return cls(about["runs"], provenance=about["provenance"], **held)

    @property
    def _title(self) -> str:
        return f"Share of {self.metric} that circuits keep"

    @property
    def _words(self) -> str:
        names = (f"'{self.provenance[key]['name']}'" for key in ("model", "pairs"))
        pairs = counted(len(self.clean), "pair")
        return " · ".join([*names, f"{pairs}, {counted(self.n_components, 'independent group')}"])

    def __str__(self) -> str:
        frame = self.summary()
        notes = [f"note: {note}" for note in frame.attrs["notes"]]
        table = readable(frame).to_string(index=False)
        return "\n".join([self._title, self._words, table, *self._areas(), *notes])

    def _areas(self) -> list[str]:
        """Return a line of areas for each order that has a curve."""
        lines = []
        for order in self.orders:
            sizes = [run["fraction"] for run in self.runs if run["kind"] == CIRCUIT and run["order"] == order]
            if len(set(sizes)) == len(sizes) > 1:
                area = self.areas(order)
                first = f"CMD {area.cmd:.3f}" if order == "magnitude" else f"CPR {area.cpr:.3f}"
                lines.append(f"by {order}: {first}, mean f over log sizes {area.log_size:.3f}")
        return lines

    def __repr__(self) -> str:
        kinds = [sum(run["kind"] == kind for run in self.runs) for kind in (CIRCUIT, RANDOM)]
        return f"Evaluation({counted(kinds[0], 'circuit')}, {kinds[1]} random ones; {self._words})"


def _is_random_of(other: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    return bool(other["kind"] == RANDOM and other["n_edges"] == run["n_edges"])


def _is_complement_of(other: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    same = all(other[key] == run[key] for key in ("order", "fraction", "n_edges"))
    return bool(other["kind"] == COMPLEMENT and same)


def _verdict(at: Interval, delta: float) -> str:
    if not at.is_bounded:
        return at.note
    if 1 - delta <= at.low and at.high <= 1 + delta:
        return "within"
    return "outside" if at.high < 1 - delta or at.low > 1 + delta else "not shown"
