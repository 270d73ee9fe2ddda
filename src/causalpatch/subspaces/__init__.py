"""Subspaces: found by interchange on some pairs, held to others, and tested for the illusion."""

from causalpatch.engine import RotationSearch
from causalpatch.subspaces.alignment import Alignment, load_subspace
from causalpatch.subspaces.interchange import Accuracy, patched_accuracy
from causalpatch.subspaces.learn import SubspaceControls, learn_subspace
from causalpatch.subspaces.parts import Part, Parts, subspace_parts

__all__ = [
    "Accuracy",
    "Alignment",
    "Part",
    "Parts",
    "RotationSearch",
    "SubspaceControls",
    "learn_subspace",
    "load_subspace",
    "patched_accuracy",
    "subspace_parts",
]
