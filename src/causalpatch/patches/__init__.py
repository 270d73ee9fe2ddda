"""What to do to a run: patches as plain data that prints, hashes, saves and travels."""

from causalpatch.patches.patch import Intervention, Patch
from causalpatch.patches.value import Constant, Function, Identity, Mean, Source, Value, Zero

__all__ = ["Constant", "Function", "Identity", "Intervention", "Mean", "Patch", "Source", "Value", "Zero"]
