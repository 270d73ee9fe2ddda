"""Methods: which interventions to ask for. None of them runs a model."""

from causalpatch.sweeps.grid import plan_sweep, sweep

__all__ = ["plan_sweep", "sweep"]
