"""What the tests of engines share: interventions of every kind, metrics that read much, and numbers that must agree."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, SettingError
from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs
from causalpatch.results.status import Status
from causalpatch.sites import NAMES, Site, SiteSet
from causalpatch.testing.tiny import VOCAB
from worlds import (
    DIRECTION,
    TOLERANCE,
    Laid,
    World,
    assert_same,
    numbers,
    plain_edits,
    projection,
    put_in,
    some_patch,
    tiny_world,
    unchecked,
)

TIERS = ("wavefront", "restart", "rows")
"""The engines that must measure what the reference measures on the families of ``ON_WAVEFRONT``."""

# Pairs of sites of one layer of which the second sees what the first did, or writes beside it.
TOGETHER = (
    ("q", "z"),
    ("k", "z"),
    ("k", "v"),
    ("q", "k"),
    ("v", "head_out"),
    ("z", "mlp_post"),
    ("resid_pre", "mlp_out"),
    ("resid_pre", "k"),
    ("resid_pre", "resid_post"),
    ("attn_out", "mlp_out"),
    ("z", "attn_out"),
    ("mlp_post", "resid_post"),
    ("resid_mid", "mlp_post"),
    ("q_rot", "scores"),
    ("k_rot", "pattern"),
    ("k", "pattern"),
    ("scores", "pattern"),
    ("pattern", "z"),
    ("scores", "mlp_pre"),
    ("z", "mlp_pre"),
    ("mlp_gate", "mlp_pre"),
    ("mlp_pre", "mlp_post"),
    ("attn_bias", "mlp_bias"),
    ("q_bias", "v_bias"),
    ("attn_out", "k_rot"),
)
REACH = (1.0, -0.7, 0.4)


def _several(outputs: cp.Outputs, pairs: Pairs) -> torch.Tensor:
    rows = torch.arange(len(outputs.pair))
    logits = [weight * outputs.logits[rows, outputs.column - back] for back, weight in enumerate(REACH)]
    return sum(logits) @ torch.as_tensor(DIRECTION).to(outputs.logits)


def _all(outputs: cp.Outputs, pairs: Pairs) -> torch.Tensor:
    shortest = [min(len(pair.clean), len(pair.corrupt)) for pair in pairs]
    whole = outputs.logits @ torch.as_tensor(DIRECTION).to(outputs.logits)
    ends = zip(whole, outputs.column.tolist(), shortest, strict=True)
    return torch.stack([torch.tanh(row[end - n + 1 : end + 1]).sum() for row, end, n in ends])


several = cp.metric(_several, name="last three tokens", position="all")
everywhere = cp.metric(_all, name="all tokens", position="all")
early = projection.at(1)
METRICS = (
    cp.logit_difference,
    projection,
    cp.log_probability,
    cp.kl_divergence,
    cp.kl_from_base,
    cp.logit_difference.at(-2),
    early,
    several,
    everywhere,
)
"""Metrics that read answers, the whole vocabulary, another run, and the last, an early, several or all tokens."""


def read_all(logits: torch.Tensor, pair: Pair, untouched: dict[str, torch.Tensor]) -> np.ndarray:
    """Return ``METRICS`` of a plain run, from its logits (position, vocab) and those of the untouched runs."""
    last, direction = logits[-1], torch.as_tensor(DIRECTION)
    answer, wrong = pair.answer[0][0], pair.wrong_answer[0][0]
    divergence = [
        (other[-1].softmax(-1) * (other[-1].log_softmax(-1) - last.log_softmax(-1))).sum()
        for other in (untouched["source"], untouched["base"])
    ]
    n = min(len(pair.clean), len(pair.corrupt))
    return np.array(
        [
            float(value)
            for value in (
                last[answer] - last[wrong],
                last @ direction,
                last.log_softmax(-1)[answer],
                *divergence,
                logits[-2, answer] - logits[-2, wrong],
                logits[1] @ direction,
                sum(weight * logits[-1 - back] @ direction for back, weight in enumerate(REACH)),
                torch.tanh(logits[-n:] @ direction).sum(),
            )
        ]
    )


def by_raw_hooks(world: World, laid: Sequence[Laid], base: str) -> np.ndarray:
    """Measure one intervention on every pair by ``METRICS`` with raw hooks: (metric, pair); NaN where it is not."""
    measured = []
    for number, pair in enumerate(world.pairs):
        runs = {"base": base, "source": "clean" if base == "corrupt" else "corrupt"}
        untouched = {name: world.plain.logits(pair.input(side)) for name, side in runs.items()}
        edits = plain_edits(world, laid, number, base)
        measured.append(
            np.full(len(METRICS), np.nan)
            if edits is None
            else read_all(world.plain.logits(pair.input(base), edits), pair, untouched)
        )
    return np.stack(measured, axis=1)


def mixed(current: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """A function of both runs that is not linear."""
    return 0.6 * torch.tanh(current) + 0.5 * source


def bent(current: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """A function of the current value alone."""
    return 0.1 - current * current.abs()


def quickly(names: Sequence[str], *quick: str) -> list[Any]:
    """Return parameters of which some are tried in ``make test`` and the others in ``make test-slow``."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def some_value(world: World, draw: Any, site: Site | SiteSet, base: str, *, can_donate: bool = True) -> Any:
    """Draw a value of any kind, resampled ones only where they can be; the source's half the time."""
    # How many keys there are differs from pair to pair.
    shape = [] if site.info.has_keys else [*world.sizes(site.name).values()]
    array = np.random.default_rng(3).normal(size=shape)
    side = draw(st.sampled_from(["clean", "corrupt"]))
    values = [
        cp.Zero(),
        cp.Mean("pairs", base),
        cp.Mean("pairs" if site.info.has_keys else "positions", base if site.info.has_keys else side),
        cp.Constant(array),
        cp.Constant(-0.5),
        cp.Function(mixed),
        cp.Function(bent, needs_source=False),
        cp.Identity(),
    ]
    drawn = [
        cp.Mean("pairs", base, per_group=True),
        cp.Interpolate(draw(st.sampled_from([0.0, 0.3, 1.0, 1.7]))),
        cp.Steer(array, -0.5),
        cp.ProjectOut(array) if array.ndim else cp.Steer(2.0),
        cp.Noise(0.4, draw=draw(st.integers(0, 2))),
        cp.Resample(draw=draw(st.integers(0, 2)), side=side),
    ]
    # Rows over keys are not noise, directions or rows of other prompts.
    drawn = drawn[:2] if site.info.has_keys else drawn
    if array.ndim:
        basis = np.random.default_rng(5).normal(size=(draw(st.integers(1, min(3, len(array)))), *array.shape))
        drawn += [cp.Subspace(basis), cp.Subspace(basis, draw(st.sampled_from([*values, *drawn])))]
    values += [value for value in drawn if can_donate or not isinstance(put_in(value), cp.Resample)]
    return draw(st.sampled_from([*values, *[None] * len(values)]))


