"""Single edges by the wavefront: what is shared, what is derived, what falls back, and memory that runs out."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import shares, single_edges
from causalpatch.results.status import Status
from causalpatch.testing.tiny import tiny_model
from toys import hooks_of, prompts

torch.set_num_threads(1)

PROMPTS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]), ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]))
SHORT = (([4, 6, 15, 8], [4, 7, 16, 8]),)


def experiment_of(family="gpt2", pairs=PROMPTS + SHORT, dtype=torch.float64, **more):
    return cp.Experiment(cp.open_model(tiny_model(family, dtype=dtype)), prompts(*pairs), **more)


def values_of(effects):
    return effects.to_xarray()["metric"].values


def slow(experiment):
    """Return all edges, each in whole forwards."""
    other = cp.Experiment(experiment.model, experiment.pairs, experiment.metrics, experiment.direction, engine="rows")
    return cp.patch_edges(other)


def engine_of(effects):
    return effects.provenance["engine"]


def test_every_edge_is_the_default_and_has_its_name():
    experiment = experiment_of()
    graph, effects = cp.graph_of(experiment), cp.patch_edges(experiment)
    assert list(effects.effect().coords["intervention"].values) == list(graph.names(graph.edges))
    assert engine_of(effects)["interventions"] == {"wavefront": graph.n_edges, "forwards": 0}
    assert "without_wavefront" not in engine_of(effects)
    assert hooks_of(experiment.model.module) == 0
    assert float(np.abs(effects.effect().values).max()) > 0.05


def test_heads_that_share_keys_are_changed_by_themselves():
    experiment = experiment_of("llama")
    names = [f"m0 -> a1.h{head}<{kind}>" for head in range(4) for kind in "kv"]
    effects = cp.patch_edges(experiment, names)
    assert engine_of(effects)["interventions"]["wavefront"] == len(names)
    wanted = values_of(slow(experiment))
    graph = cp.graph_of(experiment)
    places = [graph.edges.tolist().index(list(graph.parse(name))) for name in names]
    np.testing.assert_allclose(values_of(effects), wanted[places], atol=1e-10)
    assert len({round(float(value), 9) for value in values_of(effects)[:, 0]}) == len(names)


def test_runs_that_nothing_reaches_are_derived():
    same = (([5, 7, 3, 9], [5, 7, 3, 9]),)
    late = (([1, 7, 3, 9, 12, 4, 8], [1, 7, 3, 9, 12, 4, 20]),)
    effects = cp.patch_edges(experiment_of(pairs=PROMPTS + same + late))
    status = effects.to_xarray()["status"].values
    assert (status[:, 2] == Status.DERIVED).all()
    graph = cp.graph_of(experiment_of())
    number = {name: place for place, name in enumerate(graph.names(graph.edges))}
    # The embedding differs at tokens that are not read, so that queries of the last layer tell nothing.
    assert status[number["embed -> a1.h0<q>"], 0] == Status.DERIVED
    assert status[number["embed -> a1.h0<k>"], 0] == status[number["m0 -> logits"], 0] == Status.MEASURED
    base = effects.to_xarray()["baseline_base"].values.reshape(-1)
    assert (values_of(effects)[:, 2] == base[2]).all()
    np.testing.assert_allclose(
        values_of(effects), values_of(slow(experiment_of(pairs=PROMPTS + same + late))), atol=1e-10
    )


def test_tokens_without_a_partner_keep_what_they_have():
    pairs = prompts(([1, 7, 3, 9, 4], [1, 8, 8, 3, 9, 4])).align("difference")
    for direction in ("denoise", "noise"):
        experiment = cp.Experiment(experiment_of().model, pairs, direction=direction)
        np.testing.assert_allclose(values_of(cp.patch_edges(experiment)), values_of(slow(experiment)), atol=1e-10)


def test_metrics_that_read_all_positions_see_all_that_changes():
    experiment = experiment_of("gemma2", metric=["kl_divergence", "logit_difference"])
    found = cp.patch_edges(experiment).to_xarray()["metric"].values
    np.testing.assert_allclose(found, slow(experiment).to_xarray()["metric"].values, atol=1e-10)


def test_sets_of_edges_beside_single_ones_stay_in_order():
    experiment = experiment_of("gpt_neox")
    asked = ["m0 -> m1", ["m0 -> m1", "a0.h1 -> m1"], "a0.h1", "embed -> logits"]
    effects = cp.patch_edges(experiment, asked)
    assert engine_of(effects)["interventions"] == {"wavefront": 2, "forwards": 2}
    for place, each in enumerate(asked):
        alone = cp.patch_edges(experiment, [each])
        np.testing.assert_allclose(values_of(effects)[place], values_of(alone)[0], atol=1e-10)
    graph = cp.graph_of(experiment)
    masks = np.stack([graph.mask([name] if isinstance(name, str) else name) for name in (asked[0], asked[1])])
    np.testing.assert_allclose(values_of(cp.patch_edges(experiment, masks)), values_of(effects)[:2], atol=1e-10)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("olmo2", "the 'q' of one head changes those of others"),
        ("falcon", "layers attend by the interface"),
        ("mixtral", "the experts are fused"),
        ("modernbert", "its tokens see later ones"),
    ],
)
def test_what_the_wavefront_cannot_run_is_run_by_forwards_and_the_record_says_why(family, why):
    experiment = cp.Experiment(cp.open_model(tiny_model(family)), prompts(*PROMPTS))
    effects = cp.patch_edges(experiment, ["m0 -> m1", "a0.h1 -> a1.h0<q>"])
    assert engine_of(effects)["interventions"] == {"wavefront": 0, "forwards": 2}
    assert why in engine_of(effects)["without_wavefront"]


def test_the_engine_that_was_asked_for_is_taken():
    effects = cp.patch_edges(experiment_of(engine="rows"), ["m0 -> m1"])
    assert engine_of(effects)["interventions"]["wavefront"] == 0
    assert engine_of(effects)["without_wavefront"] == 'engine="rows"'


def test_long_prompts_take_the_fused_kernel():
    draw = np.random.default_rng(0)
    clean = draw.integers(1, 40, 70)
    corrupt = np.where(draw.random(70) < 0.3, draw.integers(1, 40, 70), clean)
    pairs = ((clean.tolist(), corrupt.tolist()), *SHORT)
    names = ["embed -> a1.h0<q>", "m0 -> a1.h2<k>", "a0.h1 -> a1.h3<v>", "a0.h0 -> m1"]
    for family in ("llama", "gemma2", "mistral"):  # plain, with a soft-cap, with a window
        found, wanted = (cp.patch_edges(experiment_of(family, pairs, engine=name), names) for name in ("auto", "rows"))
        np.testing.assert_allclose(values_of(found), values_of(wanted), atol=1e-10)
        assert engine_of(found)["interventions"]["wavefront"] == len(names)


def test_float32_is_as_exact_as_forwards():
    experiment = experiment_of("llama", dtype=torch.float32)
    exact = values_of(cp.patch_edges(experiment_of("llama")))
    by_rows, by_forwards = values_of(cp.patch_edges(experiment)), values_of(slow(experiment))
    error, floor = np.abs(by_rows - exact).max(), np.abs(by_forwards - exact).max()
    assert error <= max(2 * floor, 1e-6)


def test_when_memory_runs_out_fewer_senders_go_together(monkeypatch):
    wanted = values_of(cp.patch_edges(experiment_of()))
    own, sizes = single_edges._Batch._rows, []

    def failing(self, layer, wanted):
        sizes.append(len(wanted))
        if len(wanted) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return own(self, layer, wanted)

    monkeypatch.setattr(single_edges._Batch, "_rows", failing)
    monkeypatch.setattr(shares, "PORTION", 5)
    np.testing.assert_allclose(values_of(cp.patch_edges(experiment_of())), wanted, atol=1e-12)
    assert max(sizes) > 2 >= min(sizes)


def test_a_layer_that_gives_something_else_on_its_own_is_not_trusted(monkeypatch):
    own = single_edges._Batch._attend
    monkeypatch.setattr(single_edges._Batch, "_attend", lambda self, layer, parts: own(self, layer, parts) + 1e-3)
    experiment = experiment_of()
    effects = cp.patch_edges(experiment)
    assert "its attention in layer 0 does not give on its own what it did" in engine_of(effects)["without_wavefront"]
    np.testing.assert_allclose(values_of(effects), values_of(slow(experiment)), atol=1e-12)
