"""Encoders: metrics read the masked token wherever it stands, classifiers answer once, on every engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf

import causalpatch as cp
from causalpatch.base.errors import AnswerError, MetricError, ModelUnsupported, PairError, SiteUnsupported
from causalpatch.engine import prove
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import ENCODERS, VOCAB, tiny_classifier, tiny_model
from oracle import Edit, Plain
from worlds import FIRST

torch.set_num_threads(1)

MASK_ID = 3
TIERS = ("reference", "rows", "restart", "auto")
# (clean length, place of its mask, corrupted length, place of its mask)
SHAPES = ((6, 2, 6, 4), (8, 5, 7, 1), (5, 0, 5, 3))


def masked_pairs():
    """Return pairs of unequal lengths whose masked tokens stand at different places."""
    rng, made = np.random.default_rng(4), []
    for number, (n_clean, at_clean, n_corrupt, at_corrupt) in enumerate(SHAPES):
        clean, corrupt = rng.integers(4, VOCAB, n_clean), rng.integers(4, VOCAB, n_corrupt)
        clean[at_clean] = corrupt[at_corrupt] = MASK_ID
        spans = {"mask": ((at_clean, at_clean + 1), (at_corrupt, at_corrupt + 1))}
        made.append(Pair(clean, corrupt, ((7 + number,),), ((9 + number,),), id=str(number), spans=spans))
    return Pairs(made, name="masked")


def difference(logits, pair, role):
    at = pair.spans["mask"][role == "corrupt"][0]
    return float(logits[at, pair.answer[0][0]] - logits[at, pair.wrong_answer[0][0]])


@pytest.mark.parametrize("engine", TIERS)
@pytest.mark.parametrize("family", ENCODERS)
def test_a_metric_reads_the_masked_token_of_each_prompt_on_every_engine(family, engine):
    module, pairs = tiny_model(family), masked_pairs()
    plain, model = Plain(module, family), cp.open_model(module)
    metric = [cp.logit_difference.at("mask"), "kl_divergence@mask"]
    experiment = cp.Experiment(model, pairs, metric, engine=engine, show_progress=False)
    sites = {"resid_pre.1@2": ("resid_pre", 1, None), "z.0.1@2": ("z", 0, 1), "mlp_post.1.5@2": ("mlp_post", 1, 5)}
    effects = experiment.run(list(sites))
    assert effects.provenance["engine"]["tier"] == {"auto": "restart"}.get(engine, engine)
    got, divergence = effects.to_xarray()["metric"].values
    for number, pair in enumerate(pairs):
        source = plain.logits(pair.clean)
        assert experiment.baseline.clean[0][number] == pytest.approx(difference(source, pair, "clean"), abs=1e-9)
        for row, site in enumerate(sites.values()):
            new = plain.value(pair.clean, site)[[2]]
            logits = plain.logits(pair.corrupt, [Edit(site, [2], new)])
            assert got[row, number] == pytest.approx(difference(logits, pair, "corrupt"), abs=1e-9)
            (at_clean, _), (at_corrupt, _) = pair.spans["mask"]
            p, q = source[at_clean].log_softmax(-1), logits[at_corrupt].log_softmax(-1)
            assert divergence[row, number] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-9)


@pytest.mark.parametrize("engine", ["wavefront", "restart", "rows"])
def test_a_metric_reads_a_span_of_a_causal_model_too(engine):
    module, pairs = tiny_model(FIRST[0]), masked_pairs()
    plain, model = Plain(module, FIRST[0]), cp.open_model(module)
    experiment = cp.Experiment(model, pairs, cp.logit_difference.at("mask"), engine=engine, show_progress=False)
    (got,) = experiment.run(["resid_pre.1@0"]).to_xarray()["metric"].values
    for number, pair in enumerate(pairs):
        new = plain.value(pair.clean, ("resid_pre", 1, None))[[0]]
        logits = plain.logits(pair.corrupt, [Edit(("resid_pre", 1, None), [0], new)])
        assert got[number] == pytest.approx(difference(logits, pair, "corrupt"), abs=1e-9)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_wavefront_is_not_for_tokens_that_see_later_ones(family):
    model = cp.open_model(tiny_model(family))
    experiment = cp.Experiment(model, masked_pairs(), cp.logit_difference.at("mask"), show_progress=False)
    effects = experiment.run(["resid_pre.1@2"])
    assert "wavefront: its tokens see later ones" in effects.provenance["engine"]["reason"]
    same = cp.Experiment(model, masked_pairs().one_sided("clean"), cp.logit_difference.at("mask"))
    with pytest.raises(ModelUnsupported, match="its tokens see later ones"):
        cp.path_patch(same, "mlp_out.0", "q.1.0")


@pytest.mark.parametrize("engine", TIERS)
@pytest.mark.parametrize("family", ENCODERS)
def test_a_classifier_of_prompts_is_measured_as_raw_hooks_measure_it(family, engine):
    module = tiny_classifier(family)
    model = cp.open_model(module)
    pairs = Pairs([replace(pair, answer=((1,),), wrong_answer=((2,),)) for pair in masked_pairs()], name="classes")
    experiment = cp.Experiment(model, pairs, engine=engine, show_progress=False)
    got = experiment.run(["resid_post.0@2"]).to_xarray()["metric"].values[0]
    layer = module.get_submodule(model.tap(cp.parse("resid_post.0")).port.path)
    for number, pair in enumerate(pairs):
        kept = []
        handle = layer.register_forward_hook(lambda part, args, out, kept=kept: kept.append(out.clone()))
        with torch.no_grad():
            module(input_ids=torch.tensor(pair.clean)[None])
        handle.remove()

        def put(part, args, out, kept=kept):
            out = out.clone()
            out[:, 2] = kept[0][:, 2]
            return out

        handle = layer.register_forward_hook(put)
        with torch.no_grad():
            logits = module(input_ids=torch.tensor(pair.corrupt)[None]).logits[0]
        handle.remove()
        assert got[number] == pytest.approx(float(logits[1] - logits[2]), abs=1e-9)


def test_a_classifier_has_no_logits_for_each_token():
    proof = prove(cp.open_model(tiny_classifier("bert")), "logits")
    assert proof.failure == "the model gives one answer for a whole prompt, not one for each token"
    pairs = Pairs([replace(pair, answer=((1,),), wrong_answer=((2,),)) for pair in masked_pairs()])
    experiment = cp.Experiment(cp.open_model(tiny_classifier("bert")), pairs, show_progress=False)
    with pytest.raises(SiteUnsupported, match="one answer for a whole prompt"):
        experiment.run(["logits@2"])


def test_answers_that_are_no_classes_are_refused():
    model = cp.open_model(tiny_classifier("bert"))
    with pytest.raises(MetricError, match="answer 9 is none of the classes"):
        cp.Experiment(model, masked_pairs(), show_progress=False).run(["resid_pre.1@2"])


def test_answers_of_several_tokens_are_refused_where_prompts_would_see_them():
    model = cp.open_model(tiny_model("bert"))
    pairs = Pairs([replace(pair, answer=((7, 8),)) for pair in masked_pairs()], name="long")
    with pytest.raises(AnswerError, match="has 2 tokens, and 'BertForMaskedLM' reads one"):
        cp.Experiment(model, pairs, metric="log_probability", show_progress=False)


def test_spans_that_a_metric_cannot_read_are_refused():
    model, pairs = cp.open_model(tiny_model("bert")), masked_pairs()
    with pytest.raises(MetricError, match="reads the span 'subject', which pair 0 of 'masked' does not have"):
        cp.Experiment(model, pairs, metric="logit_difference@subject")
    wide = Pairs([replace(pair, spans={"mask": ((0, 2), (0, 1))}) for pair in pairs], name="wide")
    with pytest.raises(MetricError, match=r"reads one token, but the span 'mask' of pair 0 of 'wide' has more"):
        cp.Experiment(model, wide, metric=cp.logit_difference.at("mask"))
    with pytest.raises(MetricError, match="there is no metric 'logit_difference@2mask'"):
        cp.Experiment(model, pairs, metric="logit_difference@2mask")


def test_models_of_no_family_number_positions_as_they_do_by_themselves():
    """MPNet counts positions from behind its padding id; ids from 0 would be other positions."""
    config = hf.MPNetConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    module = hf.MPNetForMaskedLM(config).eval()
    model = cp.open_model(module)
    assert model.family is None
    ids = torch.tensor([[4, 5, 6, 7]])
    places = torch.arange(4)[None]
    with torch.no_grad():
        wanted = module(ids).logits
        got = module(**model.inputs(ids, torch.ones_like(ids).bool(), places)).logits
        other = module(ids, position_ids=places).logits
    assert torch.equal(got, wanted)
    assert not torch.equal(other, wanted)


def test_the_masked_token_is_named_by_itself_where_it_stands_once():
    class Words:
        pad_id, vocab_size, mask_id = 0, VOCAB, MASK_ID

        def encode(self, text, *, special=True):
            return [1, *(MASK_ID if word == "[MASK]" else 4 + len(word) for word in text.split()), 2]

        def encode_with_offsets(self, text):
            raise NotImplementedError

        def label(self, token_id):
            return str(token_id)

    model = cp.open_model(tiny_model("bert"), tokenizer=Words())
    rows = [
        {"clean": "a [MASK] bbb", "corrupt": "cc dd [MASK]", "answer_id": 5, "wrong_answer_id": 6},
        {"clean": "a [MASK] [MASK]", "corrupt": "cc dd [MASK]", "answer_id": 5, "wrong_answer_id": 6},
    ]
    pairs = cp.load_pairs(rows, model)
    assert pairs[0].spans == {"mask": ((2, 3), (3, 4))}
    assert pairs[1].spans == {}
    with pytest.raises(MetricError, match="put the tokenizer's mask once into each prompt"):
        cp.Experiment(model, pairs, metric="logit_difference@mask")


def test_a_row_over_keys_is_taken_only_from_a_prompt_with_the_same_keys():
    """Queries see keys behind them too, so that a prompt of another length has another row."""
    model, pairs = cp.open_model(tiny_model("bert")), masked_pairs()
    same = cp.Experiment(model, pairs.take([0, 2]), cp.logit_difference.at("mask"), show_progress=False)
    assert np.isfinite(same.run(["pattern.1.0@1"]).to_xarray()["metric"].values).all()
    other = cp.Experiment(model, pairs.take([1]), cp.logit_difference.at("mask"), show_progress=False)
    with pytest.raises(PairError, match="a row over 7 keys cannot take one over 8"):
        other.run(["pattern.1.0@1"])


def test_nothing_is_written_on_behind_prompts_whose_tokens_see_later_ones():
    with pytest.raises(MetricError, match="its tokens see later ones"):
        cp.Experiment(cp.open_model(tiny_model("bert")), masked_pairs(), metric=cp.generated_answer)
