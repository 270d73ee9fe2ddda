"""Methods: which interventions to ask for. None of them runs a model."""

from causalpatch.sweeps.grid import sweep

__all__ = ["sweep"]
