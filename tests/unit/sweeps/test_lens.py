"""Logit lens and direct logit attribution, against the model's own modules called by hand."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import AnswerError, ModelUnsupported
from toys import prompts
from worlds import tiny_world

PAIRS = prompts(([3, 4, 5], [3, 9, 5]), ([8, 4, 1, 2], [2, 4, 6, 2]))
SUMS = ("llama", "gpt2", "gpt_neox", "qwen3", "granite", "olmo2")


def difference(plain, ids, pair):
    last = plain.logits(ids)[-1]
    return float(last[pair.answer[0][0]] - last[pair.wrong_answer[0][0]])


@pytest.mark.parametrize("by", ["layer", "head"])
@pytest.mark.parametrize("family", SUMS)
def test_contributions_sum_to_the_logit_difference(family, by):
    model, plain = tiny_world(family, (2, 4, 2, 0))
    experiment = cp.Experiment(model, PAIRS)
    for side in ("clean", "corrupt"):
        parts = cp.direct_logit_attribution(experiment, by, side=side)
        wanted = [difference(plain, pair.input(side), pair) for pair in PAIRS]
        assert np.abs(parts.sum("sender").values - wanted).max() < 1e-10
        assert len(parts.sender) == (6 if by == "layer" else 2 + 2 * (4 + 2))


def test_a_head_s_contribution_is_what_its_part_of_the_stream_gives_under_the_frozen_scale():
    model, plain = tiny_world("llama", (2, 4, 2, 0))
    parts = cp.direct_logit_attribution(cp.Experiment(model, PAIRS), "head")
    pair, norm = PAIRS[0], model.module.model.norm
    stream = plain.value(pair.clean, ("resid_post", 1, None))[-1]
    part = plain.value(pair.clean, ("head_out", 0, 2))[-1]
    scale = (stream.pow(2).mean() + norm.epsilon).rsqrt()
    unembed = model.module.lm_head.weight
    direction = unembed[pair.answer[0][0]] - unembed[pair.wrong_answer[0][0]]
    wanted = float(((part * scale * norm.weight) @ direction).detach())
    assert abs(float(parts.sel(sender="head_out.0.2")[0]) - wanted) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_lens_is_the_model_s_own_norm_and_head_on_the_stream_of_each_layer(family):
    model, plain = tiny_world(family, (2, 4, 2, 0))
    lens = cp.logit_lens(cp.Experiment(model, PAIRS))
    base = model.module.transformer if family == "gpt2" else model.module.model
    norm = base.ln_f if family == "gpt2" else base.norm
    cap = getattr(model.module.config, "final_logit_softcapping", None)
    for side in ("clean", "corrupt"):
        for number, pair in enumerate(PAIRS):
            for layer in (0, 1):
                stream = plain.value(pair.input(side), ("resid_post", layer, None))[-1]
                logits = model.module.lm_head(norm(stream))
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                wanted = float(logits[pair.answer[0][0]] - logits[pair.wrong_answer[0][0]])
                assert abs(float(lens[side].sel(layer=layer)[number]) - wanted) < 1e-10


def test_what_is_not_linear_is_refused_with_the_reason():
    model, _ = tiny_world("gemma2", (2, 4, 2, 0))
    with pytest.raises(ModelUnsupported, match="cannot be attributed") as caught:
        cp.direct_logit_attribution(cp.Experiment(model, PAIRS))
    assert "soft-cap" in dict(caught.value.facts)["why"]
    llama, _ = tiny_world("llama", (2, 4, 2, 0))
    several = cp.Pairs([cp.Pair(pair.clean, pair.corrupt, ((1,), (2,)), pair.wrong_answer) for pair in PAIRS])
    with pytest.raises(AnswerError, match="no single answer"):
        cp.direct_logit_attribution(cp.Experiment(llama, several))


def test_a_chart_shows_them_beside_the_effects(tmp_path):
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, PAIRS)
    picture = cp.beside(
        cp.sweep(experiment, "z@-1"),
        attribution=cp.direct_logit_attribution(experiment, "head"),
        lens=cp.logit_lens(experiment),
    )
    text = picture.save(tmp_path / "beside.svg").read_text(encoding="utf-8")
    for word in ("patching", "direct logit attribution", "logit lens"):
        assert word in text
