"""Which weights belong to a head or a neuron, against slices that are written out by hand for each layout."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, SettingError, SiteUnsupported
from causalpatch.sites import Site
from causalpatch.testing.tiny import HEAD_WIDTH
from causalpatch.tuning.parts import parts_of, sites_of, spread
from tunings import tiny

H = HEAD_WIDTH


def rows(*ranges):
    return [place for first, last in ranges for place in range(first, last)]


# Heads 1 of 4 of layer 0: rows of what gives queries, keys and values, columns of what the heads go into. Written from
# the layouts of the weights in transformers, not from our tables of families.
BY_HAND = {
    "gpt2": (
        {"transformer.h.0.attn.c_attn": rows((H, 2 * H), (5 * H, 6 * H), (9 * H, 10 * H))},
        {"transformer.h.0.attn.c_proj": rows((H, 2 * H))},
    ),
    "gpt_neox": (
        {"gpt_neox.layers.0.attention.query_key_value": rows((3 * H, 6 * H))},
        {"gpt_neox.layers.0.attention.dense": rows((H, 2 * H))},
    ),
    "bloom": (
        {"transformer.h.0.self_attention.query_key_value": rows((3 * H, 6 * H))},
        {"transformer.h.0.self_attention.dense": rows((H, 2 * H))},
    ),
    "llama": (
        {f"model.layers.0.self_attn.{name}_proj": rows((H, 2 * H)) for name in "qkv"},
        {"model.layers.0.self_attn.o_proj": rows((H, 2 * H))},
    ),
    "phi3": (
        {"model.layers.0.self_attn.qkv_proj": rows((H, 2 * H), (5 * H, 6 * H), (9 * H, 10 * H))},
        {"model.layers.0.self_attn.o_proj": rows((H, 2 * H))},
    ),
}


@pytest.mark.parametrize("family", BY_HAND)
def test_a_head_is_the_rows_and_columns_that_the_layout_says(family):
    model = tiny(family, heads=4, **({"kv_heads": 4} if family in ("llama", "phi3") else {}))
    parts = parts_of([Site("z", 0, 1)], model)
    wanted_rows, wanted_columns = BY_HAND[family]
    assert {path: places.tolist() for path, places in parts.rows.items()} == wanted_rows
    assert {path: places.tolist() for path, places in parts.columns.items()} == wanted_columns
    assert parts.notes == ()


@pytest.mark.parametrize(
    ("family", "up", "down"),
    [
        ("gpt2", ["transformer.h.1.mlp.c_fc"], "transformer.h.1.mlp.c_proj"),
        ("llama", ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"], "model.layers.1.mlp.down_proj"),
    ],
)
def test_a_neuron_is_a_row_up_and_a_column_down(family, up, down):
    parts = parts_of([Site("mlp_post", 1, 3), Site("mlp_post", 1, 7)], tiny(family))
    assert {path: places.tolist() for path, places in parts.rows.items()} == {path: [3, 7] for path in up}
    assert {path: places.tolist() for path, places in parts.columns.items()} == {down: [3, 7]}


def test_a_fused_gate_shares_its_projection():
    model = tiny("phi3")
    n = model.shape.units["neuron"]
    parts = parts_of([Site("mlp_post", 0, 2)], model)
    assert {path: places.tolist() for path, places in parts.rows.items()} == {
        "model.layers.0.mlp.gate_up_proj": [2, n + 2]
    }


def test_keys_and_values_are_changed_where_all_heads_that_they_serve_are_selected():
    model = tiny("llama", heads=4, kv_heads=2)
    own = "model.layers.0.self_attn"
    alone = parts_of([Site("z", 0, 2)], model)
    assert set(alone.rows) == {f"{own}.q_proj"}
    assert alone.notes == (
        "k.0.1 is left as it is: it serves head 3 too",
        "v.0.1 is left as it is: it serves head 3 too",
    )
    both = parts_of([Site("z", 0, 2), Site("z", 0, 3)], model)
    assert both.rows[f"{own}.k_proj"].tolist() == rows((H, 2 * H))
    assert both.rows[f"{own}.q_proj"].tolist() == rows((2 * H, 4 * H))
    assert both.notes == ()
    taken = parts_of([Site("z", 0, 2)], model, shared="take")
    assert taken.rows[f"{own}.v_proj"].tolist() == rows((H, 2 * H))


def test_fused_groups_keep_each_shared_key_behind_its_queries():
    model = tiny("falcon_grouped", heads=4, kv_heads=2)
    parts = parts_of([Site("z", 0, 2), Site("z", 0, 3)], model)
    (fused,) = parts.rows.values()
    assert fused.tolist() == rows((4 * H, 8 * H))  # of the second group: two queries, a key, a value


def test_whole_sublayers_are_all_their_units_and_the_bias():
    model = tiny("gpt2")
    whole = parts_of([Site("attn_out", 0), Site("mlp_out", 1)], model)
    proj, fc = model.module.transformer.h[0].attn.c_proj, model.module.transformer.h[1].mlp
    n = sum(p.numel() for p in model.module.transformer.h[0].attn.parameters())
    n += sum(p.numel() for p in fc.parameters())
    assert whole.n_weights(model.module) == n
    assert whole.biases == ("transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_proj")
    assert len(whole.columns["transformer.h.0.attn.c_proj"]) == proj.weight.shape[0]


def test_components_come_from_a_table_a_circuit_and_texts():
    model = tiny("gpt2")
    pairs = cp.Pairs([cp.Pair(np.array([1 + k, 2]), np.array([3, 2 + k]), ((2,),), ((1,),)) for k in range(4)])
    table = cp.sweep(cp.Experiment(model, pairs), "z@-1").top(2)
    frame = table.to_dataframe()
    assert [(site.layer, site.unit) for site in sites_of(table, model)] == list(
        zip(frame["layer"], frame["head"], strict=True)
    )
    circuit = cp.Circuit.of(model, ["a0.h1 -> m1", "m1 -> logits"])
    assert list(map(str, sites_of(circuit, model))) == ["z.0.1", "mlp_out.1"]
    assert list(map(str, sites_of(["z.0.1@-1", "mlp_post.1.0:2"], model))) == ["z.0.1", "mlp_post.1.0", "mlp_post.1.1"]
    with pytest.raises(ModelUnsupported, match="of another model"):
        sites_of(table, tiny("gpt2", seed=1))
    with pytest.raises(ModelUnsupported, match="of another model"):
        sites_of(circuit, tiny("gpt2", seed=1))


def test_a_claim_gives_what_it_supports_and_a_localisation_what_it_found():
    model = cp.open_model("zoo:stories", device="cpu")
    found_on, held_out = cp.load_pairs("ioi", model).split()
    claim = cp.confirm(cp.Experiment(model, held_out), ["z.3.1@-1", "z.0.0@-1"], checks=cp.Checks.none())
    assert 1 <= len(claim.supported) < 2 or not claim.supported
    wanted = claim.supported or claim.components
    assert list(sites_of(claim, model)) == [Site.parse(str(one)).at(None) for one in wanted]
    found = cp.localize(cp.Experiment(model, found_on.take(range(8))), 10**4, units="heads", sample=0)
    assert found.components
    assert list(sites_of(found, model)) == list(dict.fromkeys(site.at(None) for site in found.components))
    assert parts_of(sites_of(found, model), model).modules
    other = tiny("llama")
    for source in (claim, found):
        with pytest.raises(ModelUnsupported, match="of another model"):
            sites_of(source, other)


def test_what_has_no_weights_is_refused():
    model = tiny("gpt2")
    with pytest.raises(SettingError, match="no component was named to tune"):
        parts_of(sites_of([], model), model)
    with pytest.raises(SettingError, match="has no weights of its own"):
        sites_of(["a0.h1 -> m1"], model)
    with pytest.raises(SiteUnsupported, match=r"'resid_pre\.0' has no weights of its own"):
        parts_of([Site("resid_pre", 0)], model)
    with pytest.raises(SiteUnsupported, match="has no weights for"):
        parts_of([Site("mlp_out", 0)], tiny("mixtral"))


def test_a_budget_is_spread_over_all_projections():
    model = tiny("llama", heads=4, kv_heads=4)
    head = parts_of([Site("z", 0, 1)], model)
    wide = spread(head.n_weights(model.module), model, seed=0)
    assert len(wide.modules) == 2 * 7
    assert wide.n_weights(model.module) == pytest.approx(head.n_weights(model.module), rel=0.6)
