"""Effects in the direction of the gap: positive where the base run moves to where it should go.

``sign * effect`` has the sign of the gap ``rising * (m(clean) - m(far))``, where the far end is the corrupted run, or
the run in which everything is ablated. Shares are then plain ratios of means.
"""

import numpy as np

from causalpatch.experiment.experiment import Experiment
from causalpatch.models import Model
from causalpatch.results.effects import Effects
from causalpatch.results.shares import Numbers
from causalpatch.sites import Site

SUBLAYERS = ("attn_out", "mlp_out")
"""What a layer of a decoder adds to the stream."""


def sublayers_of(model: Model) -> tuple[Site, ...]:
    """Return what each layer's attention and MLP add to the stream; nothing of a model of no known family."""
    shape = model.shape
    return tuple(
        Site(name, layer)
        for layer in range(shape.n_layers)
        for name in SUBLAYERS
        if name not in shape.refused and layer not in shape.lacking.get(name, {})
    )


def rising_of(experiment: Experiment, metric: int = 0) -> int:
    """Return +1 where the clean run should have the higher value of a metric, else -1."""
    return 1 if experiment.metrics[metric].is_higher_when_clean(experiment.direction) else -1


def gap_to_source(experiment: Experiment, metric: int = 0) -> np.ndarray:
    """Return the gap of each pair between the clean and the corrupted run, (pair,); positive where all is well."""
    baseline = experiment.baseline
    gap: np.ndarray = rising_of(experiment, metric) * (baseline.clean[metric] - baseline.corrupt[metric])
    return gap


def towards(experiment: Experiment, effects: Effects, metric: int = 0) -> np.ndarray:
    """Return effects of one metric in the direction of the gap, (intervention, pair); NaN where there was no run.

    Args:
        experiment: What they are of.
        effects: Effects over one axis.
        metric: Number of the metric.
    """
    sign = rising_of(experiment, metric) * (1 if experiment.direction == "denoise" else -1)
    values = effects.metric(experiment.metrics[metric].name).effect(per_pair=True).values
    moved: np.ndarray = sign * values.reshape(-1, values.shape[-1])
    return moved


def numbers_towards(
    experiment: Experiment, moved: np.ndarray, gap: np.ndarray, metric: int = 0, instead: str = "experiment.baseline"
) -> Numbers:
    """Return effects in the direction of the gap as the numbers of a sweep, for shares and to ask for a gap.

    Args:
        experiment: What they are of.
        moved: Effects in the direction of the gap, (intervention, pair).
        gap: Gap of each pair, positive where all is well.
        metric: Number of the metric.
        instead: What can be read where there is no gap.
    """
    rising, clean = rising_of(experiment, metric), experiment.baseline.clean[metric]
    return Numbers(
        metric=experiment.metrics[metric].name,
        effect=rising * moved,
        gap=rising * gap,
        clean=clean,
        reference=clean - rising * gap,
        group=experiment.pairs.components,
        sign=1,
        rising=rising,
        instead=instead,
    )
