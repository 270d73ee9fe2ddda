from dataclasses import dataclass

import pytest
import torch
from transformers.utils import ModelOutput

import causalpatch as cp
from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine.ports import pick_input, pick_output, put_input, put_output
from causalpatch.models import Port
from toys import Both, Pipe, opened, vectors

A, B, NEW = torch.zeros(2), torch.ones(2), torch.full((2,), 7.0)


@dataclass
class Named(ModelOutput):
    left: torch.Tensor = None
    right: torch.Tensor = None


CONTAINERS = {
    "tuple": ((A, B), 1),
    "tuple from the end": ((A, B), -1),
    "list": ([A, B], 1),
    "mapping": ({"left": A, "right": B}, "right"),
    "named tuple": (Both(A, B), 1),
    "output of transformers": (Named(left=A, right=B), "right"),
    "output of transformers by number": (Named(left=A, right=B), 1),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_item_of_an_output_is_picked_and_put_without_touching_the_rest(name):
    output, item = CONTAINERS[name]
    port = Port("m", "output", (item,))
    assert pick_output(port, output) is B
    changed = put_output(port, output, NEW)
    assert type(changed) is type(output)
    assert pick_output(port, changed) is NEW
    assert pick_output(port, output) is B
    other = Port("m", "output", ("left" if isinstance(item, str) else 0,))
    assert pick_output(other, changed) is A
    if isinstance(output, Named):
        assert changed.right is NEW
        assert changed["right"] is NEW


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_item_of_an_argument_is_picked_and_put_without_touching_the_rest(name):
    held, item = CONTAINERS[name]
    for port, args, kwargs in (
        (Port("m", "input", (1, item)), ("x", held), {"k": A}),
        (Port("m", "input", ("held", item)), ("x",), {"k": A, "held": held}),
    ):
        assert pick_input(port, args, kwargs) is B
        new_args, new_kwargs = put_input(port, args, kwargs, NEW)
        assert pick_input(port, new_args, new_kwargs) is NEW
        assert pick_input(port, args, kwargs) is B
        assert new_args[0] == "x"
        assert new_kwargs["k"] is A


def test_without_items_the_first_argument_is_meant_or_the_first_tensor_given_by_keyword():
    port = Port("m", "input")
    assert pick_input(port, (A, B), {}) is A
    assert put_input(port, (A, B), {"k": B}, NEW) == ((NEW, B), {"k": B})
    assert pick_input(port, (), {"flag": True, "x": A, "y": B}) is A
    args, kwargs = put_input(port, (), {"flag": True, "x": A, "y": B}, NEW)
    assert args == ()
    assert kwargs["x"] is NEW
    assert kwargs["y"] is B


def test_without_items_the_output_itself_is_meant_or_the_first_of_a_tuple():
    port = Port("m", "output")
    assert pick_output(port, A) is A
    assert put_output(port, A, NEW) is NEW
    assert pick_output(port, (A, B)) is A
    assert put_output(port, (A, B), NEW)[0] is NEW
    assert put_output(port, (A, B), NEW)[1] is B
    assert put_output(port, [A, B], NEW)[1] is B


def test_items_reach_into_containers_in_containers():
    output = {"states": [A, (A, B)]}
    port = Port("m", "output", ("states", 1, 1))
    assert pick_output(port, output) is B
    changed = put_output(port, output, NEW)
    assert changed["states"][1][1] is NEW
    assert changed["states"][0] is A
    assert output["states"][1][1] is B


@pytest.mark.parametrize(
    ("port", "call"),
    [
        (Port("m", "output", ("none",)), ({"left": A},)),
        (Port("m", "output", (5,)), ((A, B),)),
        (Port("m", "output", (0, 0)), (("text",),)),
        (Port("m", "output", (0,)), (A,)),
        (Port("m", "output", ("left",)), (A,)),
        (Port("m", "input", (0, 0)), ((A,), {})),
        (Port("m", "output"), (None,)),
        (Port("m", "output"), ({"left": A},)),
        (Port("m", "output"), (((A, B), B),)),
        (Port("m", "input"), ((), {"flag": True})),
        (Port("m", "input", (2,)), ((A,), {})),
        (Port("m", "input", ("mask",)), ((A,), {"x": B})),
        (Port("m", "input"), (("text",), {})),
    ],
)
def test_where_there_is_no_tensor_the_refusal_says_what_there_is(port, call):
    pick = pick_output if port.side == "output" else pick_input
    with pytest.raises(SiteUnsupported, match="names no tensor") as caught:
        pick(port, *call)
    assert caught.value.facts[0][0] == "problem"
    assert f"module(m).{port.side}" in caught.value.what


@pytest.mark.parametrize(
    ("wrap", "unwrap", "site"),
    [
        (lambda a, b: (a, b), tuple, "module(split).output[1]"),
        (lambda a, b: [a, b], tuple, "module(split).output[1]"),
        (Both, tuple, "module(split).output[1]"),
        (lambda a, b: {"left": a, "right": b}, lambda both: tuple(both.values()), 'module(split).output["right"]'),
        (lambda a, b: Named(left=a, right=b), lambda both: (both.left, both.right), 'module(split).output["right"]'),
        (lambda a, b: (a, {"deep": b}), lambda both: (both[0], both[1]["deep"]), 'module(join).input[0][1]["deep"]'),
    ],
)
def test_a_run_patches_items_of_containers_that_modules_pass_on(wrap, unwrap, site):
    model, pairs = opened(Pipe(wrap, unwrap)), vectors()
    effects = cp.Experiment(model, pairs).run([site])
    clean, corrupt = (torch.as_tensor(pairs.batch(role).values) for role in ("clean", "corrupt"))
    weights = model.module.split.weight
    with torch.no_grad():
        logits = (corrupt * weights[0] + torch.sin(clean * weights[1])) @ model.module.join.weight
    rows = range(len(pairs))
    wanted = logits[rows, [p.answer[0][0] for p in pairs]] - logits[rows, [p.wrong_answer[0][0] for p in pairs]]
    torch.testing.assert_close(torch.tensor(effects.to_xarray()["metric"].values[0]), wanted)
