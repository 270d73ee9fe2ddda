"""What running interventions gives before it is labelled, and who else may run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from causalpatch.patches import Intervention

if TYPE_CHECKING:
    from causalpatch.experiment.experiment import Experiment


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers of some interventions on some pairs.

    Args:
        values: Metrics of the patched runs, ``(metric, intervention, pair)``.
        status: Codes of ``Status``, ``(intervention, pair)``.
        baselines: Metrics of the unpatched runs by role, ``(metric, pair)``.
        kept: Numbers of those pairs of the experiment that these are, ``(pair,)``.
        record: How they were obtained, as plain data: ``engine``, ``precision``, ``noise_floor`` by metric, ``notes``,
            ``complete``, ``cost``, and ``fitted`` where something was.
    """

    values: np.ndarray
    status: np.ndarray
    baselines: Mapping[str, np.ndarray]
    kept: np.ndarray
    record: Mapping[str, Any]


@runtime_checkable
class Runner(Protocol):
    """Runs interventions for an experiment: elsewhere, or out of a store where they were run before."""

    def measure(self, experiment: Experiment, asked: Sequence[Intervention]) -> Measured:
        """Return the numbers of interventions on all pairs of an experiment.

        Args:
            experiment: Model, pairs, metrics, direction and settings.
            asked: The interventions, whose sites are in the model.
        """
