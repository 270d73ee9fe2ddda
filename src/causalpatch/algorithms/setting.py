"""What all tests of a hypothesis share: what they are made of, the runs they ask for, and the record of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.algorithms.answers import CHOICE, AnswerKey
from causalpatch.algorithms.hypothesis import Hypothesis
from causalpatch.algorithms.pool import Pool
from causalpatch.engine import EngineName
from causalpatch.experiment import Experiment
from causalpatch.metrics import Metric
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import Intervention
from causalpatch.results.provenance import describe_program
from causalpatch.sites import Every, Site

UNITS = {
    "draw": "one draw of a base and a source from these inputs, which are all that the numbers speak of",
    "component": "one couple of independent components of the pairs",
}


@dataclass(frozen=True)
class Setting:
    """What a hypothesis is tested with.

    Args:
        model: The network.
        hypothesis: The hypothesis.
        pool: The inputs.
        key: The answers.
        mapped: The sites of each variable.
        engine: How runs are made.
        budget_gib: Memory for activations.
        seed: Seed of all draws.
    """

    model: Model
    hypothesis: Hypothesis
    pool: Pool
    key: AnswerKey
    mapped: dict[str, tuple[Site, ...]]
    engine: EngineName
    budget_gib: float | None
    seed: int

    @property
    def every_site(self) -> list[Site]:
        """The sites of all variables."""
        return [site for sites in self.mapped.values() for site in sites]

    def experiment(self, pairs: Pairs, *metrics: Metric) -> Experiment:
        """Return an experiment that puts values of clean inputs into runs of corrupted ones.

        Args:
            pairs: The pairs.
            metrics: What is measured; by default what the network answers.
        """
        return Experiment(
            self.model,
            pairs,
            metric=list(metrics) or self.key.metric,
            direction="denoise",
            engine=self.engine,
            budget_gib=self.budget_gib,
            seed=self.seed,
        )

    def describe(self) -> dict[str, Any]:
        """Return what the test was made of, as plain data."""
        model, pool = self.model, self.pool
        return {
            **describe_program(),
            "model": {
                "name": model.name,
                "hash": model.content_hash,
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": str(model.device),
                "attention": model.attention,
            },
            "hypothesis": self.hypothesis.describe(),
            "text": str(self.hypothesis),
            "inputs": {"name": pool.name, "n": len(pool), "kind": pool.kind},
            "answer": self.key.describe(),
            "unit": UNITS[pool.unit],
            "seed": self.seed,
        }


def needs_equal_lengths(model: Model, pool: Pool, sites: Sequence[Site]) -> bool:
    """Say whether a site is patched at all positions, so that base and source must have equally many."""
    if pool.kind != "tokens":
        return False
    everywhere = [site for site in sites if site.position is None or isinstance(site.position, Every)]
    return any(model.tap(site).has_position for site in everywhere)


def answers_of(
    experiment: Experiment, interventions: Sequence[Intervention]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Run interventions and return what the network answers in each, by label, and in the untouched runs.

    Args:
        experiment: Model, pairs and the metric ``choice`` first of all.
        interventions: With different labels.

    Returns:
        The ids chosen, ``(pair,)`` each, with ``"base"`` and ``"source"``; NaN where nothing was measured. And which
        engine made the runs.
    """
    effects = experiment.run(interventions)
    data = effects.to_xarray()
    chosen = data["metric"]
    if "metric_name" in chosen.dims:
        chosen = chosen.sel(metric_name=CHOICE)
    place = {pair: number for number, pair in enumerate(effects.pair_ids)}
    order = [place.get(pair.id, -1) for pair in experiment.pairs]

    def laid(values: np.ndarray) -> np.ndarray:
        padded = np.append(values, np.nan)
        return np.asarray(padded[order])

    found = {each.label: laid(row) for each, row in zip(interventions, chosen.values, strict=True)}
    for name, role in (("base", "baseline_base"), ("source", "baseline_source")):
        values = data[role]
        values = values.sel(metric_name=CHOICE) if "metric_name" in values.dims else values
        found[name] = laid(values.values)
    return found, dict(effects.provenance["engine"])


def differs(chosen: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Say where two answers differ: 1 or 0; NaN where one of them was not measured."""
    return np.where(np.isnan(chosen) | np.isnan(other), np.nan, (chosen != other).astype(np.float64))


def mean(values: np.ndarray) -> float:
    """Return the mean of what was measured; NaN where nothing was."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan
