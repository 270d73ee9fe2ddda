"""What running interventions gives before it is labelled, what else is measured so, and who else may do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

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
            ``complete``, ``cost``, and ``fitted`` where something was. Where ``pooled`` is true, values and status have
            one pair, which holds the sum over all.
    """

    values: np.ndarray
    status: np.ndarray
    baselines: Mapping[str, np.ndarray]
    kept: np.ndarray
    record: Mapping[str, Any]


class Cuts(NamedTuple):
    """How a work may be cut into pieces without changing what it means.

    Args:
        pairs: Whether the numbers of a pair depend on no other pair.
        cells: Whether the numbers of a cell, and what they are shares of, depend on no other cell.
        cells_first: Whether pieces hold all pairs as long as these fit, and some of the cells.
    """

    pairs: bool
    cells: bool
    cells_first: bool = False


@runtime_checkable
class Work(Protocol):
    """What is measured on pairs cell by cell: interventions, sets of edges, scores.

    It is plain data, which can be cut, named, kept and sent to another process.
    """

    @property
    def n_cells(self) -> int:
        """How many cells it has."""

    @property
    def runs_per_pair(self) -> int:
        """Runs of the model that all cells take on a pair, about."""

    def texts(self) -> list[str]:
        """Return what names each cell: all that its numbers depend on beside model, pairs and settings.

        Where cells cannot be cut, one text may name all of them.
        """

    def take(self, cells: np.ndarray) -> Work:
        """Return some of the cells, whose numbers go up; all where they cannot be cut."""

    def cuts(self, experiment: Experiment) -> Cuts:
        """Return how it may be cut on the pairs of an experiment."""

    def measured(self, experiment: Experiment) -> Measured:
        """Measure it here, on all pairs of an experiment."""

    def plain(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return it as plain data, with arrays by their names."""


@runtime_checkable
class Runner(Protocol):
    """Runs interventions for an experiment: elsewhere, or out of a store where they were run before."""

    def measure(self, experiment: Experiment, asked: Sequence[Intervention] | Work) -> Measured:
        """Return the numbers of interventions, or of another work, on all pairs of an experiment.

        Args:
            experiment: Model, pairs, metrics, direction and settings.
            asked: The interventions, whose sites are in the model; or what else is measured.

        Raises:
            KeyboardInterrupt: The user stopped it. What was measured is kept, and nothing is returned.
        """

    def portion(self, experiment: Experiment) -> int:
        """Return how many runs of the model may be lost at most where it is stopped: as many as make a piece."""

    def recall(self, experiment: Experiment, name: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Return what was kept under a name; None where nothing was, or it is damaged.

        Args:
            experiment: Model, pairs, metrics, direction and settings, which are part of the name.
            name: What else names it, as plain data.
        """

    def keep(self, experiment: Experiment, name: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep how far something has come that is no table of cells and pairs.

        Args:
            experiment: As for ``recall``.
            name: Likewise.
            arrays: What is kept.
        """


def has_same_columns(experiment: Experiment) -> bool:
    """Say whether every part of an experiment's pairs has the columns that all of them have."""
    sizes = [np.unique(experiment.pairs.sizes(role)) for role in ("clean", "corrupt")]
    return all(len(size) == 1 for size in sizes)
