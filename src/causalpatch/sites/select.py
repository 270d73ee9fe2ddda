"""From names to the members of one model: what exists there, and which sites a set stands for."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from causalpatch.base.errors import SiteNotFound, SiteUnsupported
from causalpatch.base.suggest import closest
from causalpatch.sites.index import Every, Index, Range
from causalpatch.sites.names import CROSS_SITES, ONCE
from causalpatch.sites.site import Site, SiteSet


@dataclass(frozen=True)
class ModelShape:
    """The counts and names of one model that decide which sites exist.

    Args:
        model: The model's name as the reader typed it, for messages.
        n_layers: Number of layers; 0 for a model whose layers are not known by number.
        units: Units in a layer by axis: ``{"head": 12, "kv_head": 4, "neuron": 3072}``.
        refused: Names of sites that this model cannot offer, each with the reason.
        module_paths: Paths of all modules in the order of ``named_modules()``.
        dictionaries: For each dictionary by its name, the number of features in each layer that it covers.
        lacking: For each site that only some layers have, by its name, the layers without it, each with the reason.
        listing: What to type to see all sites; by default the command that looks the model up by its name.
        parts: For a model with several streams of tokens the shape of each by its name; what stands above is then the
            decoder's, or that of the stream that needs no name.
        main: The name of the stream that a site stands in which says none, where that stream has a name.
    """

    model: str
    n_layers: int
    units: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    module_paths: tuple[str, ...] = ()
    dictionaries: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    lacking: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    listing: str = ""
    parts: Mapping[str, "ModelShape"] = field(default_factory=dict)
    main: str | None = None

    def __post_init__(self) -> None:
        if not self.listing:
            object.__setattr__(self, "listing", f"causalpatch doctor {self.model}")

    @property
    def halves(self) -> Mapping[str, "ModelShape"]:
        """The shapes of an encoder and its decoder, where the model has them: a site must say in which it stands."""
        return self.parts if "decoder" in self.parts else {}

    def layers_with(self, name: str) -> list[int]:
        """Return the layers that have a site.

        Args:
            name: The site's name.
        """
        return [layer for layer in range(self.n_layers) if layer not in self.lacking.get(name, {})]


def check(site: Site, shape: ModelShape) -> None:
    """Make sure that a site exists in a model.

    Args:
        site: The site.
        shape: The model's counts and names.

    Raises:
        SiteUnsupported: The model cannot offer this kind of site; the message says why.
        SiteNotFound: A layer, unit or module path is not there; the message says what is.
    """
    shape = part_of(site, shape)
    _check_refused(site, shape)
    _check_hook(site, shape)
    if site.module is not None:
        _check_module(site, shape)
        return
    if site.dictionary is not None:
        _check_feature(site, site.dictionary, shape)
        return
    if site.layer is not None and site.layer >= shape.n_layers:
        if shape.n_layers == 0:
            _unsupported(site, shape, "the layers of this model are not known by number")
        _not_found(site, shape, [("layer", _asked("layer", site.layer, shape.n_layers))])
    lacking = shape.lacking.get(site.name, {})
    if site.layer is not None and site.layer in lacking:
        others = ", ".join(map(str, shape.layers_with(site.name)))
        _unsupported(site, shape, lacking[site.layer], fix=f"take one of the layers {others}")
    axis = site.unit_axis
    if axis is None or site.unit is None:
        return
    if axis not in shape.units:
        _unsupported(site, shape, f"the number of {axis}s of this model is not known")
    count = shape.units[axis]
    if site.unit < count:
        return
    facts = [(axis, _asked(axis, site.unit, count))]
    n_heads = shape.units.get("head", 0)
    if axis == "kv_head" and count > 0 and site.unit < n_heads:
        serves = site.unit // (n_heads // count)
        facts.append(("head", f"{site.unit} is served by kv_head {serves}"))
        _not_found(site, shape, facts, fix=f"write {site.name}.{site.layer}.{serves}")
    _not_found(site, shape, facts)


def expand(site: Site | SiteSet, shape: ModelShape) -> tuple[Site, ...]:
    """Return the sites that a set stands for in a model, each of them checked.

    Args:
        site: A site or a set.
        shape: The model's counts and names.

    Returns:
        The sites, by layer and then by unit; for modules in the order of ``named_modules()``.

    Raises:
        SiteUnsupported: The model cannot offer this kind of site, or cannot count its units.
        SiteNotFound: A member is not in the model, or the set selects nothing.

    Examples:
        >>> from causalpatch.sites.site import parse
        >>> shape = ModelShape("tiny", n_layers=2, units={"head": 2})
        >>> [str(member) for member in expand(parse("z@-1"), shape)]
        ['z.0.0@-1', 'z.0.1@-1', 'z.1.0@-1', 'z.1.1@-1']
    """
    shape, whole = part_of(site, shape), shape
    # What stands in a model once goes by its name alone.
    is_once = site.name in ONCE or site.stream == whole.main
    site = replace(site, stream=None) if is_once and site.stream is not None else site
    if isinstance(site, Site):
        check(site, whole)
        return (site,)
    _check_refused(site, shape)
    _check_hook(site, shape)
    members = []
    for member in _members(site, shape):
        check(member, whole)
        members.append(member)
    if not members:
        if site.module is None and (shape.n_layers == 0 or (site.unit_axis and not shape.units.get(site.unit_axis))):
            _unsupported(site, shape, "the model has none that are known by number")
        _not_found(site, shape, _empty_facts(site, shape))
    return tuple(members)


def part_of(site: Site | SiteSet, shape: ModelShape) -> ModelShape:
    """Return the shape of what a site stands in: the model, or its encoder or decoder.

    Args:
        site: The site.
        shape: The model's counts and names.

    Raises:
        SiteUnsupported: The model has no such stream, or the site is the decoder's alone.
        SiteNotFound: The site stands in both streams, and the text does not say in which.
    """
    if site.stream is not None and site.stream not in shape.parts:
        known = f"; it has {' and '.join(shape.parts)}" if shape.parts else ""
        _unsupported(site, shape, f"the model has no stream {site.stream!r}{known}")
    if site.module is not None or not (shape.halves or site.stream):
        return shape
    if not shape.halves:
        return shape.parts[site.stream or ""]
    if site.name in ONCE:
        if site.stream == "encoder":
            of_cross = "only the decoder has cross-attention"
            what = of_cross if site.name in CROSS_SITES else "only the decoder gives logits"
            _unsupported(site, shape, what, fix=f"write {str(replace(site, stream=None))!r}")
        return shape.parts["decoder"]
    if site.stream is None:
        both = [str(replace(site, stream=stream)) for stream in shape.parts]
        facts = [("streams", " ".join(shape.parts)), ("positions", "each stream counts its own tokens")]
        _not_found(site, shape, facts, fix=f"write {' or '.join(map(repr, both))}")
    return shape.parts[site.stream]


def _members(site: SiteSet, shape: ModelShape) -> Iterator[Site]:
    if site.module is not None:
        pattern = _path_pattern(site.module.path)
        paths = [path for path in shape.module_paths if pattern.fullmatch(path)]
        if "*" not in site.module.path:
            paths = [site.module.path]
        if site.unit is not None and _is_open(site.unit):
            reason = f"how many {site.unit_axis}s a module has is known only when it runs"
            _unsupported(site, shape, reason, fix=f"say how many: {site.module}#0:8")
        for path in paths:
            module = type(site.module)(path, site.module.side, site.module.items, site.module.axes)
            for unit in _numbers(site.unit, 0):
                yield Site("module", unit=unit, position=site.position, module=module)
        return
    if site.dictionary is not None:
        yield from _features(site, site.dictionary, shape)
        return
    n_units = shape.units.get(site.unit_axis, 0) if site.unit_axis else 0
    passed = shape.lacking.get(site.name, {}) if _is_open(site.layer) else {}
    for layer in (layer for layer in _numbers(site.layer, shape.n_layers) if layer not in passed):
        for unit in _numbers(site.unit, n_units):
            yield Site(site.name, layer, unit, site.position, site.stream)


def _features(site: SiteSet, dictionary: str, shape: ModelShape) -> Iterator[Site]:
    """Yield the members of a set of features; a star stands for the layers that the dictionary covers."""
    covered = _covered(site, dictionary, shape)
    named = [layer for layer in _numbers(site.layer, shape.n_layers) if layer is not None]
    for layer in sorted(set(named) & set(covered)) if _is_open(site.layer) else named:
        for unit in _numbers(site.unit, covered.get(layer, 1)):
            yield Site(site.name, layer, unit, site.position, site.stream, dictionary=dictionary)


def _numbers(index: Index, count: int) -> Iterable[int | None]:
    """Return the members of a selection; an end that is missing is 0 or ``count``."""
    if index is None:
        return (None,)
    if isinstance(index, int):
        return (index,)
    if isinstance(index, Every):
        return range(count)
    if isinstance(index, Range):
        return range(index.start or 0, count if index.stop is None else index.stop)
    return index


def _is_open(index: Index) -> bool:
    """Tell whether a selection reaches to the end, wherever that is."""
    return isinstance(index, Every) or (isinstance(index, Range) and index.stop is None)


def _path_pattern(path: str) -> re.Pattern[str]:
    """Return a pattern in which ``*`` stands for anything within one part of a module's path."""
    parts = ["[^.]+" if part == "*" else re.escape(part).replace(r"\*", "[^.]*") for part in path.split(".")]
    return re.compile(r"\.".join(parts))


