"""What the engine does when a run is stopped, gives NaN, or fails."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import CausalPatchWarning, NotFinite, PatchDidNotFire
from causalpatch.engine.job import batches_of_pairs
from causalpatch.results.status import Status
from toys import Chain, hooks_of, opened, prompts, vectors
from worlds import DIRECTION, random_pairs, run_all, tiny_world

MODEL, PLAIN = tiny_world("llama", (2, 4, 2, 0))
PAIRS = random_pairs(3, 4, "equal")
PATCHES = ["z.0.1@-1", "resid_pre.1@-1", "mlp_out.0@-1"]


def stop_after(module, n_forwards):
    """Raise KeyboardInterrupt in the forward that follows the n-th; return the hook."""
    calls = []

    def hook(part, args, output):
        calls.append(1)
        if len(calls) > n_forwards:
            raise KeyboardInterrupt

    return module.register_forward_hook(hook)


def stopped_run(n_forwards, patches=PATCHES, **settings):
    experiment = cp.Experiment(MODEL, PAIRS, engine="rows", max_rows=1, show_progress=False, **settings)
    hook = stop_after(MODEL.module, n_forwards)
    try:
        with pytest.warns(CausalPatchWarning, match="runs were made and are kept"):
            return experiment.run(patches)
    finally:
        hook.remove()


def test_stopping_keeps_what_was_measured_and_says_so():
    whole = cp.Experiment(MODEL, PAIRS, engine="rows", max_rows=1).run(PATCHES)
    n_forwards = whole.provenance["cost"]["forwards"]
    before = hooks_of(MODEL.module)
    for stop in (4, n_forwards // 2, n_forwards - 1):
        effects = stopped_run(stop)
        assert effects.provenance["complete"] is False
        assert not effects.is_complete
        assert effects.provenance["cost"]["forwards"] == stop
        data, full = effects.to_xarray(), whole.to_xarray()
        status = data["status"].values
        is_made = status == Status.MEASURED
        assert 0 < is_made.sum() < whole.to_xarray()["status"].size
        assert (status[~is_made] == Status.SKIPPED).all()
        assert np.isnan(data["metric"].values[~is_made]).all()
        both = full.sel(pair=data["pair"])
        np.testing.assert_array_equal(data["metric"].values[is_made], both["metric"].values[is_made])
        np.testing.assert_array_equal(data["baseline_clean"].values, both["baseline_clean"].values)
    assert hooks_of(MODEL.module) == before


def test_a_stopped_ablation_keeps_only_pairs_whose_reference_was_run():
    whole = cp.Experiment(MODEL, PAIRS, direction="noise", engine="rows", max_rows=1)
    patches = [cp.Patch(site, "zero") for site in PATCHES]
    full = whole.run(patches).to_xarray()
    n_forwards = whole.run(patches).provenance["cost"]["forwards"]
    seen = set()
    for stop in range(5, n_forwards):
        data = stopped_run(stop, patches, direction="noise").to_xarray()
        kept = full.sel(pair=data["pair"])
        np.testing.assert_array_equal(data["baseline_reference"].values, kept["baseline_reference"].values)
        seen.add(data.sizes["pair"])
    assert seen == {1, 2, 3, 4}


def test_stopping_before_anything_was_measured_stops():
    hook = stop_after(MODEL.module, 2)
    try:
        with pytest.raises(KeyboardInterrupt):
            cp.Experiment(MODEL, PAIRS).run(PATCHES)
    finally:
        hook.remove()


def spoil(module, when):
    """Turn a module's output into NaN in the rows for which ``when(input)`` holds."""

    def hook(part, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        output = output.clone()
        output[when(x)] = torch.nan
        return output

    return module.register_forward_hook(hook, with_kwargs=True)


def test_an_untouched_run_that_gives_nan_is_refused_with_the_pair():
    pairs = vectors(5)
    model = opened(Chain())
    bad = torch.tensor(pairs[3].clean)
    spoil(model.module, lambda x: (x == bad).all(-1))
    with pytest.raises(NotFinite, match="the clean run of pair 3 of 'arrays' gives nan") as caught:
        cp.Experiment(model, pairs).run(["module(first).output"])
    assert ("metric", "logit_difference") in caught.value.facts
    with pytest.raises(NotFinite):
        _ = cp.Experiment(model, pairs).baseline


def test_a_patched_run_that_gives_nan_has_failed_and_is_no_zero():
    model = opened(Chain())
    spoil(model.module.head, lambda x: x.abs().amax(-1) > 50)
    effects = cp.Experiment(model, vectors(4)).run([cp.Patch("module(first).output", cp.Constant(1000.0))])
    data = effects.to_xarray()
    assert (data["status"].values == Status.FAILED).all()
    assert np.isnan(data["metric"].values).all()
    assert np.isnan(effects.effect().values).all()


def test_one_failed_row_does_not_spoil_the_rows_beside_it():
    pairs = vectors(6)
    model = opened(Chain())
    wanted = cp.Experiment(model, pairs).run(["module(first).output"]).to_xarray()["metric"].values[0]
    with torch.no_grad():
        source = model.module.first(torch.tensor(pairs[2].clean))
    inputs = {}
    model.module.register_forward_pre_hook(lambda part, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    # Only the patched run of pair 2 has the corrupted input and the clean stream.
    corrupt = torch.tensor(pairs[2].corrupt)
    spoil(model.module.second, lambda x: (inputs["x"] == corrupt).all(-1) & torch.isclose(x, source).all(-1))
    data = cp.Experiment(model, pairs).run(["module(first).output"]).to_xarray()
    kept = np.arange(6) != 2
    assert data["status"].values[0].tolist() == np.where(kept, Status.MEASURED, Status.FAILED).tolist()
    np.testing.assert_allclose(data["metric"].values[0, kept], wanted[kept], atol=1e-12)


def test_several_metrics_cost_one_run():
    cp.Experiment(MODEL, PAIRS, engine="rows").run(PATCHES)  # prompts of these lengths are now known to stack
    calls = []
    hook = MODEL.module.register_forward_hook(lambda *_: calls.append(1))
    try:
        one = cp.Experiment(MODEL, PAIRS, engine="rows").run(PATCHES)
        n_one = len(calls)
        metrics = ["logit_difference", "rank", "kl_divergence"]
        three = cp.Experiment(MODEL, PAIRS, metric=metrics, engine="rows").run(PATCHES)
        assert len(calls) == 2 * n_one
    finally:
        hook.remove()
    assert three.metrics == ["logit_difference", "rank", "kl_divergence"]
    assert one.provenance["cost"]["rows"] == three.provenance["cost"]["rows"]
    np.testing.assert_array_equal(
        three.metric("logit_difference").effect(per_pair=True).values, one.effect(per_pair=True).values
    )


def test_pairs_are_batched_with_those_of_like_length_and_none_is_lost():
    lengths = [3, 9, 4, 9, 3, 30, 4]
    pairs = prompts(*[(list(range(3, 3 + n)), list(range(4, 4 + n))) for n in lengths])
    job = cp.Experiment(MODEL, pairs, max_rows=2)._job([])
    batches = [batch.tolist() for batch in batches_of_pairs(job)]
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches == [[0, 4], [2, 6], [1, 3], [5]]


def test_a_patch_deep_in_a_branch_that_is_not_taken_for_some_inputs_raises():
    class Sometimes(Chain):
        def forward(self, x):
            stream = self.first(x)
            return self.head(stream if len(x) > 1 else self.second(stream))

    with pytest.raises(PatchDidNotFire):
        cp.Experiment(opened(Sometimes()), vectors(4)).run(["module(second).output"])


def test_full_logits_of_a_patched_run_reach_a_users_metric():
    direction = torch.as_tensor(DIRECTION)
    last = cp.metric(
        lambda outputs, pairs: outputs.logits[torch.arange(len(pairs)), outputs.column] @ direction, name="last"
    )
    got = run_all(cp.Experiment(MODEL, PAIRS, metric=last), ["logits"])
    wanted = [(PLAIN.logits(pair.clean)[-1].numpy() @ DIRECTION) for pair in PAIRS]
    np.testing.assert_allclose(got[0], wanted, atol=1e-10)
