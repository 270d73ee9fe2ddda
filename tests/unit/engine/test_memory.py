import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import MemoryExhausted
from causalpatch.engine.memory import CPU_TOKENS, is_out_of_memory, row_cost, rows_per_forward
from causalpatch.testing.tiny import tiny_model
from toys import Chain, Narrow, hooks_of, opened, vectors

SITES = ["module(first).output", "module(second).output", "module(second).input"]


def test_rows_are_halved_until_they_fit_and_the_numbers_stay_the_same():
    pairs = vectors(9)
    roomy, narrow = opened(Chain()), opened(Narrow(most=3))
    wanted = cp.Experiment(roomy, pairs).run(SITES)
    got = cp.Experiment(narrow, pairs).run(SITES)
    np.testing.assert_allclose(got.effect(per_pair=True).values, wanted.effect(per_pair=True).values, atol=1e-12)
    seen = narrow.module.seen
    assert max(seen) > 3
    assert sum(rows for rows in seen if rows <= 3) == wanted.provenance["cost"]["rows"]
    assert hooks_of(narrow.module) == 0


def test_what_did_not_fit_is_not_counted_as_spent():
    narrow = opened(Narrow(most=2))
    effects = cp.Experiment(narrow, vectors(4)).run(SITES)
    fitting = [rows for rows in narrow.module.seen if rows <= 2]
    assert effects.provenance["cost"]["rows"] == sum(fitting)
    assert effects.provenance["cost"]["forwards"] == len(fitting)


def test_means_and_metrics_back_off_too():
    pairs = vectors(8)
    roomy, narrow = opened(Chain()), opened(Narrow(most=3))
    zeros = [cp.Patch(site, cp.Mean()) for site in SITES]

    def hungry(outputs, pairs):
        if len(pairs) > 2:
            raise torch.OutOfMemoryError("metric")
        return outputs.logits[:, 0]

    metric = cp.metric(hungry, name="hungry")
    wanted = cp.Experiment(roomy, pairs, metric=metric, max_rows=1).run(zeros)
    got = cp.Experiment(narrow, pairs, metric=metric).run(zeros)
    np.testing.assert_allclose(got.effect(per_pair=True).values, wanted.effect(per_pair=True).values, atol=1e-12)


@pytest.mark.parametrize("request_", [SITES, [cp.Patch(SITES[0], cp.Mean())]])
def test_one_row_that_does_not_fit_is_refused_with_what_it_needs(request_):
    with pytest.raises(MemoryExhausted, match=r"one run of pair \d of 'arrays' does not fit into memory") as caught:
        cp.Experiment(opened(Narrow(most=0)), vectors(4)).run(request_)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert [name for name, _ in caught.value.facts] == ["tokens", "needs", "device"]


def test_a_patched_row_that_does_not_fit_is_refused_too():
    model = opened(Chain())
    calls = []

    def exhaust(module, args, kwargs):
        calls.append(len(kwargs["x"]))
        if len(calls) > 2:
            raise torch.OutOfMemoryError("patched")

    model.module.register_forward_pre_hook(exhaust, with_kwargs=True)
    with pytest.raises(MemoryExhausted):
        cp.Experiment(model, vectors(4)).run(["module(first).output"])
    assert calls[:2] == [4, 4]
    assert calls[-1] == 1


def test_other_errors_are_not_taken_for_lack_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_more_budget_means_more_rows_up_to_what_a_processor_is_fastest_at():
    model = cp.open_model(tiny_model("llama", dtype=torch.float32))
    cost = row_cost(model, 50)
    # 4 streams of 32, 3 insides of 96, 4 heads of 50 scores three times, in 4 bytes; logits in 4 + 4 bytes.
    assert cost.activations == (50 * (4 * 32 + 3 * 96) + 4 * 50 * 50 * 3) * 4
    assert cost.logits == 50 * 40 * 8
    assert cost.total == cost.activations + cost.logits
    assert rows_per_forward(model, 50, 3.5 * cost.total / 2**30) == 3
    assert rows_per_forward(model, 50, 1e-9) == 1
    assert rows_per_forward(model, 50, 100.0) == CPU_TOKENS // 50
