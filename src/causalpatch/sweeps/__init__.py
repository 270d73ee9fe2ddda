"""Methods: which interventions to ask for. None of them runs a model."""

from causalpatch.sweeps.features import TopFeatures, top_features
from causalpatch.sweeps.generation import Generated, generate
from causalpatch.sweeps.grid import plan_sweep, sweep
from causalpatch.sweeps.lens import direct_logit_attribution, logit_lens
from causalpatch.sweeps.localize import localize, plan_localize, race
from causalpatch.sweeps.paths import direct_effect, path_patch
from causalpatch.sweeps.stability import selection_stability
from causalpatch.sweeps.tracing import Tracing, trace
from causalpatch.sweeps.windows import everything_but, joint, sites_of, together, window

__all__ = [
    "Generated",
    "TopFeatures",
    "Tracing",
    "direct_effect",
    "direct_logit_attribution",
    "everything_but",
    "generate",
    "joint",
    "localize",
    "logit_lens",
    "path_patch",
    "plan_localize",
    "plan_sweep",
    "race",
    "selection_stability",
    "sites_of",
    "sweep",
    "together",
    "top_features",
    "trace",
    "window",
]
