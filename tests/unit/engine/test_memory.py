from dataclasses import replace

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import MemoryExhausted
from causalpatch.engine.cone import ModelNumbers
from causalpatch.engine.memory import (
    CPU_CHUNK_ROWS,
    CPU_TOKENS,
    budget_bytes,
    chunk_bytes,
    chunk_rows,
    is_out_of_memory,
    packed_row_bytes,
    row_cost,
    rows_per_forward,
    state_bytes,
)
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


GPT2 = ModelNumbers(12, 768, 12, 12, 64, 3072, 768 * 3072, 50257)


def test_a_packed_token_needs_its_streams_and_the_larger_of_mlp_and_attention():
    streams, mlp = 8 * 768 * 4, 3 * 3072 * 4
    assert packed_row_bytes(GPT2, 16) == streams + mlp
    assert packed_row_bytes(GPT2, 1024) == streams + 12 * 12 * 1024
    half = replace(GPT2, number_bytes=2)
    # Scores stay in float32 where everything else is in half of it.
    assert packed_row_bytes(half, 1024) == streams // 2 + 12 * 12 * 1024
    assert chunk_bytes(GPT2, 100, 16) == 100 * (streams + mlp)
    assert chunk_bytes(GPT2, 100, 16, n_reads=7, n_columns=50257) == 100 * (streams + mlp) + 7 * 50257 * 4


def test_chunks_are_what_fits_and_is_fast_but_never_less_than_a_segment():
    row = packed_row_bytes(GPT2, 128)
    assert chunk_rows(GPT2, 128, 500 * row, "cpu") == 500
    assert chunk_rows(GPT2, 128, 500 * row + row - 1, "cuda") == 500
    assert chunk_rows(GPT2, 128, 10**6 * row, "cpu") == CPU_CHUNK_ROWS == 2048
    assert chunk_rows(GPT2, 128, 10**6 * row, "cuda") == 10**6
    assert chunk_rows(GPT2, 128, 10**6 * row, "cuda", preferred=8192) == 8192
    assert chunk_rows(GPT2, 128, 10**6 * row, "cpu", preferred=1024) == 1024
    assert chunk_rows(GPT2, 128, 3 * row, "cpu") == 128
    assert chunk_rows(GPT2, 4096, 10**6 * row, "cpu") == 4096


def test_the_default_budget_is_two_gib_on_a_processor():
    assert budget_bytes(torch.device("cpu"), None) == 2 * 2**30
    assert budget_bytes(torch.device("cpu"), 0.5) == 2**29


def test_the_default_budget_on_a_gpu_is_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    assert budget_bytes(torch.device("cuda"), None) == 5 * 2**30


def test_the_stream_of_a_long_sweep_is_as_large_as_it_is_known_to_be():
    # Llama-8B in bfloat16, one pair of 1,024 tokens, all layers: 137 GB.
    llama = ModelNumbers(32, 4096, 32, 8, 128, 14336, 2 * 4096 * 14336, 128256, number_bytes=2)
    assert state_bytes(llama, 32 * 1024 * 1025 // 2) == pytest.approx(137e9, rel=0.01)
