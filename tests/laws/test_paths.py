"""Path patching against three runs of raw hooks, on random models of every family whose layers run on rows."""

import itertools

import numpy as np
from hypothesis import strategies as st

import causalpatch as cp
from oracle_paths import Node, ThreeRuns
from oracle_values import other
from worlds import LACKS, ON_WAVEFRONT, World, _matches, assert_same, law, numbers, read_off

PARALLEL = tuple(family for family in ON_WAVEFRONT if "resid_mid" in LACKS[family])


def senders_of(world: World) -> list[tuple]:
    """Return all senders in the order in which they join the stream, heads of a layer side by side."""
    steps = [[("embed", None, None)]]
    if world.family == "gpt2":
        steps[0].append(("pos_embed", None, None))
    for layer in range(world.model.shape.n_layers):
        heads = [("head_out", layer, head) for head in range(world.plain.n_heads)]
        mlp = ("mlp_out", layer, None)
        steps.append([("resid_pre", layer, None)])
        steps.append([*heads, ("attn_out", layer, None)])
        steps.append([mlp])
    return steps


def receivers_of(world: World) -> list[tuple[int, tuple]]:
    """Return all receivers, each with how many steps of senders come before it."""
    found = []
    for layer in range(world.model.shape.n_layers):
        before = 2 + 3 * layer
        found += [(before, ("q", layer, head)) for head in range(world.plain.n_heads)]
        found += [(before, (name, layer, head)) for name in "kv" for head in range(world.plain.n_kv_heads)]
        found.append((before + (world.family not in PARALLEL), ("mlp_in", layer, None)))
    return [*found, (1 + 3 * world.model.shape.n_layers, ("logits", None, None))]


def text(spec: tuple, position: int | None = None) -> str:
    at = "" if position is None else f"@{position}"
    return ".".join(str(part) for part in spec if part is not None) + at


def some_edge(world: World, draw, receiver: tuple | None = None) -> tuple[tuple, tuple]:
    """Draw a receiver, unless it is given, and a sender that comes before it."""
    listed = receivers_of(world)
    before, receiver = draw(st.sampled_from([each for each in listed if receiver in (None, each[1])]))
    steps = senders_of(world)[:before]
    return draw(st.sampled_from(list(itertools.chain(*steps)))), receiver


def nodes_at(world: World, number: int, base: str, spec: tuple, position: int | None) -> Node:
    """Return a first sender, with the tokens at which it differs and those that it takes its value from."""
    if position is not None:
        n_base, n_source = (len(world.pairs[number].input(side)) for side in (base, other(base)))
        return Node(spec, [position % n_base], [position % n_source])
    matches = _matches(world.pairs, number, base)
    return Node(spec, [here for here, _ in matches], [there for _, there in matches])


def oracle(world: World, number: int, base: str, received, *, recompute: bool = False) -> np.ndarray:
    pair = world.pairs[number]
    runs = ThreeRuns(world.plain, pair.input(base), pair.input(other(base)), recompute=recompute)
    return read_off(runs.logits(received), pair)


def some_setting(draw) -> tuple[str, str]:
    direction = draw(st.sampled_from(["denoise", "noise"]))
    return direction, "corrupt" if direction == "denoise" else "clean"


@law(only=ON_WAVEFRONT)
def test_edges_measure_what_three_runs_of_raw_hooks_measure(world, draw):
    direction, base = some_setting(draw)
    recompute = draw(st.booleans())
    laid = []
    for _ in range(6):
        sender, receiver = some_edge(world, draw)
        sends, receives = draw(st.sampled_from([(None, None), (-1, None), (0, None), (None, -2), (-1, -1)]))
        laid.append((sender, sends, receiver, receives))
    # Of unaligned prompts the last tokens may be no partners: then nothing arrives, which is refused.
    laid = {f"{text(s, a)} -> {text(r, b)}": (s, a, r, b) for s, a, r, b in laid if arrives(world, base, s, a, b)}
    if not laid:
        return
    got = numbers(cp.path_patch(world.experiment(direction=direction), paths=list(laid), recompute_mlps=recompute))
    for place, (sender, sends, receiver, receives) in enumerate(laid.values()):
        for number, pair in enumerate(world.pairs):
            tokens = None if receives is None else [receives % len(pair.input(base))]
            node = nodes_at(world, number, base, sender, sends)
            wanted = oracle(world, number, base, [(receiver, [node], tokens)], recompute=recompute)
            assert_same(got[:, place, number], wanted)


def arrives(world: World, base: str, sender: tuple, sends: int | None, receives: int | None) -> bool:
    """Say whether a sender differs at a token where its receiver receives, in every pair."""
    for number, pair in enumerate(world.pairs):
        node = nodes_at(world, number, base, sender, sends)
        if receives is not None and receives % len(pair.input(base)) not in node.tokens:
            return False
    return True