def some_intervention(world: World, draw: Any, base: str) -> list[Laid]:
    """Draw one to three patches: alone, both in one layer, the later one at a lower token, a layer's heads, or any."""
    kind = draw(st.sampled_from(["one", "layer", "lower", "heads", "any"]))
    together = [both for both in TOGETHER if set(both) <= set(world.site_names)]
    kind = "any" if kind == "layer" and not together else kind
    n_layers = world.model.shape.n_layers
    if kind == "lower":
        low = world.among("resid_pre", "k", "z", "mlp_out", "resid_post")
        first, second = (draw(st.sampled_from(low)) for _ in range(2))
        sites = [world.some_site(draw, first), world.some_site(draw, second)]
        layers = sorted([sites[0].layer, draw(st.integers(0, n_layers - 1))])
        tokens = sorted(draw(st.lists(st.integers(0, 2), min_size=2, max_size=2)), reverse=True)
        made = [Site(one.name, layer, one.unit) for one, layer in zip(sites, layers, strict=True)]
        laid = [_at_token(world, draw, site, token, base) for site, token in zip(made, tokens, strict=True)]
    elif kind == "layer":
        layer = draw(st.integers(0, n_layers - 1))
        chosen = draw(st.sampled_from(together))
        sites = [world.some_site(draw, name) for name in chosen]
        laid = [_anywhere(world, draw, Site(one.name, layer, one.unit), base) for one in sites]
    elif kind == "heads":
        several = ["z", "q", "k", "v", "head_out", "mlp_post", "q_rot", "k_rot", "scores", "pattern", "mlp_pre"]
        name = draw(st.sampled_from(world.among(*several) or ["resid_pre"]))
        one = world.some_site(draw, name)
        n_units = world.model.shape.units.get(NAMES[name].unit_axis, 1)
        laid = [_anywhere(world, draw, SiteSet(name, one.layer) if n_units > 1 else one, base)]
    else:
        n = 1 if kind == "one" else draw(st.integers(2, 3))
        laid = [_anywhere(world, draw, world.some_site(draw), base) for _ in range(n)]
    places = {(one.patch.site, one.patch.column): one for one in laid}
    return list(places.values())


