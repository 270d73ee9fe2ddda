"""Rows that enter a layer unchanged: not projected again, and the numbers are those of full forwards."""

from collections import Counter

import numpy as np
import pytest
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.pytorch_utils import Conv1D

import causalpatch as cp
from causalpatch.engine import unchanged_rows
from causalpatch.engine.cone import Point, Runs, cone
from causalpatch.engine.few_bits import FewBits
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import Cost, Job
from causalpatch.engine.means import Means
from causalpatch.engine.planning import numbers_of
from causalpatch.engine.resolve import targets_of
from causalpatch.engine.shares import Kept
from causalpatch.engine.unchanged_rows import kept_ports, numbers_per_token
from causalpatch.engine.wave import Wave
from causalpatch.engine.wavefront import measure
from causalpatch.pairs import Pair, Pairs
from doctored import llama
from tiers import (
    assert_agree,
    assert_as_raw_hooks,
    laid_at,
    mixed,
    quickly,
    run_model,
    run_on,
    tier_of,
    with_answers,
    world_of,
)
from worlds import ON_WAVEFRONT, projection, random_pairs, tiny_world

LENGTH, LAYERS = 6, 3
SHAPE = (LAYERS, 4, 2, 0)
FAMILIES = [family for family in ON_WAVEFRONT if family != "gpt_bigcode"]  # which has one kv_head
QUERIES = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}


