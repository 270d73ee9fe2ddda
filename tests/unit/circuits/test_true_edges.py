"""True edges are those that the compiler names: every edge is tried on every input by raw code, plain and hidden."""

import pytest
import torch

from causalpatch.circuits.ground_truth import all_gates, all_programs, build, compile_program, linear
from causalpatch.circuits.ground_truth.gates import LINEAR_EDGES
from causalpatch.circuits.ground_truth.train import EdgewiseDecoder, train
from causalpatch.circuits.ground_truth.trained import TRAINED, Recipe, load
from causalpatch.sites.graph import Graph
from oracle_truth import Small, largest_changes

PROGRAMS = {program.name: program for program in (*all_programs(), *all_gates())}
SMALL = {"reverse": 2, "sort": 1, "induction": 2, "balance": 1, "same-count": 3, "bigram-count": 2, "addition": 2}
COUNTS = {
    "fraction": (3, 4),
    "reverse": (2, 8),
    "sort": (4, 4),
    "induction": (5, 8),
    "count": (4, 5),
    "bigram-count": (7, 11),
    "same-count": (7, 10),
    "balance": (9, 9),
    "first-position": (2, 3),
    "addition": (4, 6),
    "and": (5, 7),
    "or": (5, 7),
    "cancelling": (6, 9),
}


def tried(module, prompts, ablation, tokens, reads, most=None):
    """The edges that ever change an answer's logit; what is no change is far below what is one."""
    changes = largest_changes(module, prompts, ablation, tokens, [-1] if reads == "last" else None, most)
    true = {edge for edge, change in changes.items() if change > 1e-6}
    assert min((changes[edge] for edge in true), default=1) > 1e-2
    assert max(change for edge, change in changes.items() if edge not in true) < 1e-9
    return true


def agree(name, seed, n_symbols, ablation, most=None):
    program = PROGRAMS[name]
    compiled = compile_program(program)
    module = build(compiled.blueprint, seed=seed)
    found = tried(module, program.prompts(n_symbols), ablation, program.tokens, program.reads, most)
    assert found == compiled.true_edges(ablation, n_symbols)


@pytest.mark.parametrize("name", ["fraction", "reverse", "first-position", "or", "cancelling"])
@pytest.mark.parametrize("seed", [None, 3])
def test_the_compilers_edges_are_the_true_ones_on_small_inputs(name, seed):
    program = PROGRAMS[name]
    for ablation in ("resample", "zero"):
        agree(name, seed, SMALL.get(name, 3), ablation)
    assert program.inputs()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_the_compilers_edges_are_the_true_ones_on_all_inputs(name, seed, ablation):
    agree(name, seed, 2 if name == "balance" else PROGRAMS[name].n_symbols, ablation)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_the_compilers_edges_of_long_brackets_are_the_true_ones_on_some_inputs(seed, ablation):
    """All 65,536 pairs of prompts of four brackets would take half an hour."""
    agree("balance", seed, 4, ablation, most=4000)


@pytest.mark.parametrize("name", COUNTS)
def test_there_are_as_many_true_edges_as_the_page_says(name):
    compiled = compile_program(PROGRAMS[name])
    assert tuple(len(compiled.true_edges(ablation)) for ablation in ("resample", "zero")) == COUNTS[name]


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_the_edges_of_the_linear_model_are_those_of_its_numbers(seed, ablation):
    assert tried(build(linear(), seed=seed), [[1], [2]], ablation, range(4), "all") == LINEAR_EDGES


@pytest.mark.parametrize("seed", [None, 2])
def test_effects_in_the_linear_model_are_hand_numbers(seed):
    """Token 2 sends (0, 2, 0) where token 1 sends (1, 0, 0); the logit of token 3 is 7 and 16."""
    small = Small(build(linear(), seed=seed))
    ids = torch.tensor([[1], [2]])
    logits, sends = small.run(ids)
    assert logits[:, 0, 3].tolist() == pytest.approx([7, 16])
    # In the run of token 1 one edge is given what token 2 sends: from (1, 0, 0) to (0, 2, 0), and so on.
    by_hand = {
        "embed -> a0.h0<v>": -1 - 2 - 1,  # z loses 1, so x by m0 too; that is 2 less by a1.h0 and 1 by m1
        "embed -> a0.h1<v>": 6 + 2 * 6 + 6,  # z gains 6, so x by m0 too; that is 12 more by a1.h0 and 6 by m1
        "embed -> a1.h0<v>": -2,
        "m0 -> a1.h0<v>": 2 * (6 - 1),
        "embed -> a1.h1<v>": -6,
        "a1.h1 -> m1": -6,
        "embed -> m1": -1 - 2,
        "m0 -> m1": 5,
        "a0.h1 -> logits": 6,
        "m1 -> logits": -2 - 2,
        "embed -> logits": 0,
        "embed -> a1.h1<q>": 0,
    }
    for edge, effect in by_hand.items():
        sender = edge.partition(" -> ")[0]
        changed = small.run(ids[:1], edge, sends[sender][1:])[0]
        assert float((changed - logits[:1])[0, 0, 3]) == pytest.approx(effect, abs=1e-9), edge


