"""Algorithms on the embedded language model: against raw hooks, across engines, with spans and unequal lengths."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.algorithms.scrubbing import WHOLE
from causalpatch.pairs import load_pairs
from causalpatch.pairs.tasks import generate

OTHER = {"Laura": "Ashley", "Ashley": "Laura"}
TEMPLATE = "near"
INPUTS = {"first": tuple(OTHER), "giver": tuple(OTHER), "place": ("park", "lake"), "style": ("short", "long")}
BY_NAME = cp.CausalModel(
    {"name": lambda giver: giver, "receiver": lambda name: OTHER[name]}, INPUTS, output="receiver", name="by name"
)


def encode(first, giver, place, style):
    """Write a prompt; the long ones are a word longer."""
    went = {"short": "went to", "long": "had fun at"}[style]
    return {
        "prompt": f"When {first} and {OTHER[first]} {went} the {place}, {giver} gave a ring to",
        "spans": {"thing": "ring"},
    }


def claim(mapping, **more):
    return cp.Hypothesis(BY_NAME, mapping, encode=encode, answers=lambda name: f" {name}", **more)


@pytest.fixture(scope="module")
def model():
    return cp.open_model("zoo:stories", device="cpu")


def test_spans_and_last_tokens_meet_across_prompts_of_unequal_lengths(model):
    found = cp.interchange_accuracy(model, claim({"name": "resid_post.1@thing"}), n=24)
    lengths = {len(encode(**each)["prompt"].split()) for each in BY_NAME.every_input()}
    assert len(lengths) == 2
    assert found.accuracy("name") == 1.0
    scrubbed = cp.causal_scrubbing(
        model, claim({"name": "resid_post.1@thing", "receiver": "attn_out.3@-1"}), n=16, parts=False
    )
    assert scrubbed.recovered == pytest.approx(1.0, abs=0.02)


def test_what_the_network_answers_is_what_raw_hooks_say(model):
    found = cp.interchange_accuracy(model, claim({"name": "attn_out.0@-4"}), n=12, n_random=0)
    site = model.module.model.layers[0].self_attn
    tokenizer = model.tokenizer
    listed = list(BY_NAME.every_input())
    allowed = [tokenizer.encode(f"x {name}", special=False)[-1] for name in OTHER]

    def run(number, hook=None):
        ids = torch.tensor([tokenizer.encode(encode(**listed[number])["prompt"])])
        handle = site.register_forward_hook(hook) if hook else None
        with torch.no_grad():
            logits = model.module(ids).logits[0, -1]
        if handle:
            handle.remove()
        return logits

    for base, source, answer in found.samples[["base", "source", "answer: mapped"]].itertuples(index=False):
        kept = []
        run(source, lambda module, given, output, kept=kept: kept.append(output[0][0, -4].clone()))

        def put(module, given, output, kept=kept):
            output[0][0, -4] = kept[0]
            return output

        logits = run(base, put)
        assert answer == max(allowed, key=lambda token, logits=logits: float(logits[token]))


@pytest.mark.parametrize("nodes", [(), ("z", "mlp_out")])
def test_scrubbing_by_the_fastest_engine_is_scrubbing_by_the_reference(model, nodes):
    mapping = {"name": "z.1@thing", "receiver": ["z.3.1@-1", "z.3.2@-1"]}
    short = [each for each in BY_NAME.every_input() if each["style"] == "short"]
    runs = [
        cp.causal_scrubbing(model, claim(mapping), short, n=6, nodes=nodes, parts=False, engine=engine)
        for engine in ("reference", "auto")
    ]
    columns = ["original", "scrubbed", "random"]
    assert runs[0].provenance["engine"][0]["tier"] == "reference"
    assert runs[1].provenance["engine"][0]["tier"] == "wavefront"
    assert np.allclose(runs[0].samples[columns], runs[1].samples[columns], atol=2e-4)
    assert runs[0].samples["reference"].equals(runs[1].samples["reference"])


def test_held_nodes_leave_nothing_but_what_mapped_heads_write(model):
    """The name moves to its place through heads of two layers and their MLPs: held, it does not get there."""
    short = [each for each in BY_NAME.every_input() if each["style"] == "short"]
    mapping = {"name": "resid_post.1@thing", "receiver": ["z.3.1@-1", "z.3.2@-1"]}
    free = cp.causal_scrubbing(model, claim(mapping), short, n=24, parts=False)
    held = cp.causal_scrubbing(model, claim(mapping), short, n=24, nodes=["z", "mlp_out"], parts=False)
    assert free.row(hypothesis=WHOLE)["right"] > 0.9
    # The receiver's heads read the stream at the thing directly, so the hypothesis survives the stricter graph.
    assert held.row(hypothesis=WHOLE)["right"] > 0.9
    # The token of the giver itself is one layer below where its head reads: through held nodes it says nothing.
    early = {"name": "embed@10", "receiver": ["z.3.1@-1", "z.3.2@-1"]}
    assert cp.causal_scrubbing(model, claim(early), short, n=24, parts=False).row(hypothesis=WHOLE)["right"] > 0.9
    lost = cp.causal_scrubbing(model, claim(early), short, n=24, nodes=["z", "mlp_out"], parts=False)
    assert lost.row(hypothesis=WHOLE)["right"] < 0.75


def test_pairs_of_a_task_are_read_with_their_components(model):
    rows = generate("agreement", n=40, templates=[TEMPLATE])
    pairs = load_pairs(rows, model, name="agreement")
    verb = cp.CausalModel(
        {"is_plural": lambda noun: noun, "verb": lambda is_plural: is_plural}, ["noun"], output="verb"
    )
    first = pairs[0]
    are = first.answer[0] if rows[0]["answer"] == " are" else first.wrong_answer[0]
    hypothesis = cp.Hypothesis(
        verb,
        {"is_plural": "resid_pre.1@2"},
        inputs=lambda pair, side: {"noun": (pair.answer[0] == are) == (side == "clean")},
        answers={True: " are", False: " is"},
    )
    found = cp.interchange_accuracy(model, hypothesis, pairs, n=60)
    row = found.row(variable="is_plural")
    assert row["changing"] > 0.9
    assert 10 <= row["n_units"] <= 20
    assert row["low"] > row["chance"]
    strict = cp.strict_test(model, hypothesis, pairs, n=40, nodes=["z.0", "mlp_out.3"], positions=["attractor"])
    assert set(strict.table["verdict"]) <= {"inconclusive", "fails"}  # some twenty units are too few to pass
