"""Endpoints of several seeds: their ends hold for each of them, and tails are not averaged away."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.pairs import Pair, Pairs
from causalpatch.tuning.checks import Measured, endpoints
from tunings import prompts, tiny_data

N, SEEDS, TOKENS = 300, 3, 20


def other_behaviour():
    """Return prompts of which none shares anything with another."""
    return Pairs([Pair(row, row, ((4,),), ((3,),), id=f"o{k}") for k, row in enumerate(prompts(N, 5))])


def measured(*, lost=None, moved=None):
    """Return what one seed shows: answers that are lost, and tokens that moved; else nothing."""
    documents = np.repeat(np.arange(N // TOKENS), TOKENS)
    nothing = np.zeros(len(documents))
    return Measured(
        np.ones(5),
        np.zeros(0),
        nothing if moved is None else moved,
        documents,
        nothing,
        documents,
        {"other": np.zeros(N) if lost is None else lost},
    )


def found(each):
    data = tiny_data(others={"other": other_behaviour()})
    return {one.name: one for one in endpoints(each, data, cp.Margins())}


def test_answers_that_each_seed_loses_elsewhere_are_lost():
    def loses(seed):
        return (np.arange(N) % 10 == seed).astype(float)

    own = found([measured(lost=loses(seed)) for seed in range(SEEDS)])["answers lost, other"]
    assert own.estimate == pytest.approx(0.1)
    assert own.low <= own.estimate <= own.high
    assert own.verdict == "beyond"
    alone = found([measured(lost=loses(0))])["answers lost, other"]
    assert own.high == alone.high  # the worst seed's
    none = found([measured() for _ in range(SEEDS)])["answers lost, other"]
    assert (none.estimate, none.verdict) == (0, "within")
    gained = found([measured(lost=-loses(0))])["answers lost, other"]
    assert gained.estimate < 0
    assert gained.high == none.high  # what is won pays for nothing


def test_a_tail_that_each_seed_has_elsewhere_is_a_tail():
    def moves(seed):
        return 1.2 * (np.arange(N) % 25 == seed)

    names = ("retain KL, p95", "retain KL, p99")
    together, alone = (found([measured(moved=moves(seed)) for seed in seeds]) for seeds in (range(SEEDS), [0]))
    for name in names:
        assert together[name].estimate == pytest.approx(alone[name].estimate)
    assert together["retain KL, p99"].verdict == "beyond"
    assert together["retain KL, mean"].estimate == pytest.approx(1.2 / 25)
