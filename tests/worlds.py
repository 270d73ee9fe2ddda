"""Random tiny worlds for laws: a model of one family, its plain twin, pairs of random prompts, random patches.

``law`` turns a check of one world into a test of families. Those in ``FIRST`` get a few seeded cases in ``make test``;
all get many random ones in ``make test-slow``, and of the laws in which most can go wrong (``is_for_all``) one seeded
case too. A check takes the world and ``draw``, hypothesis' way to draw more.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from jaxtyping import config

import causalpatch as cp
from causalpatch.engine import require_proofs
from causalpatch.models import FAMILIES, Model
from causalpatch.models.experts import EXPERT_SITES
from causalpatch.models.families import Absent
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import NAMES, Range, Site, Span, expand
from causalpatch.sites.names import ATTENTION_SITES, CROSS_SITES
from causalpatch.testing.tiny import ENCODERS, FAMILY_NAMES, GROUPED, VOCAB, tiny_model
from oracle import Edit, Plain
from oracle_values import donor_of, key, new_value, other
from parts import BIASED, PARTS

torch.set_num_threads(1)

FEW = 1  # worlds of a law and family in `make test`; each has several interventions of several pairs
MANY = int(os.environ.get("WORLDS", "1"))  # the same in `make test-slow`, of every family and any shape
FIRST = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gpt_neox")
# Sites that the tiny models do not have: those that their family's table refuses, what is inside attention where there
# are no heads, and biases.
ONE_STREAM = [family for family in FAMILIES if family.name in FAMILY_NAMES]
LACKS = {f.name: {name for name, fact in f.sites.items() if isinstance(fact, Absent)} for f in ONE_STREAM}
for _family, _lacks in LACKS.items():
    _lacks |= ATTENTION_SITES if "z" in _lacks else set()
    _lacks |= CROSS_SITES | (set() if PARTS[_family].experts else EXPERT_SITES)
    _lacks |= {name for name in NAMES if name.endswith("_bias") and name not in BIASED[_family]}
NEEDED_BY_THE_WAVEFRONT = frozenset({"resid_pre", "z", "mlp_post", "final_norm"})
# Families whose attention is computed by themselves, not by a kernel that can be switched.
OWN_ATTENTION = tuple(family for family in FAMILY_NAMES if PARTS[family].spelt_out)
CAUSAL = tuple(family for family in FAMILY_NAMES if family not in ENCODERS)
ON_WAVEFRONT = tuple(f for f in CAUSAL if not LACKS[f] & NEEDED_BY_THE_WAVEFRONT and f not in OWN_ATTENTION)
TOLERANCE = 1e-10
# (layers, heads, kv_heads, seed); hypothesis tries the first ones most.
FEW_SHAPES = ((2, 4, 2, 0), (3, 4, 2, 1), (2, 4, 2, 2))
ALL_SHAPES = tuple(
    (layers, heads, kv_heads, seed)
    for layers in (2, 3, 1)
    for heads in (4, 3, 2, 1)
    for kv_heads in range(1, heads + 1)
    if heads % kv_heads == 0
    for seed in (0, 1)
)
# Proofs of a new model take longer than most laws: each family has a few shapes, unless many worlds are drawn.
N_SHAPES = 5
SHORTEST, LONGEST = 3, 8  # tokens in a prompt; windows of attention have 4
DIRECTION = np.random.default_rng(7).normal(size=VOCAB)

Lengths = Literal["equal", "unequal"]
Draw = Callable[[st.SearchStrategy], Any]


@dataclass(frozen=True, eq=False)
class World:
    """A tiny model, its plain twin, and pairs of random prompts; the shape it was built in, where one was drawn."""

    family: str
    model: Model
    plain: Plain
    pairs: Pairs
    padding_side: Literal["right", "left"]
    shape: tuple[int, int, int, int] = FEW_SHAPES[0]

    def __repr__(self) -> str:
        shown = [(pair.clean.tolist(), pair.corrupt.tolist()) for pair in self.pairs]
        heads = f"{self.plain.n_heads}/{self.plain.n_kv_heads} heads"
        return f"World({self.model!r}, {heads}, {shown}, {self.padding_side})"

    @property
    def site_names(self) -> list[str]:
        """Names of the sites that the model has, and whose values from the source fit: keys meet by their place."""
        names = [name for name in NAMES if name != "module" and name not in self.model.shape.refused]
        meet = self.pairs.alignment is None or self.pairs.alignment.how == "position"
        return [name for name in names if meet or not NAMES[name].has_keys]

    @property
    def tiers(self) -> tuple[str, ...]:
        """The engines that must measure what the reference measures."""
        if "resid_pre" in LACKS[self.family]:
            return ("rows",)
        return ("wavefront", "restart", "rows") if self.family in ON_WAVEFRONT else ("restart", "rows")

    def sibling(self) -> tuple[Model, Plain]:
        """Return a model of the same shape with other weights, and its plain twin."""
        return tiny_world(self.family, (*self.shape[:3], 7))

    def among(self, *names: str) -> list[str]:
        """Return the sites of these that the model has."""
        return [name for name in names if name in self.site_names]

    def flows_through(self, name: str) -> bool:
        """Say whether everything that reaches the logits flows through a site."""
        return self.family != "gemma3n" or name in ("final_norm", "logits")

    def sizes(self, name: str) -> dict[str, int]:
        """Return the sizes of the axes of a site's value."""
        layer, unit = _first(name)
        layer = layer if layer is None else self.model.shape.layers_with(name)[0]
        value = self.plain.value(self.pairs[0].clean, (name, layer, unit))
        return dict(zip(NAMES[name].value_axes, value.shape[1:], strict=True))

    def experiment(self, pairs: Pairs | None = None, **settings: Any) -> cp.Experiment:
        """Make an experiment that reads a logit difference and a projection of all logits."""
        settings = {"metric": [cp.logit_difference, projection], "padding_side": self.padding_side} | settings
        return cp.Experiment(self.model, pairs or self.pairs, show_progress=False, **settings)

    def some_site(self, draw: Draw, name: str | None = None) -> Site:
        """Draw a layer and a unit for a name, and the name too unless it is given."""
        name = name or draw(st.sampled_from(self.site_names))
        shape, info = self.model.shape, NAMES[name]
        layer = draw(st.sampled_from(shape.layers_with(name))) if info.has_layer else None
        unit = draw(st.integers(0, shape.units[info.unit_axis] - 1)) if info.unit_axis else None
        return Site(name, layer, unit)


