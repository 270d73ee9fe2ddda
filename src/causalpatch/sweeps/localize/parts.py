"""The parts of a model, coarse to fine: what each is made of.

A model whose family is known::

    whole -> sublayers (attn_out.L, mlp_out.L) -> positions -> units (heads z.L.H, neurons mlp_post.L.N, experts)

Any other module::

    whole -> modules, as they are nested -> channels or neurons of the innermost

Where another model makes the source runs, heads are ``head_out.L.H``: what a head writes through its own model's output
projection. ``z`` stands before it, and would hide what changed in the projection itself.

Positions are what all pairs have: spans and the last token, or aligned columns where these are the same tokens in all
prompts; else all positions are patched together, and nothing is told apart by them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal, TypeAlias

import numpy as np

from causalpatch.attribution.confirm import COARSE, FINE
from causalpatch.base.errors import CausalPatchError, ModelUnsupported, SettingError
from causalpatch.engine import probe
from causalpatch.experiment import Experiment
from causalpatch.experiment.towards import sublayers_of
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import Intervention, Patch
from causalpatch.sites import ModuleRef, Site, SiteSet, Span, parse

Level = Literal["whole", "sublayer", "position", "head", "neuron", "expert", "feature", "module", "channel"]
Units = Literal["heads", "neurons", "all", "none"]
UNITS: Final = ("heads", "neurons", "all", "none")
_OF_SUBLAYER: Final[dict[str, tuple[tuple[str, Level], ...]]] = {
    "attn_out": (("z", "head"),),
    "mlp_out": (("mlp_post", "neuron"), ("expert_out", "expert")),
}
_PART_OF: Final = {"attn_out": "attn_out", "z": "attn_out", "mlp_out": "mlp_out", "mlp_post": "mlp_out"}
"""Of which sublayer a dictionary's features are parts, by what it describes."""
_MOST_COLUMNS: Final = 64  # more positions are told apart only where they are asked for


@dataclass(frozen=True)
class Part:
    """Sites that are patched together.

    Args:
        level: What it is.
        sites: One site; of the whole, all of its parts.
        above: The name of the sublayer that it belongs to, for scores; or an empty text.
    """

    level: Level
    sites: tuple[Site | SiteSet, ...]
    above: str = ""

    @cached_property
    def name(self) -> str:
        """The site's text."""
        return str(self.sites[0]) if len(self.sites) == 1 else self.level

    @property
    def delta(self) -> float:
        """Which |effect| matters by default, as a share of the gap."""
        return FINE if self.level in ("neuron", "feature") else COARSE


def together(parts: Sequence[Part], label: str) -> Intervention:
    """Return one run in which several parts are patched; units of one layer go as one set."""
    sets: dict[tuple[object, ...], list[Site]] = {}
    rest: list[Site | SiteSet] = []
    for site in (site for part in parts for site in part.sites):
        if isinstance(site, Site) and site.unit is not None and site.module is None:
            sets.setdefault((site.name, site.layer, site.position, site.dictionary), []).append(site)
        else:
            rest.append(site)
    for members in sets.values():
        units = tuple(sorted(site.unit for site in members if site.unit is not None))
        first = members[0]
        rest.append(
            first
            if len(units) == 1
            else SiteSet(first.name, first.layer, units, first.position, dictionary=first.dictionary)
        )
    return Intervention(tuple(map(Patch, rest)), label)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model with layers of attention and MLP.

    Args:
        model: The model.
        positions: What is told apart, in the grammar of sites; none for all positions at once.
        which: Which units are looked at.
        features: A dictionary whose features are units of the sublayers that it describes.
        heads: The site that heads are patched at.
    """

    model: Model
    positions: tuple[str, ...] = ()
    which: Units = "all"
    features: str | None = None
    heads: str = "z"

    @cached_property
    def whole(self) -> Part:
        """All sublayers together."""
        return Part("whole", sublayers_of(self.model))

    def groups(self, part: Part) -> list[list[Part]]:
        """Return sublayers of the whole; positions, then units, of a sublayer; positions of a unit."""
        if part.level == "whole":
            return [[Part("sublayer", (site,), str(site)) for site in part.sites]]
        (site,) = part.sites
        at = [parse(f"{site}@{text}").position for text in self.positions] if site.position is None else []
        level: Level = "position" if part.level == "sublayer" else part.level
        placed = [[Part(level, (site.at(position),), part.above) for position in at]] if at else []
        if part.level in ("sublayer", "position"):
            units = self.units(part)
            return [*placed, units] if units else placed
        return placed

    def units(self, part: Part) -> list[Part]:
        """Return heads, neurons, experts or features of a sublayer."""
        if part.level == "whole":
            return [unit for each in self.groups(part)[0] for unit in self.units(each)]
        (site,) = part.sites
        if part.level not in ("sublayer", "position") or site.layer is None or not isinstance(site.layer, int):
            return []
        name, level, n = self._kind(site.name, site.layer)
        dictionary = self.features if level == "feature" else None
        return [
            Part(level, (Site(name, site.layer, unit, site.position, dictionary=dictionary),), part.above)
            for unit in range(n)
        ]

    def _kind(self, sublayer: str, layer: int) -> tuple[str, Level, int]:
        """Return the name of a sublayer's units, what they are, and how many there are."""
        shape = self.model.shape
        of = {} if self.features is None else shape.dictionaries[self.features]
        if layer in of and _PART_OF.get(_described(self.model, str(self.features), layer)) == sublayer:
            return "feature", "feature", of[layer]
        for name, level in _OF_SUBLAYER[sublayer]:
            if name in shape.refused or layer in shape.lacking.get(name, {}) or level not in shape.units:
                continue
            if self.which == "all" or self.which == ("heads" if level == "head" else "neurons"):
                return self.heads if level == "head" else name, level, shape.units[level]
        return "", "head", 0

    @cached_property
    def scored(self) -> list[str]:
        """Sets of all heads and all neurons, as far as they are looked at."""
        levels = {unit.level for unit in self.units(self.whole)}
        names = {"head": self.heads, "neuron": "mlp_post", "expert": "expert_out"}
        return [f"feature({self.features})"] * ("feature" in levels) + [names[n] for n in names if n in levels]