def _check_hook(site: Site | SiteSet, shape: ModelShape) -> None:
    """Make sure that a hook name which depends on the model means the site that it was translated into."""
    if site.hook is not None and "mlp_gate" not in shape.refused:
        gate = str(site).replace("mlp_pre", "mlp_gate", 1)
        reason = f"{site.hook!r} is what goes into the activation function: in gated MLPs, as here, the gate"
        _unsupported(site, shape, reason, fix=f"write {gate!r}")


def _check_refused(site: Site | SiteSet, shape: ModelShape) -> None:
    if site.name in shape.refused:
        adds = site.dictionary is not None and shape.n_layers > 0
        fix = f'model.add_dictionary("{site.dictionary}", FOLDER)' if adds else ""
        _unsupported(site, shape, shape.refused[site.name], fix)


def _covered(site: Site | SiteSet, dictionary: str, shape: ModelShape) -> Mapping[int, int]:
    """Return the number of features in each layer of a dictionary."""
    if dictionary not in shape.dictionaries:
        near = closest(dictionary, shape.dictionaries)
        known = list(dict.fromkeys([*near, *shape.dictionaries]))
        fix = f"did you mean {site.name}({near[0]})?" if near else f'model.add_dictionary("{dictionary}", FOLDER)'
        _not_found(site, shape, [("dictionary", f"none is named {dictionary!r}"), ("known", " ".join(known))], fix)
    return shape.dictionaries[dictionary]


