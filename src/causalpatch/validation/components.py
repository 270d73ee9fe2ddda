"""What a claim is about: sites or edges, from whatever names them, and those that are like them.

A *member* is one site (with the aligned column that it is patched at, if it has one) or one edge. Members print as the
texts that a claim keeps, and are made again from these texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np

from causalpatch.attribution.confirm import COARSE, FINE
from causalpatch.base.errors import PathError, SettingError, SiteNotFound
from causalpatch.engine.wiring import graph_of
from causalpatch.experiment import Experiment
from causalpatch.models import Model
from causalpatch.patches import Patch, Value
from causalpatch.patches.patch import Alignment
from causalpatch.results.effects import Effects
from causalpatch.results.localization import Localization
from causalpatch.results.top import TopTable
from causalpatch.sites import Site, SiteSet, expand, parse
from causalpatch.sites.graph import Graph

_FINE_AXES: Final = ("neuron", "feature", "channel")
_COLUMN: Final = "@column "

Asked: TypeAlias = Any  # a site, an edge, a patch, their text, lists of these, or what holds some: see ``members_of``


@dataclass(frozen=True)
class Node:
    """A site, and where it is patched.

    Args:
        site: The site.
        column: The aligned column of the pairs; None where the site says its position, or all are meant.
        align: How spans of unequal lengths meet.
    """

    site: Site
    column: int | None = None
    align: Alignment | None = None

    @property
    def is_fine(self) -> bool:
        """Whether it is as small as a neuron."""
        return self.site.unit_axis in _FINE_AXES

    def patch(self, value: Value | None) -> Patch:
        """Return the patch of this site with a value."""
        return Patch(self.site, value, self.align, self.column)

    def __str__(self) -> str:
        return f"{self.site}" if self.column is None else f"{self.site}{_COLUMN}{self.column}"


@dataclass(frozen=True)
class Wire:
    """An edge of the model's graph.

    Args:
        name: Its name, such as ``a0.h1 -> m2``.
        sender: Number of the sender.
        receiver: Number of the receiver.
    """

    name: str
    sender: int
    receiver: int

    is_fine = True

    def __str__(self) -> str:
        return self.name


Member: TypeAlias = Node | Wire


def members_of(asked: Asked, model: Model) -> list[Member]:
    """Return the members that something names.

    Args:
        asked: A site or edge, its text, a patch (for its site and column), a list of these; the table of
            ``Effects.top``; effects, for the cells of a sweep over layers and units that lie beyond its ``top``; or
            anything with ``components``.
        model: The model that they are in.

    Returns:
        The members, in order; a set of sites is one member for each.

    Raises:
        SettingError: Nothing is named, one is named twice, or sites and edges are mixed.
        SiteNotFound: A site is not in the model.
        PathError: An edge is not in the model.
        ModelUnsupported: Edges are named, and the model's components are not known by name.
    """
    found = [member for one in _listed(asked) for member in _of_one(one, model)]
    names = list(map(str, found))
    twice = next((name for name in names if names.count(name) > 1), None)
    if not found or twice is not None:
        raise SettingError(
            "no component was named to make a claim about" if not found else f"component '{twice}' is named twice",
            facts=[("components", len(found))],
            fix='confirm(experiment, ["z.4.4@-1", "z.4.2@-1"])',
        )
    if len({type(member) for member in found}) > 1:
        raise SettingError(
            "a claim is about sites or about edges, not about both",
            facts=[("given", ", ".join(names[:6]))],
            fix="confirm them in two claims, each on pairs of its own",
        )
    return found


def delta_of(members: Sequence[Member]) -> float:
    """Return the share of the gap that does not count yet, by default: .02 of what is fine, .1 of all else."""
    return FINE if all(member.is_fine for member in members) else COARSE


def origin_of(asked: Asked) -> Mapping[str, Any] | None:
    """Return the record of the pairs that components were found on, where what names them knows it."""
    record = getattr(asked, "provenance", None)
    pairs = record.get("pairs") if isinstance(record, Mapping) else None
    return pairs if isinstance(pairs, Mapping) and pairs.get("hash") else None


def shares_of(asked: Asked, members: Sequence[Member]) -> list[float | None]:
    """Return each member's share where it was found, for what knows it: to be shown beside the held-out one."""
    known: dict[str, float] = {}
    if isinstance(asked, TopTable):
        sites = sites_of_table(asked)
        known = {str(site): float(share) for site, share in zip(sites, asked["recovered"], strict=True)}
    elif isinstance(asked, Localization):
        known = {str(site): cell.effect for site, cell in zip(asked.components, asked.found, strict=True)}
    return [known.get(str(member)) for member in members]


def closed_in(asked: Asked) -> list[str]:
    """Say what a search left closed, with the bound on what was missed there; nothing where there was no search."""
    if not isinstance(asked, Localization):
        return []
    told = [
        f"the search left {sum(each.sizes)} of {each.n} {each.level}s closed, at most {each.at_most(asked.level)} of "
        f"them beyond {each.delta:g} on its own pairs"
        for each in asked.closed
        if sum(each.sizes)
    ]
    pending = [f"the budget of the search ended before {', '.join(asked.pending)}"] if asked.pending else []
    return [*told, *pending]


