"""The cone's closed counts against an enumeration that follows every number of every token by itself."""

import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from causalpatch.engine.cone import ModelNumbers, Point, Runs, cone, full_flops

GPT2 = ModelNumbers(12, 768, 12, 12, 64, 3072, 768 * 3072, 50257)
# The numbers of a token in a layer, in the order of computation; what a point writes stands at its place.
NODES = ("stream", "query", "key_value", "attended", "attn_out", "resid_mid", "activated", "mlp_out")
PLACES = {
    Point.STREAM: "stream",
    Point.QUERY: "query",
    Point.KEY_VALUE: "key_value",
    Point.ATTENDED: "attended",
    Point.MIDDLE: "attn_out",
    Point.ACTIVATED: "activated",
    Point.ADDED: "mlp_out",
    Point.LOGITS: "logits",
}


def sees(numbers, layer, token):
    return range(max(0, token + 1 - numbers.reach(layer)), token + 1)


def parents(numbers, layer, node, token):
    """Return what a number is computed from, as (layer, node, token)."""
    match node:
        case "stream":
            below = ("stream", "attn_out", "mlp_out") if layer else ()
            return [(layer - 1, name, token) for name in below]
        case "query" | "key_value":
            return [(layer, "stream", token)]
        case "attended":
            return [(layer, "query", token), *((layer, "key_value", key) for key in sees(numbers, layer, token))]
        case "attn_out":
            return [(layer, "attended", token)]
        case "resid_mid":
            return [(layer, "stream", token), (layer, "attn_out", token)]
        case "activated":
            return [(layer, "stream" if numbers.is_parallel else "resid_mid", token)]
        case "mlp_out":
            return [(layer, "activated", token)]


def enumerate_cone(numbers, run, n_columns, low_rank):
    """Count every number that something written leads to and that leads to something read."""
    layer, point, written, reads, columns = run
    n_layers, last, place = numbers.n_layers, max([*written, *reads]), (layer, PLACES[point])
    order = [(j, node) for j in range(n_layers) for node in NODES]
    order += [(n_layers, "stream"), (n_layers, "logits")]

    def above(j, node, token):
        return [(j, "stream", token)] if node == "logits" else parents(numbers, j, node, token)

    changed, needed = set(), {(n_layers, "logits", token) for token in reads}
    for j, node in order:
        for token in range(last + 1):
            if ((j, node) == place and token in written) or changed.intersection(above(j, node, token)):
                changed.add((j, node, token))
    for j, node in reversed(order):
        for token in range(last + 1):
            if (j, node, token) in needed:
                needed.update(above(j, node, token))
    read = {x for x in changed & needed if x[1] == "logits"}
    if not read:
        return 0, 0, 0, 0, 0
    computed = {x for x in changed & needed if x[:2] != place}
    full, linear, attention, rows = numbers.n_heads * numbers.head_width, 0, 0, set()
    for j, node, token in computed:
        few = columns if j == layer and columns else 0
        thin = few if low_rank else 0
        on_heads = point in (Point.QUERY, Point.KEY_VALUE, Point.ATTENDED)
        cost = {
            "query": numbers.query,
            "key_value": numbers.key_value,
            "attn_out": numbers.width * thin if thin and on_heads else numbers.projection,
            "activated": numbers.up,
            "mlp_out": numbers.width * thin if thin and point == Point.ACTIVATED else numbers.down,
        }.get(node, 0)
        linear += 2 * cost
        if node == "attended":
            heads = few if few and point in (Point.QUERY, Point.KEY_VALUE) else full
            attention += 4 * heads * len(sees(numbers, j, token))
        if cost or node == "attended":
            rows.add((j, token))
    head = 0 if point == Point.LOGITS else 2 * len(read) * numbers.width * n_columns
    return linear, attention, head, len(rows), len(read)


def packed(runs):
    def matrix(rows):
        width = max(map(len, rows))
        return np.array([[*row, *[-1] * (width - len(row))] for row in rows])

    layers, points, written, reads, columns = zip(*runs, strict=True)
    return Runs(np.array(layers), np.array(points), matrix(written), matrix(reads), np.array(columns))


@st.composite
def cases(draw, windows):
    numbers = {
        "n_layers": draw(st.integers(1, 4)),
        "width": 7,
        "n_heads": 4,
        "n_kv_heads": draw(st.sampled_from([4, 2, 1])),
        "head_width": 3,
        "n_neurons": 11,
        "up": 7 * 11 * draw(st.sampled_from([1, 2])),
        "vocab": 13,
        "is_parallel": draw(st.booleans()),
    }
    if windows:
        some = st.sampled_from([None, 1, 2, 3, 5])
        numbers["windows"] = tuple(draw(some) for _ in range(numbers["n_layers"]))
    runs = []
    for _ in range(draw(st.integers(1, 4))):
        point = draw(st.sampled_from(list(Point)))
        behind = point == Point.LOGITS
        layer = numbers["n_layers"] if behind else draw(st.integers(0, numbers["n_layers"] - (point != Point.STREAM)))
        tokens = st.integers(0, 8)
        if windows:  # one stretch each, for which the counts are exact
            first, read = draw(tokens), draw(tokens)
            written, reads = [*range(first, draw(st.integers(first, 8)) + 1)], [read]
        else:
            written = draw(st.lists(tokens, min_size=1, max_size=4, unique=True))
            reads = draw(st.lists(tokens, min_size=1, max_size=3, unique=True))
        columns = draw(st.sampled_from([0, 3, 6])) if point != Point.STREAM else 0
        runs.append((layer, point, written, reads, columns))
    return numbers, runs


