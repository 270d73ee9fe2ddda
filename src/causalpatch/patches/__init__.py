"""What to do to a run: patches as plain data that prints, hashes, saves and travels."""

from causalpatch.patches.direction import ProjectOut, Steer
from causalpatch.patches.files import load_interventions, save_interventions
from causalpatch.patches.fixed import Constant, Function, Identity, Interpolate, Source, Zero
from causalpatch.patches.patch import Intervention, Patch
from causalpatch.patches.sampled import Fitted, FittedOn, Mean, Noise, Optimal, Resample
from causalpatch.patches.value import Value

__all__ = [
    "Constant",
    "Fitted",
    "FittedOn",
    "Function",
    "Identity",
    "Interpolate",
    "Intervention",
    "Mean",
    "Noise",
    "Optimal",
    "Patch",
    "ProjectOut",
    "Resample",
    "Source",
    "Steer",
    "Value",
    "Zero",
    "load_interventions",
    "save_interventions",
]
