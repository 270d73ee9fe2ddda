"""Attention laid open: the arithmetic of transformers, rows over keys, and which kernel runs when."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_attention

import causalpatch as cp
from causalpatch.base.errors import CausalPatchWarning, ModelUnsupported, SiteUnsupported
from causalpatch.engine import capture
from causalpatch.engine.attention import attend_openly
from causalpatch.engine.hooks import Write, run_with_hooks
from causalpatch.models import Port
from causalpatch.models.views import KeyRow, bound
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import Site, parse
from causalpatch.testing.tiny import ENCODERS, FAMILY_NAMES, tiny_model
from tiers import TIERS, assert_agree, assert_as_raw_hooks, laid_at, quickly, run_on, world_of
from worlds import LACKS, ON_WAVEFRONT, numbers, random_pairs

ROWS, HEADS, KV, TOKENS, WIDTH = 2, 4, 2, 6, 8


def tensors(dtype=torch.float32):
    draw = torch.Generator().manual_seed(3)
    shapes = [(ROWS, heads, TOKENS, WIDTH) for heads in (HEADS, KV, KV)]
    query, key, value = (torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)
    mask = torch.zeros(ROWS, 1, TOKENS, TOKENS, dtype=dtype)
    hidden = ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(ROWS, 1, -1, -1).clone()
    hidden[1, :, 1:, 0] = True  # a pad on the left of the second prompt
    return query, key, value, mask.masked_fill(hidden, torch.finfo(dtype).min)


def opened(*given, door=None, **more):
    """Return what attention gives, and the tensors at its steps."""
    seen = {}

    def see(side, tensor):
        seen[side] = tensor.clone()
        return tensor if door is None else door(side, tensor)

    return attend_openly(*given, more, see), seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_arithmetic_is_that_of_the_plain_kernels_of_transformers_bit_for_bit(dtype):
    given = tensors(dtype)
    stub = SimpleNamespace(num_key_value_groups=HEADS // KV, training=False)
    wanted, pattern = llama_attention(stub, *given, scaling=0.3)
    got, seen = opened(*given, scaling=0.3, dropout=0.0)
    assert torch.equal(got, wanted)
    assert torch.equal(seen["pattern"].transpose(1, 2), pattern)
    wanted, pattern = gemma2_attention(stub, *given, scaling=0.3, softcap=1.5)
    got, seen = opened(*given, scaling=0.3, softcap=1.5, sliding_window=None)
    assert torch.equal(got, wanted)
    assert torch.equal(seen["pattern"].transpose(1, 2), pattern)


def test_sinks_take_their_share_and_rows_are_never_renormalised():
    given, sinks = tensors(), torch.linspace(-1.0, 2.0, HEADS)
    stub = SimpleNamespace(num_key_value_groups=HEADS // KV, training=False, sinks=sinks)
    wanted, pattern = gpt_oss_attention(stub, *given, scaling=0.3)
    got, seen = opened(*given, scaling=0.3, s_aux=sinks)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["pattern"].transpose(1, 2), pattern, rtol=1e-5, atol=1e-6)
    assert seen["pattern"].sum(-1).max() < 0.99


def test_each_step_goes_on_as_its_door_hands_it_on():
    given = tensors(torch.float64)
    _, seen = opened(*given)
    for side in ("query", "key", "scores", "pattern"):
        changed, after = opened(*given, door=lambda at, x, side=side: 2 * x if at == side else x)
        assert not torch.equal(changed, opened(*given)[0])
        order = ["query", "key", "visible", "scores", "pattern"]
        for earlier in order[: order.index(side) + 1]:
            assert torch.equal(after[earlier], seen[earlier])
    halved, _ = opened(*given, door=lambda at, x: x / 2 if at == "pattern" else x)
    torch.testing.assert_close(2 * halved, opened(*given)[0])


def test_what_the_mask_hides_is_known_by_row_query_and_key():
    *_, mask = given = tensors()
    visible = opened(*given)[1]["visible"]
    assert visible.shape == (ROWS, TOKENS, 1, TOKENS)
    assert torch.equal(visible[:, :, 0], mask[:, 0] == 0)
    assert opened(*given[:3], None)[1]["visible"].all()


@pytest.mark.parametrize(
    ("more", "mask", "message"),
    [({"tilt": 0.4}, True, "an argument that is not known: tilt"), ({}, False, "a mask that is not added")],
)
def test_what_is_not_known_of_a_kernel_is_refused(more, mask, message):
    *given, additive = tensors()
    with pytest.raises(SiteUnsupported, match=message):
        attend_openly(*given, additive if mask else additive == 0, more, lambda side, x: x)


def padded(family="llama", **settings):
    """Return a model and a batch whose prompts have 4 and 6 tokens, padded on the left."""
    model = cp.open_model(tiny_model(family, **settings))
    pairs = Pairs([Pair(np.arange(3, 3 + n), np.arange(5, 5 + n), ((5,),), ((6,),)) for n in (4, 6)])
    return model, pairs, pairs.batch("clean", [0, 1], padding_side="left")


@pytest.mark.parametrize("family", [f for f in FAMILY_NAMES if "scores" not in LACKS[f] and f not in ENCODERS])
def test_rows_over_keys_count_real_tokens_and_hide_what_the_mask_hides(family):
    model, pairs, batch = padded(family)
    names = [Site(name, 1, 1) for name in ("scores", "pattern")]
    run = capture(model, batch, names)
    for row, n in enumerate((4, 6)):
        alone = capture(model, pairs.batch("clean", [row]), names)
        for site in names:
            real = run.value(site)[row, batch.start[row] :]
            hidden = -torch.inf if site.name == "scores" else 0.0
            assert (real[:, n:] == hidden).all()
            assert (real[:, :n][~torch.ones(n, n, dtype=torch.bool).tril()] == hidden).all()
            torch.testing.assert_close(real[:, :n], alone.value(site)[0], rtol=1e-12, atol=1e-12)
        pattern, scores = (run.value(Site(name, 1, 1))[row, batch.start[row] :] for name in ("pattern", "scores"))
        if family == "gpt_oss":  # its sinks have a share
            assert pattern.sum(-1).max() < 1 - 1e-6
            pattern = pattern / pattern.sum(-1, keepdim=True)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(n).double())
        torch.testing.assert_close(scores.softmax(-1), pattern)


@pytest.mark.parametrize("family", [f for f in FAMILY_NAMES if not LACKS[f] & {"z", "v"}])
def test_the_pattern_times_the_values_is_z_for_every_head_of_every_layer(family):
    model, _, batch = padded(family)
    units, real = model.shape.units, torch.as_tensor(batch.mask)
    sites = {name: [[Site(name, layer, unit) for unit in range(n)] for layer in range(2)] for name, n in HELD(units)}
    run = capture(model, batch, [site for layers in sites.values() for some in layers for site in some])
    for layer in range(2):
        for head in range(units["head"]):
            shared = units["head"] // units["kv_head"]
            pattern = run.tensors[Port(attention_of(model, layer), "pattern")][:, :, head]
            z = pattern @ run.value(sites["v"][layer][head // shared])
            torch.testing.assert_close(z[real], run.value(sites["z"][layer][head])[real], rtol=1e-12, atol=1e-12)


def HELD(units):
    return [("pattern", units["head"]), ("z", units["head"]), ("v", units["kv_head"])]


def attention_of(model, layer):
    return model.tap(Site("pattern", layer, 0)).port.path


@pytest.mark.parametrize("name", ["scores", "pattern"])
def test_hidden_keys_stay_hidden_whatever_is_written_there(name):
    model, _, batch = padded()
    site = Site(name, 0, 2)
    run = capture(model, batch, [site])
    rows, columns = np.nonzero(batch.mask)
    index = (torch.as_tensor(rows), torch.as_tensor(columns))
    tap = model.tap(site)
    view = bound(tap.view, batch.start)
    value = view.at(run.tensors[tap.port], (run.tensors[tap.companions[0]],), index)
    is_hidden = value == view.hidden
    for filler in (7.0, torch.nan):
        write = Write(type(tap)(site, tap.port, view, tap.companions), index, value.masked_fill(is_hidden, filler))
        output, kept = run_with_hooks(
            model, model.inputs(batch.ids, batch.mask, batch.position_ids), [write], [tap.port]
        )
        assert torch.equal(model.logits(output), model.logits(run.output))
        assert torch.equal(kept[tap.port], run.tensors[tap.port])


def test_a_row_over_more_or_fewer_keys_is_put_where_there_are_keys():
    view = KeyRow(0, 0.0, np.array([1, 0]))
    visible = torch.ones(2, 3, 1, 3, dtype=torch.bool)
    visible[0, :, :, 0] = False  # a pad
    for n_keys in (1, 2, 3, 5):
        x = torch.full((2, 3, 1, 3), -1.0)
        value = torch.arange(1.0, 1 + n_keys).expand(2, n_keys)
        view.write(x, (visible,), (torch.tensor([0, 1]), torch.tensor([2, 2])), value)
        wanted = [*range(1, 1 + n_keys), 0, 0, 0]
        assert x[0, 2, 0].tolist() == [-1, *wanted[:2]]
        assert x[1, 2, 0].tolist() == wanted[:3]
        assert (x[:, :2] == -1).all()
        read = view.read(x, (visible,))
        assert read[0, 2].tolist() == [*wanted[:2], 0]
        assert read[1, 2].tolist() == wanted[:3]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_models_own_kernel_is_back_after_runs_and_after_errors(kernel):
    model, _, batch = padded(dtype=torch.float32)
    config = model.module.config
    config._attn_implementation = kernel
    inputs = model.inputs(batch.ids, batch.mask, batch.position_ids)
    before = model.logits(run_with_hooks(model, inputs)[0])
    capture(model, batch, [parse("pattern.0.0")])
    with pytest.raises(ModelUnsupported):
        run_with_hooks(model, {"input_ids": torch.tensor([[1000]])}, keep=[Port(attention_of(model, 0), "scores")])
    assert config._attn_implementation == kernel
    assert torch.equal(model.logits(run_with_hooks(model, inputs)[0]), before)


def test_other_threads_run_the_models_own_kernel_meanwhile():
    model, _, batch = padded(dtype=torch.float32)
    inputs = model.inputs(batch.ids, batch.mask, batch.position_ids)
    wanted = model.logits(model.module(**inputs)).detach()
    site = parse("pattern.0.1")
    tap = model.tap(site)
    elsewhere = []

    def new(current):
        thread = threading.Thread(target=lambda: elsewhere.append(model.logits(model.module(**inputs)).detach()))
        thread.start()
        thread.join()
        return current * 0.5

    index = (torch.tensor([1]), torch.tensor([5]))
    output, _ = run_with_hooks(model, inputs, [Write(tap, index, new)])
    assert torch.equal(elsewhere[0], wanted)
    assert not torch.allclose(model.logits(output), wanted)


class OwnAttention(nn.Module):
    """Attention that calls no interface; it has the projections that its family names."""

    def __init__(self, before):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = before.q_proj, before.k_proj, before.v_proj, before.o_proj
        self.n_heads, self.width = before.config.num_attention_heads, before.head_dim

    def forward(self, hidden_states, attention_mask=None, **_):
        parts = [p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj)]
        query, key, value = (x.unflatten(-1, (-1, self.width)).transpose(1, 2) for x in parts)
        key, value = (x.repeat_interleave(self.n_heads // x.shape[1], 1) for x in (key, value))
        z = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(z.transpose(1, 2).flatten(-2)), None


def test_attention_that_does_not_use_the_interface_has_no_sites_inside():
    module = tiny_model("llama")
    module.model.layers[1].self_attn = OwnAttention(module.model.layers[1].self_attn)
    model = cp.open_model(module)
    experiment = cp.Experiment(model, random_pairs(0), show_progress=False)
    with pytest.raises(SiteUnsupported, match="'pattern' failed its proof") as caught:
        experiment.run(["pattern.1.0"])
    assert "cannot be looked into" in dict(caught.value.facts)["failed"]
    assert experiment.run(["z.1.0"]).effect().values[0]


class SpeltOut(OwnAttention):
    """Attention that calls no interface, with a softmax over keys among its operations."""

    def forward(self, hidden_states, attention_mask=None, **_):
        parts = [p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj)]
        query, key, value = (x.unflatten(-1, (-1, self.width)).transpose(1, 2) for x in parts)
        key, value = (x.repeat_interleave(self.n_heads // x.shape[1], 1) for x in (key, value))
        n = query.shape[2]
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (query @ key.mT / 3).masked_fill(hidden, torch.finfo(query.dtype).min)
        pattern = self.soften(scores)
        assert pattern.shape == (len(hidden_states), self.n_heads, n, n)
        return self.o_proj((pattern @ value).transpose(1, 2).flatten(-2)), None

    def soften(self, scores):
        return torch.nn.functional.softmax(scores, dim=-1)


class ByMethod(SpeltOut):
    def soften(self, scores):
        return scores.softmax(-1)


@pytest.mark.parametrize("kind", [SpeltOut, ByMethod])
def test_attention_that_is_spelt_out_is_met_at_its_softmax(kind):
    module = tiny_model("llama")
    for layer in module.model.layers:
        layer.self_attn = kind(layer.self_attn)
    model = cp.open_model(module)
    pairs = random_pairs(6)
    experiment = cp.Experiment(model, pairs, show_progress=False)
    effects = experiment.run(["pattern.0.1", "scores.1.0@-1", "z.0.1"])
    assert effects.provenance["engine"]["tier"] == "restart"
    assert (effects.effect().values != 0).all()
    run = capture(model, pairs.batch("clean", [0]), [Site(name, 1, 2) for name in ("scores", "pattern", "z")])
    scores, pattern = (run.value(Site(name, 1, 2)) for name in ("scores", "pattern"))
    torch.testing.assert_close(scores.softmax(-1), pattern)
    assert (scores == -torch.inf).sum() == (pattern == 0).sum() > 0
    # Both heads' weights from the source, and the values that they share: z of the source.
    runs = [["pattern.0.0", "pattern.0.1", "v.0.0"], ["scores.0.0", "scores.0.1", "v.0.0"], ["z.0.0", "z.0.1"]]
    by_pattern, by_scores, by_z = numbers(experiment.run(runs))
    np.testing.assert_allclose(by_pattern, by_z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(by_scores, by_z, rtol=1e-9, atol=1e-9)
    with pytest.raises(SiteUnsupported, match="'q_rot' failed its proof"):
        experiment.run(["q_rot.0.0"])
    assert all("forward" not in vars(layer.self_attn) for layer in module.model.layers)


def test_a_kernel_that_computes_otherwise_is_refused():
    def bend(module, query, key, value, mask, scaling, **_):
        scores = torch.tanh(query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling) + mask
        return (scores.softmax(-1) @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)).transpose(1, 2), None

    AttentionInterface.register("bent", bend)
    AttentionMaskInterface.register("bent", eager_mask)
    module = tiny_model("llama")
    module.config._attn_implementation = "bent"
    model = cp.open_model(module)
    with pytest.raises(SiteUnsupported) as caught:
        cp.Experiment(model, random_pairs(0), show_progress=False).run(["scores.0.0"])
    failed = dict(caught.value.facts)["failed"]
    assert failed.startswith("kernel: attention step by step against the model's own kernel (bent) is off by")


@pytest.mark.parametrize("engine", ["reference", "rows", "restart"])
def test_base_and_patched_runs_use_one_kernel_which_the_record_names(engine):
    pairs = random_pairs(3)
    model = cp.open_model(tiny_model("llama", dtype=torch.float32))
    effects = cp.Experiment(model, pairs, engine=engine, show_progress=False).run(["pattern.0.1@-1", "z.0.1@-1"])
    record = effects.provenance["engine"]
    assert record["kernel"] == f"eager, laid open, in base and patched runs ({engine})"
    assert 0 <= record["gap"]["logit_difference"] < 1e-4
    # One prompt per forward rounds alike, so that the identity patch shows nothing if the kernel is one.
    if engine == "reference":
        assert effects.provenance["noise_floor"]["logit_difference"] == 0
    plain = cp.Experiment(model, pairs, engine=engine, show_progress=False).run(["z.0.1@-1"])
    assert "kernel" not in plain.provenance["engine"]


def test_a_pattern_that_is_knocked_out_moves_z_by_what_the_key_gave():
    world = world_of("llama", random_pairs(5, n_pairs=1))
    knock = cp.Function(
        lambda now, _: now.index_fill(-1, torch.tensor([1]), -torch.inf), "no key 1", needs_source=False
    )
    drop = cp.Function(lambda now, _: now.index_fill(-1, torch.tensor([1]), 0.0), "0 for key 1", needs_source=False)
    patches = [cp.Patch("scores.1.2@-1", knock), cp.Patch("pattern.1.2@-1", drop)]
    values = numbers(run_on("reference", world, patches))
    assert_agree(run_on("wavefront", world, patches), run_on("reference", world, patches))
    assert abs(values[1, 0] - values[1, 1]).max() > 1e-6  # the softmax shares out what the knocked-out key had


SITES = ("scores.0.1", "pattern.1.2", "q_rot.0.3", "k_rot.1.0", "k_rot.0.1", "pattern.0.0")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", quickly(ON_WAVEFRONT, "gemma2"))
def test_the_wavefront_writes_inside_attention_what_raw_hooks_write(family, side):
    pairs = random_pairs(11, n_pairs=4, n_twins=2)
    world = world_of(family, pairs, side)
    sites = [site for site in SITES if world.model.n_kv_heads > 1 or site != "k_rot.0.1"]
    laid = [[laid_at(pairs, f"{site}@{token}")] for site in sites for token in (0, 1, -2, -1)]
    value = cp.Function(lambda now, new: 0.3 * now + new, "mixed")
    laid += [[laid_at(pairs, f"{site}@{token}", value)] for site in sites for token in (1, -1)]
    laid += [[laid_at(pairs, f"{site}@-1", "zero") for site in sites]]
    assert_as_raw_hooks("wavefront", world, laid)


@pytest.mark.parametrize("tier", TIERS)
def test_long_prompts_whose_attention_is_fused_are_laid_open_where_they_are_patched(tier):
    rng = np.random.default_rng(0)
    prompts = [(rng.integers(3, 40, 60), rng.integers(3, 40, 60)) for _ in range(2)]
    pairs = Pairs([Pair(clean, corrupt, ((5,),), ((6,),)) for clean, corrupt in prompts])
    patches = ["pattern.1.1@50", "scores.0.2", "k_rot.0.0@3", "pattern.0@-1", ["scores.1.0@40", "resid_pre.1@2"]]
    world = world_of("llama", pairs)
    assert_agree(run_on(tier, world, patches), run_on("reference", world, patches))


def test_values_from_tokens_at_other_places_keep_their_rotation_and_that_is_said():
    pairs = random_pairs(2, lengths="unequal")
    model = cp.open_model(tiny_model("llama"))
    experiment = cp.Experiment(model, pairs, show_progress=False)
    with pytest.warns(CausalPatchWarning, match=r"'k_rot\.0\.0' takes values from tokens at other places"):
        effects = experiment.run(["k_rot.0.0@-1"])
    assert any("whose rotation they keep" in note for note in effects.provenance["notes"])
    experiment.run(["k_rot.0.0@0", cp.Patch("q_rot.0.0@-1", "zero"), "k.0.0@-1"])  # says nothing
    cp.Experiment(cp.open_model(tiny_model("gpt2")), pairs, show_progress=False).run(["k_rot.0.0@-1"])


def test_sweeps_of_sites_inside_attention_go_by_layer_and_head():
    world = world_of("llama", random_pairs(4))
    for site, axes in (("pattern", ("layer", "head")), ("scores", ("layer", "head")), ("k_rot", ("layer", "kv_head"))):
        effects = cp.sweep(world.experiment(), site)
        assert effects.axes == axes
        assert (effects.metric("projection").effect().values != 0).all()
    walked = cp.sweep(world.experiment(random_pairs(4, n_pairs=1)), "pattern.1", over="head,position")
    assert walked.axes == ("head", "position")
