"""The axis ``source_layer``: the layers that a value is read at, as in back-patching and patchscopes."""

from collections.abc import Callable
from dataclasses import replace

from causalpatch.base.errors import SettingError
from causalpatch.patches import From, Subspace, Value
from causalpatch.sites import Site, SiteSet, expand
from causalpatch.sites.select import ModelShape

SOURCE_LAYER = "source_layer"


def source_layers(shape: ModelShape, value: Value | None) -> tuple[list[int], Callable[[int], Value]]:
    """Return the layers that a value is read at, and the value of each.

    Args:
        shape: The model's counts and names.
        value: The value: ``From`` a site of several layers, also inside a subspace.

    Raises:
        SettingError: The value is not read at several layers.
    """
    read = value.of if isinstance(value, Subspace) else value
    sites = read.parsed if isinstance(read, From) else None
    if not isinstance(read, From) or sites is None or isinstance(sites.layer, int | None):
        raise SettingError(
            f"the value {value or 'source'} has no axis {SOURCE_LAYER!r}",
            facts=[("needed", "a value that is read at a site of several layers")],
            fix='sweep(…, value=From("resid_post@-1"), over="source_layer,layer")',
        )
    one_unit = sites if sites.unit is None else replace(sites, unit=0)
    layers = sorted({site.layer for site in expand(one_unit, shape) if site.layer is not None})

    def at(layer: int) -> Value:
        of = From(_at_layer(sites, layer), read.run, read.prompts)
        return replace(value, of=of) if isinstance(value, Subspace) else of

    return layers, at


def _at_layer(sites: Site | SiteSet, layer: int) -> str:
    """Return a set of sites in one layer; a unit that it leaves open stays open."""
    if isinstance(sites.unit, int | None):
        site = Site(sites.name, layer, sites.unit, sites.position, sites.stream, dictionary=sites.dictionary)
        return str(site)
    return str(replace(sites, layer=layer))
