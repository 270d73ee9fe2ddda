"""Sites: names of activations, text in and text out.

One grammar names every activation::

    site     = [STREAM "/"] NAME ["." LAYER ["." UNIT]] ["@" POSITION]      STREAM = encoder | decoder | vision | text
             | feature(DICTIONARY)|feature_error(DICTIONARY) ["." LAYER ["." UNIT]] ["@" POSITION]
             | module(PATH).output|input|state|cell [items] [" axes=(...)"] ["#" [AXIS "="] UNIT] ["@" POSITION]
    LAYER, UNIT = 3 | 2:5 (half open) | 1,4,7 | *                           POSITION = 3 | -1 | 2:5 | span | *

With all its indices a text is a ``Site``, one target of a patch. A missing, starred or sliced layer or unit makes a
``SiteSet``: several targets. Without ``@`` a site means all positions at once. Both are plain frozen data: they print,
hash, compare and travel, and ``parse(str(site)) == site`` holds for every one of them.
"""

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from causalpatch.base.errors import SiteSyntaxError
from causalpatch.sites.aliases import depends_on_model, translate
from causalpatch.sites.index import (
    EVERY,
    Every,
    Index,
    Position,
    Range,
    Span,
    index_text,
    parse_index,
    parse_position,
    settle_index,
    settle_position,
)
from causalpatch.sites.module_ref import ModuleRef, parse_module
from causalpatch.sites.names import FEATURE_SITES, SiteName, describe

__all__ = ["EVERY", "Every", "Index", "ModuleRef", "Position", "Range", "Site", "SiteSet", "Span", "parse"]

STREAMS = ("encoder", "decoder", "vision", "text")
_GRAMMAR = "[STREAM/]NAME[.LAYER[.UNIT]][@POSITION]"
_OF_DICTIONARY = re.compile(rf"(?P<name>{'|'.join(sorted(FEATURE_SITES))})\((?P<dictionary>[^()\s@/]+)\)(?P<rest>.*)")


