"""What to do to a run: patches as plain data that prints, hashes, saves and travels."""

from causalpatch.patches.direction import ProjectOut, Steer
from causalpatch.patches.elsewhere import From, OtherPrompts
from causalpatch.patches.files import load_interventions, save_interventions
from causalpatch.patches.fixed import Constant, Function, Identity, Interpolate, Source, Zero
from causalpatch.patches.given import Given
from causalpatch.patches.patch import Intervention, Patch
from causalpatch.patches.sampled import Fitted, FittedOn, Mean, Noise, Optimal, Resample
from causalpatch.patches.subspace import Subspace
from causalpatch.patches.value import Value

__all__ = [
    "Constant",
    "Fitted",
    "FittedOn",
    "From",
    "Function",
    "Given",
    "Identity",
    "Interpolate",
    "Intervention",
    "Mean",
    "Noise",
    "Optimal",
    "OtherPrompts",
    "Patch",
    "ProjectOut",
    "Resample",
    "Source",
    "Steer",
    "Subspace",
    "Value",
    "Zero",
    "load_interventions",
    "save_interventions",
]