def pairs_of(*lengths, seed=0):
    """Return pairs that differ in every token."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number, length in enumerate(lengths):
        clean = rng.integers(3, 40, length)
        pairs.append(Pair(clean, (clean - 2) % 37 + 3, ((5,),), ((6,),), id=f"pair {number}"))
    return Pairs(pairs, name="random")


ONE = pairs_of(LENGTH)


@pytest.fixture
def rows_of(monkeypatch):
    """Count the rows that each linear module is given in waves, by the module; what it returns runs a job anew."""
    counts, waves = Counter(), []
    stream = Wave.stream

    def watched(self):
        waves.append(self)
        try:
            return stream(self)
        finally:
            waves.clear()

    def counting(forward):
        def count(self, x):
            if waves:
                counts[self] += x.shape[:-1].numel()
            return forward(self, x)

        return count

    monkeypatch.setattr(Wave, "stream", watched)
    for kind in (nn.Linear, Conv1D):
        monkeypatch.setattr(kind, "forward", counting(kind.forward))

    def run(model, pairs, patches):
        counts.clear()
        job = job_of(model, pairs, patches)
        cells = sum(len(block.pairs) for block in measure(job, Gauge([projection], pairs, model), Means(), Cost()))
        assert cells == len(pairs) * (len(patches) + 2)
        return Counter(counts)

    return run


def job_of(model, pairs, patches, **settings):
    """Return a job without controls."""
    asked = [
        cp.Intervention.of([cp.Patch(text) for text in ([one] if isinstance(one, str) else one)]) for one in patches
    ]
    return Job(model, pairs, [targets_of(model, one) for one in asked], "corrupt", **settings)


def layer_of(model, layer):
    return {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(model.family.name, "model.layers") + f".{layer}"


def queries_of(model, layer):
    """Return the module whose output holds the queries of a layer."""
    name = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}.get(model.family.name, "self_attn.q_proj")
    return model.module.get_submodule(f"{layer_of(model, layer)}.{name}")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize(
    ("patch", "layer", "wanted"),
    [
        ("resid_pre.1@2", 1, 1),
        (["resid_pre.1@1", "resid_pre.1@3"], 1, 2),
        ("resid_post.0@0", 1, 1),
        ("embed@3", 0, 1),
        ("z.0.1@2", 1, 1),
        ("attn_out.0@1", 1, 1),
        ("mlp_post.0.3@1", 1, 1),
        (["z.0.1@0", "mlp_out.0@2"], 1, 2),
        (["mlp_out.0@0", "resid_pre.1@0"], 1, 1),
        (["mlp_out.0@0", "resid_pre.1@4"], 1, 2),
        ("q.1.0@2", 1, 0),
        ("k.1.0@2", 1, 0),
        (["q.1.0@4", "k.1.0@2", "v.1.0@1"], 1, 0),
        (["resid_pre.1@3", "v.1.0@1"], 1, 1),
        (["resid_pre.1@3", "z.1.0@1", "mlp_out.1@2"], 1, 1),
        ("resid_pre.0@2", 1, LENGTH - 2),
        ("resid_pre.1", 1, LENGTH),
        ("resid_pre.1@-1", 1, 1),
        (["resid_pre.1@-1", "resid_pre.2@0"], 1, 1),
    ],
)
def test_only_written_rows_are_projected_in_the_first_layer_that_a_run_passes_whole(
    rows_of, family, patch, layer, wanted
):
    model, _ = tiny_world(family, SHAPE)
    assert rows_of(model, ONE, [patch])[queries_of(model, layer)] == wanted


@pytest.mark.parametrize(("family", "wanted"), [("gpt2", 0), ("llama", 0), ("gpt_neox", 1)])
def test_in_the_last_layer_rows_that_nothing_reads_get_queries_only_where_these_stand_between_keys(
    rows_of, family, wanted
):
    model, _ = tiny_world(family, SHAPE)
    assert rows_of(model, ONE, ["resid_pre.2@0"])[queries_of(model, 2)] == wanted


def test_projections_of_queries_keys_and_values_all_run_on_the_written_rows_and_nothing_else_does(rows_of):
    model, _ = tiny_world("llama", SHAPE)
    found = rows_of(model, ONE, [["resid_pre.1@1", "k.1.1@2"]])
    path = layer_of(model, 1)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert found[model.module.get_submodule(f"{path}.{name}")] == 1
    for name in ("self_attn.o_proj", "mlp.up_proj"):
        assert found[model.module.get_submodule(f"{path}.{name}")] == LENGTH - 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("token", [0, 3])
def test_layers_multiply_what_the_cone_counts(rows_of, family, layer, token):
    model, _ = tiny_world(family, SHAPE)
    found = rows_of(model, ONE, [f"resid_pre.{layer}@{token}"])
    multiplied = 2 * sum(count * module.weight.numel() for module, count in found.items())
    model_numbers = numbers_of(model)
    counted = cone(model_numbers, Runs.at(layer, Point.STREAM, token, LENGTH - 1), 2).linear[0]
    # The last layer's own module gives queries to rows that only feed keys and values where these do not stand in
    # front; else the module gives none, and a product without them is not its own.
    query, rest = model_numbers.query, LENGTH - 1 - token
    unseen = {"gpt_neox": query, "llama": 0, "gpt2": query - queries_of(model, LAYERS - 1).weight.numel()}[family]
    assert multiplied == counted + 2 * rest * unseen


@pytest.mark.parametrize(
    ("patches", "wanted"),
    [
        (["resid_pre.1@2"], 1),
        (["z.0.1@1", "mlp_out.0@2"], 2),
        (["k.1.0@2"], 0),
        ([["resid_pre.1@2", "mlp_out.1@4"]], 1),
        ([["resid_pre.1@2", "mlp_post.1.3@4"]], LENGTH - 2),  # something is written within
        ([["resid_pre.0@2"]], LENGTH - 2),
        (["module(gpt_neox.layers.1.post_attention_layernorm).output@1"], 1),
        (["module(gpt_neox.layers.1.mlp).input@1"], 1),
        (["module(gpt_neox.layers.1.mlp.act).output@1"], LENGTH - 1),
    ],
)
def test_the_mlp_of_a_parallel_block_runs_on_the_written_rows(rows_of, patches, wanted):
    world = world_of("gpt_neox", ONE, shape=SHAPE)
    found = rows_of(world.model, ONE, patches)
    for name in ("dense_h_to_4h", "dense_4h_to_h"):
        assert found[world.model.module.get_submodule(f"gpt_neox.layers.1.mlp.{name}")] == wanted
    assert_agree(run_on("wavefront", world, patches), run_on("reference", world, patches))


def test_segments_of_several_layers_mix_in_one_call(rows_of):
    model, _ = tiny_world("gpt2", SHAPE)
    patches = ["resid_pre.0@1", "resid_pre.1@0", "resid_pre.1@2", ["z.0.0@3", "resid_pre.1@4"], "q.1.1@2"]
    assert rows_of(model, ONE, patches)[queries_of(model, 1)] == (LENGTH - 1) + 1 + 1 + 2 + 0


def test_few_unchanged_rows_among_many_are_projected_with_them(rows_of):
    model, _ = tiny_world("gpt2", SHAPE)
    patches = ["resid_pre.0@0", "resid_pre.0@1", "resid_pre.1@3"]
    assert rows_of(model, ONE, patches)[queries_of(model, 1)] == LENGTH + LENGTH - 1 + 3


@pytest.mark.parametrize(
    ("patches", "layers"),
    [
        (["resid_pre.1@2"], [1]),
        (["resid_post.0@2"], [1]),
        (["z.0.1@0", "mlp_out.1@1"], [1, 2]),
        (["z.2.1@0", "final_norm@0", "logits@0"], []),  # behind the last layer
        (["embed@0"], [0]),
        (["resid_pre.1", "z.0.1", "mlp_post.0.3@-1", "resid_pre.0@-1"], []),
        (["q.1.0@-1", "k.2.0"], [1, 2]),
        ([["resid_pre.1@-1", "z.2.0@0"]], [1]),
        (["module(model.layers.1.mlp).output@1"], [1]),
    ],
)
def test_only_projections_in_which_rows_can_be_unchanged_are_kept(patches, layers):
    model, _ = tiny_world("llama", SHAPE)
    job = job_of(model, ONE, patches)
    names = ("q_proj", "k_proj", "v_proj")
    assert [port.path for port in kept_ports(job)] == [f"model.layers.{i}.self_attn.{n}" for i in layers for n in names]
    assert numbers_per_token(job) == len(layers) * (4 + 2 * 2) * 8
    assert kept_ports(job_of(model, ONE, patches, few_bits=FewBits("bf16"))) == []


def test_of_a_parallel_block_the_mlp_is_kept_too():
    model, _ = tiny_world("gpt_neox", SHAPE)
    job = job_of(model, ONE, ["resid_pre.1@2"])
    path = "gpt_neox.layers.1"
    assert [port.path for port in kept_ports(job)] == [f"{path}.attention.query_key_value", f"{path}.mlp"]
    assert numbers_per_token(job) == (3 + 1) * model.width


def test_what_is_kept_makes_batches_of_pairs_smaller():
    model, _ = tiny_world("llama", SHAPE)
    pairs = pairs_of(*[8] * 40)
    patches = [f"resid_pre.{layer}" for layer in range(LAYERS)]
    n_batches = []
    for some in (patches, [f"{patch}@1" for patch in patches]):
        job = job_of(model, pairs, some, budget_gib=1e-3)
        kept = Kept.of(job, Gauge([cp.logit_difference], pairs, model), numbers_of(model))
        n_batches.append(len(list(kept.batches())))
    assert 1 < n_batches[0] < n_batches[1]


@pytest.fixture(params=["as it is", "always"])
def share(request, monkeypatch):
    """Set from which share on rows are gathered."""
    if request.param != "as it is":
        monkeypatch.setattr(unchanged_rows, "SHARE", 0.0)


def some_patches(names):
    """Return patches that enter at each layer and stage, alone and together."""
    texts = [
        f"{name}.{layer}{'.1' if name in ('q', 'k', 'v', 'z', 'head_out') else ''}@{token}"
        for name in names
        for layer, token in ((0, 1), (1, -2), (2, 0))
    ]
    together = [
        ["z.0.0@1", "resid_pre.1@2", "q.1.1@3"],
        ["mlp_out.0@0", "k.1.0@2"],
        ["resid_pre.1@1", "resid_pre.1@3", cp.Patch("v.1.1@2", "zero")],
        ["resid_pre.2@2", cp.Patch("k.2.0@0", cp.Function(mixed))],
        [cp.Patch("q.1.0@1", cp.Identity()), "attn_out.0@1"],
        [cp.Patch("v.1.0@1", 0.7), cp.Patch("q.1.2@2", cp.Mean("pairs", "corrupt"))],
        ["embed@1", "k.0.0@3"],
        ["q.1.*", "resid_pre.1@0"],
    ]
    return [*([text] for text in texts), *together]


@pytest.mark.parametrize("family", quickly(FAMILIES, "gpt2", "gemma2"))
def test_numbers_are_those_of_full_forwards_whatever_is_gathered(family, share):
    side = "left" if FAMILIES.index(family) % 2 else "right"
    world = world_of(family, pairs_of(5, 8, 8), side, shape=SHAPE)
    names = ("resid_pre", "q", "k", "v", "z", "head_out", "attn_out", "mlp_out", "resid_post")
    patches = some_patches(names)
    wanted = run_on("reference", world, patches)
    for settings in ({}, {"max_rows": 1}):
        got = run_on("wavefront", world, patches, **settings)
        assert tier_of(got) == "wavefront"
        assert_agree(got, wanted)


@pytest.mark.parametrize("family", quickly(FAMILIES, "gpt2", "gemma2"))
def test_numbers_are_those_of_raw_hooks(family):
    pairs = pairs_of(7, 5, 7)
    world = world_of(family, pairs, shape=SHAPE)
    laid = [[laid_at(pairs, f"{name}.{layer}@0")] for name in ("resid_pre", "mlp_out") for layer in range(LAYERS)]
    laid += [[laid_at(pairs, "resid_pre.1@1"), laid_at(pairs, f"{name}.1.1@2", cp.Constant(2.0))] for name in "qkv"]
    laid += [[laid_at(pairs, "z.0.2@1"), laid_at(pairs, "q.1.0@-1"), laid_at(pairs, "resid_pre.1@-2")]]
    assert_as_raw_hooks("wavefront", world, laid)


def test_answers_of_several_tokens_go_on_from_gathered_rows(share):
    world = world_of("llama", with_answers(random_pairs(3, 3, "equal"), 1), shape=SHAPE)
    patches = [["resid_pre.1@-1"], ["resid_pre.1@0"], ["z.0.1@-1"], ["q.1.1@1"], ["mlp_out.0@1", "v.1.0@2"]]
    settings = {"metric": cp.log_probability}
    assert_agree(run_on("wavefront", world, patches, **settings), run_on("reference", world, patches, **settings))


class Twice(LlamaAttention):
    """Calls its query projection twice."""

    def forward(self, hidden_states, **given):
        self.q_proj(hidden_states)
        return super().forward(hidden_states, **given)


class Inline(LlamaAttention):
    """Has a projection that is called as a function, so that its module never runs."""

    def forward(self, hidden_states, **given):
        own, weight = self.q_proj, self.q_proj.weight
        self._modules["q_proj"] = lambda x: nn.functional.linear(x, weight)
        try:
            return super().forward(hidden_states, **given)
        finally:
            self._modules["q_proj"] = own


class Flat(LlamaAttention):
    """Projects queries of rows that lie one after the other, without an axis for prompts."""

    def forward(self, hidden_states, **given):
        own = self.q_proj
        self._modules["q_proj"] = lambda x: own(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        try:
            return super().forward(hidden_states, **given)
        finally:
            self._modules["q_proj"] = own


class Bent(nn.Linear):
    """A projection that does more than multiply, and depends on the number of rows."""

    def forward(self, x):
        return super().forward(x) + 0.0 * x.shape[1]


def replaced(layer):
    own = layer.self_attn.k_proj.forward
    layer.self_attn.k_proj.forward = lambda x: 0.5 * own(x)


ODD = {
    "called twice": lambda layer: setattr(layer.self_attn, "__class__", Twice),
    "called as a function": lambda layer: setattr(layer.self_attn, "__class__", Inline),
    "called on flat rows": lambda layer: setattr(layer.self_attn, "__class__", Flat),
    "of a class of its own": lambda layer: setattr(layer.self_attn.v_proj, "__class__", Bent),
    "with another forward": replaced,
}


@pytest.mark.parametrize("odd", ODD)
def test_projections_that_are_not_plain_linear_modules_run_on_all_rows_and_numbers_are_right(rows_of, odd, share):
    module = llama()
    for layer in module.model.layers:
        ODD[odd](layer)
    model = cp.open_model(module)
    patches = ["resid_pre.1@1", "mlp_out.0@0", ["resid_pre.1@2", "z.1.0@0"]]
    got = run_model("wavefront", model, ONE, patches, metric=projection)
    assert tier_of(got) == "wavefront"
    assert_agree(got, run_model("reference", model, ONE, patches, metric=projection))
    found = rows_of(model, ONE, patches)
    name, n_rows = {"called twice": ("q", 2), "of a class of its own": ("v", 1), "with another forward": ("k", 1)}.get(
        odd, ("q", int(odd == "called on flat rows"))
    )
    wanted = dict.fromkeys("qkv", 3)
    wanted[name] = n_rows * (3 * LENGTH - 1)
    path = "model.layers.1.self_attn"
    assert {name: found[model.module.get_submodule(f"{path}.{name}_proj")] for name in "qkv"} == wanted