@dataclass(frozen=True, repr=False)
class _Named:
    """What one site and a set of sites share: the fields and everything that follows from them alone."""

    name: str
    layer: Index = None
    unit: Index = None
    position: Position | None = None
    stream: str | None = None
    module: ModuleRef | None = None
    hook: str | None = dataclasses.field(default=None, compare=False)
    dictionary: str | None = None

    @property
    def info(self) -> SiteName:
        """What the name means: its indices and the axes of its value."""
        return describe(self.name)

    @property
    def unit_axis(self) -> str | None:
        """The axis that ``unit`` counts on, or None."""
        return self.module.unit_axis if self.module else self.info.unit_axis

    def at(self, position: Position | None) -> Self:
        """Return the same site or set at another position."""
        if position is not None:
            return dataclasses.replace(self, position=position)
        if self.position is None:
            return self
        made = copy.copy(self)  # nothing is left to be checked
        object.__setattr__(made, "position", None)
        return made

    def __str__(self) -> str:
        return _text(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


@dataclass(frozen=True, repr=False)
class Site(_Named):
    """The name of one activation.

    Args:
        name: A name of ``sites.names.NAMES``.
        layer: The layer, from 0; None for names without layers.
        unit: The head, kv_head or neuron, from 0, for names that have units; of a module, the index on the first of
            its named axes that is not ``position`` (or the one that is named with it), or None for all of it.
        position: Where in each prompt, counted in real tokens; None for all positions at once.
        stream: ``"encoder"`` or ``"decoder"``, ``"vision"`` or ``"text"``, in models that have several.
        module: The module, for the name ``"module"`` alone.
        hook: The hook name that it was translated from, where such a name means another site in other models.
        dictionary: The name of a dictionary, for ``"feature"`` and ``"feature_error"`` alone.

    Raises:
        SiteNotFound: No site has this name.
        SiteSyntaxError: An index is missing, is too many, or is not one number.

    Examples:
        >>> site = Site.parse("z.9.6@-1")
        >>> site.layer, site.unit, site.position
        (9, 6, -1)
        >>> str(site.at(None))
        'z.9.6'
    """

    layer: int | None = None
    unit: int | None = None

    def __post_init__(self) -> None:
        _settle(self)
        info = self.info
        wanted = [("layer", self.layer)] if info.has_layer else []
        if info.unit_axis or self.unit is not None:
            wanted.append((self.unit_axis or "unit", self.unit))
        for axis, index in wanted:
            if not isinstance(index, int):
                said = "no" if index is None else f"{axis} {index_text(index)}, not one"
                _refuse(self.name, f"one site needs one {axis}; {said} {axis} was given", "several are a SiteSet")
        if self.module is not None and "*" in self.module.path:
            _refuse(str(self.module), "one site needs the path of one module", "a path with '*' makes a SiteSet")

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read a text that names one site.

        Args:
            text: A site, or a TransformerLens hook name.

        Raises:
            SiteSyntaxError: The text is not a site, or names several.
            SiteNotFound: No site has this name.
        """
        found = parse(text)
        if not isinstance(found, Site):
            _refuse(text, f"it names several sites: {found}", "give one number for each layer and unit")
        return found


@dataclass(frozen=True, repr=False)
class SiteSet(_Named):
    """The name of several activations: a layer, unit or path is missing, starred, listed or sliced.

    In a sweep a set is one patch per member; in a patch it is all members in one run. A missing layer or unit and a
    starred one are the same set and print as stars.

    Args:
        name: A name of ``sites.names.NAMES``.
        layer: The layers, as number, ``Range``, tuple, ``EVERY`` or None.
        unit: The units, likewise.
        position: Where in each prompt; None for all positions at once. A position never makes a set.
        stream: ``"encoder"`` or ``"decoder"``, ``"vision"`` or ``"text"``, in models that have several.
        module: The module, for the name ``"module"`` alone; its path may hold ``*``.
        hook: The hook name that it was translated from, where such a name means another site in other models.
        dictionary: The name of a dictionary, for ``"feature"`` and ``"feature_error"`` alone.

    Raises:
        SiteNotFound: No site has this name.
        SiteSyntaxError: The indices name one site only, or do not fit the name.

    Examples:
        >>> str(parse("z"))
        'z.*.*'
        >>> str(parse("z.3"))
        'z.3.*'
    """

    def __post_init__(self) -> None:
        _settle(self)
        info = self.info
        if info.has_layer and self.layer is None:
            object.__setattr__(self, "layer", EVERY)
        if info.unit_axis and self.unit is None:
            object.__setattr__(self, "unit", EVERY)
        if _is_one(self.layer, self.unit, self.module):
            _refuse(str(self), "a set needs a missing, starred, listed or sliced index", "one target is a Site")


def parse(text: str | Site | SiteSet) -> Site | SiteSet:
    """Read a site or a set of sites.

    Args:
        text: A text of the grammar above, or a TransformerLens hook name; a site or set is returned as it is.

    Returns:
        A ``Site`` where every index is one number, else a ``SiteSet``. ``str()`` of it is the canonical text.

    Raises:
        SiteSyntaxError: The text does not follow the grammar.
        SiteNotFound: No site has this name; the message lists those that exist, the closest first.

    Examples:
        >>> parse("blocks.9.attn.hook_z.6@-1")
        Site('z.9.6@-1')
        >>> parse("resid_pre.2:5@subject")
        SiteSet('resid_pre.2:5@subject')
        >>> parse("module(conv2).output axes=(channel,height,column)#7")
        Site('module(conv2).output axes=(channel,height,column)#7')
        >>> parse("module(conv2).output axes=(channel,height,column)#height=2:5")
        SiteSet('module(conv2).output axes=(channel,height,column)#height=2:5')
    """
    if isinstance(text, Site | SiteSet):
        return text
    if not isinstance(text, str):
        _refuse(text, f"it is a value of type {type(text).__name__}, not a text", "write for instance 'z.9.6@-1'")
    try:
        fields = _read(translate(text.strip()), text.strip())
        fields["hook"] = text.strip() if depends_on_model(text.strip()) else None
        one = _is_one(fields["layer"], fields["unit"], fields["module"]) and not _is_partial(fields)
        return Site(**fields) if one else SiteSet(**fields)
    except SiteSyntaxError as error:
        if error.what.startswith(repr(text)):
            raise
        facts = (
            error.facts
            if error.facts[:1] and error.facts[0][0] == "problem"
            else (("problem", error.what), *error.facts)
        )
        raise SiteSyntaxError(f"{text!r} is not a site", facts=facts, fix=error.fix) from error


def _read(text: str, original: str) -> dict[str, Any]:
    """Split a text into the fields of a site."""
    if text.startswith("module("):
        module, rest = parse_module(text)
        before, at, position_text = rest.partition("@")
        axis, is_named, index = before[1:].rpartition("=")
        module = dataclasses.replace(module, counts=axis.strip()) if is_named else module
        unit = parse_index(index, module.unit_axis or "unit") if before else None
        layer, name, stream, dictionary = None, "module", None, None
    else:
        module = None
        before, at, position_text = text.partition("@")
        head, slash, body = before.rpartition("/")
        stream = head if slash else None
        found = _OF_DICTIONARY.fullmatch(body)
        dictionary = found["dictionary"] if found else None
        name, *indices = (f"{found['name']}{found['rest']}" if found else body).split(".")
        if name == "module":
            parse_module(text)
        if not name:
            _refuse(original, "it has no name", "write for instance 'z.9.6@-1'")
        info = describe(name, original)
        if len(indices) > 2:
            _refuse(
                original,
                f"{len(indices)} indices follow the name; a site has at most a layer and a unit",
                "write z.9.6",
            )
        layer = parse_index(indices[0], "layer") if indices else None
        unit = parse_index(indices[1], info.unit_axis or "unit") if len(indices) > 1 else None
    position = parse_position(position_text) if at else None
    indices_of = {"layer": layer, "unit": unit, "position": position}
    return {"name": name, **indices_of, "stream": stream, "module": module, "dictionary": dictionary}


def _is_one(layer: Index, unit: Index, module: ModuleRef | None) -> bool:
    """Tell whether the indices that are given name one target."""
    settled = all(index is None or isinstance(index, int) for index in (layer, unit))
    return settled and not (module is not None and "*" in module.path)


def _is_partial(fields: dict[str, Any]) -> bool:
    """Tell whether a layer or unit that the name takes is missing."""
    info = describe(fields["name"])
    return (info.has_layer and fields["layer"] is None) or (info.unit_axis is not None and fields["unit"] is None)


def _settle(site: _Named) -> None:
    """Bring the fields into their one form and refuse those that do not fit the name."""
    info = site.info
    unit_axis = site.module.unit_axis if isinstance(site.module, ModuleRef) else info.unit_axis
    object.__setattr__(site, "layer", settle_index(site.layer, "layer"))
    object.__setattr__(site, "unit", settle_index(site.unit, unit_axis or "unit"))
    object.__setattr__(site, "position", settle_position(site.position))
    if isinstance(site.module, ModuleRef) and site.unit is None and site.module.counts is not None:
        object.__setattr__(site, "module", dataclasses.replace(site.module, counts=None))
    if (info.name == "module") != isinstance(site.module, ModuleRef):
        _refuse(site.name, "the name 'module', and no other, comes with a module", "write module(PATH).output")
    if (info.name in FEATURE_SITES) != (site.dictionary is not None):
        needed = "the name of a dictionary in parentheses" if site.dictionary is None else "no dictionary"
        _refuse(site.name, f"{site.name} takes {needed}", f"write {sorted(FEATURE_SITES)[0]}(NAME).LAYER.FEATURE")
    if site.stream is not None and site.stream not in STREAMS:
        _refuse(f"{site.stream}/{site.name}", f"{site.stream!r} is not a stream", f"streams: {' '.join(STREAMS)}")
    if site.stream is not None and site.module is not None:
        _refuse(f"{site.stream}/{site.module}", "a module's path says its stream", "leave the stream out")
    if site.layer is not None and not info.has_layer:
        shown = f"{site.name}.{index_text(site.layer)}"
        _refuse(shown, f"{site.name} has no layers", f"write {site.module or site.name}")
    if site.unit is not None and unit_axis is None:
        if site.module is not None:
            _refuse(f"{site.module}#{index_text(site.unit)}", "a unit needs a named axis", "add axes=(channel,…)")
        _refuse(site.name, f"{site.name} has no units after its layer", f"write {site.name}.LAYER")


def _text(site: _Named) -> str:
    """Return the canonical text."""
    if site.module is not None:
        axis = "" if site.module.counts is None else f"{site.module.counts}="
        text = str(site.module) + ("" if site.unit is None else f"#{axis}{index_text(site.unit)}")
    else:
        stream = [] if site.stream is None else [f"{site.stream}/"]
        indices = [f".{index_text(index)}" for index in (site.layer, site.unit) if index is not None]
        dictionary = [] if site.dictionary is None else [f"({site.dictionary})"]
        text = "".join([*stream, site.name, *dictionary, *indices])
    return text if site.position is None else f"{text}@{site.position}"


def _refuse(what: object, problem: str, fix: str) -> NoReturn:
    raise SiteSyntaxError(f"{what!r} is not a site", facts=[("problem", problem), ("grammar", _GRAMMAR)], fix=fix)
