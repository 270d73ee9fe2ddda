"""Refusals of files of results: another ending, no file, a file of something else, one that was changed."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import ResultsNotFound, SettingError, StoreCorrupt
from causalpatch.testing.tiny import tiny_model
from toys import prompts

KINDS = ("scores", "edge scores", "circuit", "evaluation", "confirmation")


@pytest.fixture(scope="module")
def saved():
    """One of each kind of results that are a file."""
    model = cp.open_model(tiny_model("gpt2"))
    pairs = prompts(([1, 2, 3], [1, 4, 3]))
    made = cp.Experiment(model, pairs)
    if made.baseline.clean < made.baseline.corrupt:
        made = cp.Experiment(model, prompts(([1, 2, 3], [1, 4, 3]), answer=6, wrong=5))
    edges = cp.attribute_edges(made, "eap")
    circuit = cp.discover_circuit(edges, 3)
    return {
        "scores": cp.attribute(made, "z"),
        "edge scores": edges,
        "circuit": circuit,
        "evaluation": cp.evaluate_circuit(made, circuit, n_random=0),
        "confirmation": edges.confirm(top=1, random_sample=1),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_what_they_say(saved, refuses, tmp_path, kind):
    one, noun = saved[kind], kind.rpartition(" ")[2]
    are, it = (f"{noun} are", "them") if noun == "scores" else (f"a {noun} is", "it")
    with refuses(
        SettingError,
        f"""
        {are} saved as .npz, not as '{noun}.json'
          fix: {noun}.save("{noun}.npz")
        """,
    ):
        one.save(tmp_path / f"{noun}.json")
    with refuses(
        ResultsNotFound,
        f"""
        no saved {noun} in 'TMP/none.npz'
          fix: name the file that {noun}.save(path) wrote
        """,
    ):
        type(one).load(tmp_path / "none.npz")
    path = one.save(tmp_path / "held.npz")
    other = KINDS[KINDS.index(kind) - 1]
    other_noun = other.rpartition(" ")[2]
    with refuses(
        StoreCorrupt,
        f"""
        the {other_noun} in 'TMP/held.npz' cannot be read
          why  it is 'causalpatch {kind}', not 'causalpatch {other}', schema 1
          fix: write {"them" if other_noun == "scores" else "it"} again: {other_noun}.save(path)
        """,
    ):
        type(saved[other]).load(path)
    with np.load(path) as file:
        held = {name: file[name] for name in file.files}
    first = next(name for name in held if name != "about")
    np.savez(path, **{**held, first: held[first] + 1})
    with refuses(
        StoreCorrupt,
        f"""
        the {noun} in 'TMP/held.npz' cannot be read
          why  it was changed after it was written
          fix: write {it} again: {noun}.save(path)
        """,
    ):
        type(one).load(path)