def _check_feature(site: Site, dictionary: str, shape: ModelShape) -> None:
    covered = _covered(site, dictionary, shape)
    layer = site.layer or 0
    if layer not in covered:
        layers = ", ".join(map(str, sorted(covered)))
        facts = [("layer", f"{layer} was asked for; {dictionary!r} covers {layers}")]
        _not_found(site, shape, facts, f'model.add_dictionary("{dictionary}", FOLDER) with the file of that layer')
    count = covered[layer]
    if site.unit is not None and site.unit >= count:
        asked = f"{site.unit} was asked for; {dictionary!r} has features 0 to {count - 1} in layer {layer}"
        _not_found(site, shape, [("feature", asked)], f"write {site.name}({dictionary}).{layer}.{count - 1} or below")


def _check_module(site: Site, shape: ModelShape) -> None:
    module = site.module
    if module is None:
        return
    if site.position is not None and module.axes and "position" not in module.axes:
        _unsupported(site, shape, f"its axes ({','.join(module.axes)}) hold no position", fix="leave the @ out")
    if module.path and module.path not in shape.module_paths:
        near = closest(module.path, shape.module_paths)
        shown = near or [path for path in shape.module_paths if path][:3]
        fix = f"did you mean module({near[0]}).{module.side}?" if near else ""
        _not_found(
            site, shape, [("module", f"no module {module.path!r}"), ("closest", "  ".join(shown) or "none")], fix
        )


def _asked(axis: str, index: int, count: int) -> str:
    has = f"{axis}s 0 to {count - 1}" if count > 1 else f"{axis} 0 only" if count == 1 else f"no {axis}s"
    return f"{index} was asked for; this model has {has}"


def _empty_facts(site: SiteSet, shape: ModelShape) -> list[tuple[str, str]]:
    if site.module is not None:
        shown = "  ".join(path for path in shape.module_paths[:8] if path) or "none"
        return [
            ("selected", "no module matches the path"),
            ("modules", shown + ("  …" * (len(shape.module_paths) > 8))),
        ]
    facts = [("selected", "nothing"), ("layers", f"0 to {shape.n_layers - 1}")]
    if site.dictionary is not None:
        covered = shape.dictionaries[site.dictionary]
        return [facts[0], ("covered", ", ".join(f"layer {n}: 0 to {covered[n] - 1}" for n in sorted(covered)))]
    if site.unit_axis:
        facts.append((f"{site.unit_axis}s", f"0 to {shape.units.get(site.unit_axis, 0) - 1}"))
    return facts


def _not_found(site: Site | SiteSet, shape: ModelShape, facts: Sequence[tuple[str, str]], fix: str = "") -> NoReturn:
    raise SiteNotFound(
        f"no site named {str(site)!r} in {shape.model!r}",
        facts=facts,
        fix=fix or f"list the sites with: {shape.listing}",
    )


def _unsupported(site: Site | SiteSet, shape: ModelShape, reason: str, fix: str = "") -> NoReturn:
    raise SiteUnsupported(
        f"{shape.model!r} does not have the site {str(site)!r}",
        facts=[("reason", reason)],
        fix=fix or f"list the sites with: {shape.listing}",
    )
