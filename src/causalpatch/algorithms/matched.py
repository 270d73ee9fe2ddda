"""Matched controls: random sites of the same kind as those that a variable is said to be at.

A head is matched with other heads at the same position, a neuron with other neurons, a module with others of its class
or, where it names a unit, with other units of the same module. No site that the hypothesis maps to anything is drawn.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from causalpatch.models import Model
from causalpatch.sites import EVERY, ModuleRef, Site, SiteSet, expand


def draw_matched(
    model: Model, sites: Sequence[Site], mapped: Sequence[Site], n: int, stream: np.random.Generator
) -> list[tuple[Site, ...]]:
    """Draw sets of sites matched in kind.

    Args:
        model: The network.
        sites: What is to be matched.
        mapped: Sites that are not drawn.
        n: Most sets that are drawn.
        stream: Where randomness comes from.

    Returns:
        Different sets, as many as there are up to ``n``; none where a site has no other of its kind.
    """
    taken = {str(site.at(None)) for site in mapped}
    choices = []
    for site in sites:
        others = [other.at(site.position) for other in _alike(model, site) if str(other.at(None)) not in taken]
        if not others:
            return []
        choices.append(others)
    found: dict[frozenset[str], tuple[Site, ...]] = {}
    for _ in range(20 * n):
        drawn = tuple(others[int(stream.integers(len(others)))] for others in choices)
        names = frozenset(map(str, drawn))
        if len(names) == len(drawn):
            found.setdefault(names, drawn)
        if len(found) == n:
            break
    return list(found.values())


def _alike(model: Model, site: Site) -> list[Site]:
    """Return the sites of a site's kind, itself aside."""
    if site.module is None:
        if not site.info.has_layer:
            return []
        return [each for each in expand(SiteSet(site.name, EVERY), model.shape) if each != site.at(None)]
    if site.unit is not None:
        # Units of one module are counted by what the hypothesis names; the module's own weight says how many.
        n_units = _n_units(model, site.module)
        return [replace(site.at(None), unit=unit) for unit in range(n_units) if unit != site.unit]
    own = type(model.module.get_submodule(site.module.path))
    return [
        Site("module", module=replace(site.module, path=path))
        for path in model.shape.module_paths
        if path and path != site.module.path and type(model.module.get_submodule(path)) is own
    ]


def _n_units(model: Model, module: ModuleRef) -> int:
    """Return how many units a module has, as far as its weights say; 0 where they do not."""
    part = model.module.get_submodule(module.path)
    for name in ("out_features", "out_channels", "num_features", "embedding_dim"):
        size = getattr(part, name, None)
        if isinstance(size, int) and module.side == "output":
            return size
    return 0