class Modules:
    """Any model: its modules, and channels or neurons of the innermost.

    Args:
        experiment: Model and pairs; which modules run is seen in runs of the first pair.
    """

    scored: list[str] = []  # noqa: RUF012 - units of modules of unknown shape are not scored

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.n_probed = 0
        self._shapes: dict[str, tuple[int, ...] | None] = {}

    @cached_property
    def whole(self) -> Part:
        """All outermost modules together."""
        parts = list(self._inside(""))
        if not parts:
            raise ModelUnsupported(
                f"'{self.experiment.model.name}' has no parts that could be patched one by one",
                facts=[("needed", "modules inside it that run once and give one tensor")],
                fix='patch what it has: sweep(experiment, "module().output")',
            )
        return Part("whole", tuple(site for part in parts for site in part.sites))

    def groups(self, part: Part) -> list[list[Part]]:
        """Return the modules inside a module; channels or neurons of the innermost."""
        if part.level == "whole":
            return [[Part("module", (site,), str(site)) for site in part.sites]]
        (site,) = part.sites
        if part.level != "module" or site.module is None:
            return []
        inside = list(self._inside(site.module.path))
        return [inside] if inside else [units] if (units := self.units(part)) else []

    def units(self, part: Part) -> list[Part]:
        """Return channels or neurons of an innermost module; the modules inside any other."""
        (site,) = part.sites if len(part.sites) == 1 else (None,)
        if part.level != "module" or site is None or site.module is None:
            return []
        inside = list(self._inside(site.module.path))
        shape = self._shapes.get(site.module.path)
        if inside or shape is None or len(shape) not in (1, 3) or shape[0] < 2:
            return inside
        level: Level = "channel" if len(shape) == 3 else "neuron"
        axes = ("channel", "height", "column") if len(shape) == 3 else ("neuron",)
        module = replace(site.module, axes=axes)
        return [Part(level, (Site("module", unit=unit, module=module),), part.above) for unit in range(shape[0])]

    def _inside(self, path: str) -> Iterator[Part]:
        """Yield the modules right inside a module; of one that does not run as such, what is inside it."""
        start = f"{path}." if path else ""
        for each in self.experiment.model.shape.module_paths:
            if each and each.startswith(start) and "." not in each[len(start) :]:
                site = Site("module", module=ModuleRef(each, "output"))
                if self._shape(each, site) is None:
                    yield from self._inside(each)
                else:
                    yield Part("module", (site,), str(site))

    def _shape(self, path: str, site: Site) -> tuple[int, ...] | None:
        """Return the shape of what a module gives for one input; None where it does not give one tensor, once."""
        if path not in self._shapes:
            self.n_probed += 1
            try:
                found = probe(self.experiment.model, self.experiment.pairs, self.experiment.base, 0, [site])
                self._shapes[path] = tuple(found.value(site).shape[1:])
            except CausalPatchError:
                self._shapes[path] = None
        return self._shapes[path]


