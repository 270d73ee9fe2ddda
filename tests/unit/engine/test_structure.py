"""What was found out about a model holds until the model is made of other things, and no longer."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaMLP

import causalpatch as cp
from causalpatch.engine.structure import Findings, structure_of
from doctored import llama
from tiers import assert_agree, run_model, tier_of
from toys import opened
from worlds import numbers, random_pairs

PAIRS = random_pairs(1)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.numbers = (1.0, [2.0, {"deep": 3.0}])
        self.table = torch.ones(3)
        self.array = np.ones(3)
        self.settings = type("Settings", (), {})()
        self.settings.scale = float("nan")

    def forward(self, x):
        return self.first(x)


def put(path, name):
    def change(module):
        setattr(module.get_submodule(path), name, 0.5)

    return change


CHANGES = {
    "a number in a dict in a list in a tuple": lambda m: m.numbers[1][1].update(deep=4.0),
    "the length of a list": lambda m: m.numbers[1].append(0),
    "a tuple": lambda m: setattr(m, "numbers", (0.7,)),
    "True in place of 1": lambda m: m.numbers[1].__setitem__(0, True),
    "a tensor in place": lambda m: m.table.add_(1),
    "another tensor": lambda m: setattr(m, "table", torch.ones(3)),
    "an array in place": lambda m: m.array.__setitem__(0, 2.0),
    "what a plain object holds": lambda m: setattr(m.settings, "scale", 2.0),
    "a part's setting": put("first", "anything"),
    "a part": lambda m: setattr(m, "first", nn.Linear(4, 3).double()),
    "a forward": lambda m: setattr(m.first, "forward", lambda x: x),
    "a buffer": lambda m: m.register_buffer("more", torch.ones(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_anything_that_a_model_holds_is_seen(name):
    model = opened(Holder())
    before = structure_of(model)
    assert before.is_still(structure_of(model))
    CHANGES[name](model.module)
    assert not before.is_still(structure_of(model))


def test_weights_that_change_in_place_and_modes_do_not_matter():
    model = opened(Holder())
    before = structure_of(model)
    with torch.no_grad():
        model.module.first.weight.mul_(2)
    model.module.train()
    assert before.is_still(structure_of(model))


def test_a_model_of_transformers_that_nobody_touches_stays_the_same():
    model = cp.open_model(llama())
    before = structure_of(model)
    for _ in range(20):
        assert before.is_still(structure_of(model))
    assert not before.moving


def test_autocast_is_part_of_what_a_model_is():
    model = opened(Holder())
    before = structure_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not before.is_still(structure_of(model))


def test_what_a_model_counts_itself_does_not_matter():
    class Counting(Holder):
        n_calls = 0

        def forward(self, x):
            self.n_calls += 1
            return super().forward(x)

    model, calls, findings = opened(Counting()), [], Findings()

    def find():
        calls.append(1)
        return model.module(torch.zeros(1, 4, dtype=torch.float64)).shape

    for _ in range(3):
        findings.of(model, "shape", find)
    assert len(calls) == 1
    model.module.numbers = ()
    findings.of(model, "shape", find)
    assert len(calls) == 2


def test_a_function_that_takes_the_place_of_one_that_is_gone_is_another():
    model = opened(Holder())
    model.module.act = lambda x: x
    before = structure_of(model)
    for _ in range(50):  # Python gives the id of the first to one of these
        del model.module.act
        model.module.act = lambda x: 2 * x
        assert not before.is_still(structure_of(model))


def test_a_kernel_registered_again_under_its_name_is_checked_again():
    def kernel(factor):
        def attend(module, query, key, value, attention_mask, scaling, **_):
            groups = query.shape[1] // key.shape[1]
            scores = scaling * query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
            pattern = (scores + factor * torch.tanh(scores) + attention_mask).softmax(-1)
            return (pattern @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), pattern

        return attend

    AttentionMaskInterface.register("tests_edited", eager_mask)
    AttentionInterface.register("tests_edited", kernel(0.0))
    module = llama()
    module.config._attn_implementation = "tests_edited"
    model = cp.open_model(module)
    first = run_model("auto", model, PAIRS, ["resid_pre.1@1"])
    assert tier_of(first) == "wavefront"
    AttentionInterface.register("tests_edited", kernel(0.5))
    again = run_model("auto", model, PAIRS, ["resid_pre.1@1"])
    assert tier_of(again) != "wavefront"
    assert_agree(again, run_model("reference", model, PAIRS, ["resid_pre.1@1"]))


class Optional(LlamaMLP):
    """Mixes tokens by a number that is kept in a tuple."""

    options = (0.0,)

    def forward(self, x):
        return super().forward(x) + self.options[0] * nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


def test_a_setting_in_a_tuple_that_changes_is_checked_again():
    module = llama()
    for layer in module.model.layers:
        layer.mlp.__class__, layer.mlp.options = Optional, (0.0,)
    model = cp.open_model(module)
    assert tier_of(run_model("auto", model, PAIRS, ["resid_pre.0@1"])) == "wavefront"
    for layer in module.model.layers:
        layer.mlp.options = (0.7,)
    again = run_model("auto", model, PAIRS, ["resid_pre.0@1"])
    assert tier_of(again) != "wavefront"
    assert_agree(again, run_model("reference", model, PAIRS, ["resid_pre.0@1"]))


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)
        self.limit = 1e3

    def forward(self, x):
        return self.head(self.act(self.first(x)).clamp(max=self.limit))


@pytest.mark.parametrize(
    "change",
    [lambda m: setattr(m, "limit", 15.0), lambda m: setattr(m, "act", nn.Hardtanh(0.0, 18.0))],
    ids=["a limit", "an activation"],
)
def test_a_graph_does_not_outlive_a_change_that_only_patched_runs_show(change):
    model = opened(Clamped())
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=4) for _ in range(6)]
    pairs = cp.Pairs.from_arrays(inputs[:3], inputs[3:], [0] * 3, [1] * 3)
    asked = [cp.Patch("module(first).output", 50.0)]
    before = run_model("graph", model, pairs, asked)
    change(model.module)
    after = run_model("graph", model, pairs, asked)
    assert_agree(after, run_model("reference", model, pairs, asked))
    assert not np.allclose(numbers(after), numbers(before))