@dataclass(frozen=True, eq=False)
class Laid:
    """A patch, and where it lies as the oracle counts.

    Args:
        patch: What the library is given.
        tokens: From the number of a pair to the tokens written in the base, and for each of them the tokens of the
            source whose mean it receives. No tokens: the pair does not have the place.
    """

    patch: cp.Patch
    tokens: Callable[[int], tuple[Sequence[int], Sequence[Sequence[int]]]]


projection = cp.metric(
    lambda outputs, pairs: outputs.distribution.double() @ torch.as_tensor(DIRECTION), name="projection", position=-1
)
"""A fixed random projection of all logits at the last token: no column can change unseen."""


def _first(name: str) -> tuple[int | None, int | None]:
    """Return the first layer and unit of a site."""
    return (0 if NAMES[name].has_layer else None, 0 if NAMES[name].unit_axis else None)


def shapes_of(family: str, is_quick: bool) -> tuple[tuple[int, int, int, int], ...]:
    """Return the shapes that worlds of a family have."""
    if is_quick or MANY > 1:
        return FEW_SHAPES if is_quick else ALL_SHAPES
    chosen = np.random.default_rng(list(family.encode())).permutation(len(ALL_SHAPES))[:N_SHAPES]
    return tuple(ALL_SHAPES[place] for place in chosen)


@functools.lru_cache(maxsize=600)
def tiny_world(family: str, shape: tuple[int, int, int, int]) -> tuple[Model, Plain]:
    """Build a model, once, and prove its sites."""
    layers, heads, kv_heads, seed = shape
    kv_heads = kv_heads if family in GROUPED else heads
    module = tiny_model(family, layers=layers, heads=heads, kv_heads=kv_heads, seed=seed)
    model = cp.open_model(module)
    require_proofs(model, [name for name in NAMES if name not in model.shape.refused])
    return model, Plain(module, family)


