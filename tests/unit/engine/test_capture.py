import numpy as np
import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import PatchDidNotFire, SiteUnsupported
from causalpatch.engine import capture
from causalpatch.engine.capture import require_positions
from causalpatch.sites import Site
from toys import Pictures, Pooled, Twice, hooks_of, opened, prompts, vectors
from worlds import assert_same, run_all, tiny_world

PAIRS = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([8, 9], [8, 11]))
SITES = [Site("resid_pre", 1), Site("q", 0, 3), Site("k", 1, 1), Site("mlp_post", 0, 7), Site("resid_mid", 0)]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_one_run_keeps_the_values_of_many_sites(padding_side):
    model, plain = tiny_world("llama", (2, 4, 2, 0))
    batch = PAIRS.batch("clean", padding_side=padding_side)
    run = capture(model, batch, SITES)
    for site in SITES:
        value = run.value(site)
        assert value.shape[:2] == (2, 4)
        for row, pair in enumerate(PAIRS):
            wanted = plain.value(pair.clean, (site.name, site.layer, site.unit))
            torch.testing.assert_close(value[row, batch.mask[row]], wanted)
    assert run.output.logits.shape == (2, 4, 40)


def test_sites_of_one_tensor_share_its_copy():
    model, _ = tiny_world("gpt2", (2, 4, 2, 0))
    sites = [Site(name, 0, head) for name in "qkv" for head in range(4)]
    run = capture(model, PAIRS.batch("clean"), sites)
    assert len(run.tensors) == 1
    assert [run.value(site).shape for site in sites] == [(2, 4, 8)] * 12


def test_values_of_arrays_have_the_modules_own_axes():
    run = capture(opened(Pictures()), vectors(3, shape=(1, 6, 6)).batch("clean"), [Site.parse("module(conv1).output")])
    assert run.value(Site.parse("module(conv1).output")).shape == (3, 3, 4, 4)
    unit = Site.parse("module(conv1).output axes=(channel,height,column)#2")
    torch.testing.assert_close(run.value(unit), run.value(Site.parse("module(conv1).output"))[:, 2])


def test_a_site_without_a_row_per_prompt_cannot_be_read():
    model, _ = tiny_world("gpt2", (1, 2, 2, 2))
    site = Site.parse("module(transformer.wpe).output")
    run = capture(model, PAIRS.batch("clean"), [site])
    with_one_row = run.tensors[model.tap(site).port].shape[0] == 1
    if with_one_row:
        with pytest.raises(SiteUnsupported, match="has no row for each prompt"):
            run.value(site)
    else:
        assert run.value(site).shape[0] == 2


def test_a_module_that_does_not_run_cannot_be_read():
    with pytest.raises(PatchDidNotFire):
        capture(opened(Twice()), vectors().batch("clean"), [Site.parse("module(second).output")])


def test_captured_values_carry_no_gradient_and_leave_no_hooks():
    model = opened(Pictures())
    run = capture(model, vectors(2, shape=(1, 6, 6)).batch("corrupt"), [Site.parse("module(conv2).input")])
    assert not run.value(Site.parse("module(conv2).input")).requires_grad
    assert hooks_of(model.module) == 0


def test_tensors_that_do_not_grow_with_the_prompt_have_no_positions():
    model = opened(Pooled())
    require_positions(model, PAIRS, "clean", [Site.parse("module(mix).output")])
    require_positions(model, PAIRS, "clean", [])
    # Eight columns of width meet a prompt of eight tokens, but not one of two.
    pairs = prompts((list(range(3, 11)), list(range(4, 12))), ([8, 9], [8, 11]))
    with pytest.raises(SiteUnsupported, match="has no column for each token") as caught:
        require_positions(model, pairs, "clean", [Site.parse("module(pool).output")])
    assert caught.value.facts[1] == ("prompt", "2 tokens")


def test_the_library_never_changes_the_batch_it_is_given():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    batch = PAIRS.batch("clean", padding_side="left")
    before = [np.array(part) for part in (batch.ids, batch.mask, batch.position_ids)]
    capture(model, batch, SITES)
    for part, was in zip((batch.ids, batch.mask, batch.position_ids), before, strict=True):
        assert np.array_equal(part, was)


class Scored(nn.Module):
    """A text model in which a module returns scores: heads, queries, keys."""

    def __init__(self):
        super().__init__()
        self.embed, self.scores, self.out = nn.Embedding(12, 4), nn.Identity(), nn.Linear(4, 12)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        scores = self.scores(x.transpose(1, 2)[..., None] * x.transpose(1, 2)[:, :, None])
        return self.out(scores.softmax(-1).mean(-1).transpose(1, 2))


def test_as_many_heads_as_tokens_are_not_taken_for_positions():
    model = opened(Scored().double())
    pairs = prompts(([1, 2, 3, 4], [1, 2, 3, 5]))
    with pytest.raises(SiteUnsupported, match="has no column for each token"):
        require_positions(model, pairs, "clean", [Site.parse("module(scores).output")])
    require_positions(model, pairs, "clean", [Site.parse("module(embed).output")])


@pytest.mark.parametrize("family", ["opt", "opt_post_norm"])
def test_a_module_that_lays_rows_and_positions_into_one_axis_is_read_with_both(family):
    model, _ = tiny_world(family, (2, 4, 2, 0))
    path = model.tap(Site("mlp_out", 1)).port.path
    texts = [f"module({path}).output", f"module({path}).output axes=(position,width)"]
    sites = [Site.parse(text) for text in texts]
    run = capture(model, PAIRS.batch("clean"), [Site("mlp_out", 1), *sites])
    wanted = run.value(Site("mlp_out", 1))
    assert wanted.ndim == 3
    for site in sites:
        torch.testing.assert_close(run.value(site), wanted)
    by_path, by_name = run_all(cp.Experiment(model, PAIRS, show_progress=False), [f"{texts[0]}@-1", "mlp_out.1@-1"])
    assert_same(by_path, by_name)
