import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PairError, PatchError, SiteNotFound, SiteUnsupported
from causalpatch.engine import Placer, targets_of
from causalpatch.pairs import Pair, Pairs
from causalpatch.results.status import Status
from toys import Chain, Pictures, Pooled, opened, prompts, vectors
from worlds import tiny_world

MODEL, _ = tiny_world("llama", (2, 4, 2, 0))
EQUAL = prompts(([3, 4, 5, 6], [7, 4, 8, 6]), ([3, 4, 5], [9, 4, 5]), spans={"s": ((1, 3), (0, 2))})
UNEQUAL = prompts(([3, 4, 5, 6], [7, 4, 5]), ([3, 4, 5], [9, 4, 5, 6]), spans={"s": ((0, 3), (1, 3))}).align(
    "map", mapping=[[(0, 0), (3, 2)], [(1, 2)]]
)


def placed(pairs, patch, pair=0, base="corrupt"):
    """Return base tokens and, for each, the range of source tokens."""
    (target,) = targets_of(MODEL, cp.Intervention((patch if isinstance(patch, cp.Patch) else cp.Patch(patch),)))
    place = Placer(pairs, base).place(target, pair)
    return None if place is None else [place.base.tolist(), place.start.tolist(), place.stop.tolist()]


@pytest.mark.parametrize(
    ("patch", "wanted"),
    [
        ("z.0.0", [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4]]),
        ("z.0.0@*", [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4]]),
        ("z.0.0@-1", [[3], [3], [4]]),
        ("z.0.0@1", [[1], [1], [2]]),
        ("z.0.0@1:3", [[1, 2], [1, 2], [2, 3]]),
        ("z.0.0@s", [[0, 1], [1, 2], [2, 3]]),
        (cp.Patch("z.0.0", column=2), [[2], [2], [3]]),
        (cp.Patch("z.0.0@s", "zero"), [[0, 1], [0, 1], [1, 2]]),
    ],
)
def test_positions_are_counted_in_each_prompt(patch, wanted):
    assert placed(EQUAL, patch) == wanted


@pytest.mark.parametrize(
    ("patch", "pair", "base", "wanted"),
    [
        ("z.0.0@-1", 0, "corrupt", [[2], [3], [4]]),
        ("z.0.0@-1", 0, "clean", [[3], [2], [3]]),
        ("z.0.0", 0, "corrupt", [[0, 2], [0, 3], [1, 4]]),
        ("z.0.0", 0, "clean", [[0, 3], [0, 2], [1, 3]]),
        (cp.Patch("z.0.0", "zero"), 0, "corrupt", [[0, 1, 2], [0, 1, 2], [1, 2, 3]]),
        (cp.Patch("z.0.0", column=0), 1, "corrupt", [[2], [1], [2]]),
        (cp.Patch("z.0.0", column=1), 0, "corrupt", [[2], [3], [4]]),
        (cp.Patch("z.0.0", column=1), 1, "corrupt", None),
        (cp.Patch("z.0.0@s", align="first"), 0, "corrupt", [[1, 2], [0, 1], [1, 2]]),
        (cp.Patch("z.0.0@s", align="last"), 0, "corrupt", [[1, 2], [1, 2], [2, 3]]),
        (cp.Patch("z.0.0@s", align="mean"), 0, "corrupt", [[1, 2], [0, 0], [3, 3]]),
        (cp.Patch("z.0.0@s", align="mean"), 0, "clean", [[0, 1, 2], [1, 1, 1], [3, 3, 3]]),
        (cp.Patch("z.0.0@s", align="last"), 0, "clean", [[1, 2], [1, 2], [2, 3]]),
    ],
)
def test_prompts_of_different_lengths_meet_as_the_patch_says(patch, pair, base, wanted):
    assert placed(UNEQUAL, patch, pair, base) == wanted


def test_spans_of_different_lengths_need_a_word_on_how_they_meet():
    with pytest.raises(PairError, match="pair 0 of 'prompts' has 2 and 3 tokens at '@s'"):
        placed(UNEQUAL, "z.0.0@s")


def test_a_column_that_no_pair_has_is_refused():
    with pytest.raises(PairError, match="no aligned column 2"):
        placed(UNEQUAL, cp.Patch("z.0.0", column=2))
    with pytest.raises(PairError, match="no aligned column -1"):
        placed(UNEQUAL, cp.Patch("z.0.0", column=-1))


