import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PatchError
from causalpatch.engine import Job, fit_all_means, targets_of
from causalpatch.testing.tiny import tiny_model
from toys import Chain, opened, prompts, vectors
from worlds import tiny_world

PAIRS = prompts(([3, 4, 5, 6, 7], [8, 4, 5, 6, 7]), ([9, 4], [10, 4]), ([11, 12, 13], [11, 14, 13]))


def fitted(model, pairs, patch, **settings):
    """Return the mean of the patch's one site."""
    target = targets_of(model, cp.Intervention((patch,)))
    means = fit_all_means(Job(model, pairs, [target], "corrupt", **settings))
    ((key, value),) = means.of.items()
    assert key == (target[0].site, patch.value)
    return value


@pytest.mark.parametrize("side", ["clean", "corrupt"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("max_rows", [1, 2, None])
def test_each_position_has_its_own_mean_over_the_prompts_that_have_it(side, padding_side, max_rows):
    model, plain = tiny_world("qwen2", (2, 4, 2, 0))
    mean = fitted(model, PAIRS, cp.Patch("z.1.2", cp.Mean("pairs", side)), padding_side=padding_side, max_rows=max_rows)
    values = [plain.value(pair.input(side), ("z", 1, 2)) for pair in PAIRS]
    assert mean.shape == (5, 8)
    for position in range(5):
        present = [value[position] for value in values if len(value) > position]
        torch.testing.assert_close(mean[position], torch.stack(present).mean(0))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_one_mean_over_all_positions_counts_every_real_token_once_and_no_pad(padding_side):
    model, plain = tiny_world("gpt2", (2, 4, 2, 0))
    mean = fitted(model, PAIRS, cp.Patch("resid_post.0", cp.Mean("positions", "clean")), padding_side=padding_side)
    tokens = torch.cat([plain.value(pair.clean, ("resid_post", 0, None)) for pair in PAIRS])
    assert len(tokens) == 10
    torch.testing.assert_close(mean, tokens.mean(0))


def test_a_mean_is_summed_in_float64_whatever_the_models_dtype():
    model = cp.open_model(tiny_model("gpt2", dtype=torch.bfloat16))
    rng = np.random.default_rng(0)
    pairs = prompts(*[(rng.integers(3, 40, 6).tolist(), rng.integers(3, 40, 6).tolist()) for _ in range(60)])
    mean = fitted(model, pairs, cp.Patch("resid_pre.0", cp.Mean()), max_rows=7)
    assert mean.dtype == torch.float64
    module = model.module.transformer
    ids = torch.as_tensor(pairs.batch("corrupt").ids)
    with torch.no_grad():
        stream = module.wte(ids) + module.wpe(torch.arange(6))
    wanted = stream.double().mean(0)
    torch.testing.assert_close(mean, wanted, rtol=1e-12, atol=1e-12)
    in_bfloat16 = stream.sum(0) / 60
    assert (in_bfloat16.double() - wanted).abs().max() > 1e-4


def test_a_site_without_positions_has_one_mean():
    model, pairs = opened(Chain()), vectors(7)
    mean = fitted(model, pairs, cp.Patch("module(first).output", cp.Mean(side="clean")), max_rows=3)
    with torch.no_grad():
        wanted = model.module.first(torch.as_tensor(pairs.batch("clean").values)).mean(0)
    torch.testing.assert_close(mean, wanted)


def test_nothing_runs_where_no_patch_puts_a_mean_in():
    model = opened(Chain())
    model.module.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    targets = [targets_of(model, cp.Intervention((cp.Patch("module(first).output", "zero"),)))]
    assert fit_all_means(Job(model, vectors(), targets, "corrupt")).of == {}


def test_a_position_that_no_prompt_of_the_means_side_has_is_refused():
    model, _ = tiny_world("gpt2", (2, 4, 2, 0))
    pairs = prompts(([3, 4, 5, 6], [8, 4])).align("difference")
    experiment = cp.Experiment(model, pairs, direction="noise")
    with pytest.raises(PatchError, match=r"there is no mean of 'z\.0\.0' at token 3"):
        experiment.run([cp.Patch("z.0.0@3", cp.Mean(side="corrupt"))])
    experiment.run([cp.Patch("z.0.0@3", cp.Mean(side="clean")), cp.Patch("z.0.0@3", cp.Mean("positions", "corrupt"))])
