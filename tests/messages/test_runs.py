"""Refusals of experiments and sweeps, and of numbers that would be wrong."""

import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import CausalPatchWarning, MemoryExhausted, NoGap, NotFinite, SettingError
from causalpatch.testing.tiny import tiny_model


def test_a_sweep_walks_along_axes_that_the_site_has(refuses, experiment):
    with refuses(
        SettingError,
        """
        'z.*.*' cannot be swept over 'heads'
          its axes  layer, head, position
          fix: over="head"
        """,
    ):
        cp.sweep(experiment, "z", over=("layer", "heads"))


def test_a_sweep_at_one_position_does_not_walk_along_positions(refuses, experiment):
    with refuses(
        SettingError,
        """
        'z.*.*@-1' cannot be swept over 'position'
          its axes  layer, head
          because   it stands at @-1
          fix: leave over= out for the default axes
        """,
    ):
        cp.sweep(experiment, "z@-1", over=("layer", "position"))


def test_a_sweep_over_all_neurons_must_say_what_it_may_cost(refuses, experiment):
    with refuses(
        SettingError,
        """
        sweeping 'mlp_post.*.*' takes 192 interventions, 384 runs of the model: at all positions at once
          cells  192
          fix: narrow it, such as 'mlp_post.0:2@-1', or say what it may cost: sweep(…, budget=384)
        """,
    ):
        cp.sweep(experiment, "mlp_post")


def test_a_sweep_stays_within_its_budget(refuses, experiment):
    with refuses(
        SettingError,
        """
        sweeping 'z.*.*' takes 8 interventions, 16 runs of the model: the budget is 10 rows
          cells  8
          fix: narrow it, such as 'z.0:2@-1', or say what it may cost: sweep(…, budget=16)
        """,
    ):
        cp.sweep(experiment, "z", budget=10)


def test_interventions_must_fill_the_axes(refuses, experiment):
    with refuses(
        SettingError,
        """
        3 interventions do not fill the axes
          axes  layer 1 x head 2 = 2 cells
          fix: give one intervention per cell, the last axis fastest, or leave axes= out
        """,
    ):
        experiment.run(["z.0.0", "z.0.1", "z.0.2"], axes={"layer": [0], "head": [0, 1]})


def test_equal_inputs_have_no_gap_to_recover(refuses, llama):
    row = {"clean": "Mary met John", "corrupt": "Mary met John", "answer": " left", "wrong_answer": " came"}
    effects = cp.sweep(cp.Experiment(llama, cp.load_pairs([row], llama)), "z@-1")
    with refuses(
        NoGap,
        """
        clean and reference runs have no gap in 'logit_difference', so no share of it can be given
          clean      4.092 (mean of 1 pairs)
          reference  4.092
          gap        0
          fix: read effects.effect() instead, or choose pairs that the model tells apart (pairs.check())
        """,
    ):
        effects.recovered()
    with pytest.raises(NoGap):
        effects.summary()
    with pytest.raises(NoGap):
        effects.top()


def test_weights_that_are_not_numbers_give_no_effects(refuses):
    module = tiny_model("llama")
    with torch.no_grad():
        module.lm_head.weight[6, 0] = torch.nan
    model = cp.open_model(module)
    rows = [{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}]
    experiment = cp.Experiment(model, cp.load_pairs(rows, model, name="ids"))
    with refuses(
        NotFinite,
        """
        the corrupted run of pair 0 of 'ids' gives nan
          metric  logit_difference
          model   'LlamaForCausalLM' in torch.float64
          fix: check the checkpoint for NaN weights, or open the model in float32
        """,
    ):
        experiment.run(["module(model.layers.0).output"])


@pytest.fixture
def full():
    """A model whose last layer never fits into memory."""

    def exhausted(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    module = tiny_model("llama")
    module.lm_head.register_forward_pre_hook(exhausted)
    return cp.open_model(module)


FULL = """
    one run of pair 0 of 'ids' does not fit into memory
      tokens  2
      needs   about 8 KiB, 1 KiB of them for logits
      device  cpu
      fix: shorten the prompts, open the model in bfloat16, or use a device with more memory
    """


def test_one_row_that_does_not_fit_into_memory_is_named(refuses, full):
    rows = [{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}] * 3
    experiment = cp.Experiment(full, cp.load_pairs(rows, full, name="ids"))
    with refuses(MemoryExhausted, FULL):
        _ = experiment.baseline
    with refuses(MemoryExhausted, FULL):
        experiment.run(["module(lm_head).output"])


def test_a_proof_that_does_not_fit_into_memory_is_named(refuses, full):
    rows = [{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}]
    with refuses(
        MemoryExhausted,
        """
        the proof of site 'z' in 'LlamaForCausalLM' does not fit into memory
          runs    2 prompts of 5 tokens
          device  cpu
          fix: free the device, or open the model in bfloat16
        """,
    ):
        cp.Experiment(full, cp.load_pairs(rows, full)).run(["z.0.1"])


def test_a_run_that_is_stopped_says_what_it_kept(llama, pairs):
    def stop(outputs, pairs):
        rows.append(len(pairs))
        if sum(rows) > 12:
            raise KeyboardInterrupt
        return outputs.distribution.amax(-1)

    rows = []
    experiment = cp.Experiment(llama, pairs, metric=cp.metric(stop, name="largest"), engine="rows", max_rows=2)
    with pytest.warns(CausalPatchWarning) as heard:
        effects = experiment.run(["z.0.0", "z.0.1", "z.0.2", "z.1.0", "z.1.1", "z.1.2"])
    n_made = int(effects.to_xarray()["metric"].notnull().sum())
    assert 0 < n_made < 12
    assert [str(warning.message) for warning in heard] == [f"stopped: {n_made} of 12 runs were made and are kept"]
    assert not effects.is_complete