def random_pairs(
    seed: int,
    n_pairs: int = 3,
    lengths: Lengths = "equal",
    shared: float = 0.4,
    prefix: float = 0.0,
    n_twins: int = 0,
) -> Pairs:
    """Make pairs of random prompts.

    Args:
        seed: Seed of everything drawn.
        n_pairs: Number of pairs; their lengths differ from one another.
        lengths: Whether clean and corrupted prompts are equally long. If not, the pairs are aligned by a random map.
        shared: Share of the tokens that clean and corrupted prompts have in common.
        prefix: Share of the prompts, from their first token on, in which they do not differ at all.
        n_twins: Number of further pairs that have one prompt, clean and corrupted by turns, in common with the first.
    """
    rng = np.random.default_rng(seed)
    pairs, mapping = [], []
    for number in range(n_pairs):
        n_clean = int(rng.integers(SHORTEST, LONGEST + 1))
        n_corrupt = n_clean if lengths == "equal" else int(rng.integers(SHORTEST, LONGEST + 1))
        clean, corrupt = rng.integers(3, VOCAB, n_clean), rng.integers(3, VOCAB, n_corrupt)
        n_both = min(n_clean, n_corrupt)
        corrupt[:n_both] = np.where(rng.random(n_both) < shared, clean[:n_both], corrupt[:n_both])
        n_prefix = int(prefix * n_both)
        corrupt[:n_prefix] = clean[:n_prefix]
        changed = rng.integers(n_prefix, n_both)
        corrupt[changed] = (clean[changed] - 2) % (VOCAB - 3) + 3
        answer, wrong = rng.choice(VOCAB, 2, replace=False).tolist()
        spans = {"subject": (_some_range(rng, n_clean), _some_range(rng, n_corrupt))}
        group = "ab"[number % 2]
        pairs.append(Pair(clean, corrupt, ((answer,),), ((wrong,),), id=f"pair {number}", group=group, spans=spans))
        n_matches = int(rng.integers(1, n_both + 1))
        places = (np.sort(rng.permutation(n)[:n_matches]).tolist() for n in (n_clean, n_corrupt))
        mapping.append(list(zip(*places, strict=True)))
    for number in range(n_twins):
        side = ("corrupt", "clean")[number % 2]
        other = rng.integers(3, VOCAB, len(pairs[0].input(side)))
        twin = replace(pairs[0], **{side: other}, id=f"twin {number}")
        pairs.append(replace(twin, answer=twin.wrong_answer, wrong_answer=twin.answer))
        mapping.append(mapping[0])
    made = Pairs(pairs, name="random")
    return made if lengths == "equal" else made.align("map", mapping=mapping)


def _some_range(rng: np.random.Generator, length: int) -> tuple[int, int]:
    start = int(rng.integers(length))
    return start, int(rng.integers(start + 1, length + 1))


