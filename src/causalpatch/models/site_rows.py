"""The table of a model's sites: every name with its axes and sizes, or why the model does not have it.

Sites of cross-attention stand in the tables of models that have an encoder beside their decoder, and in no others.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from causalpatch.models.table import FamilyTable
from causalpatch.sites.names import CROSS_SITES, FEATURE_SITES, NAMES, ONCE
from causalpatch.sites.select import ModelShape

Sizes = Callable[[str, str | None], Mapping[str, int]]
"""From a site's name and the stream that it stands in to the sizes of the axes of its value."""


class SiteRow(NamedTuple):
    """One line of the table of sites.

    Args:
        name: The site's name, with its stream where the model has two.
        axes: Its axes: those of the name, then those of the value.
        shape: Their sizes; ``position`` stays a word.
        refused: Why the model does not have the site, or None.
    """

    name: str
    axes: str
    shape: str
    refused: str | None


def shape_by(
    table: FamilyTable,
    *,
    name: str,
    dictionaries: Mapping[str, Mapping[int, int]],
    paths: tuple[str, ...],
    listing: str,
) -> ModelShape:
    """Return the shape that a table gives: of a model, or of one of its streams.

    Args:
        table: The table.
        name: What the reader calls the model.
        dictionaries: The number of features in each layer, by dictionary.
        paths: Paths of all modules.
        listing: What to type to see all sites.
    """
    lacking = {} if dictionaries else dict.fromkeys(sorted(FEATURE_SITES), "no dictionary was added to the model")
    refused = {**table.refused, **lacking}
    some = {site: layers for site, layers in table.lacking.items() if layers and site not in refused}
    more: dict[str, Any] = {"dictionaries": dictionaries, "lacking": some, "listing": listing}
    return ModelShape(name, table.numbers.n_layers, table.units, refused, paths, **more)


def site_rows(shape: ModelShape, sizes: Sizes) -> list[SiteRow]:
    """Return the table of a model's sites.

    Args:
        shape: The model's counts and names.
        sizes: Says how large the axes of a value are.
    """
    rows = [*_named(shape, sizes)]
    features = ((name, of) for of in shape.dictionaries for name in sorted(FEATURE_SITES))
    return [*rows, *(_feature_row(shape, name, of) for name, of in features)]


def _named(shape: ModelShape, sizes: Sizes) -> Iterator[SiteRow]:
    names = [name for name in NAMES if name not in FEATURE_SITES or name in shape.refused]
    if not shape.halves:
        yield from (_row(shape, sizes, name) for name in names if name not in CROSS_SITES)
        for stream, part in shape.parts.items():
            if stream != shape.main:
                own = (name for name in names if name not in ONCE and name != "module")
                yield from (_row(part, sizes, name, stream) for name in own)
        return
    for stream, part in shape.parts.items():
        own = (name for name in names if name not in ONCE and name != "module")
        yield from (_row(part, sizes, name, stream) for name in own)
    yield from (_row(shape, sizes, name) for name in names if name in ONCE or name == "module")


def _feature_row(shape: ModelShape, name: str, dictionary: str) -> SiteRow:
    of_layer = shape.dictionaries[dictionary]
    layers = f"layers {', '.join(map(str, sorted(of_layer)))}"
    counts = " or ".join(map(str, sorted(set(of_layer.values()))))
    is_error = name == "feature_error"
    axes = "layer position width" if is_error else "layer feature position"
    return SiteRow(f"{name}({dictionary})", axes, layers if is_error else f"{layers} x {counts} x position", None)


def _row(shape: ModelShape, sizes: Sizes, name: str, stream: str | None = None) -> SiteRow:
    info = NAMES[name]
    if name == "module":
        return SiteRow("module(PATH)", "the module's own", f"{len(shape.module_paths) - 1} modules", None)
    axes = ["layer"] if info.has_layer else []
    axes += [info.unit_axis] if info.unit_axis else []
    axes += [info.position_axis, *info.value_axes]
    known: dict[str, int | None] = {"layer": len(shape.layers_with(name)), **shape.units}
    known |= sizes(name, stream)
    refused = shape.refused.get(name)
    shown = "" if refused else " x ".join(str(known.get(axis) or axis) for axis in axes)
    return SiteRow(f"{stream}/{name}" if stream else name, " ".join(axes), shown, refused)