def _anywhere(world: World, draw: Any, site: Site | SiteSet, base: str) -> Laid:
    return some_patch(world, draw, site, some_value(world, draw, site, base), base)


def _at_token(world: World, draw: Any, site: Site, token: int, base: str) -> Laid:
    patch = cp.Patch(site.at(token), some_value(world, draw, site, base, can_donate=False))
    return Laid(patch, lambda number: ([token], [[token]]))


def laid_at(pairs: Pairs, text: str, value: Any = None, base: str = "corrupt") -> Laid:
    """Lay a patch at one token, counted from either end, in prompts that are equally long in every pair."""
    site = cp.parse(text)

    def tokens(number: int) -> tuple[list[int], list[list[int]]]:
        token = site.position % len(pairs[number].input(base))
        return [token], [[token]]

    return Laid(cp.Patch(site, value), tokens)


def world_of(
    family: str, pairs: Pairs, side: Literal["left", "right"] = "left", shape: tuple[int, int, int, int] = (2, 4, 2, 0)
) -> World:
    """Return a family's tiny model with pairs of one's own."""
    return World(family, *tiny_world(family, shape), pairs, side, shape)


def assert_as_raw_hooks(engine: str, world: World, laid: Sequence[Sequence[Laid]], base: str = "corrupt") -> cp.Effects:
    """Run interventions on an engine, compare every number with raw hooks, and return them."""
    direction = "denoise" if base == "corrupt" else "noise"
    effects = run_on(engine, world, [[one.patch for one in each] for each in laid], direction=direction)
    got = numbers(effects)
    for number, each in enumerate(laid):
        assert_same(got[:, number], by_raw_hooks(world, each, base))
    return effects


def modules_of(world: World, draw: Any, n: int = 4) -> list[cp.Patch]:
    """Draw outputs and inputs of layers and of modules within them."""
    patches = []
    for _ in range(n):
        path, side = draw(st.sampled_from(_ports_with_tokens(world.model.module)))
        patches.append(cp.Patch(f"module({path}).{side}", draw(st.sampled_from([None, cp.Function(mixed), "zero"]))))
    return patches


def _ports_with_tokens(module: nn.Module) -> list[tuple[str, str]]:
    """Return the sides of modules within layers that run once, on a row for each prompt and a column per token."""
    found, handles = [], []

    def look(path: str, side: str, held: Any) -> None:
        first = held[0] if isinstance(held, tuple) and held else held
        if isinstance(first, torch.Tensor) and first.ndim == 3 and first.shape[:2] == (2, 5):
            found.append((path, side))

    for path, part in module.named_modules():
        if re.search(r"\.\d", path):
            handles.append(part.register_forward_hook(partial(_look_at, look, path), with_kwargs=True))
    with torch.no_grad():
        module(input_ids=torch.arange(3, 13).reshape(2, 5))
    for handle in handles:
        handle.remove()
    return sorted(port for port in set(found) if found.count(port) == 1)


