import pickle

import pytest

import causalpatch as cp
from causalpatch.base.errors import PatchError, SiteSyntaxError
from causalpatch.base.spec import content_hash, to_json
from causalpatch.sites import parse
from worlds import unchecked


def test_a_patch_is_read_from_texts():
    patch = cp.Patch("blocks.9.attn.hook_z.6@-1", "zero")
    assert patch.site == parse("z.9.6@-1")
    assert patch.value == cp.Zero()
    assert patch == cp.Patch(parse("z.9.6@-1"), cp.Zero())
    assert cp.Patch("z.9.6").value == cp.Source()


def test_patches_print_hash_compare_and_travel():
    patch = cp.Patch("z.3@subject", cp.Mean(side="clean"), align="mean")
    assert str(patch) == "z.3.*@subject <- mean over pairs of the clean side"
    assert str(cp.Patch("resid_pre.1", column=4)) == "resid_pre.1@column 4 <- source"
    assert pickle.loads(pickle.dumps(patch)) == patch
    assert hash(pickle.loads(pickle.dumps(patch))) == hash(patch)
    assert len({patch, cp.Patch("z.3@subject", cp.Mean(side="clean"), align="mean"), cp.Patch("z.3@subject")}) == 2


def test_a_spec_of_a_patch_is_canonical_and_changes_with_its_content():
    one, same = cp.Patch("z.3.1@-1", 0.5), cp.Patch(" z.3.1@-1 ", cp.Constant(0.5))
    assert to_json(one) == to_json(same)
    assert content_hash(one) == content_hash(same)
    for other in (cp.Patch("z.3.2@-1", 0.5), cp.Patch("z.3.1@-1", 0.25), cp.Patch("z.3.1@-1", 0.5, align="first")):
        assert content_hash(other) != content_hash(one)


def test_a_position_and_a_column_contradict_each_other():
    with pytest.raises(PatchError, match="has a position and an aligned column"):
        cp.Patch("z.3.1@-1", column=2)


def test_an_unknown_alignment_is_refused():
    with unchecked(), pytest.raises(PatchError, match="there is no alignment 'middle'"):
        cp.Patch("z.3.1@subject", align="middle")


def test_a_text_that_is_no_site_is_refused_at_once():
    with pytest.raises(SiteSyntaxError):
        cp.Patch("z.3.1@")


@pytest.mark.parametrize(
    ("request_", "label"),
    [
        ("z.9.6@-1", "z.9.6@-1"),
        (parse("z"), "z.*.*"),
        (cp.Patch("z.1.1", "zero"), "z.1.1 <- zero"),
        (["z.1.1", cp.Patch("mlp_out.0", 2)], "z.1.1 + mlp_out.0 <- constant 2"),
        (("resid_pre.0", parse("k.1.0")), "resid_pre.0 + k.1.0"),
        (cp.Patch("resid_pre.0", column=3), "resid_pre.0@3"),
        (cp.Intervention((cp.Patch("z.0.0"),), "mine"), "mine"),
    ],
)
def test_interventions_are_made_of_whatever_names_patches(request_, label):
    made = cp.Intervention.of(request_)
    assert made.label == str(made) == label
    assert all(isinstance(patch, cp.Patch) for patch in made.patches)


def test_an_intervention_stays_what_it_is():
    made = cp.Intervention.of(["z.0.0", "z.0.1"])
    assert cp.Intervention.of(made) is made


@pytest.mark.parametrize("request_", [5, None, [5], ["z.0.0", None]])
def test_what_names_no_patch_is_refused(request_):
    with unchecked(), pytest.raises(PatchError):
        cp.Intervention.of(request_)


def test_an_intervention_needs_a_patch():
    with pytest.raises(PatchError, match="an intervention without patches"):
        cp.Intervention.of([])
    with pytest.raises(PatchError, match="an intervention without patches"):
        cp.Intervention(())
