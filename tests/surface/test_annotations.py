"""Annotations of the torch rooms are checked while tests run: in each room a wrong shape or type is an error."""

import ast
import importlib
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import causalpatch
import causalpatch as cp
from causalpatch.engine import Means, Run
from causalpatch.engine.delta import DeltaLinears
from causalpatch.engine.products import Casts
from causalpatch.metrics import AnswerTable, Outputs
from causalpatch.models import Columns, Sum
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import Site
from causalpatch.subspaces.interchange import refuse_shared
from worlds import tiny_world

ROOT = Path(__file__).parents[2]
SOURCE = Path(causalpatch.__file__).parent
NOT_CHECKED = {"cli", "testing"}  # nothing in them is handed tensors by others

PAIRS = Pairs([Pair([1, 2], [3, 2], ((1,),), ((2,),)), Pair([1, 4], [3, 4], ((1,),), ((2,),))])


def checked_rooms():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (packages,) = (part for part in options.split() if part.startswith("--jaxtyping-packages="))
    *rooms, checker = packages.partition("=")[2].split(",")
    return {room.removeprefix("causalpatch.") for room in rooms}, checker


def test_every_room_that_imports_torch_is_checked():
    using = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] in ("torch", "jaxtyping") for name in names):
                using.add(path.relative_to(SOURCE).parts[0].removesuffix(".py"))
    rooms, checker = checked_rooms()
    assert using - NOT_CHECKED <= rooms
    assert checker == "typed.check"


def test_a_wrong_shape_raises_in_models():
    with pytest.raises(TypeCheckError):
        Sum().read(torch.zeros(2, 3), (torch.zeros(2, 4),))
    with pytest.raises(TypeCheckError):
        Columns(0, 2).write(torch.zeros(2, 3), (), (torch.zeros(1, dtype=torch.long),), torch.zeros(2, 2))
    with pytest.raises(TypeCheckError):
        tiny_world("gpt2", (1, 2, 2, 2))[0].inputs(np.zeros(3, dtype=np.int64))


def test_a_wrong_type_raises_in_patches():
    with pytest.raises(TypeCheckError):
        cp.Function("twice")
    with pytest.raises(TypeCheckError):
        cp.Patch("z.0.0", column="first")


def test_a_wrong_shape_raises_in_metrics():
    answers = AnswerTable.of(PAIRS, torch.device("cpu"))
    right = Outputs(torch.zeros(2, 5), answers, torch.arange(2))
    assert cp.logit_difference(right, PAIRS).tolist() == [0.0, 0.0]
    with pytest.raises(TypeCheckError):
        Outputs(torch.zeros(2, 5), answers, torch.arange(3))
    with pytest.raises(TypeCheckError):
        Outputs(torch.zeros(2, 5, dtype=torch.long), answers, torch.arange(2))


def test_a_wrong_shape_raises_in_the_engine():
    batch = PAIRS.batch("clean")
    Run(torch.zeros(2, 2, 5), batch, torch.arange(2))
    with pytest.raises(TypeCheckError):
        Run(torch.zeros(2, 2, 5), batch, torch.arange(3))
    with pytest.raises(TypeCheckError):
        Means({(Site("embed"), cp.Mean()): torch.zeros(3, dtype=torch.long)})
    with pytest.raises(Exception, match="index"), DeltaLinears(Casts()).replay(torch.zeros(2, 2, dtype=torch.long)):
        pass


def test_a_wrong_type_raises_in_the_experiment():
    model, _ = tiny_world("gpt2", (1, 2, 2, 2))
    with pytest.raises(TypeCheckError):
        cp.Experiment(model, PAIRS, seed="zero")
    with pytest.raises(TypeCheckError):
        cp.Experiment(model, PAIRS).count_units("embed", "width")


def test_a_wrong_type_raises_in_sweeps():
    with pytest.raises(TypeCheckError):
        cp.sweep("experiment", "z")


def test_a_wrong_type_raises_in_attribution():
    with pytest.raises(TypeCheckError):
        cp.attribute("experiment", "z")
    with pytest.raises(TypeCheckError):
        cp.confirm_scores("experiment", "scores")


def test_a_wrong_type_raises_in_studies():
    with pytest.raises(TypeCheckError):
        cp.run_study("study.yaml")


def test_a_wrong_shape_raises_in_subspaces():
    with pytest.raises(TypeCheckError):
        refuse_shared(np.zeros((2, 7), dtype=np.uint8), "one", PAIRS)
    with pytest.raises(TypeCheckError):
        cp.learn_subspace("experiment", "z", PAIRS)


def test_a_wrong_type_raises_in_tuning():
    with pytest.raises(TypeCheckError):
        cp.tune("model", ["z.0.0"], PAIRS)
    with pytest.raises(TypeCheckError):
        cp.Schedule(steps="many")


def test_a_whole_number_may_stand_for_any_number():
    assert cp.Constant(2) == cp.Constant(2.0)
    assert cp.Experiment(tiny_world("gpt2", (1, 2, 2, 2))[0], PAIRS, budget_gib=1).budget_gib == 1


def test_every_room_was_loaded_by_the_checker():
    for room in checked_rooms()[0]:
        module = importlib.import_module(f"causalpatch.{room}")
        assert type(module.__spec__.loader).__module__ == "jaxtyping._import_hook"
    assert cp.sweep.__wrapped__.__module__ == "causalpatch.sweeps.grid"
