"""Scores held against exact effects: how far they agree, and how much can have been missed.

Scores rank components; the largest ones and a random sample of the others, stratified by score, are patched exactly.

- *Agreement* is told of the sample, which knows nothing of the scores' errors, and of all components: there each that
  was drawn stands for as many as were in its stratum for each one drawn.
- *Missed* are components outside the top whose exact |effect| is above ``delta``, a share of the gap. Their number has
  an upper bound that holds with a stated probability over the draw of the sample (``statistics.missed``). It speaks of
  mean effects on these very pairs; other pairs may have others.

References:
    Kramár et al. 2024, "AtP*", 2403.00745 (how much attribution
    can have missed, from verifying a random part).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results import arrays, scatter
from causalpatch.results.words import counted, percent
from causalpatch.statistics.agreement import kendall, recall_at, spearman
from causalpatch.statistics.missed import most_missed

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.pictures import Picture
else:
    pd = lazy("pandas")

_RECALL_AT = (10, 20, 50, 100)  # largest effects that are looked for among as many largest scores


class Confirmation(arrays.Saved):
    """Scores and exact effects of the same components, as shares of the gap.

    Args:
        axes: Where each component stands: for each axis its coordinates, (component,), that of the largest score first.
        scores: Importance of each, by scores; magnitudes where scores have no sign.
        effects: Its exact effect as a share of the gap.
        stratum: The stratum that each was drawn from; -1 for the top, which was measured whole.
        sizes: Components in each stratum, (stratum,).
        provenance: The record of the exact runs, with that of the scores in ``"scores"``, which |effect| matters in
            ``"delta"``, as a share of the gap, and with which probability bounds hold in ``"level"``.
    """

    format = "causalpatch confirmation"

    def __init__(
        self,
        axes: Mapping[str, Sequence[Any]],
        scores: np.ndarray,
        effects: np.ndarray,
        stratum: np.ndarray,
        sizes: np.ndarray,
        provenance: Mapping[str, Any],
    ) -> None:
        self.axes = {axis: list(held) for axis, held in axes.items()}
        self.scores, self.effects = scores, effects
        self.stratum, self.sizes = stratum, sizes
        self.provenance = dict(provenance)

    @property
    def delta(self) -> float:
        """Which |effect| matters, as a share of the gap."""
        return float(self.provenance["delta"])

    @property
    def level(self) -> float:
        """With which probability bounds hold."""
        return float(self.provenance["level"])

    @property
    def is_top(self) -> np.ndarray:
        """Which components are of the top, (component,)."""
        found: np.ndarray = self.stratum < 0
        return found

    @property
    def matters(self) -> np.ndarray:
        """Which components have an exact |effect| above ``delta``, (component,)."""
        found: np.ndarray = np.abs(self.effects) > self.delta
        return found

    @property
    def is_signed(self) -> bool:
        """Whether scores have a sign; those of AtP* have none."""
        return not self.provenance["scores"].get("unsigned", False)

    @cached_property
    def sampled(self) -> np.ndarray:
        """How many were drawn from each stratum, (stratum,)."""
        return np.bincount(self.stratum[~self.is_top], minlength=len(self.sizes))

    @cached_property
    def weights(self) -> np.ndarray:
        """How many components each stands for, (component,): one of the top for itself."""
        of_strata = np.append(self.sizes / np.maximum(self.sampled, 1), 1.0)  # the last one is the top's, -1
        found: np.ndarray = of_strata[self.stratum]
        return found

    @property
    def n_components(self) -> int:
        """How many components have a score."""
        return int(self.is_top.sum() + self.sizes.sum())

    @property
    def found(self) -> np.ndarray:
        """How many of those drawn from each stratum matter, (stratum,)."""
        return np.bincount(self.stratum[~self.is_top & self.matters], minlength=len(self.sizes))

    @property
    def missed(self) -> float:
        """Estimate of how many components outside the top matter."""
        return float(self.weights[~self.is_top & self.matters].sum())

    @property
    def missed_at_most(self) -> int:
        """Upper bound on how many components outside the top matter, those that were drawn among them."""
        return most_missed(self.sizes, self.sampled, self.found, self.level)

    @property
    def recall(self) -> tuple[float, float]:
        """Share of the components that matter which are in the top: the estimate, and what it is at least.

        NaN where none is known to matter.
        """
        in_top = int((self.is_top & self.matters).sum())
        shares = [in_top / (in_top + n) if in_top + n else np.nan for n in (self.missed, self.missed_at_most)]
        return shares[0], shares[1]

    def recall_at(self, k: int) -> float:
        """Return the estimated share of the ``k`` largest exact effects that are among the ``k`` largest scores.

        Raises:
            SettingError: The top has fewer components, so that not all of the ``k`` largest scores were measured.
        """
        n_top = int(self.is_top.sum())
        if not 1 <= k <= (n_top if self.sizes.sum() else self.n_components):
            raise SettingError(
                f"recall at {k} is not known", facts=[("top", counted(n_top, "component"))], fix=f"recall_at({n_top})"
            )
        # The components stand in the order of their scores' magnitude within the top.
        is_taken = self.is_top & (np.arange(len(self.effects)) < k)
        return recall_at(np.abs(self.effects), is_taken, k, self.weights)

    def agreement(self) -> pd.DataFrame:
        """Return how scores and effects agree.

        Returns:
            Rows ``sample`` (what was drawn, outside the top) and ``all`` (the top and the sample, each of which stands
            for its stratum): ``n`` that were measured, ``spearman``, ``kendall``, ``same_sign``, and
            ``same_sign_above``, of those that matter. Without a sign magnitudes are compared, and signs are NaN.
        """
        rows = []
        for of, some in (("sample", ~self.is_top), ("all", np.ones_like(self.is_top))):
            effects = self.effects[some] if self.is_signed else np.abs(self.effects[some])
            pair = self.scores[some], effects, self.weights[some]
            rows.append(
                {
                    "of": of,
                    "n": int(some.sum()),
                    "spearman": spearman(*pair),
                    "kendall": kendall(*pair),
                    "same_sign": self._same_sign(some),
                    "same_sign_above": self._same_sign(some & self.matters),
                }
            )
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """Return one row: what was measured, what was missed, and how scores and effects agree."""
        agreement = self.agreement().set_index("of")
        recall, at_least = self.recall
        return pd.DataFrame(
            [
                {
                    "n_components": self.n_components,
                    "n_top": int(self.is_top.sum()),
                    "n_sampled": int(self.sampled.sum()),
                    "delta": self.delta,
                    "in_top": int((self.is_top & self.matters).sum()),
                    "in_sample": int(self.found.sum()),
                    "missed": self.missed,
                    "missed_at_most": self.missed_at_most,
                    "recall": recall,
                    "recall_at_least": at_least,
                    "spearman_sample": agreement.loc["sample", "spearman"],
                    **{name: agreement.loc["all", name] for name in agreement.columns if name != "n"},
                }
            ]
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per component: where it stands, score, effect, whether it matters, part, stratum and weight."""
        return pd.DataFrame(
            {
                **self.axes,
                "score": self.scores,
                "effect": self.effects,
                "matters": self.matters,
                "part": np.where(self.is_top, "top", "sample"),
                "stratum": self.stratum,
                "weight": self.weights,
            }
        )

    def plot(self) -> Picture:
        """Draw exact effects over scores, with the line on which both are one, and the band that does not matter."""
        labels = [" ".join(map(str, place)) for place in zip(*self.axes.values(), strict=True)]
        frame = self.to_dataframe().assign(component=labels)
        lines = [self._where, self._missed_words, *self._agreement_words, *self.notes]
        return scatter.against(frame, title=self._title, lines=lines, delta=self.delta, is_signed=self.is_signed)

    @property
    def notes(self) -> list[str]:
        """What must be said with the numbers."""
        return [str(note) for note in self.provenance.get("notes", [])]

    def __str__(self) -> str:
        recalls = [f"{self.recall_at(k):.2f} at {k}" for k in _RECALL_AT if k <= self.is_top.sum()]
        lines = [
            self._title,
            self._where,
            self._measured_words,
            self._missed_words,
            *self._agreement_words,
            *([f"recall of the largest effects among as many largest scores: {', '.join(recalls)}"] if recalls else []),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Confirmation({self._measured_words}; {self._missed_words})"

    @property
    def _title(self) -> str:
        scores = self.provenance["scores"]
        return f"Scores of {self.n_components:,} {scores['of']} ({scores.get('method')}) against exact effects"

    @property
    def _where(self) -> str:
        names = (f"'{self.provenance[key]['name']}'" for key in ("model", "pairs"))
        about = (
            counted(self.provenance["pairs"]["n"], "pair"),
            self.provenance["metrics"][0],
            self.provenance["direction"],
        )
        return " · ".join([*names, *about])

    @property
    def _measured_words(self) -> str:
        n_top, n_rest, n_drawn = int(self.is_top.sum()), int(self.sizes.sum()), int(self.sampled.sum())
        strata = f", in {counted(len(self.sizes), 'stratum').replace('stratums', 'strata')}" if n_drawn else ""
        in_top, in_sample = int((self.is_top & self.matters).sum()), int(self.found.sum())
        top, drawn = f"the {n_top:,} largest scores", f"{n_drawn:,} drawn of the other {n_rest:,}{strata}"
        return f"|effect| above {percent(self.delta)} of the gap: {in_top} of {top}; {in_sample} of {drawn}"

    @property
    def _missed_words(self) -> str:
        recall, at_least = self.recall
        shares = "" if np.isnan(recall) else f"; recall about {recall:.2f}, at least {at_least:.2f}"
        if not self.sizes.sum():
            return "missed: none, all were measured"
        if not self.sampled.sum():
            return f"missed: not known, none of the other {int(self.sizes.sum()):,} was drawn"
        return f"missed: about {self.missed:.3g}, at most {self.missed_at_most} ({percent(self.level)} bound){shares}"

    @property
    def _agreement_words(self) -> list[str]:
        lines = []
        for row in self.agreement().to_dict("records"):
            if row["n"] < 2:
                continue
            signs = [
                f"{row[name]:.2f} {where}"
                for name, where in (("same_sign", "of them"), ("same_sign_above", "of those that matter"))
                if not np.isnan(row[name])
            ]
            told = f"; same sign in {', '.join(signs)}" if signs else ""
            lines.append(f"{row['of']}: Spearman {row['spearman']:.2f}, Kendall {row['kendall']:.2f}{told}")
        return lines

    def _same_sign(self, some: np.ndarray) -> float:
        weights = self.weights[some]
        if not self.is_signed or not weights.sum():
            return np.nan
        return float(np.average(np.sign(self.scores[some]) == np.sign(self.effects[some]), weights=weights))

    def _parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        held = {name: getattr(self, name) for name in ("scores", "effects", "stratum", "sizes")}
        axes = {
            axis: [each.item() if isinstance(each, np.generic) else each for each in at]
            for axis, at in self.axes.items()
        }
        return held, {"order": list(axes), "axes": axes, "provenance": self.provenance}

    @classmethod
    def _of_parts(cls, held: dict[str, np.ndarray], about: dict[str, Any]) -> Self:
        axes = {axis: about["axes"][axis] for axis in about["order"]}
        return cls(axes, provenance=about["provenance"], **held)


Confirms = Callable[..., Confirmation]
"""Measures what scores approximate: called with the scores, and what ``Confirmable.confirm`` was asked."""


class Confirmable(arrays.Saved):
    """Scores that can be held against exact effects, as long as they know the experiment that they are of."""

    _confirms: Confirms | None = None

    def confirmed_by(self, confirms: Confirms | None) -> Self:
        """Return the same scores, which now know how what they approximate is measured; a file forgets it."""
        self._confirms = confirms
        return self

    def confirm(
        self,
        top: int = 50,
        random_sample: int = 100,
        *,
        at_most: int | None = None,
        delta: float | None = None,
        level: float = 0.95,
    ) -> Confirmation:
        """Patch the largest and a random sample of the others, and hold scores against these exact effects.

        Scores out of a file do not know their experiment: ``cp.confirm_scores(experiment, scores, …)`` takes it, and
        can hold scores against effects on other pairs.

        Args:
            top: How many of the largest |score| are measured.
            random_sample: How many of the others are drawn, stratified by |score|, by the experiment's seed.
            at_most: Instead, as many as bound what was missed by this number, if none is found.
            delta: Which |effect| matters, as a share of the gap; by default .02 of neurons, features and edges, .1 of
                all else.
            level: With which probability the bound on what was missed holds.

        Raises:
            SettingError: The scores were read from a file, or the numbers are impossible.
            NoGap: Clean and corrupted runs do not differ enough, so a share means nothing.

        Cost:
            One run per pair and component that is measured.
        """
        if self._confirms is None:
            raise SettingError(
                "scores that were read from a file, or made by hand, do not know their experiment",
                fix="name it: cp.confirm_scores(experiment, scores, top=50, random_sample=100)",
            )
        return self._confirms(self, top=top, random_sample=random_sample, at_most=at_most, delta=delta, level=level)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or sent elsewhere: not the experiment, which holds the model."""
        return {name: held for name, held in vars(self).items() if name != "_confirms"}
