"""Given values are plain data: they compare by content, and are saved with their arrays."""

import numpy as np

import causalpatch as cp
from toys import prompts

PAIRS = prompts(([3, 4, 5], [3, 9, 5]), ([8, 4, 1, 2], [2, 4, 6, 2]))


def some(how="given values"):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(len(pair.corrupt), 8)) for pair in PAIRS]
    arrays[1][2] = np.nan
    return cp.Given.of(PAIRS, arrays, how)


def test_tokens_without_a_value_are_left_out():
    tokens, first = some().elements(PAIRS[1].content_hash)
    assert (tokens.tolist(), first) == ([0, 1, 3], 3)
    assert some().elements("another pair") is None


def test_they_compare_by_content_and_print_what_they_are():
    assert some() == some()
    assert hash(some()) == hash(some())
    assert some() != some("others")
    assert str(cp.Patch("z.0.1", some("values of another model"))) == "z.0.1 <- values of another model"


def test_they_are_saved_and_read_back(tmp_path):
    asked = [cp.Intervention((cp.Patch("z.0.1", some()),), "given")]
    assert cp.load_interventions(cp.save_interventions(tmp_path / "given.json", asked)) == asked
