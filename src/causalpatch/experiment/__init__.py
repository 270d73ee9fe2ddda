"""The one verb: an experiment runs interventions and returns effects."""

from causalpatch.experiment.activity import activity
from causalpatch.experiment.baseline import Baseline
from causalpatch.experiment.carry import put_values, read_values
from causalpatch.experiment.distance import off_distribution
from causalpatch.experiment.experiment import Experiment

__all__ = ["Baseline", "Experiment", "activity", "off_distribution", "put_values", "read_values"]
