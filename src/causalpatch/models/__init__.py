"""Models: opening them, naming their activations, and saying where each is tapped."""

from causalpatch.models.adapter import Model, SiteRow
from causalpatch.models.dictionaries import (
    Coded,
    Dictionary,
    EachFeature,
    Feature,
    FeatureError,
    FeatureView,
)
from causalpatch.models.families import FAMILIES, Family
from causalpatch.models.open import open_model
from causalpatch.models.readers import Reader, named_reader, reader_of
from causalpatch.models.streamed import StreamedWeights, runs_own_forward
from causalpatch.models.table import (
    input_width,
    output_width,
    plain_rows,
    plain_widths,
    projection_rows,
    why_not_plain,
)
from causalpatch.models.taps import Port, Tap
from causalpatch.models.towers import PIXELS
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
    "PIXELS",
    "BiasTerm",
    "Coded",
    "Columns",
    "Dictionary",
    "EachColumns",
    "EachFeature",
    "Family",
    "Feature",
    "FeatureError",
    "FeatureView",
    "HeadShare",
    "KeyRow",
    "Model",
    "ModuleUnit",
    "Port",
    "PositionAt",
    "Reader",
    "SiteRow",
    "StreamedWeights",
    "Sum",
    "Tap",
    "View",
    "Whole",
    "input_width",
    "named_reader",
    "open_model",
    "output_width",
    "plain_rows",
    "plain_widths",
    "projection_rows",
    "reader_of",
    "runs_own_forward",
    "why_not_plain",
]
