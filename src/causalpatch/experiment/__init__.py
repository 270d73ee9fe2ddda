"""The one verb: an experiment runs interventions and returns effects."""

from causalpatch.experiment.baseline import Baseline
from causalpatch.experiment.distance import off_distribution
from causalpatch.experiment.experiment import Experiment

__all__ = ["Baseline", "Experiment", "off_distribution"]
