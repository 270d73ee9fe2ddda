"""The one room that runs models: hooks, captured values, patched forwards, their cost and their proofs."""

from causalpatch.engine.activity import Activity, read_activity
from causalpatch.engine.capture import Captured, capture, probe, require_positions
from causalpatch.engine.distance import Distance, measure_distance, without_controls
from causalpatch.engine.fit import Fit, fit_all_means, fit_patches, fit_values
from causalpatch.engine.gauge import Gauge, Run, check_answers
from causalpatch.engine.job import BASE, SOURCE, Block, Cost, Job
from causalpatch.engine.joined import joined_site
from causalpatch.engine.means import Means
from causalpatch.engine.memory import budget_within
from causalpatch.engine.plan import ModelCost, Plan, make_plan
from causalpatch.engine.planning import plan_job
from causalpatch.engine.prove import Proof, prove, require_proofs
from causalpatch.engine.readers import moves_of, paths_that_read
from causalpatch.engine.reading import read_patched
from causalpatch.engine.remembered import Remembered
from causalpatch.engine.resolve import Placer, Role, Target, crosses_positions, targets_of
from causalpatch.engine.rotate import Epoch, Rotation, RotationSearch, learn_rotation
from causalpatch.engine.screen import Precision, Screen, measure_screened, plan_screen
from causalpatch.engine.tiers import ENGINES, EngineName, Route, likely_tier, measure

__all__ = [
    "BASE",
    "ENGINES",
    "SOURCE",
    "Activity",
    "Block",
    "Captured",
    "Cost",
    "Distance",
    "EngineName",
    "Epoch",
    "Fit",
    "Gauge",
    "Job",
    "Means",
    "ModelCost",
    "Placer",
    "Plan",
    "Precision",
    "Proof",
    "Remembered",
    "Role",
    "Rotation",
    "RotationSearch",
    "Route",
    "Run",
    "Screen",
    "Target",
    "budget_within",
    "capture",
    "check_answers",
    "crosses_positions",
    "fit_all_means",
    "fit_patches",
    "fit_values",
    "joined_site",
    "learn_rotation",
    "likely_tier",
    "make_plan",
    "measure",
    "measure_distance",
    "measure_screened",
    "moves_of",
    "paths_that_read",
    "plan_job",
    "plan_screen",
    "probe",
    "prove",
    "read_activity",
    "read_patched",
    "require_positions",
    "require_proofs",
    "targets_of",
    "without_controls",
]