def test_labels_are_those_of_all_edges():
    small = Small(build(linear()))
    graph = Graph(small.n_layers, small.n_heads)
    assert set(small.edges()) == set(graph.names(graph.edges))
    assert len(small.edges()) == graph.n_edges


def answers_and_changes(module, program, n_couples=None):
    """Answers at the last position; for each edge how often it changes them, and by how much it changes logits most."""
    small, ids = Small(module), torch.tensor(program.inputs())
    tokens = torch.tensor(list(program.tokens))
    base, source = torch.cartesian_prod(torch.arange(len(ids)), torch.arange(len(ids))).T
    some = torch.randperm(len(base), generator=torch.Generator().manual_seed(0))[:n_couples]
    base, source = base[some], source[some]
    with torch.no_grad():
        logits, sends = small.run(ids)
        assert torch.allclose(logits, module(ids).logits, atol=1e-4)
        last = logits[:, -1, tokens]
        found = {}
        for edge in small.edges():
            out = small.run(ids[base], edge, sends[edge.partition(" -> ")[0]][source])[0][:, -1, tokens]
            is_other = out.argmax(-1) != last[base].argmax(-1)
            found[edge] = float(is_other.double().mean()), float((out - last[base]).abs().max())
    return tokens[last.argmax(-1)].tolist(), found


def check_trained(module, program, n_couples=None):
    """Each true edge changes answers, no other one does in any base from any source; logits move far less by these."""
    true = compile_program(program).true_edges("resample")
    answers, found = answers_and_changes(module, program, n_couples)
    assert answers == [program.answers(prompt)[len(prompt) - 1] for prompt in program.inputs()]
    assert {edge for edge, (share, _) in found.items() if share > 0} == true
    most = max(change for edge, (_, change) in found.items() if edge not in true)
    assert min(found[edge][1] for edge in true) > 4 * most


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model_is_right_and_has_the_programs_edges(name):
    check_trained(load(TRAINED[name](), torch.float32), TRAINED[name](), n_couples=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model_has_the_programs_edges_on_all_inputs(name):
    check_trained(load(TRAINED[name](), torch.float32), TRAINED[name]())


@pytest.mark.slow
def test_the_script_trains_such_a_model():
    program = TRAINED["addition"]()
    check_trained(train(program, Recipe(seed=1, steps=500)), program)


def test_training_runs_edges_as_the_model_does():
    """The decoder of the training script gives the model's logits, and along one edge those of the raw code."""
    program = TRAINED["induction"]()
    module = load(program, torch.float32)
    decoder, small = EdgewiseDecoder(module, Recipe()), Small(module)
    ids = torch.tensor(program.inputs())[[3, 40, 77]]
    senders, receivers = Graph(2, 4).sender_labels, Graph(2, 4).receiver_labels
    with torch.no_grad():
        logits, sends = decoder.run(ids)
        assert torch.allclose(logits, module(ids).logits, atol=1e-4)
        sent = sends[:, [1, 2, 0]]
        for edge in ("embed -> a0.h2<k>", "a0.h1 -> a1.h3<q>", "m0 -> m1", "a1.h2 -> logits", "embed -> a1.h0<v>"):
            sender, receiver = edge.split(" -> ")
            mask = torch.zeros(3, len(senders), len(receivers), dtype=torch.bool)
            mask[:, senders.index(sender), receivers.index(receiver)] = True
            expected = small.run(ids, edge, sent[senders.index(sender)])[0]
            assert not torch.allclose(expected, logits, atol=1e-4)
            assert torch.allclose(decoder.run(ids, sent, mask)[0], expected, atol=1e-3)
