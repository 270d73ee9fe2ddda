"""Neurons written straight into the stream: only where a layer adds what they give, and nothing else to it."""

import hashlib

import pytest
import torch
from torch import nn
from transformers import Gemma2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import causalpatch as cp
from causalpatch.engine.neurons import Neurons
from causalpatch.engine.stack import Stack
from causalpatch.testing.tiny import tiny_model
from doctored import llama
from tiers import assert_agree, run_model, run_unless_refused, tier_of
from worlds import numbers, projection, random_pairs

PAIRS = random_pairs(11, 3, "equal", prefix=1 / 3)
NEURONS = ["mlp_post.0.5@-1", "mlp_post.1.3@1", "mlp_post.2.7@-2", cp.Patch("mlp_post.0.9@-1", 0.4), "mlp_post.1.0"]
HEADS = ["z.0.1@-1", "z.1.3@0", "z.2.0"]


class Doctored(LlamaDecoderLayer):
    """A layer that does more than add to the stream, behind attention and behind the MLP."""

    def changed(self, x, added):
        raise NotImplementedError

    def forward(self, hidden_states, **more):
        mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
        middle = self.changed(hidden_states, mixed)
        return self.changed(middle, self.mlp(self.post_attention_layernorm(middle)))


class Multiplied(Doctored):
    """Multiplies what it adds, as Granite does."""

    def changed(self, x, added):
        return x + 0.6 * added


class PostNorm(Doctored):
    """Normalises what it adds, as OLMo2 does."""

    def changed(self, x, added):
        return x + added / (added.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


class Clipped(Doctored):
    """Limits the stream, which small differences would not show."""

    def changed(self, x, added):
        return (x + added).clamp(-40, 40)


def doctored(kind):
    module = llama()
    for layer in module.model.layers:
        layer.__class__ = kind
    return module


@pytest.fixture
def verdicts(monkeypatch):
    """Collect what is found out about layers, and how often neurons are written straight into the stream."""
    found, written = [], []
    is_sum, stream = Neurons.is_sum, Neurons.stream

    def seen(self, layer):
        found.append(is_sum(self, layer))
        return found[-1]

    def counted(self, layer, *more):
        written.append(layer)
        return stream(self, layer, *more)

    monkeypatch.setattr(Neurons, "is_sum", seen)
    monkeypatch.setattr(Neurons, "stream", counted)
    return found, written


def test_neurons_of_a_plain_layer_take_the_short_way(verdicts):
    model = cp.open_model(llama())
    got = run_model("wavefront", model, PAIRS, NEURONS, metric=projection)
    assert_agree(got, run_model("reference", model, PAIRS, NEURONS, metric=projection))
    assert verdicts[0]
    assert all(verdicts[0])


@pytest.mark.parametrize("kind", [Multiplied, PostNorm, Clipped])
def test_neurons_of_a_layer_that_does_more_go_through_it_and_are_right(verdicts, kind):
    model = cp.open_model(doctored(kind))
    got = run_model("wavefront", model, PAIRS, NEURONS, metric=projection)
    found = list(verdicts[0])
    assert found
    assert not any(found)
    assert_agree(got, run_model("reference", model, PAIRS, NEURONS, metric=projection))
    assert abs(numbers(got) - numbers(run_model("wavefront", cp.open_model(llama()), PAIRS, NEURONS))[:1]).max() > 1e-3


@pytest.mark.parametrize("kind", [Multiplied, PostNorm, Clipped])
def test_heads_of_a_layer_that_does_more_are_right(kind):
    model = cp.open_model(doctored(kind))
    got = run_model("wavefront", model, PAIRS, HEADS, metric=projection)
    assert_agree(got, run_model("reference", model, PAIRS, HEADS, metric=projection))


def test_neurons_of_gemma_2_whose_mlp_has_a_norm_behind_it_go_through_it(verdicts):
    module = tiny_model("gemma2", layers=3)
    assert isinstance(module.config, Gemma2Config)
    model = cp.open_model(module)
    got = run_model("wavefront", model, PAIRS, NEURONS[:2], metric=projection)
    assert not any(verdicts[0])
    assert_agree(got, run_model("reference", model, PAIRS, NEURONS[:2], metric=projection))


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def test_keys_and_values_of_the_base_run_are_the_same_after_a_sweep(monkeypatch):
    made = []
    run = Stack.run

    def keeping(self, *asked, **more):
        held = run(self, *asked, **more)
        tensors = [part for seen in held.attention for part in (seen.keys, seen.values)]
        made.append((held, digest([*tensors, *held.inputs.values(), *held.kept.values()])))
        return held

    monkeypatch.setattr(Stack, "run", keeping)
    model = cp.open_model(llama())
    sites = [*NEURONS, *HEADS, "k.0.1@1", "v.1.0", "resid_pre.1", cp.Patch("resid_mid.2@-1", "zero"), "attn_out.0@1"]
    assert tier_of(run_model("wavefront", model, PAIRS, sites, metric=projection)) == "wavefront"
    assert made
    for held, before in made:
        tensors = [part for seen in held.attention for part in (seen.keys, seen.values)]
        assert digest([*tensors, *held.inputs.values(), *held.kept.values()]) == before


class Sharing(LlamaDecoderLayer):
    """Adds what the layer before has left in something that all layers share, beside the stream."""

    def forward(self, hidden_states, **more):
        if self.self_attn.layer_idx == 0:
            self.shared.clear()
        out = super().forward(hidden_states, **more) + self.shared.get("last", 0)
        self.shared["last"] = 0.1 * torch.tanh(out)
        return out


def test_layers_that_share_more_than_the_stream_are_refused_or_right():
    module, shared = llama(), {}
    for layer in module.model.layers:
        layer.__class__ = Sharing
        nn.Module.__setattr__(layer, "shared", shared)
    model = cp.open_model(module)
    wanted = run_model("reference", model, PAIRS, HEADS[:1], metric=projection)
    for engine in ("wavefront", "restart", "auto"):
        got = run_unless_refused(engine, model, PAIRS, HEADS[:1], metric=projection)
        assert got is not None or engine != "auto"
        if got is not None:
            assert_agree(got, wanted)
