"""The one verb: an experiment runs interventions and returns effects."""

from causalpatch.experiment.baseline import Baseline
from causalpatch.experiment.experiment import Experiment

__all__ = ["Baseline", "Experiment"]