@law(only=ON_WAVEFRONT)
def test_longer_paths_and_sets_of_them_are_those_of_the_treeified_model(world, draw):
    direction, base = some_setting(draw)
    n_heads, n_layers = world.plain.n_heads, world.model.shape.n_layers
    layer = n_layers - 1
    head = draw(st.integers(0, n_heads - 1))
    served = head * world.plain.n_kv_heads // n_heads
    inputs = [("q", layer, head), ("k", layer, served), ("v", layer, served)]
    first, second = draw(st.permutations(inputs))[:2]
    a, _ = some_edge(world, draw, first)
    b, _ = some_edge(world, draw, second)
    middle, mlp = ("head_out", layer, head), ("mlp_in", layer, None)
    to_mlp = [mlp] if world.family not in PARALLEL else []
    nodes = lambda spec, n: nodes_at(world, n, base, spec, None)  # noqa: E731

    def through(n, *inputs):
        return Node(middle, inputs=list(inputs))

    sets = {
        # One head in the middle, by two of its inputs at once: one copy.
        (
            f"{text(a)} -> {text(first)} -> {text(middle)} -> logits",
            f"{text(b)} -> {text(second)} -> {text(middle)} -> logits",
        ): (lambda n: [(("logits", None, None), [through(n, (first, [nodes(a, n)]), (second, [nodes(b, n)]))], None)]),
    }
    if to_mlp:
        # The head's change goes through the MLP behind it, and past it by itself.
        sets[(f"{text(a)} -> {text(first)} -> {text(middle)} -> {text(mlp)} -> logits",)] = lambda n: [
            (
                ("logits", None, None),
                [Node(("mlp_out", layer, None), inputs=[(mlp, [through(n, (first, [nodes(a, n)]))])])],
                None,
            )
        ]
        # The head has another copy for each way that leads on from it.
        sets[
            (
                f"{text(a)} -> {text(first)} -> {text(middle)} -> {text(mlp)} -> logits",
                f"{text(b)} -> {text(second)} -> {text(middle)} -> logits",
            )
        ] = lambda n: [
            (
                ("logits", None, None),
                [
                    Node(("mlp_out", layer, None), inputs=[(mlp, [through(n, (first, [nodes(a, n)]))])]),
                    through(n, (second, [nodes(b, n)])),
                ],
                None,
            )
        ]
    # Two last receivers at once.
    sets[(f"{text(a)} -> {text(first)}", f"{text(b)} -> {text(second)}")] = lambda n: [
        (first, [nodes(a, n)], None),
        (second, [nodes(b, n)], None),
    ]
    got = numbers(cp.path_patch(world.experiment(direction=direction), paths=[list(each) for each in sets]))
    for place, received in enumerate(sets.values()):
        for number in range(len(world.pairs)):
            assert_same(got[:, place, number], oracle(world, number, base, received(number)))


@law(only=ON_WAVEFRONT)
def test_senders_and_receivers_make_a_grid_of_edges_token_by_token(world, draw):
    direction, base = some_setting(draw)
    sender, receiver = some_edge(world, draw)
    walked = cp.path_patch(world.experiment(direction=direction), text(sender), text(receiver), positions="each")
    got = numbers(walked)
    assert walked.axes == ("sender", "receiver", "position")
    for number in range(len(world.pairs)):
        matches = _matches(world.pairs, number, base)
        columns = walked.to_xarray()["base_position"].values[number].tolist()
        for column, token in enumerate(columns):
            if token < 0:
                assert np.isnan(got[:, 0, 0, column, number]).all()
                continue
            there = next(there for here, there in matches if here == token)
            wanted = oracle(world, number, base, [(receiver, [Node(sender, [token], [there])], None)])
            assert_same(got[:, 0, 0, column, number], wanted)
        assert len(columns) >= len(matches)


@law(lengths="equal", only=ON_WAVEFRONT)
def test_all_senders_at_once_are_the_receiver_patched_whole(world, draw):
    direction, _ = some_setting(draw)
    experiment = world.experiment(direction=direction)
    before, receiver = draw(st.sampled_from([each for each in receivers_of(world) if each[1][0] in "qkv"]))
    steps = senders_of(world)[:before]
    every = [spec for step in steps for spec in step if spec[0] not in ("attn_out", "resid_pre")]
    together = cp.path_patch(experiment, paths=[[f"{text(spec)} -> {text(receiver)}" for spec in every]])
    stream = cp.path_patch(experiment, f"resid_pre.{receiver[1]}", text(receiver))
    whole = experiment.run([text(receiver)])
    assert_same(numbers(stream)[:, 0], numbers(whole))
    assert_same(numbers(together)[:, 0], numbers(whole)[:, 0])
