"""Further arguments of a model's forward: beside the inputs of each pair, or the same in every run."""

import json

import numpy as np
import pytest

from causalpatch.base.errors import PairError
from causalpatch.pairs import Pair, Pairs, load_pairs


class Seeing:
    """A model without a tokenizer that is also given pictures."""

    tokenizer = None
    further = ("pixel_values", "image_sizes")


def prompts(n_pairs=3):
    return Pairs([Pair(np.array([2 * k]), np.array([2 * k + 1]), id=str(k)) for k in range(n_pairs)])


def pictures(n, offset=0.0):
    return np.arange(n * 4.0).reshape(n, 2, 2) + offset


def test_what_stands_beside_an_input_goes_where_the_input_goes():
    pairs = prompts().with_beside(pixel_values=(pictures(3), pictures(3, 100.0)))
    clean, corrupt = pairs[1].beside["pixel_values"]
    assert (clean.tolist(), corrupt[0, 0]) == ([[4, 5], [6, 7]], 104)
    assert pairs.swapped()[1].besides("clean")["pixel_values"].tolist() == corrupt.tolist()
    both = pairs.one_sided("corrupt")[1].beside["pixel_values"]
    assert [side.tolist() for side in both] == [corrupt.tolist()] * 2
    batch = pairs.batch("corrupt", [2, 1])
    assert batch.beside["pixel_values"].tolist() == [pictures(3, 100.0)[2].tolist(), corrupt.tolist()]
    assert batch.take(np.array([1])).beside["pixel_values"].tolist() == [corrupt.tolist()]
    assert pairs.take([1])[0].besides("clean")["pixel_values"].tolist() == clean.tolist()


def test_what_is_the_same_in_every_run_is_handed_over_as_it_is():
    pairs = prompts().with_common(image_sizes=[[4, 4]]).with_beside(pixel_values=pictures(3)).take([2, 0])
    batch = pairs.batch("clean")
    assert batch.common["image_sizes"].tolist() == [[4, 4]]
    assert batch.beside["pixel_values"].shape == (2, 2, 2)
    assert pairs.swapped().common["image_sizes"] is pairs.common["image_sizes"]


def test_hashes_see_what_stands_beside():
    plain, seeing = prompts(), prompts().with_beside(pixel_values=pictures(3))
    other = prompts().with_beside(pixel_values=(pictures(3), pictures(3, 1.0)))
    common = prompts().with_common(image_sizes=[1])
    assert len({each.content_hash for each in (plain, seeing, other, common)}) == 4
    assert seeing[0].digests[0] == other[0].digests[0] != plain[0].digests[0]
    assert seeing[0].digests[1] != other[0].digests[1]


def test_pairs_that_share_a_picture_hang_together():
    shown = pictures(4)[[0, 1, 0]]
    assert prompts().components.tolist() == [0, 1, 2]
    assert prompts().with_beside(pixel_values=shown).components.tolist() == [0, 1, 0]
    assert prompts().with_beside(pixel_values=(pictures(3), pictures(3, 4.0))).components.tolist() == [0, 0, 0]
    assert prompts().with_common(pixel_values=pictures(1)).components.tolist() == [0, 1, 2]


def test_columns_with_names_of_arguments_are_read(tmp_path):
    np.savez(tmp_path / "data.npz", images=pictures(3))
    row = {
        "clean": [1, 2],
        "corrupt": [1, 3],
        "clean_pixel_values": "data.npz:images[0]",
        "corrupted_pixel_values": "data.npz:images[2]",
        "image_sizes": [2, 2],
        "clean_logit_diff": 0.5,
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    (pair,) = load_pairs(tmp_path / "p.jsonl", Seeing())
    assert pair.beside["pixel_values"][1].tolist() == pictures(3)[2].tolist()
    assert pair.beside["image_sizes"][0].tolist() == [2, 2]
    assert dict(pair.extra) == {"clean_logit_diff": 0.5}
    (unnamed,) = load_pairs(tmp_path / "p.jsonl", None)
    assert set(unnamed.beside) == {"pixel_values"}


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"clean_pixel_values": [[1.0]]}, "has 'clean_pixel_values', but no 'pixel_values' for the other side"),
        ({"pixels": "data.npz:images[0]"}, "gives the model 'pixels', which its forward does not take"),
        (
            {"pixel_values": "a picture"},
            "'pixel_values' of row 0 of 'rows' is given to the model, but holds no numbers",
        ),
    ],
)
def test_columns_that_cannot_be_given_to_the_model_are_refused(columns, what):
    with pytest.raises(PairError, match=what):
        load_pairs([{"clean": [1], "corrupt": [2], **columns}], Seeing())


def test_pairs_differ_in_values_not_in_arguments():
    with pytest.raises(PairError, match="does not stand beside the 3 pairs"):
        prompts().with_beside(pixel_values=pictures(2))
    mixed = [*prompts(1).with_beside(pixel_values=pictures(1)), *prompts(1)]
    with pytest.raises(PairError, match="not all pairs of 'pairs' have 'pixel_values'"):
        Pairs(mixed)
    with pytest.raises(PairError, match="is given for each pair and for all of them"):
        prompts().with_beside(pixel_values=pictures(3)).with_common(pixel_values=pictures(1))
    unlike = [pictures(1)[0], pictures(1)[0][:1], pictures(1)[0]]
    with pytest.raises(PairError, match="'pixel_values' of 'pairs' cannot stand in one batch"):
        prompts().with_beside(pixel_values=unlike).batch("clean")