def law(
    check: Callable[[World, Draw], None] | None = None,
    *,
    lengths: Lengths | None = None,
    n_pairs: int = 3,
    shared: float = 0.4,
    is_typed: bool = False,
    is_varied: bool = False,
    needs: Sequence[str] = (),
    only: Sequence[str] = FAMILY_NAMES,
    is_for_all: bool = False,
) -> Any:
    """Turn a check of one world into a test of families.

    Args:
        check: Takes a world and ``draw``.
        lengths: Whether clean and corrupted prompts are equally long; both kinds are drawn by default.
        n_pairs: Number of pairs.
        shared: Share of the tokens that clean and corrupted prompts have in common.
        is_typed: Whether annotations are checked too, which makes a case twice as slow.
        is_varied: Whether a third of the prompts may not differ at all, and pairs may have prompts in common.
        needs: Sites without which a family is left out.
        only: The families that it is about.
        is_for_all: Whether every family is tried in ``make test``.
    """
    if check is None:
        about_pairs = {"lengths": lengths, "n_pairs": n_pairs, "shared": shared}
        about_families = {"needs": needs, "only": only, "is_for_all": is_for_all}
        return functools.partial(law, **about_pairs, **about_families, is_typed=is_typed, is_varied=is_varied)
    families = [family for family in only if not LACKS[family] & set(needs)]
    first = [family for family in families if is_for_all or family in FIRST]
    quick = [pytest.param(family, FEW, True, id=f"few-{family}") for family in first]
    slow = [pytest.param(family, MANY, False, id=f"many-{family}", marks=pytest.mark.slow) for family in families]

    # Values of turned queries and keys may come from tokens at other places, which is right and said.
    @pytest.mark.filterwarnings("ignore:.*whose rotation they keep")
    @pytest.mark.parametrize(("family", "n_cases", "is_quick"), [*quick, *slow])
    def test(family: str, n_cases: int, is_quick: bool) -> None:
        profile = settings.get_profile("test" if is_quick else "slow")

        # Worlds grow from seeds: there is nothing to shrink.
        @settings(profile, max_examples=n_cases + 1, phases=[Phase.explicit, Phase.generate])
        @given(data=st.data())
        def run(data: st.DataObject) -> None:
            draw = data.draw
            if draw(st.integers(0, 999)) == 0:
                return  # hypothesis tries the simplest of all cases first, in which nothing varies
            with unchecked(not is_typed):
                shape = draw(st.sampled_from(shapes_of(family, is_quick)))
                model, plain = tiny_world(family, shape)
                kind = lengths or draw(st.sampled_from(["unequal", "equal"]))
                prefix, n_twins = draw(st.sampled_from([(1 / 3, 2), (0.0, 0)])) if is_varied else (0.0, 0)
                pairs = random_pairs(draw(st.integers(0, 10**6)), n_pairs, kind, shared, prefix, n_twins)
                check(World(family, model, plain, pairs, draw(st.sampled_from(["left", "right"])), shape), draw)

        run()

    test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
    return test


