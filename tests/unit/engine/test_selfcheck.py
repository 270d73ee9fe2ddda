"""An engine that is wrong is not trusted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaMLP

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.engine import reference, restart, wavefront
from causalpatch.engine.selfcheck import why_drifts
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import tiny_model
from doctored import llama
from tiers import assert_agree, run_model, tier_of
from worlds import numbers, random_pairs


def job_of(family: str = "gemma2"):
    model = cp.open_model(tiny_model(family, layers=3))
    pairs = Pairs([Pair(np.arange(3, 3 + n), np.arange(4, 4 + n), ((5,),), ((6,),)) for n in (5, 9)])
    return cp.Experiment(model, pairs, show_progress=False)._job([])


def test_engines_that_are_right_pass():
    job = job_of()
    for module in (wavefront, restart):
        assert why_drifts(module.__name__, module.measure, job) is None


def test_an_engine_that_is_off_by_a_little_somewhere_is_refused_and_the_run_is_named():
    def off(job, gauge, means, cost):
        for block in reference.measure_rows(job, gauge, means, cost):
            is_here = block.interventions == 2
            yield replace(block, values=np.where(is_here, block.values + 1e-6, block.values))

    assert "a check run (resid_pre.0) is off by" in why_drifts("off", off, job_of())


def test_an_engine_whose_untouched_run_is_off_is_refused():
    def off(job, gauge, means, cost):
        for block in reference.measure_rows(job, gauge, means, cost):
            yield replace(block, values=block.values * (1 + 1e-6)) if block.interventions[0] < 0 else block

    assert "the untouched run" in why_drifts("untouched", off, job_of())


def test_a_check_is_made_once_for_a_model():
    job, calls = job_of(), []

    def counted(*given):
        calls.append(1)
        return reference.measure_rows(*given)

    assert why_drifts("counted", counted, job) is None
    assert why_drifts("counted", counted, job) is None
    assert len(calls) == 1


def mixing(share, dtype):
    """A llama whose MLPs see a share of the token before."""

    class Mixing(LlamaMLP):
        def forward(self, x):
            return super().forward(x + share * torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))

    module = llama(dtype=dtype)
    for layer in module.model.layers:
        layer.mlp.__class__ = Mixing
    return cp.open_model(module)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.1), (torch.float16, 0.01), (torch.float32, 3e-4)])
def test_a_small_mistake_is_told_from_rounding_in_every_dtype(dtype, share):
    pairs = random_pairs(3, n_pairs=4)
    for how_much, is_right in ((0.0, True), (share, False)):
        job = cp.Experiment(mixing(how_much, dtype), pairs, show_progress=False)._job([])
        assert (why_drifts("wavefront", wavefront.measure, job) is None) == is_right


def grown(kind):
    """A llama whose rotary tables depend on the longest prompt of a batch."""
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 8}
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    most = 8 if kind == "dynamic" else 32
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=most, rope_parameters=rope, pad_token_id=0)
    return cp.open_model(LlamaForCausalLM(config).double().eval())


def of_lengths(*lengths):
    rng = np.random.default_rng(0)
    return Pairs([Pair(*(rng.integers(5, 40, n) for _ in "ab"), ((3,),), ((4,),), id=str(n)) for n in lengths])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_that_treats_a_prompt_otherwise_beside_a_longer_one_is_run_one_by_one(kind):
    model, sites = grown(kind), ["resid_pre.1@2", "z.0.1@1"]
    for lengths, tier in (((6, 7), "wavefront"), ((6, 20), "reference"), ((20, 20), "wavefront")):
        pairs = of_lengths(*lengths)
        effects = run_model("auto", model, pairs, sites)
        assert tier_of(effects) == tier
        alone = [numbers(run_model("reference", model, pairs.take([n]), sites)) for n in (0, 1)]
        np.testing.assert_allclose(numbers(effects), np.concatenate(alone, -1), atol=1e-6)
    reason = run_model("auto", model, of_lengths(6, 20), sites).provenance["engine"]["reason"]
    assert "rows: a prompt has other numbers beside longer ones" in reason
    with pytest.raises(SettingError, match="'rows' cannot make"):
        run_model("rows", model, of_lengths(6, 20), sites)


def test_a_check_sees_lengths_on_both_sides_of_a_limit_though_they_are_alike():
    model = grown("dynamic")
    assert tier_of(run_model("auto", model, of_lengths(7, 8), ["resid_pre.1@2"])) == "wavefront"
    assert tier_of(run_model("auto", model, of_lengths(8, 9), ["resid_pre.1@2"])) == "reference"
    assert tier_of(run_model("auto", model, of_lengths(8, 15), ["resid_pre.1@2"])) == "reference"


def test_untouched_runs_of_such_a_model_are_measured_too():
    experiment = cp.Experiment(grown("dynamic"), of_lengths(6, 20), show_progress=False)
    alone = [cp.Experiment(experiment.model, of_lengths(6, 20).take([n])).baseline.clean for n in (0, 1)]
    np.testing.assert_allclose(experiment.baseline.clean, np.concatenate(alone, -1), atol=1e-10)


@pytest.mark.parametrize("error", [ValueError("too long"), RuntimeError("sizes"), KeyError("x"), IndexError()])
def test_an_engine_that_fails_in_the_check_is_passed_over(error):
    class Short(LlamaMLP):
        def forward(self, x):
            if x.shape[1] > 16:
                raise error
            return super().forward(x)

    module = llama(layers=2)
    for layer in module.model.layers:
        layer.mlp.__class__ = Short
    effects = run_model("auto", cp.open_model(module), random_pairs(1), ["resid_pre.1@1"])
    assert tier_of(effects) == "restart"
    assert f"a check run stopped with {type(error).__name__}" in effects.provenance["engine"]["reason"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), SettingError("not so"), KeyboardInterrupt()])
def test_memory_that_runs_out_and_requests_that_cannot_be_met_end_the_check(error):
    def fail(*_):
        raise error

    with pytest.raises(type(error)):
        why_drifts("failing", fail, job_of())


def test_the_wavefronts_gap_to_the_models_own_runs_is_recorded():
    effects = run_model("auto", cp.open_model(llama(dtype=torch.float32)), random_pairs(1), ["resid_pre.1@1"])
    (gap,) = effects.provenance["engine"]["gap"].values()
    assert 0 < gap < 1e-4
    restarted = run_model("restart", cp.open_model(llama()), random_pairs(1), ["resid_pre.1@1"])
    assert "gap" not in restarted.provenance["engine"]


@pytest.mark.parametrize("metric", [cp.logit_difference, cp.kl_divergence, [cp.kl_from_base, cp.log_probability]])
def test_a_kernel_that_changes_where_nobody_looks_is_found_by_the_gap(metric):
    bend = [0.0]

    def attend(module, query, key, value, attention_mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        scores = scaling * query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
        pattern = (scores + bend[0] * torch.tanh(scores) + attention_mask).softmax(-1)
        return (pattern @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), pattern

    AttentionMaskInterface.register("tests_hidden", eager_mask)
    AttentionInterface.register("tests_hidden", attend)
    module = llama()
    module.config._attn_implementation = "tests_hidden"
    model, pairs = cp.open_model(module), random_pairs(1)
    assert tier_of(run_model("auto", model, pairs, ["resid_pre.1@1"], metric=metric)) == "wavefront"
    bend[0] = 0.6
    again = run_model("auto", model, pairs, ["resid_pre.1@1"], metric=metric)
    assert tier_of(again) == "restart"
    assert_agree(again, run_model("reference", model, pairs, ["resid_pre.1@1"], metric=metric))
