"""Arms of a comparison: what is changed beside the located parts, to see what changing anything of that size does.

==================  ==================================================================================================
arm                 changes
==================  ==================================================================================================
base                nothing
located             what was located
random              components of the same kinds and depths: all sets where there are few, else so many draws
same layers         heads and neurons of the same layers, drawn up to the same number of weights
lowest effect       components of the same kinds that have the least effect on the pairs of the experiment
spread              rows and columns drawn over all projections, the same number of weights in all
full                every weight
prefix, steering    nothing (``untrained``)
==================  ==================================================================================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.seeds import generator
from causalpatch.experiment import Experiment
from causalpatch.models import Model
from causalpatch.results.words import counted
from causalpatch.sites import Site
from causalpatch.tuning.data import TuningData
from causalpatch.tuning.low_rank import ranks_of
from causalpatch.tuning.parts import Parts, parts_of, spread
from causalpatch.tuning.tune import maker_of
from causalpatch.tuning.ways import Way
from causalpatch.tuning.whole import Full
from causalpatch.validation.components import Node, kin
from causalpatch.validation.controls import matched_sets

KINDS: Final = ("random", "same layers", "lowest effect", "spread", "full", "prefix", "steering")
_MOST_MEASURED: Final = 256  # components whose effect is measured to find the lowest
_SLACK: Final = 0.05  # of the number of weights


@dataclass(frozen=True, eq=False)
class Candidate:
    """An arm in which something is trained.

    Args:
        name: Its name.
        kind: Its kind.
        components: What it changes, in words.
        make: Makes a fresh change by a seed.
        n_weights: Weights that its components have.
    """

    name: str
    kind: str
    components: tuple[str, ...]
    make: Callable[[int], Way]
    n_weights: int


@dataclass(frozen=True, eq=False)
class Request:
    """What a comparison is made of.

    Args:
        experiment: The model, and pairs by which effects are measured.
        sites: The located components.
        data: The data.
        way: How parts are changed.
        rank: Of adapters.
        shared: Whether keys and values are taken that others use too.
        n_random: Random draws.
        kinds: The arms beside the base and the located one.
    """

    experiment: Experiment
    sites: tuple[Site, ...]
    data: TuningData
    way: str
    rank: int
    shared: str
    n_random: int
    kinds: tuple[str, ...]

    @property
    def model(self) -> Model:
        """The model."""
        return self.experiment.model


def candidates(request: Request) -> tuple[list[Candidate], list[str]]:
    """Return the arms in which something is trained, the located one first, and what is to be known of them.

    Raises:
        SettingError: An arm is unknown.
    """
    strange = next((kind for kind in request.kinds if kind not in KINDS), None)
    if strange is not None:
        raise SettingError(f"no arm is called {strange!r}", facts=[("known", ", ".join(KINDS))], fix='arms=("random",)')
    notes: list[str] = []
    located = _of_sites(request, "located", "located", request.sites)
    notes += _parts(request, request.sites).notes
    found = [located]
    if "random" in request.kinds:
        draws, told = _random(request)
        found += draws
        notes.append(told)
    if "same layers" in request.kinds:
        sites = _same_layers(request, located.n_weights)
        found += [_of_sites(request, "same layers", "same layers", sites)] if sites else []
        notes += [] if sites else ["same layers: there is nothing else in them that is small enough"]
    if "lowest effect" in request.kinds:
        sites = _lowest(request)
        found += [_of_sites(request, "lowest effect", "lowest effect", sites)] if sites else []
        notes += [] if sites else ["lowest effect: there are no other components of these kinds"]
    if "spread" in request.kinds:
        parts = spread(located.n_weights, request.model, request.experiment.seed)
        found.append(_of_parts(request, "spread", "spread", parts, parts.notes))
    if "full" in request.kinds:
        n = sum(each.numel() for each in request.model.module.parameters())
        found.append(Candidate("full", "full", ("every weight",), lambda seed: Full(request.model), n))
    for each in found[1:]:
        if each.kind in ("same layers", "spread", "lowest effect"):
            n_own, n_located = (one.make(0).n_trained for one in (each, located))
            if abs(n_own - n_located) > _SLACK * n_located:
                notes.append(f"{each.name}: {n_own:,} numbers are trained, {n_located:,} where it was located")
    odd = [each.name for each in found[1:] if each.kind == "random" and each.n_weights != located.n_weights]
    if odd:
        notes.append(f"{counted(len(odd), 'random draw')} has another number of weights than what was located")
    return found, notes


def _random(request: Request) -> tuple[list[Candidate], str]:
    members = [Node(site) for site in request.sites]
    sets, reach, is_all = matched_sets(members, request.experiment, request.n_random)
    drawn = [tuple(each.site for each in one if isinstance(each, Node)) for one in sets]
    near = "in the same layers" if reach == 0 else f"up to {reach} layers off"
    what = f"all {len(drawn)} matched sets" if is_all else f"{len(drawn)} matched sets, drawn"
    told = ""
    if request.way == "lora":
        apart = _told_apart(request, drawn)
        if len(apart) < len(drawn):
            n_alike = len(drawn) - len(apart)
            told = f", without {n_alike} that change the modules of another: adapters do not tell them apart"
        drawn = apart
    draws = [_of_sites(request, f"random {number}", "random", sites) for number, sites in enumerate(drawn, 1)]
    smallest = 1 / (1 + len(draws))
    return draws, f"random: {what}, {near}{told}; the smallest attainable p is {smallest:.3g}"


def _told_apart(request: Request, drawn: Sequence[tuple[Site, ...]]) -> list[tuple[Site, ...]]:
    """Return the draws whose adapters are those neither of what was located nor of a draw before."""
    seen = [ranks_of(_parts(request, request.sites), request.rank)]
    found = []
    for sites in drawn:
        ranks = ranks_of(_parts(request, sites), request.rank)
        if ranks not in seen:
            seen.append(ranks)
            found.append(sites)
    return found


def _same_layers(request: Request, n_weights: int) -> tuple[Site, ...]:
    """Draw heads and neurons of the located layers, without the located ones, up to a number of weights."""
    layers = sorted({site.layer for site in request.sites if site.layer is not None})
    taken = {path: set(places.tolist()) for path, places in _parts(request, request.sites).columns.items()}
    units = request.model.shape.units
    pool: list[Site] = []
    for name, axis in (("z", "head"), ("mlp_post", "neuron")):
        if name not in request.model.shape.refused:
            pool += [Site(name, layer, unit) for layer in layers for unit in range(units.get(axis, 0))]
    free = [site for site in pool if not _is_within(site, request.model, taken)]
    sizes = {site.name: parts_of([site], request.model, shared="take").n_weights(request.model.module) for site in free}
    draw = generator(request.experiment.seed, "same layers")
    chosen: list[Site] = []
    total = 0
    for place in draw.permutation(len(free)).tolist():
        if total + sizes[free[place].name] <= n_weights * (1 + _SLACK):
            chosen.append(free[place])
            total += sizes[free[place].name]
        if total >= n_weights * (1 - _SLACK):
            break
    return tuple(chosen)


def _is_within(site: Site, model: Model, taken: dict[str, set[int]]) -> bool:
    """Say whether a head or neuron is among columns."""
    (held,) = parts_of([site], model, outputs_alone=True).columns.items()
    return bool(set(held[1].tolist()) & taken.get(held[0], set()))


def _lowest(request: Request) -> tuple[Site, ...]:
    """Return for each located component another of its kind with the least effect."""
    members = [Node(site) for site in request.sites]
    pool = [each.site for each in kin(members, request.experiment) if isinstance(each, Node)]
    if len(pool) > _MOST_MEASURED:
        draw = generator(request.experiment.seed, "lowest effect")
        pool = [pool[k] for k in sorted(draw.choice(len(pool), _MOST_MEASURED, replace=False).tolist())]
    if not pool:
        return ()
    effects = request.experiment.run(pool).effect().values
    size = np.abs(effects.reshape(len(pool), -1).mean(1)) if effects.ndim > 1 else np.abs(effects)
    ordered = [pool[k] for k in np.argsort(size, kind="stable").tolist()]
    chosen: list[Site] = []
    for site in request.sites:
        alike = (each for each in ordered if each.name == site.name and each not in chosen)
        found = next(alike, None)
        chosen += [] if found is None else [found]
    return tuple(chosen)


def _parts(request: Request, sites: Sequence[Site]) -> Parts:
    return parts_of(sites, request.model, shared=request.shared, outputs_alone=request.way == "offset")


def _of_sites(request: Request, name: str, kind: str, sites: Sequence[Site]) -> Candidate:
    parts = _parts(request, sites)
    whole = parts_of(sites, request.model, shared=request.shared)
    made = _of_parts(request, name, kind, parts, tuple(map(str, sites)))
    return replace(made, n_weights=whole.n_weights(request.model.module))


def _of_parts(request: Request, name: str, kind: str, parts: Parts, told: Sequence[str]) -> Candidate:
    make = maker_of(request.model, parts, request.data, way=request.way, rank=request.rank)
    return Candidate(name, kind, tuple(told), make, parts.n_weights(request.model.module))
