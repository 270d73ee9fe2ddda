"""Memory that runs out in the middle of a wave."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import MemoryExhausted
from causalpatch.engine import values, wave
from tiers import assert_agree, run_model
from worlds import numbers, random_pairs, tiny_world

MODEL, _ = tiny_world("llama", (3, 4, 2, 0))
PAIRS = random_pairs(1, 6)
TEXTS = ("resid_pre.0", "resid_pre.1", "z.1.2", "mlp_out.0", "mlp_post.1.3", "k.1.0")
SITES = [*(f"{site}@{place}" for site in TEXTS for place in (0, 1, 2)), "resid_pre.1", ["z.0.1", "mlp_out.1@2"]]
METRICS = [cp.logit_difference, cp.log_probability]


def allow_rows(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let memory run out in calls of a layer on more rows."""
    real = wave.call_layer

    def limited(stack, run, layer, hidden, *args, **kwargs):
        if len(hidden) > most:
            raise torch.OutOfMemoryError("no room")
        return real(stack, run, layer, hidden, *args, **kwargs)

    monkeypatch.setattr(wave, "call_layer", limited)


@pytest.mark.parametrize("most", [40, 12, 9])
def test_calls_are_halved_until_they_fit_and_give_the_same_numbers(monkeypatch, most):
    wanted = run_model("reference", MODEL, PAIRS, SITES, metric=METRICS)
    plenty = run_model("wavefront", MODEL, PAIRS, SITES, metric=METRICS)
    allow_rows(monkeypatch, most)
    got = run_model("wavefront", MODEL, PAIRS, SITES, metric=METRICS)
    assert_agree(got, wanted)
    # What did not fit is not counted as spent.
    assert got.provenance["cost"]["rows"] == plenty.provenance["cost"]["rows"]
    assert got.provenance["cost"]["token_layers"] == plenty.provenance["cost"]["token_layers"]


def test_a_segment_that_does_not_fit_is_named_with_what_it_needs(monkeypatch):
    allow_rows(monkeypatch, 2)
    with pytest.raises(MemoryExhausted, match="does not fit into memory") as caught:
        run_model("wavefront", MODEL, PAIRS, SITES)
    _, size, unit = str(dict(caught.value.facts)["needs"]).split()
    assert int(size) > 0
    assert unit == "KiB"


def test_values_are_compared_in_bounded_pieces(monkeypatch):
    real, sizes = values._gather, []

    def gather(run, kind, elements):
        sizes.append(len(elements.rows))
        return real(run, kind, elements)

    monkeypatch.setattr(values, "_gather", gather)
    wanted = run_model("wavefront", MODEL, PAIRS, SITES)
    longest = int(max(PAIRS.lengths("clean").max(), PAIRS.lengths("corrupt").max()))
    monkeypatch.setattr(values, "AT_ONCE", 4)
    sizes.clear()
    compared = []
    monkeypatch.setattr(values, "_are_same", _counting(values._are_same, compared))
    assert_agree(run_model("wavefront", MODEL, PAIRS, SITES), wanted)
    assert max(compared) <= 4 + longest
    assert len(compared) > 10


def _counting(real, counts):
    def count(taps, known, kind, entries):
        counts.append(sum(len(place.base) for _, _, place in entries))
        return real(taps, known, kind, entries)

    return count


def test_comparing_that_runs_out_of_memory_is_said_in_words(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    run_model("wavefront", MODEL, PAIRS, SITES)  # the check of the engine is behind us
    monkeypatch.setattr(values, "_are_same", fail)
    with pytest.raises(MemoryExhausted, match="does not fit into memory"):
        run_model("wavefront", MODEL, PAIRS, SITES)


def test_a_patch_that_writes_back_what_an_overlapping_one_has_changed_is_not_left_out():
    base, source = np.array([5, 6, 7, 8, 9]), np.array([7, 6, 11, 8, 9])  # base token 2 is source token 0
    pair = cp.Pair(source, base, ((3,),), ((4,),), id="x", spans={"s": ((0, 1), (2, 3))})
    pairs = cp.Pairs([pair], name="one")
    sites = [["resid_pre.0@2", "resid_pre.0@s"], ["resid_pre.0@s", "resid_pre.0@2"], "resid_pre.0@2"]
    got = run_model("wavefront", MODEL, pairs, sites)
    assert_agree(got, run_model("reference", MODEL, pairs, sites))
    found = numbers(got)
    assert np.abs(found[0] - found[1]).max() > 1e-3
