"""Compiled programs compute what they say, exactly, on all inputs of small lengths."""

import numpy as np
import pytest
import torch

from causalpatch.circuits.ground_truth import all_gates, all_programs, build, compile_program, linear
from causalpatch.circuits.ground_truth.meaning import SHARP, evaluate

PROGRAMS = {program.name: program for program in (*all_programs(), *all_gates())}


def prompts_of(program):
    """All inputs of each length up to the full one, of gates the full one alone."""
    for n in range(3 if program.chosen else 1, program.n_symbols + 1):
        yield list(program.prompts(n))


def largest_error(program, module):
    """The largest difference from the answers in plain Python, over all tokens but the one that is never an answer."""
    worst = 0.0
    for prompts in prompts_of(program):
        with torch.no_grad():
            logits = module(torch.tensor(prompts)).logits[..., :-1].double()
        for row, prompt in enumerate(prompts):
            for position, answer in program.answers(prompt).items():
                expected = torch.zeros(len(program.vocabulary), dtype=torch.float64)
                if program.is_number:
                    expected[program.tokens[0]] = answer
                else:
                    expected[int(answer)] = 1.0
                worst = max(worst, float((logits[row, position] - expected).abs().max()))
    return worst


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("seed", [None, 1])
def test_a_compiled_program_gives_the_answers_of_plain_python(name, seed):
    program = PROGRAMS[name]
    assert largest_error(program, build(compile_program(program).blueprint, seed=seed)) < 1e-9


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_plain_model_is_as_good_in_float32(name):
    program = PROGRAMS[name]
    assert largest_error(program, build(compile_program(program).blueprint, dtype=torch.float32)) < 1e-4


def test_answers_of_plain_python_are_what_their_names_say():
    def said(name, *ids):
        program = PROGRAMS[name]
        return {p: a if program.is_number else program.vocabulary[int(a)] for p, a in program.answers(ids).items()}

    assert said("fraction", 0, 2, 1, 1, 2) == {1: 0, 2: 1 / 2, 3: 2 / 3, 4: 1 / 2}
    assert said("reverse", 0, 1, 2, 3, 4, 5, 5, 5) == {5: "c", 6: "b", 7: "a"}
    assert said("sort", 0, 5, 2, 3, 6, 2, 3) == {4: "2", 5: "3", 6: "5"}
    assert said("induction", 0, 1, 2, 1, 3, 1) == {1: "^", 2: "^", 3: "b", 4: "^", 5: "c"}
    assert said("count", 0, 1, 2, 1, 1) == {1: "1", 2: "1", 3: "2", 4: "3"}
    assert said("bigram-count", 0, 1, 1, 1, 2) == {1: "1", 2: "1", 3: "2", 4: "1"}
    assert said("same-count", 0, 1, 2, 1, 2) == {1: "1", 2: "2", 3: "1", 4: "2"}
    assert said("balance", 0, 1, 3, 2, 4) == {0: 1, 1: 0, 2: 0, 3: 0, 4: 1}
    assert said("balance", 0, 2, 1) == {0: 1, 1: 0, 2: 0}
    assert said("first-position", 0, 2, 1, 1) == {1: "0", 2: "2", 3: "2"}
    assert said("addition", 0, 3, 2, 3) == {2: "0", 3: "0"}
    assert [said(gate, 0, 1, 2, 1)[3] for gate in ("and", "or", "cancelling")] == ["0", "1", 0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_stream_holds_the_programs_variables(name):
    """What the weights write into each variable's columns is what the program means by it."""
    compiled = compile_program(PROGRAMS[name])
    prompts = list(compiled.program.prompts(min(3, compiled.program.n_symbols)))
    values = evaluate(compiled.program, prompts)
    module = build(compiled.blueprint)
    with torch.no_grad():
        stream = module(torch.tensor(prompts), output_hidden_states=True).hidden_states
    # The last of hidden_states is behind the final norm, which changes nothing.
    for variable, columns in compiled.columns.items():
        if variable not in values:
            continue
        held = (stream[-1][..., 0::2] - stream[-1][..., 1::2])[..., columns].numpy() / 2
        np.testing.assert_allclose(held, values[variable], atol=1e-9)


def test_the_norm_is_harmless():
    """It changes at most variance * 2^-61 of what it is given: a part in 10^12 where the variance is 10^6."""
    norm = build(linear()).transformer.h[0].ln_1
    draw = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 30.0, 1000.0):
        x = scale * torch.randn(200, norm.normalized_shape[0], generator=draw, dtype=torch.float64)
        x = x - x.mean(-1, keepdim=True)
        allowed = x.var(-1, correction=0, keepdim=True) * 2.0**-61 + 4 * torch.finfo(x.dtype).eps
        with torch.no_grad():
            # The mean that is left by rounding is taken out as well.
            off = norm(x) - (x - x.mean(-1, keepdim=True))
        assert bool((off.abs() <= allowed * x.abs().amax(-1, keepdim=True)).all())


def test_what_is_not_selected_weighs_nothing():
    """The largest weight of a position that is not selected, over all heads of use of a program with two kinds."""
    compiled = compile_program(PROGRAMS["induction"])
    module = build(compiled.blueprint)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = module(torch.tensor(list(compiled.program.prompts(4))), output_attentions=True).attentions
    for layer in (0, 1):
        weights = patterns[layer][:, 0]
        assert float(weights[weights < 0.5].max()) <= np.exp(-SHARP)


@pytest.mark.parametrize("name", PROGRAMS)
def test_streams_are_small_and_sum_to_nothing(name):
    """So that the norm is off by less than 1000 * 2^-61 of what it is given, which is 4e-16."""
    program = PROGRAMS[name]
    for seed in (None, 0):
        module = build(compile_program(program).blueprint, seed=seed)
        with torch.no_grad():
            streams = module(torch.tensor(program.inputs()[:64]), output_hidden_states=True).hidden_states
        for stream in streams:
            assert float(stream.var(-1, correction=0).max()) < 1000
            assert float(stream.mean(-1).abs().max()) < 1e-12