@contextmanager
def unchecked(is_off: bool = True) -> Iterator[None]:
    """Leave annotations unchecked for a while, as they are outside tests."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", before or is_off)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


def some_patch(world: World, draw: Draw, site: Site, value: Any = None, base: str = "corrupt") -> Laid:
    """Draw where a site is patched, in any of the ways that there are to say it."""
    put = put_in(value)
    needs_source = put is None or (isinstance(put, cp.Function) and put.needs_source)
    needs_source |= isinstance(put, cp.Interpolate | cp.Source)
    # Prompts differ in length, so that others cannot stand in for all their tokens. The spans of a pair may stand at
    # different places, from where no row over keys can be taken.
    ways = ["token", "everywhere", "column", "range", *([] if site.info.has_keys and needs_source else ["span"])]
    where = draw(st.sampled_from(["token"] if isinstance(put, cp.Resample) else ways))
    lengths = [(len(pair.input(base)), len(pair.input(other(base)))) for pair in world.pairs]
    if where == "token":
        token = draw(st.integers(-SHORTEST, SHORTEST - 1))
        if isinstance(put, cp.Resample):
            return Laid(cp.Patch(site.at(token), value), lambda n: _from_donor(world.pairs, put, base, token, n))
        return Laid(cp.Patch(site.at(token), value), lambda n: ([token % lengths[n][0]], [[token % lengths[n][1]]]))
    if where == "range":
        part = slice(*draw(st.sampled_from([(-2, None), (None, 2), (1, 3), (-3, -1)])))
        parts = [[list(range(length))[part] for length in both] for both in lengths]
        return Laid(
            cp.Patch(site.at(Range(part.start, part.stop)), value), lambda n: (parts[n][0], _singly(parts[n][1]))
        )
    if where == "span":
        align = draw(st.sampled_from(["first", "last", "mean"]))
        return Laid(
            cp.Patch(site.at(Span("subject")), value, align=align),
            lambda n: _span(world.pairs[n], base, align, needs_source),
        )
    matches = [_matches(world.pairs, n, base) for n in range(len(lengths))]
    if where == "column":
        column = draw(st.integers(0, max(map(len, matches)) - 1))
        chosen = [some[column : column + 1] for some in matches]
        return Laid(cp.Patch(site, value, column=column), lambda n: _apart(chosen[n]))
    if needs_source:
        return Laid(cp.Patch(site, value), lambda n: _apart(matches[n]))
    return Laid(cp.Patch(site, value), lambda n: (range(lengths[n][0]), _singly(range(lengths[n][0]))))


def put_in(value: Any) -> Any:
    """Return what is put in, whole or inside a subspace."""
    return value.of if isinstance(value, cp.Subspace) else value


def _matches(pairs: Pairs, number: int, base: str) -> list[tuple[int, int]]:
    """Return (base, source) tokens of the aligned columns of a pair."""
    if pairs.alignment.how == "position":
        return [(token, token) for token in range(len(pairs[number].clean))]
    columns = [tuple(match) for match in pairs.alignment.columns[number].tolist() if match != [-1, -1]]
    return columns if base == "clean" else [(corrupt, clean) for clean, corrupt in columns]


def _span(pair: Pair, base: str, align: str, needs_source: bool) -> tuple[list[int], list[list[int]]]:
    here, there = (list(range(*pair.spans["subject"][side == "corrupt"])) for side in (base, other(base)))
    if len(here) == len(there) or not needs_source:
        return here, _singly(there)
    if align == "mean":
        return here, [there] * len(here)
    n = min(len(here), len(there))
    part = slice(None, n) if align == "first" else slice(-n, None)
    return here[part], _singly(there[part])


def _from_donor(
    pairs: Pairs, value: cp.Resample, base: str, token: int, number: int
) -> tuple[list[int], list[list[int]]]:
    donor = pairs[donor_of(pairs, number, value, base)].input(value.side)
    return [token % len(pairs[number].input(base))], [[token % len(donor)]]


def _singly(tokens: Sequence[int]) -> list[list[int]]:
    return [[token] for token in tokens]


def _apart(matches: Sequence[tuple[int, int]]) -> tuple[list[int], list[list[int]]]:
    return [here for here, _ in matches], [[there] for _, there in matches]


def by_plain_hooks(world: World, laid: Sequence[Laid], base: str = "corrupt") -> np.ndarray:
    """Measure one intervention on every pair with raw hooks: (metric, pair); NaN where a pair lacks a place."""
    measured = []
    for number, pair in enumerate(world.pairs):
        edits = plain_edits(world, laid, number, base)
        is_there = edits is not None
        measured.append(read_off(world.plain.logits(pair.input(base), edits), pair) if is_there else np.full(2, np.nan))
    return np.stack(measured, axis=1)


def plain_edits(world: World, laid: Sequence[Laid], number: int, base: str = "corrupt") -> list[Edit] | None:
    """Return what raw hooks change in one pair; None where it lacks a place."""
    places = [one.tokens(number) for one in laid]
    if not all(len(here) for here, _ in places):
        return None
    return [
        Edit(
            key(site),
            here,
            new_value(world.plain, world.pairs, one.patch.value, site, number, base, here, there),
            len(world.pairs[number].input(base)) if site.info.has_keys else None,
        )
        for one, (here, there) in zip(laid, places, strict=True)
        for site in expand(one.patch.site, world.model.shape)
    ]


def read_off(logits: torch.Tensor, pair: Pair) -> np.ndarray:
    """Return the two metrics of a plain run: (metric,)."""
    last = logits[-1].numpy()
    return np.array([last[pair.answer[0][0]] - last[pair.wrong_answer[0][0]], last @ DIRECTION])


def numbers(effects: cp.Effects) -> np.ndarray:
    """Return the metrics of the patched runs: (metric, …, pair), NaN where there is no run."""
    return effects.to_xarray()["metric"].values


def run_all(experiment: cp.Experiment, interventions: Sequence[Any]) -> np.ndarray:
    """Run interventions, equal ones too; (metric, intervention, pair)."""
    return numbers(experiment.run(interventions, axes={"intervention": list(range(len(interventions)))}))


def assert_same(got: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Compare numbers, relative to the larger of 1 and their size; NaN must meet NaN."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    error = np.abs(got - wanted) / np.maximum(1.0, np.abs(wanted))
    assert not (error > tolerance).any(), f"off by {np.nanmax(error):.2e} at {np.argwhere(error > tolerance)[:5]}"
