"""``module(PATH).input|output|state|cell``: a tap on any module of any ``nn.Module``."""

from causalpatch.models.taps import Port, Tap
from causalpatch.models.views import ModuleUnit, PositionAt, View, Whole
from causalpatch.sites.site import ModuleRef, Site


def module_tap(site: Site, module: ModuleRef, *, counts_positions: bool, rows: Port | None = None) -> Tap:
    """Return the tap of a module's input or output.

    Args:
        site: The site, whose unit counts on the first named axis that is not ``position``.
        module: The site's module.
        counts_positions: Whether the axis after the row is assumed to count positions where the site names no axes.
        rows: Where the module lays rows and positions into one axis: what has them apart.

    Returns:
        The tap. Its value has the module's axes as they are named, but positions stand first.
    """
    axes = module.axes
    has_position = "position" in axes if axes else counts_positions
    is_apart = has_position and axes[:1] in ((), ("position",))
    port = Port(module.path, module.side, module.items, like=rows if is_apart else None)
    ordered = ("position", *(axis for axis in axes if axis != "position")) if has_position and axes else axes
    view: View = Whole()
    if site.unit is not None and module.unit_axis is not None:
        view = ModuleUnit(axis=1 + ordered.index(module.unit_axis), index=site.unit)
    if has_position and axes and axes[0] != "position":
        view = PositionAt(axis=1 + axes.index("position"), view=view)
    return Tap(site, port, view, has_position=has_position, assumes_position=has_position and not axes)
