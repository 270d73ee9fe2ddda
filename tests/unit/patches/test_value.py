import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PatchError
from causalpatch.base.spec import content_hash
from causalpatch.patches.value import as_value
from toys import Pictures, opened, prompts, vectors
from worlds import tiny_world, unchecked


def halve(current, source):
    return current / 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("source", cp.Source()),
        ("zero", cp.Zero()),
        ("mean", cp.Mean()),
        ("identity", cp.Identity()),
        (3, cp.Constant(3.0)),
        (0.5, cp.Constant(0.5)),
        (np.arange(3), cp.Constant(np.array([0.0, 1.0, 2.0]))),
        (cp.Zero(), cp.Zero()),
        (cp.Mean("positions", "clean"), cp.Mean("positions", "clean")),
    ],
)
def test_values_go_by_name_number_array_or_themselves(given, wanted):
    assert as_value(given) == wanted


@pytest.mark.parametrize("given", ["nothing", True, None, [1, 2], torch.zeros(2), halve])
def test_what_is_no_value_is_refused_with_those_that_are(given):
    with pytest.raises(PatchError, match="is not a value to patch in") as caught:
        as_value(given)
    assert "Constant(array)" in dict(caught.value.facts)["known"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (cp.Source(), "source"),
        (cp.Identity(), "identity"),
        (cp.Zero(), "zero"),
        (cp.Mean(), "mean over pairs of the corrupt side"),
        (cp.Mean("positions", "clean"), "mean over positions of the clean side"),
        (cp.Constant(0.5), "constant 0.5"),
        (cp.Constant(np.zeros((2, 3))), "constant of shape (2, 3)"),
        (cp.Function(halve), "function halve"),
        (cp.Function(lambda current, source: source, "swap"), "function swap"),
    ],
)
def test_values_print_as_one_says_them(value, text):
    assert str(value) == text


def test_constants_are_compared_and_hashed_by_content():
    one, same, other = (cp.Constant(np.array(values)) for values in ([1.0, 2.0], [1, 2], [1.0, 3.0]))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != cp.Zero()
    assert cp.Constant(0.0) == cp.Constant(-0.0)
    assert hash(cp.Constant(0.0)) == hash(cp.Constant(-0.0))


def test_a_constant_does_not_follow_the_array_that_it_was_made_of():
    array = np.ones(3)
    constant = cp.Constant(array)
    array[0] = 7
    assert constant == cp.Constant(np.ones(3))


@pytest.mark.parametrize("array", [np.nan, np.inf, np.array([1.0, np.nan])])
def test_a_constant_that_is_not_finite_is_refused(array):
    with pytest.raises(PatchError, match="NaN or infinity"):
        cp.Constant(array)


@pytest.mark.parametrize("settings", [{"over": "heads"}, {"side": "both"}])
def test_a_mean_of_something_else_is_refused(settings):
    with unchecked(), pytest.raises(PatchError):
        cp.Mean(**settings)


def test_what_cannot_be_called_is_no_function():
    with unchecked(), pytest.raises(PatchError):
        cp.Function("twice")


def test_values_are_plain_data_with_a_hash_of_their_content():
    assert content_hash(cp.Mean()) == content_hash(cp.Mean("pairs", "corrupt"))
    assert content_hash(cp.Mean()) != content_hash(cp.Mean(side="clean"))
    assert content_hash(cp.Constant(1.0)) != content_hash(cp.Constant(2.0))
    # A function is known by its name alone.
    assert content_hash(cp.Function(halve)) == content_hash(cp.Function(lambda current, source: source, "halve"))


def test_a_constant_needs_the_sites_own_axes():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, prompts(([3, 4, 5], [6, 4, 5]), ([7, 8, 9], [7, 10, 9])))
    for array in (np.ones(8), np.ones(1), 1.0):
        experiment.run([cp.Patch("z.0.0", cp.Constant(array))])
    # Six elements (two prompts of three tokens) or two would fit by accident.
    for array in (np.ones(7), np.ones((6, 8)), np.ones((2, 8)), np.ones((6, 1)), np.ones((1, 8))):
        with pytest.raises(PatchError, match=r"the constant for 'z\.0\.0' does not fit") as caught:
            experiment.run([cp.Patch("z.0.0", cp.Constant(array))])
        assert ("site", "shape (8,) per token") in caught.value.facts


def test_a_constant_for_arrays_has_the_modules_axes():
    experiment = cp.Experiment(opened(Pictures()), vectors(3, shape=(1, 6, 6), n_classes=4))
    full = np.arange(3.0)[:, None, None] * np.ones((3, 4, 4))
    same = [cp.Constant(full), cp.Constant(np.arange(3.0)[:, None, None])]
    first, second = (
        experiment.run([cp.Patch("module(conv1).output", value)]).effect(per_pair=True).values for value in same
    )
    assert np.array_equal(first, second)
    assert (first != 0).all()


@pytest.mark.parametrize("wrong", [lambda current, source: current[:1], lambda current, source: 3.0])
def test_a_function_that_changes_the_shape_is_refused(wrong):
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, prompts(([3, 4, 5], [6, 4, 5])))
    with unchecked(), pytest.raises(PatchError, match="did not return the shape it was given"):
        experiment.run([cp.Patch("z.0.0", cp.Function(wrong, "wrong"))])


def test_a_function_may_change_its_arguments_in_place_without_harm():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, prompts(([3, 4, 5], [6, 4, 5]), ([7, 8, 9], [7, 10, 9])))
    in_place = cp.Function(lambda current, source: current.mul_(2), "in place")
    anew = cp.Function(lambda current, source: current * 2, "anew")
    first, second = experiment.run([cp.Patch("z.0.0", in_place), cp.Patch("z.0.0", anew)]).effect(per_pair=True).values
    np.testing.assert_allclose(first, second, rtol=1e-12)  # rows of one product may differ in their last digit


def test_a_function_without_a_source_sees_the_current_value_twice():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    seen = []
    look = cp.Function(
        lambda current, source: seen.append(torch.equal(current, source)) or current, "look", needs_source=False
    )
    cp.Experiment(model, prompts(([3, 4, 5], [6, 4, 5]))).run([cp.Patch("z.0.0", look)])
    assert seen == [True] * 4  # three of them are the look at whether it mixes tokens
