"""The one room that runs models: hooks, captured values, patched forwards, their cost and their proofs."""

from causalpatch.engine.capture import Captured, capture, probe, require_positions
from causalpatch.engine.distance import Distance, measure_distance, without_controls
from causalpatch.engine.fit import Fit, fit_all_means, fit_patches, fit_values
from causalpatch.engine.gauge import Gauge, Run, check_answers
from causalpatch.engine.job import BASE, SOURCE, Block, Cost, Job
from causalpatch.engine.means import Means
from causalpatch.engine.plan import ModelCost, Plan, make_plan
from causalpatch.engine.planning import plan_job
from causalpatch.engine.prove import Proof, prove, require_proofs
from causalpatch.engine.resolve import Placer, Role, Target, crosses_positions, targets_of
from causalpatch.engine.screen import Precision, Screen, measure_screened, plan_screen
from causalpatch.engine.tiers import ENGINES, EngineName, Route, likely_tier, measure

__all__ = [
    "BASE",
    "ENGINES",
    "SOURCE",
    "Block",
    "Captured",
    "Cost",
    "Distance",
    "EngineName",
    "Fit",
    "Gauge",
    "Job",
    "Means",
    "ModelCost",
    "Placer",
    "Plan",
    "Precision",
    "Proof",
    "Role",
    "Route",
    "Run",
    "Screen",
    "Target",
    "capture",
    "check_answers",
    "crosses_positions",
    "fit_all_means",
    "fit_patches",
    "fit_values",
    "likely_tier",
    "make_plan",
    "measure",
    "measure_distance",
    "measure_screened",
    "plan_job",
    "plan_screen",
    "probe",
    "prove",
    "require_positions",
    "require_proofs",
    "targets_of",
    "without_controls",
]
