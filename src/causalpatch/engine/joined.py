"""All units of a layer as one value: the tensor that holds them side by side, such as all neurons of an MLP.

A subspace may lie across units (heads, neurons), each of which is a site of its own. It is then a subspace of the
tensor in which they lie side by side, which has a name too: that of its module.
"""

from dataclasses import replace
from typing import Literal

from causalpatch.base.errors import PatchError
from causalpatch.models import Columns, Model, input_width, output_width
from causalpatch.patches import Patch, Subspace
from causalpatch.sites import ModuleRef, Site, SiteSet, expand


def is_joined(site: Site | SiteSet, value: Subspace) -> bool:
    """Say whether a subspace lies across the units of a layer: its basis has an axis of units."""
    is_set = isinstance(site, SiteSet) and site.info.unit_axis is not None
    return is_set and value.basis.ndim == 2 + len(site.info.value_axes)


def joined_patch(model: Model, patch: Patch, value: Subspace) -> Patch:
    """Return the patch of a subspace across units as one of the tensor in which they lie side by side.

    Raises:
        PatchError: They do not lie so, or the basis has another number of units.
    """
    site = joined_site(model, patch.site)
    n_units = model.shape.units.get(patch.site.info.unit_axis or "", 0)
    if value.basis.shape[1] != n_units:
        raise PatchError(
            f"the subspace for '{patch.site}' does not fit",
            facts=[("basis", f"shape {value.basis.shape}"), ("units", f"{n_units}, all of one layer")],
            fix=f"give a basis of shape (dimension, {n_units}, …)",
        )
    return Patch(site, replace(value, basis=value.rows), patch.align, patch.column)


def joined_site(model: Model, units: Site | SiteSet) -> Site:
    """Return the site that all units of a layer are together.

    Args:
        model: The model.
        units: All units of one layer, such as ``mlp_post.3@-1``.

    Raises:
        PatchError: These are not all units of one layer, or their tensor holds something else too.
    """
    members = expand(units, model.shape)
    n_units = model.shape.units.get(units.info.unit_axis or "", 0)
    taps = [model.tap(member) for member in members]
    views = [tap.view for tap in taps if isinstance(tap.view, Columns)]
    port = taps[0].port
    is_whole = [member.unit for member in members] == list(range(n_units)) and len({m.layer for m in members}) == 1
    if not is_whole:
        raise PatchError(
            f"'{units}' is not all units of one layer",
            facts=[("members", len(members)), ("units in a layer", n_units)],
            fix=f"name one layer and no unit: {units.name}.{members[0].layer}",
        )
    module = model.module.get_submodule(port.path)
    width = input_width(module) if port.side == "input" else output_width(module)
    ends = [(view.start, view.start + view.width) for view in views]
    is_tiled = ends == [(k * view.width, (k + 1) * view.width) for k, view in enumerate(views)]
    if len(views) < n_units or not is_tiled or width != ends[-1][1] or port.items:
        raise PatchError(
            f"the units of '{units}' do not fill a tensor of their own",
            facts=[("their tensor", f"{port.side} of {port.path}"), ("holds", "other values too, or in another order")],
            fix=f"take the whole tensor: module({port.path}).{port.side} axes=(position,width)",
        )
    side: Literal["input", "output"] = "input" if port.side == "input" else "output"
    return Site("module", position=units.position, module=ModuleRef(port.path, side, (), ("position", "width")))