def test_a_span_without_a_token_is_refused_instead_of_writing_nothing():
    pairs = prompts(([3, 4, 5], [6, 4, 5]), spans={"s": ((1, 1), (1, 2))})
    for align in ("first", "last", "mean", None):
        with pytest.raises(PairError, match="span 's' of pair 0 of 'prompts' holds no token"):
            placed(pairs, cp.Patch("z.0.0@s", align=align))
    assert placed(pairs, cp.Patch("z.0.0@s", "zero")) == [[1], [1], [2]]
    with pytest.raises(PairError, match="holds no token"):
        placed(pairs, cp.Patch("z.0.0@s", "zero"), base="clean")


def test_a_pair_none_of_whose_tokens_is_aligned_is_unaligned_and_not_without_effect():
    pairs = prompts(([3, 4, 5], [6, 4, 5, 7]), ([3, 4, 5], [8, 9])).align("map", mapping=[[(0, 0)], []])
    effects = cp.Experiment(MODEL, pairs).run(["resid_pre.0", cp.Patch("resid_pre.0", "zero")]).to_xarray()
    assert effects["status"].values.tolist() == [
        [Status.MEASURED, Status.UNALIGNED],
        [Status.MEASURED, Status.MEASURED],
    ]
    assert np.isnan(effects["metric"].values[0, 1])


def test_a_set_becomes_one_target_per_site_in_order():
    found = targets_of(MODEL, cp.Intervention.of(["z.0@-1", cp.Patch("mlp_out.1", "zero")]))
    assert [str(target.site) for target in found] == ["z.0.0", "z.0.1", "z.0.2", "z.0.3", "mlp_out.1"]
    assert [target.position for target in found] == [-1, -1, -1, -1, None]
    assert [target.needs_source for target in found] == [True] * 4 + [False]


def test_a_site_that_is_written_twice_in_one_run_is_refused():
    for patches in (["z.0.1", "z.0.1"], ["z.0", "z.0.1"], ["z.0.1@2", "z.0.*@2"]):
        with pytest.raises(PatchError, match=r"writes 'z\.0\.1' twice"):
            targets_of(MODEL, cp.Intervention.of(patches))
    assert len(targets_of(MODEL, cp.Intervention.of(["z.0.1@1", "z.0.1@2"]))) == 2


def test_a_position_is_refused_where_the_tensor_has_none():
    with pytest.raises(SiteNotFound, match="has no positions in 'Chain'"):
        targets_of(opened(Chain()), cp.Intervention.of("module(first).output@1"))
    with pytest.raises(SiteNotFound, match="has no positions in 'Chain'"):
        targets_of(opened(Chain()), cp.Intervention((cp.Patch("module(first).output", column=0),)))


def test_a_module_whose_tensor_has_no_column_per_token_is_refused_instead_of_patched_along_another_axis():
    experiment = cp.Experiment(opened(Pooled()), prompts(([3, 4, 5], [6, 4, 5]), ([7, 8], [7, 9]), answer=1, wrong=2))
    for patch in ("module(pool).output", "module(pool).output@-1", cp.Patch("module(pool).input", "zero")):
        with pytest.raises(SiteUnsupported, match="has no column for each token"):
            experiment.run([patch])
    whole, mixed = (
        experiment.run(["module(pool).output axes=(width)", "module(mix).output"]).effect(per_pair=True).values
    )
    gap = (experiment.baseline.clean - experiment.baseline.corrupt)[0]
    np.testing.assert_allclose(whole, gap, atol=1e-12)
    np.testing.assert_allclose(mixed, gap, atol=1e-12)


def test_arrays_have_no_positions_to_patch_some_of():
    model = opened(Pictures())
    experiment = cp.Experiment(model, vectors(shape=(1, 6, 6), n_classes=4))
    for value in (None, "zero"):
        with pytest.raises(PairError, match="has positions, but 'arrays' holds arrays"):
            experiment.run([cp.Patch("module(conv1).output axes=(channel,position,column)", value)])


def test_ids_are_arrays_of_numbers_wherever_pairs_come_from():
    pairs = Pairs([Pair([3, 4], [5, 4], ((6,),), ((7,),))])
    assert placed(pairs, "z.0.0@0") == [[0], [0], [1]]