def check(case, low_rank):
    numbers, runs = ModelNumbers(**case[0]), case[1]
    made = cone(numbers, packed(runs), 5, low_rank=low_rank)
    for number, run in enumerate(runs):
        wanted = enumerate_cone(numbers, run, 5, low_rank)
        got = tuple(array[number] for array in (made.linear, made.attention, made.head, made.rows, made.reads))
        assert got == wanted, run


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(windows=False), st.booleans())
def test_counts_are_those_of_an_enumeration(case, low_rank):
    check(case, low_rank)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(windows=True), st.booleans())
def test_windows_cut_the_cone_above_and_below(case, low_rank):
    check(case, low_rank)


def grid(point, n_tokens, columns=0):
    layers, tokens = np.meshgrid(np.arange(12), np.arange(n_tokens), indexing="ij")
    return Runs.at(layers, point, tokens, n_tokens - 1, columns)


@pytest.mark.parametrize("point", [Point.ATTENDED, Point.MIDDLE, Point.ADDED, Point.QUERY])
def test_a_difference_that_has_not_met_attention_costs_no_more_than_the_same_one_in_the_next_stream(point):
    # What mlp_out.3@5 and resid_pre.4@5 lead to is the same from layer 4 on.
    inside = cone(GPT2, Runs.at(3, point, 5, 15), 2)
    stream = cone(GPT2, Runs.at(4, Point.STREAM, 5, 15), 2)
    own = {
        Point.ATTENDED: GPT2.projection + GPT2.up + GPT2.down,
        Point.MIDDLE: GPT2.up + GPT2.down,
        Point.ADDED: 0,
        Point.QUERY: GPT2.projection + GPT2.up + GPT2.down,
    }
    assert inside.linear[0] - stream.linear[0] == 2 * own[point]
    assert inside.head[0] == stream.head[0] == 2 * 768 * 2


def test_one_token_through_all_layers_costs_every_projection_once():
    made = cone(GPT2, Runs.at(0, Point.STREAM, 0, 0), 50257)
    assert made.linear[0] == 2 * 12 * GPT2.layer == 2 * 12 * 12 * 768**2
    assert made.flops[0] == full_flops(GPT2, np.array([1]))[0]
    assert made.rows[0] == 12
    assert made.held[0] == 1


def test_the_whole_prompt_patched_from_the_first_layer_on_costs_a_whole_forward_but_for_unread_tokens():
    every = Runs(np.array([0]), np.array([0]), np.arange(9)[None], np.arange(9)[None], np.array([0]))
    assert cone(GPT2, every, GPT2.vocab).flops[0] == full_flops(GPT2, np.array([9]))[0]
    last = Runs(np.array([0]), np.array([0]), np.arange(9)[None], np.array([[8]]), np.array([0]))
    saved = 8 * 2 * (GPT2.query + GPT2.projection + GPT2.up + GPT2.down + 768 * GPT2.vocab)
    keys_saved = 4 * 768 * (8 * 9 // 2)
    assert cone(GPT2, last, GPT2.vocab).flops[0] == full_flops(GPT2, np.array([9]))[0] - saved - keys_saved


def test_whole_forwards_from_a_layer_on_leave_the_layers_below_out():
    lengths = np.array([5, 5, 5])
    some = full_flops(GPT2, lengths, from_layer=np.array([0, 11, 12]))
    assert some[2] == 2 * 5 * 768 * GPT2.vocab
    assert some[0] - some[2] == pytest.approx(12 * (some[1] - some[2]))


def test_writing_behind_the_last_read_token_is_known_to_change_nothing():
    made = cone(GPT2, Runs.at(0, Point.STREAM, np.arange(4), 2), 2)
    assert made.is_derived.tolist() == [False, False, False, True]
    assert made.flops[3] == made.rows[3] == made.held[3] == 0
    # In the last layer nothing is left that would carry it to another token.
    assert cone(GPT2, grid(Point.ADDED, 16), 2).is_derived.sum() == 15


def test_the_front_of_a_long_sweep_is_as_large_as_it_is_known_to_be():
    # GPT-2, one pair of 1,024 tokens, all layers: 19 GB.
    held = cone(GPT2, grid(Point.STREAM, 1024), 2).held.sum()
    assert held == 12 * (1024 * 1025 // 2)


def every_neuron(n_tokens):
    return Runs.at(np.repeat(np.arange(12), 3072), Point.ACTIVATED, n_tokens - 1, n_tokens - 1, 1)


def every_head(n_tokens):
    tokens, reads = np.tile(np.arange(n_tokens), (144, 1)), np.full((144, 1), n_tokens - 1)
    points, widths = np.full(144, Point.ATTENDED), np.full(144, 64)
    return Runs(np.repeat(np.arange(12), 12), points, tokens, reads, widths)


@pytest.mark.parametrize(
    ("runs", "pairs", "gflop"),
    [
        (grid(Point.STREAM, 16), 4, 514.1),
        (grid(Point.ADDED, 16), 4, 428.8),
        (every_head(16), 4, 706.2),
        (every_neuron(16), 4, 11521.0),
        (grid(Point.STREAM, 128), 1, 7773.6),
        (every_head(128), 1, 1415.3),
    ],
)
def test_known_workloads_on_gpt2_small_need_what_they_need(runs, pairs, gflop):
    made = cone(GPT2, runs, 2, low_rank=True)
    assert made.flops.sum() * pairs / 1e9 == pytest.approx(gflop, rel=1e-4)


def test_thousands_of_runs_are_counted_in_milliseconds():
    runs = grid(Point.STREAM, 128)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        cone(GPT2, runs, 2)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.1  # about 7 ms on one core


def test_numbers_of_runs_are_broadcast():
    runs = Runs.at(np.arange(3), Point.QUERY, 4, 5, 64)
    assert len(runs) == 3
    assert runs.written.tolist() == [[4]] * 3
    assert runs.columns.tolist() == [64] * 3