Tree: TypeAlias = Decoder | Modules
"""What a model is made of: its ``whole``; the ``groups`` that a part is made of, in ways that are tried in turn; the
finest ``units`` of a part, at its position; and the sets of sites that are ``scored``."""


def tree_of(experiment: Experiment, positions: str | Sequence[str] | None, units: Units, features: str | None) -> Tree:
    """Return the parts of an experiment's model.

    Args:
        experiment: Model and pairs.
        positions: What is told apart; see ``localize``.
        units: Which units are looked at.
        features: Name of a dictionary.

    Raises:
        ModelUnsupported: The model has several streams of tokens.
        SettingError: Units, positions or the dictionary do not exist.
    """
    model = experiment.model
    if units not in UNITS:
        raise SettingError(f"units cannot be {units!r}", facts=[("known", ", ".join(UNITS))], fix='units="heads"')
    if model.streams:
        raise ModelUnsupported(
            f"'{model.name}' has several streams of tokens, and parts are those of one",
            facts=[("streams", ", ".join(model.shape.parts))],
            fix='sweep each by itself: sweep(experiment, "encoder/attn_out"), then "decoder/attn_out"',
        )
    has_sublayers = model.shape.n_layers > 0 and not set(_OF_SUBLAYER) <= set(model.shape.refused)
    if not has_sublayers:
        return Modules(experiment)
    if features is not None:
        _check_features(model, features)
    crosses = experiment.source_model is not None and "head_out" not in model.shape.refused
    return Decoder(
        model, _positions(experiment.pairs, positions), units, features, heads="head_out" if crosses else "z"
    )


def _described(model: Model, name: str, layer: int) -> str:
    """Return the name of the site that a dictionary describes in a layer."""
    return model.dictionaries.of(name, layer).writes.partition(".")[0]


def _check_features(model: Model, name: str) -> None:
    known = model.shape.dictionaries
    if name not in known:
        raise SettingError(
            f"no dictionary is named {name!r}",
            facts=[("known", ", ".join(known) or "none")],
            fix=f'model.add_dictionary("{name}", FOLDER)',
        )
    writes = {_described(model, name, layer) for layer in known[name]}
    if not writes & set(_PART_OF):
        raise SettingError(
            f"the features of {name!r} are parts of no sublayer",
            facts=[("they describe", ", ".join(sorted(writes))), ("parts", ", ".join(_PART_OF))],
            fix=f'rank them by themselves: top_features(experiment, "{name}")',
        )


def _positions(pairs: Pairs, asked: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the positions that are told apart, as texts."""
    listed = [asked] if isinstance(asked, str) else asked
    if listed == ["all"]:
        return ()
    if listed is not None and listed not in (["auto"], ["each"]):
        for text in listed:
            if isinstance(parse(f"resid_pre.0@{text}").position, Span) and not all(text in p.spans for p in pairs):
                raise SettingError(
                    f"not all pairs have a span {text!r}",
                    facts=[("all have", ", ".join(_spans(pairs)) or "none")],
                    fix='positions=["-1"], or positions="all"',
                )
        return tuple(map(str, listed))
    columns = _columns(pairs)
    if listed == ["each"]:
        if not columns:
            raise SettingError(
                "aligned columns are not the same tokens in all pairs, so that no site can name them",
                facts=[("pairs", f"'{pairs.name}', of different lengths")],
                fix='positions=["-1"], a span that all pairs have, or positions="all"',
            )
        return columns
    spans = _spans(pairs)
    if spans:
        return (*spans, "-1")
    return columns if 1 < len(columns) <= _MOST_COLUMNS else ()


def _spans(pairs: Pairs) -> list[str]:
    """Return the spans that all pairs have, as long in the clean as in the corrupted prompt."""
    if pairs.kind != "tokens":
        return []
    names = [name for name in pairs[0].spans if all(name in pair.spans for pair in pairs)]
    sizes = {name: [[stop - start for start, stop in pair.spans[name]] for pair in pairs] for name in names}
    return [name for name in names if all(clean == corrupt > 0 for clean, corrupt in sizes[name])]


def _columns(pairs: Pairs) -> tuple[str, ...]:
    """Return aligned columns as positions, where each is one position in all prompts; else nothing."""
    inner = pairs.in_tokens
    if inner.alignment is None:
        return ()
    columns = inner.aligned().columns
    first = columns[0, :, 0]
    return tuple(map(str, first.tolist())) if bool(np.all(columns == first[None, :, None])) else ()
