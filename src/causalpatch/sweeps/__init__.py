"""Methods: which interventions to ask for. None of them runs a model."""

from causalpatch.sweeps.grid import plan_sweep, sweep
from causalpatch.sweeps.tracing import Tracing, trace
from causalpatch.sweeps.windows import everything_but, joint, sites_of, together, window

__all__ = [
    "Tracing",
    "everything_but",
    "joint",
    "plan_sweep",
    "sites_of",
    "sweep",
    "together",
    "trace",
    "window",
]
