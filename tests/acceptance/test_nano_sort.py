"""Captured sites of a trained model against activations that its own authors' code wrote down."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import Captured, capture

FOLDER = Path("models") / "nano-sort-gpt2"
# Name in the golden file and the site that it is; where units are axes of the golden array, the set of them.
SITES = {
    "tok_emb": "embed",
    "x": "resid_pre.0",
    "ln1": "module(transformer.h.0.ln_1).output",
    "qkv": "module(transformer.h.0.attn.c_attn).output",
    "yProj": "attn_out.0",
    "attnResid": "resid_mid.0",
    "ln2": "module(transformer.h.0.ln_2).output",
    "fc": "module(transformer.h.0.mlp.c_fc).output",
    "mlp": "mlp_out.0",
    "mlpResid": "resid_post.0",
    "block0": "resid_post.0",
    "block1": "resid_post.1",
    "block2": "resid_post.2",
    "ln_f": "final_norm",
    "lm_head": "logits",
}
HEADS = {"q": "q.0", "k": "k.0", "v": "v.0"}  # row head position head_width
MERGED = {"y": ("z.0", True), "gelu": ("mlp_post.0", False)}  # units side by side on the last axis


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    text = (shared / FOLDER / "golden_activations.json").read_text()
    entries = {name: entry for name, entry in json.loads(text).items() if name != "config"}
    return {
        name: np.frombuffer(base64.b64decode(entry["data"]), dtype="<f4").reshape(entry["shape"])
        for name, entry in entries.items()
    }


@pytest.fixture(scope="module")
def captured(shared: Path, golden: dict[str, np.ndarray]) -> Captured:
    model = cp.open_model(shared / FOLDER, dtype="float32")
    ids = golden["idx"].astype(np.int64)
    assert ids.shape == (3, 11)
    rows = [{"clean": row.tolist(), "corrupt": row.tolist()} for row in ids]
    batch = cp.load_pairs(rows, model).batch("clean")
    texts = [*SITES.values(), *HEADS.values(), *(text for text, _ in MERGED.values())]
    return capture(model, batch, [site for text in texts for site in members(model, text)])


def members(model: cp.Model, text: str) -> tuple[cp.Site, ...]:
    site = cp.parse(text)
    units = model.shape.units
    if isinstance(site, cp.Site):
        return (site,)
    return tuple(cp.Site(site.name, site.layer, unit) for unit in range(units[site.unit_axis]))


def values(captured: Captured, text: str) -> list[torch.Tensor]:
    return [captured.value(site) for site in members(captured.model, text)]


@pytest.mark.parametrize("name", SITES)
def test_a_captured_site_equals_its_golden_activation(name, golden, captured):
    (value,) = values(captured, SITES[name])
    np.testing.assert_allclose(value.numpy(), golden[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_of_a_projection_equal_their_golden_activations(name, golden, captured):
    heads = torch.stack(values(captured, HEADS[name]), dim=1)
    assert heads.shape == (3, 3, 11, 16)
    np.testing.assert_allclose(heads.numpy(), golden[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MERGED)
def test_units_side_by_side_equal_their_golden_activations(name, golden, captured):
    text, has_width = MERGED[name]
    units = values(captured, text)
    merged = torch.cat(units, dim=-1) if has_width else torch.stack(units, dim=-1)
    np.testing.assert_allclose(merged.numpy(), golden[name], rtol=0, atol=1e-5)


def test_every_golden_activation_is_compared_or_has_no_site(golden):
    compared = {*SITES, *HEADS, *MERGED}
    assert set(golden) - compared == {"idx", "pos_emb", "att", "attSm", "probs"}


def test_the_probabilities_of_the_logits_are_the_golden_ones(golden, captured):
    (logits,) = values(captured, "logits")
    np.testing.assert_allclose(logits.softmax(-1).numpy(), golden["probs"], rtol=0, atol=1e-5)


def test_the_model_is_right_on_all_of_its_pairs(shared, captured):
    pairs = cp.load_pairs(shared / FOLDER / "pairs.jsonl", captured.model)
    baseline = cp.Experiment(captured.model, pairs).baseline
    assert len(pairs) == 120
    assert baseline.right_clean.all()
    assert baseline.right_corrupt.all()
    assert baseline.clean.mean() == pytest.approx(10.2, abs=0.05)


@pytest.mark.parametrize(("method", "name"), [("eap", "eap"), ("eap-ig", "eap_ig_5")])
def test_scores_of_all_edges_are_those_of_their_authors_code(shared, method, name):
    reference = json.loads((shared / "reference" / "nano_sort_eap.json").read_text())
    lines = (shared / FOLDER / "pairs.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["n_tokens"] == 6]
    model = cp.open_model(shared / FOLDER, dtype="float32")
    # Their sign: the change of the metric where an edge carries the corrupted run.
    experiment = cp.Experiment(model, cp.load_pairs(rows, model), direction="noise")
    scores = cp.attribute_edges(experiment, method, steps=5, rule="eap-ig")
    graph = scores.graph
    assert graph.receiver_labels == reference["destinations"]
    assert [graph.find_sender(text) for text in reference["sources"]] == list(range(graph.n_senders))
    wanted = np.array(reference[name], dtype=float)[graph.exists]
    assert len(wanted) == 172
    np.testing.assert_allclose(scores.values[graph.exists], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert scores.provenance["mean_base"] == pytest.approx(reference["mean_metric_clean"], rel=1e-5)


def test_a_graph_file_of_their_scores_is_read_with_its_sign(shared, tmp_path):
    """Their scores of the metric itself fall where an edge matters; those of their scripts, of a loss, rise."""
    reference = json.loads((shared / "reference" / "nano_sort_eap.json").read_text())
    model = cp.open_model(shared / FOLDER, dtype="float32")
    scores = torch.tensor(np.nan_to_num(np.array(reference["eap"], dtype=float)), dtype=torch.float32)
    data = {
        "cfg": {"n_layers": 3, "n_heads": 3, "parallel_attn_mlp": False, "d_model": 48},
        "src_nodes": reference["sources"],
        "dst_nodes": reference["destinations"],
        "edges_scores": scores,
        "edges_in_graph": torch.zeros(scores.shape, dtype=torch.bool),
        "nodes_in_graph": torch.zeros(len(scores), dtype=torch.bool),
    }
    torch.save(data, tmp_path / "metric.pt")
    torch.save({**data, "edges_scores": -scores}, tmp_path / "loss.pt")
    lines = (shared / FOLDER / "pairs.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["n_tokens"] == 6]
    own = cp.attribute_edges(cp.Experiment(model, cp.load_pairs(rows, model), direction="noise"), "eap")
    for name, of in (("metric", "metric"), ("loss", "loss")):
        found = cp.read_graph(tmp_path / f"{name}.pt", model, of=of).scores
        exists = own.graph.exists
        np.testing.assert_allclose(
            found.values[exists], own.values[exists], rtol=0, atol=1e-4 * np.abs(own.values[exists]).max()
        )
        order = [set(cp.discover_circuit(each, 20).edges()) for each in (found, own)]
        assert order[0] == order[1]
