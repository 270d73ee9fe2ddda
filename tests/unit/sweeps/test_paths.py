"""Path patching on models whose effects can be written out, on the embedded model, and what its results say."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import causalpatch as cp
from causalpatch.pairs import Pairs
from causalpatch.pairs.tasks import generate
from causalpatch.results.status import Status
from oracle import Plain
from oracle_paths import Node, ThreeRuns
from toys import prompts
from worlds import tiny_world, unchecked

HEADS, WIDTH, TOKENS = 2, 8, 5
HEAD_WIDTH = WIDTH // HEADS


@pytest.fixture(scope="module")
def linear():
    """Two layers without norms; heads attend to all tokens alike; MLPs are linear."""
    config = GPT2Config(
        vocab_size=11, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=16, activation_function="linear"
    )
    module = GPT2LMHeadModel(config).double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        for block in module.transformer.h:
            block.attn.c_attn.weight[:, : 2 * WIDTH] = 0.0
            block.attn.c_attn.bias[: 2 * WIDTH] = 0.0
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    module.transformer.ln_f = nn.Identity()
    return cp.open_model(module)


@pytest.fixture(scope="module")
def pair():
    return prompts(([1, 2, 3, 4, 5], [1, 7, 3, 9, 6]), answer=2, wrong=8)


class Weights:
    """The weights of the linear model, as numpy arrays, and what it computes written out."""

    def __init__(self, model, pairs: Pairs) -> None:
        get = lambda name: model.module.get_parameter(name).detach().numpy()  # noqa: E731
        self.embed, self.unembed = get("transformer.wte.weight"), get("lm_head.weight")
        self.v, self.o, self.mlp = {}, {}, {}
        for layer in range(2):
            path = f"transformer.h.{layer}"
            for head in range(HEADS):
                part = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
                self.v[layer, head] = get(f"{path}.attn.c_attn.weight")[:, 2 * WIDTH :][:, part]
                self.o[layer, head] = get(f"{path}.attn.c_proj.weight")[part]
            self.mlp[layer] = get(f"{path}.mlp.c_fc.weight") @ get(f"{path}.mlp.c_proj.weight")
        # Every token looks at itself and all before it alike.
        self.pattern = np.tril(np.ones((TOKENS, TOKENS))) / np.arange(1, TOKENS + 1)[:, None]
        self.change = self.embed[pairs[0].clean] - self.embed[pairs[0].corrupt]
        self.read = self.unembed[2] - self.unembed[8]

    def head(self, layer: int, head: int, change: np.ndarray) -> np.ndarray:
        return self.pattern @ change @ self.v[layer, head] @ self.o[layer, head]

    def out(self, change: np.ndarray) -> float:
        return float((change @ self.read)[-1])


def effect(model, pairs, path, **settings):
    experiment = cp.Experiment(model, pairs, show_progress=False)
    asked = [path] if isinstance(path, list) else [[path]]
    return float(cp.path_patch(experiment, paths=asked, **settings).effect().values[0])


def test_on_a_linear_model_a_path_is_the_product_of_its_weights(linear, pair):
    w = Weights(linear, pair)
    e = w.change
    behind = np.eye(WIDTH) + w.mlp[1]  # what the last MLP makes of a change before it
    h00, h01, m0 = w.head(0, 0, e), w.head(0, 1, e), e @ w.mlp[0]
    every = sum(w.head(0, head, e) for head in range(HEADS))
    whole_mlp0 = (e + every) @ w.mlp[0]
    wanted = {
        "embed -> v.1.0": w.out(w.head(1, 0, e) @ behind),
        "head_out.0.0 -> v.1.1": w.out(w.head(1, 1, h00) @ behind),
        "mlp_out.0 -> v.1.0": w.out(w.head(1, 0, whole_mlp0) @ behind),
        "head_out.0.1 -> mlp_in.1": w.out(h01 @ w.mlp[1]),
        "embed -> logits": w.out(e),
        "head_out.0.0 -> logits": w.out(h00),
        "mlp_out.0 -> logits": w.out(whole_mlp0),
        "embed -> mlp_in.0 -> logits": w.out(m0),
        "embed -> mlp_in.0 -> v.1.0 -> mlp_in.1 -> logits": w.out(w.head(1, 0, m0) @ w.mlp[1]),
        "head_out.0.0 -> v.1.1 -> head_out.1.1 -> logits": w.out(w.head(1, 1, h00)),
        "embed -> v.0.1 -> v.1.0 -> logits": w.out(w.head(1, 0, h01)),
    }
    for path, value in wanted.items():
        assert effect(linear, pair, path) == pytest.approx(value, abs=1e-9), path
        assert abs(value) > 1e-3


def test_recomputed_mlps_are_ways_of_their_own(linear, pair):
    w = Weights(linear, pair)
    h00, behind = w.head(0, 0, w.change), np.eye(WIDTH) + w.mlp[1]
    through = h00 + h00 @ w.mlp[0]
    got = effect(linear, pair, "head_out.0.0 -> v.1.1", recompute_mlps=True)
    assert got == pytest.approx(w.out(w.head(1, 1, through) @ behind), abs=1e-9)
    # On a linear model that is the sum over the direct path and the one through the MLP.
    apart = effect(linear, pair, ["head_out.0.0 -> v.1.1", "head_out.0.0 -> mlp_in.0 -> v.1.1"])
    assert apart == pytest.approx(got, abs=1e-9)


def test_on_a_linear_model_paths_add_up_to_the_gap(linear, pair):
    experiment = cp.Experiment(linear, pair, show_progress=False)
    direct = cp.direct_effect(experiment, ["embed", "head_out", "mlp_out"])
    gap = float((experiment.baseline.clean - experiment.baseline.corrupt)[0, 0])
    assert float(direct.effect().sum()) == pytest.approx(gap, abs=1e-9)
    assert direct.axes == ("sender",)


@pytest.fixture(scope="module")
def embedded():
    return cp.open_model("zoo:stories", device="cpu")


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("recompute", [False, True])
def test_on_the_embedded_model_edges_are_those_of_three_runs(embedded, direction, recompute):
    pairs = cp.load_pairs(generate("ioi", n=3), embedded, name="ioi")
    plain = Plain(embedded.module, "llama")
    edges = [
        (("head_out", 0, 2), ("v", 1, 3)),
        (("head_out", 1, 1), ("q", 3, 2)),
        (("head_out", 1, 3), ("v", 3, 2)),
        (("mlp_out", 0, None), ("k", 2, 0)),
        (("embed", None, None), ("mlp_in", 2, None)),
        (("head_out", 3, 2), ("mlp_in", 3, None)),
        (("head_out", 2, 1), ("logits", None, None)),
    ]
    texts = [" -> ".join(".".join(str(p) for p in spec if p is not None) for spec in edge) for edge in edges]
    with unchecked():
        experiment = cp.Experiment(embedded, pairs, direction=direction, show_progress=False)
        got = cp.path_patch(experiment, paths=texts, recompute_mlps=recompute).to_xarray()["metric"].values
    base, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    for place, (sender, receiver) in enumerate(edges):
        for number, one in enumerate(pairs):
            runs = ThreeRuns(plain, one.input(base), one.input(source), recompute=recompute)
            last = runs.logits([(receiver, [Node(sender)], None)])[-1].double()
            wanted = float(last[one.answer[0][0]] - last[one.wrong_answer[0][0]])
            assert got[place, number] == pytest.approx(wanted, abs=1e-5 * max(1.0, abs(wanted)))


PAIRS = prompts(([3, 4, 5, 6], [3, 9, 5, 7]), ([8, 4, 1, 2], [8, 4, 6, 2]), answer=2, wrong=1)


@pytest.fixture(scope="module")
def experiment():
    return cp.Experiment(tiny_world("llama", (2, 4, 2, 0))[0], PAIRS, show_progress=False)


def test_cells_without_a_path_are_skipped_and_never_zero(experiment):
    effects = cp.path_patch(experiment, ["head_out.0", "head_out.1"], ["q.1.0", "logits"])
    data = effects.to_xarray()
    assert data["sender"].values.tolist() == [f"head_out.{layer}.{head}" for layer in (0, 1) for head in range(4)]
    assert data["receiver"].values.tolist() == ["q.1.0", "logits"]
    assert (data["status"].values[4:, 0] == Status.SKIPPED).all()
    assert np.isnan(data["metric"].values[4:, 0]).all()
    assert np.isfinite(data["metric"].values[:4]).all()
    assert np.isfinite(data["metric"].values[:, 1]).all()
    assert "4 cells have no path" in str(effects.provenance["notes"])
    assert effects.is_complete
    # Those of a set that precede no receiver are left out.
    assert cp.path_patch(experiment, "head_out", "q.1.0").to_xarray().sizes["sender"] == 4


def test_tokens_in_front_of_the_first_difference_carry_nothing_exactly(experiment):
    walked = cp.path_patch(experiment, "head_out.0.1", "k.1.0", positions="each")
    data = walked.to_xarray()
    is_before = np.array([[True, True], [False, True], [False, False], [False, False]])  # column by pair
    assert ((data["status"].values[0, 0] == Status.DERIVED) == is_before).all()
    assert ((walked.effect(per_pair=True).values[0, 0] == 0) == is_before).all()


def test_receivers_of_one_list_are_patched_in_one_run(experiment):
    group = cp.path_patch(experiment, ["head_out.0.1", "head_out.1.0"], [["q.1.0", "k.1.0", "logits"]])
    assert group.to_xarray()["receiver"].values.tolist() == ["q.1.0 + k.1.0 + logits"]
    edges = [f"head_out.0.1 -> {name}" for name in ("q.1.0", "k.1.0", "logits")]
    one, other = cp.path_patch(experiment, paths=[edges, ["head_out.1.0 -> logits"]]).effect().values
    assert group.effect().values[:, 0] == pytest.approx([one, other], abs=1e-12)


@pytest.mark.parametrize("engine", ["restart", "rows", "reference"])
def test_third_runs_are_the_same_by_every_engine(experiment, engine):
    other = cp.Experiment(experiment.model, PAIRS, engine=engine, show_progress=False)
    asked = ("embed", "head_out.0.1", "mlp_out.0"), ("q.1.0", "v.1.1", "mlp_in.1", "logits")
    made = [cp.path_patch(each, *asked) for each in (experiment, other)]
    assert made[1].provenance["engine"]["tier"] == engine
    assert np.allclose(*(each.to_xarray()["metric"].values for each in made), rtol=0, atol=1e-10)


def test_portions_change_nothing_but_what_is_held(experiment, monkeypatch):
    whole = cp.path_patch(experiment, "head_out.0", ["q.1", "mlp_in.1"])
    monkeypatch.setattr("causalpatch.sweeps.path_runs.PORTION_BYTES", 1)
    apart = cp.path_patch(experiment, "head_out.0", ["q.1", "mlp_in.1"])
    assert np.allclose(apart.to_xarray()["metric"].values, whole.to_xarray()["metric"].values, rtol=0, atol=1e-12)
    counts = [each.provenance["engine"]["interventions"] for each in (whole, apart)]
    assert counts[0] == counts[1]


def test_results_say_that_they_are_of_paths_and_go_to_a_file_and_back(experiment, tmp_path):
    effects = cp.path_patch(experiment, "head_out.0", ["q.1", "k.1"], recompute_mlps=True)
    record = effects.provenance
    assert record["facts"]["kind"] == "edge"
    assert "MLPs between computed again" in record["facts"]["circuit"]
    assert record["reference"] == "corrupted run"
    assert "clean values at head_out.0.0" in str(effects.top(2))
    same = cp.Effects.load(effects.save(tmp_path / "paths"))
    assert same.effect().equals(effects.effect())
    svg = effects.plot().save(tmp_path / "paths.svg").read_text()
    assert "head_out.0.3" in svg
    assert "k.1.1" in svg