def sites_of_table(table: TopTable) -> list[Site]:
    """Return the sites that the rows of ``Effects.top`` stand for.

    Raises:
        SettingError: The rows are no single sites.
    """
    frame = table.to_dataframe()
    swept = parse(str(table.provenance.get("site") or "")) if table.provenance.get("site") else None
    axes = [axis for axis in table.axes if axis != "layer"]
    unit = [] if swept is None or swept.unit_axis is None else [swept.unit_axis]
    if swept is None or swept.module is not None or "layer" not in table.axes or axes not in ([], unit):
        raise SettingError(
            "the rows of this table are no single sites",
            facts=[("axes", ", ".join(table.axes)), ("needed", "layer, and the site's unit where it has one")],
            fix='name them: confirm(experiment, ["z.4.4@-1"]), or sweep at a position: sweep(experiment, "z@-1")',
        )
    rows = frame.to_dict("records")
    places = [(int(row["layer"]), int(row[axes[0]]) if axes else None) for row in rows]
    return [Site(swept.name, *at, swept.position, swept.stream, dictionary=swept.dictionary) for at in places]


def _listed(asked: Asked) -> list[Any]:
    if isinstance(asked, TopTable):
        return list(sites_of_table(asked))
    if isinstance(asked, Effects):
        raise SettingError(
            "effects are no components: say which of them",
            facts=[("cells", " x ".join(f"{axis}" for axis in asked.axes))],
            fix="confirm(experiment, effects.top(3), found_on=discovery)",
        )
    held = getattr(asked, "components", None)
    if held is not None:
        return list(held)
    if isinstance(asked, str | Site | SiteSet | Patch) or not isinstance(asked, Iterable):
        return [asked]
    return list(asked)


def _of_one(one: Any, model: Model) -> list[Member]:
    if isinstance(one, Node | Wire):
        return [one]
    if isinstance(one, str) and "->" in one:
        graph = graph_of(model)
        sender, receiver = graph.parse(one)
        return [Wire(graph.label(sender, receiver), sender, receiver)]
    if isinstance(one, Patch):
        return [Node(site, one.column, one.align) for site in expand(one.site, model.shape)]
    if isinstance(one, str) and _COLUMN in one:
        text, _, column = one.partition(_COLUMN)
        return [Node(site, int(column)) for site in expand(parse(text), model.shape)]
    if isinstance(one, str | Site | SiteSet):
        return [Node(site) for site in expand(parse(one), model.shape)]
    raise SettingError(
        f"{repr(one)[:60]} is no component",
        facts=[("type", type(one).__name__)],
        fix='name sites such as "z.4.4@-1", or edges such as "a0.h1 -> m2"',
    )


def siblings(member: Member, experiment: Experiment, reach: int) -> list[Member]:
    """Return what is like a member: of its kind, at its position, at its depth or up to ``reach`` layers off.

    A site with units has the other units of its layer, one without has the same site of other layers. An edge has the
    edges from senders of its kind and layer to receivers of its kind and layer; ``reach`` does not widen these.

    Args:
        member: The member.
        experiment: The experiment, for the model.
        reach: How many layers further up or down.

    Returns:
        The others, by layer and unit; none where units cannot be counted.
    """
    if isinstance(member, Wire):
        graph = graph_of(experiment.model)
        kind = _kind_of_edge(graph, member.sender, member.receiver)
        alike = [edge for edge in graph.edges.tolist() if _kind_of_edge(graph, *edge) == kind]
        return [Wire(graph.label(*edge), *edge) for edge in alike if edge != [member.sender, member.receiver]]
    site = member.site
    whole = _all_like(site, experiment, None if site.layer is None else (site.layer, reach))
    return [replace(member, site=one) for one in whole if one != site]


def kin(members: Sequence[Member], experiment: Experiment) -> list[Member]:
    """Return all members of the kinds that some are of, at any depth, but these themselves."""
    found: dict[Member, None] = {}
    for member in members:
        if isinstance(member, Wire):
            graph = graph_of(experiment.model)
            found |= dict.fromkeys(Wire(graph.label(*edge), *edge) for edge in graph.edges.tolist())
        else:
            found |= dict.fromkeys(replace(member, site=one) for one in _all_like(member.site, experiment, None))
    taken = set(members)
    return [member for member in found if member not in taken]


def _all_like(site: Site, experiment: Experiment, near: tuple[int, int] | None) -> list[Site]:
    """Return the sites of one kind, in the layers that are near or in all; none where they cannot be counted."""
    shape = experiment.model.shape
    if site.module is not None:
        if site.unit is None or site.unit_axis is None:
            return []
        whole = replace(site, unit=None)
        return [replace(site, unit=unit) for unit in range(experiment.count_units(whole, site.unit_axis))]
    try:
        everything = expand(_kind(site), shape) if site.info.has_layer or site.unit_axis else ()
    except (SiteNotFound, PathError):
        return []
    if near is None:
        return list(everything)
    layer, reach = near
    return [one for one in everything if one.layer is not None and abs(one.layer - layer) <= reach]


def _kind(site: Site) -> SiteSet:
    return SiteSet(site.name, position=site.position, stream=site.stream, dictionary=site.dictionary)


def _kind_of_edge(graph: Graph, sender: int, receiver: int) -> tuple[Any, ...]:
    """Return what edges of one kind and depth have in common."""
    first, last = graph.sender_label(sender), graph.receiver_label(receiver)
    return first.partition(".")[0], last.partition(".")[0], last.partition("<")[2]


def masks_of(sets: Sequence[Sequence[Member]], graph: Graph) -> np.ndarray:
    """Return the mask of the edges of each set, booleans ``(set, sender, receiver)``."""
    masks = np.zeros((len(sets), *graph.shape), dtype=bool)
    for mask, members in zip(masks, sets, strict=True):
        for member in members:
            if isinstance(member, Wire):
                mask[member.sender, member.receiver] = True
    return masks
