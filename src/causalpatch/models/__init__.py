"""Models: opening them, naming their activations, and saying where each is tapped."""

from causalpatch.models.adapter import Model, SiteRow
from causalpatch.models.families import FAMILIES, Family
from causalpatch.models.open import open_model
from causalpatch.models.table import plain_rows
from causalpatch.models.taps import Port, Tap
from causalpatch.models.views import (
    BiasTerm,
    Columns,
    EachColumns,
    HeadShare,
    KeyRow,
    ModuleUnit,
    PositionAt,
    Sum,
    View,
    Whole,
)

__all__ = [
    "FAMILIES",
    "BiasTerm",
    "Columns",
    "EachColumns",
    "Family",
    "HeadShare",
    "KeyRow",
    "Model",
    "ModuleUnit",
    "Port",
    "PositionAt",
    "SiteRow",
    "Sum",
    "Tap",
    "View",
    "Whole",
    "open_model",
    "plain_rows",
]
