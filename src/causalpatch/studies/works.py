"""What a study's shards are of: interventions, sets of edges, scores; each of them a work that can be cut and kept.

=====================  ==================================  =====================================
work                   is asked for by                     cut by
=====================  ==================================  =====================================
interventions          sweeps, searches, claims            pairs, then cells (see ``cutting``)
sets of edges          circuits: found, evaluated          cells, then pairs
scores                 ``attribute``, searches             pairs
=====================  ==================================  =====================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from causalpatch.attribution.edges import EdgeScoring
from causalpatch.attribution.nodes import NodeScoring
from causalpatch.experiment import Experiment
from causalpatch.experiment.edges import EdgeRuns
from causalpatch.experiment.measured import Cuts, Measured, Work
from causalpatch.patches import Intervention
from causalpatch.patches.files import interventions_of_plain, plain_interventions
from causalpatch.studies.cutting import is_by_itself, is_of_one_pair
from causalpatch.studies.shards import texts_of

PATCHES: Final = "patches"
_KINDS: Final[Mapping[str, Any]] = {"edges": EdgeRuns, "scores of edges": EdgeScoring, "scores of nodes": NodeScoring}


@dataclass(frozen=True, eq=False)
class Patched:
    """Interventions as a work.

    Args:
        interventions: The cells.
    """

    interventions: tuple[Intervention, ...]

    @property
    def n_cells(self) -> int:
        """How many interventions there are."""
        return len(self.interventions)

    @property
    def runs_per_pair(self) -> int:
        """A run for each."""
        return self.n_cells

    def texts(self) -> list[str]:
        """Return what names each intervention."""
        return texts_of(self.interventions)

    def take(self, cells: np.ndarray) -> "Patched":
        """Return some of them."""
        return Patched(tuple(self.interventions[int(cell)] for cell in cells))

    def cuts(self, experiment: Experiment) -> Cuts:
        """Return how they may be cut."""
        return Cuts(is_of_one_pair(experiment, self.interventions), is_by_itself(self.interventions))

    def measured(self, experiment: Experiment) -> Measured:
        """Run them here."""
        return experiment.measured(self.interventions)

    def plain(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return them as plain data, with arrays by their names."""
        plain, arrays = plain_interventions(self.interventions)
        return {"kind": PATCHES, "interventions": plain}, arrays


def work_of(asked: Sequence[Intervention] | Work) -> Work:
    """Return what is asked for as a work."""
    return asked if isinstance(asked, Work) else Patched(tuple(asked))


def work_of_plain(told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Work:
    """Return the work that ``plain`` wrote.

    Args:
        told: Plain data.
        arrays: Arrays by their names.
    """
    if told["kind"] == PATCHES:
        return Patched(tuple(interventions_of_plain(told["interventions"], lambda name: arrays[name])))
    found: Work = _KINDS[told["kind"]].of_plain(told, arrays)
    return found