def _look_at(look: Any, path: str, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    look(path, "output", output)
    look(path, "input", args or next(iter(kwargs.values()), None))


def experiment_on(engine: str, world: World, **settings: Any) -> cp.Experiment:
    """Make an experiment on an engine, by ``METRICS`` unless told otherwise."""
    return world.experiment(**({"metric": list(METRICS), "engine": engine} | settings))


def run_on(engine: str, world: World, interventions: Sequence[Any], **settings: Any) -> cp.Effects:
    """Run interventions on an engine, equal ones too, by ``METRICS`` unless told otherwise."""
    experiment = experiment_on(engine, world, **settings)
    return experiment.run(interventions, axes={"intervention": list(range(len(interventions)))})


def run_model(engine: str, model: Model, pairs: Pairs, interventions: Sequence[Any], **settings: Any) -> cp.Effects:
    """Run interventions, equal ones too, on an engine and a model of one's own."""
    with unchecked():
        experiment = cp.Experiment(model, pairs, engine=engine, show_progress=False, **settings)
        return experiment.run(interventions, axes={"intervention": list(range(len(interventions)))})


def run_unless_refused(engine: str, model: Model, pairs: Pairs, interventions: Sequence[Any], **settings: Any) -> Any:
    """Run interventions on an engine and a model of one's own; return nothing where the engine does not take them."""
    try:
        return run_model(engine, model, pairs, interventions, **settings)
    except (ModelUnsupported, SettingError):
        return None


class Watch(TorchFunctionMode):
    """Shows every call of a torch function to ``see(name, args, result)``, whatever engine makes it, without hooks."""

    def __init__(self, see: Callable[[str, tuple[Any, ...], Any], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.see(getattr(function, "__name__", ""), args, result)
        return result


def tier_of(effects: cp.Effects) -> str:
    """Return the tier that the numbers came from."""
    return effects.provenance["engine"]["tier"]


def statuses(effects: cp.Effects) -> np.ndarray:
    """Return how each cell was obtained, (…, pair)."""
    return effects.to_xarray()["status"].values


def baselines(effects: cp.Effects) -> np.ndarray:
    """Return the metrics of the clean and the corrupted runs, (2, …, pair)."""
    data = effects.to_xarray()
    return np.stack([data[f"baseline_{side}"].values for side in ("clean", "corrupt")])


def assert_agree(got: cp.Effects, wanted: cp.Effects, tolerance: float = TOLERANCE) -> None:
    """Compare all numbers of two runs, baselines too; a derived cell must give the base run's number exactly."""
    try:
        assert_same(baselines(got), baselines(wanted), tolerance)
        assert_same(numbers(got), numbers(wanted), tolerance)
    except AssertionError as error:
        raise AssertionError(f"{got.provenance.get('engine')}: {error}") from error
    status, expected = statuses(got), statuses(wanted)
    is_derived = status == Status.DERIVED
    assert np.array_equal(*(np.where(x == Status.DERIVED, Status.MEASURED, x) for x in (status, expected)))
    if is_derived.any():
        for name in got.metrics:
            effect = got.metric(name).effect(per_pair=True).values
            assert (effect[is_derived] == 0).all()


def with_answers(pairs: Pairs, seed: int) -> Pairs:
    """Return the pairs with sets of one to three answers of one to three tokens on each side."""
    rng = np.random.default_rng(seed)

    def some_answers() -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(rng.integers(0, VOCAB, rng.integers(1, 4)).tolist()) for _ in range(rng.integers(1, 4)))

    made = [replace(pair, answer=some_answers(), wrong_answer=some_answers()) for pair in pairs]
    if pairs.alignment is None or pairs.alignment.how == "position":
        return Pairs(made, name="answers")
    mapping = [[(a, b) for a, b in columns.tolist() if a >= 0] for columns in pairs.alignment.columns]
    return Pairs(made, name="answers").align("map", mapping=mapping)


def log_probability_by_raw_hooks(world: World, laid: Sequence[Laid], base: str) -> np.ndarray:
    """Measure the log-probability of whole answer sets with raw hooks, on each prompt and answer: (pair,)."""
    measured = []
    for number, pair in enumerate(world.pairs):
        edits = plain_edits(world, laid, number, base)
        if edits is None:
            measured.append(np.nan)
            continue
        prompt = pair.input(base).tolist()
        found = []
        for answer in pair.answer:
            logits = world.plain.logits(prompt + list(answer[:-1]), edits)
            spelt = logits[len(prompt) - 1 :].log_softmax(-1)
            found.append(sum(spelt[place, token] for place, token in enumerate(answer)))
        measured.append(float(torch.stack(found).logsumexp(0)))
    return np.array(measured)
