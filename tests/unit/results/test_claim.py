"""Claims as data: saved and read again, what they say, and how they are drawn."""

import dataclasses
import json
import re

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import ResultsNotFound, SettingError, StoreCorrupt
from causalpatch.results.claim import Check, Claim, Finding

FORBIDDEN = ("sufficient", "necessary", "the circuit", "stores", "unimportant component")


def finding(component="z.4.4@-1", verdict="supported", **changed):
    held = {
        "component": component,
        "share": 0.61,
        "low": 0.55,
        "high": 0.67,
        "low_inner": 0.56,
        "high_inner": 0.66,
        "p": 0.0001,
        "verdict": verdict,
        "why": "the interval holds 0.1" if verdict == "inconclusive" else "",
        "agreement": 1.0,
        "p10": 0.5,
        "p50": 0.6,
        "p90": 0.7,
        "beyond": 1.0,
        "spread": 0.08,
        "skew": 0.1,
        "is_approximate": False,
        "n_pairs": 4,
        "n_components": 4,
        "discovery": None,
    }
    return Finding(**{**held, **changed})


def claim_of(*findings, **changed):
    n = len(findings)
    spec = {
        "components": [each.component for each in findings if each.component != "together"],
        "metric": "logit_difference",
        "direction": "denoise",
        "delta": 0.1,
        "alpha": 0.05,
        "smallest_p": 0.002,
        "model": {"name": "gpt2", "hash": "abc"},
        "pairs": {"name": "ioi.jsonl", "hash": "def", "n": 4, "n_components": 4},
    }
    held = {
        "spec": spec,
        "findings": findings,
        "effects": np.full((n, 4), 0.6) + 0.01 * np.arange(4),
        "gap": np.ones(4),
        "group": np.arange(4),
        "pair_ids": ("a", "b", "c", "d"),
        "limits": ("not said: anything else",),
    }
    return Claim(**{**held, **changed})


def test_a_claim_reads_as_it_was_written(tmp_path):
    about = {"observed": 0.6, "p": 0.5, "smallest_p": 0.5, "reach": 0, "is_all": True}
    checks = (
        Check("matched sets", ({"members": "z.1.1", "share": 0.01},), about),
        Check("backup", skipped="none were asked for"),
    )
    claim = claim_of(finding(low=np.nan, high=np.nan), checks=checks, reused={"abc": 3})
    path = claim.save(tmp_path / "deep" / "claim.json")
    read = cp.Claim.load(path)
    assert str(read) == str(claim)
    assert read.spec_hash == claim.spec_hash
    np.testing.assert_array_equal(read.effects, claim.effects)
    assert np.isnan(read.findings[0].low)
    assert read.findings[0].discovery is None
    text = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert text["claim"]["verdict"] == "inconclusive"
    assert read.save(tmp_path / "again.json").read_text() == path.read_text()


@pytest.mark.parametrize("change", [("inconclusive", "supported"), ('"alpha": 0.05', '"alpha": 0.5'), ("{", "")])
def test_a_claim_that_was_changed_is_refused(tmp_path, change):
    path = claim_of(finding(verdict="inconclusive")).save(tmp_path / "claim.json")
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(StoreCorrupt, match="cannot be read"):
        cp.Claim.load(path)


def test_what_is_no_claim_is_refused(tmp_path):
    with pytest.raises(ResultsNotFound, match="no saved claim"):
        cp.Claim.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"format": "other", "schema": "1"}')
    with pytest.raises(StoreCorrupt, match="it is 'other'"):
        cp.Claim.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["supported", "supported"], "supported"),
        (["absent up to delta"] * 2, "absent up to delta"),
        (["supported", "absent up to delta"], "inconclusive"),
        (["supported", "inconclusive"], "inconclusive"),
    ],
)
def test_the_verdict_is_that_of_every_component(verdicts, expected):
    found = [finding(f"z.0.{n}", verdict) for n, verdict in enumerate(verdicts)]
    claim = claim_of(*found, finding("together"))
    assert claim.verdict == expected
    assert bool(claim.reasons) == (expected == "inconclusive")
    reused = dataclasses.replace(claim, reused={"abc": 4})
    assert reused.verdict == "inconclusive"
    assert reused.reasons == ["reused hold-out: 4 of 4 pairs were opened before with this model, by 1 claim (abc)"]


def test_the_words_are_fixed():
    said = claim_of(
        finding(),
        finding("z.1.1", share=-0.3, low=-0.4, high=-0.2),
        finding("z.2.2", "absent up to delta", share=0.01, low=-0.02, high=0.04),
        finding("z.3.3", "inconclusive", low=np.nan, high=np.nan, why="too few independent groups"),
        finding("together"),
    ).statement.splitlines()
    assert said == [
        "inconclusive. On 4 held-out pairs (4 independent components) of 'ioi.jsonl', putting clean values into "
        "corrupted runs of 'gpt2':",
        "- z.4.4@-1 restores 0.610 of the gap in logit_difference (95% interval 0.550 to 0.670): more than 0.1",
        "- z.1.1 restores -0.300 of the gap in logit_difference (95% interval -0.400 to -0.200): against it, by more "
        "than 0.1",
        "- z.2.2 restores 0.010 of the gap in logit_difference (95% interval -0.020 to 0.040): absent up to 0.1",
        "- z.3.3 restores 0.610 of the gap in logit_difference (no interval): inconclusive, too few independent groups",
        "- together, the 4 components restore 0.610 of the gap in logit_difference (95% interval 0.550 to 0.670): more "
        "than 0.1",
        "inconclusive because of z.3.3 too few independent groups",
    ]


def test_nothing_is_said_that_must_not_be():
    text = str(claim_of(finding(), finding("z.1.1", "absent up to delta"))).lower()
    assert not [word for word in FORBIDDEN if re.search(rf"\b{word}\b", text)]


@pytest.mark.parametrize(
    ("claim", "step"),
    [
        (claim_of(finding()), "causalpatch recheck claim.json"),
        (claim_of(finding(verdict="absent up to delta")), "look elsewhere"),
        (claim_of(finding(verdict="inconclusive")), "causalpatch power claim.json"),
        (claim_of(finding(), reused={"abc": 4}), "on pairs that no claim has opened"),
    ],
)
def test_every_claim_says_what_to_do_next(claim, step):
    assert step in claim.next_step
    assert str(claim).splitlines()[-1] == f"next: {claim.next_step}"


def test_checks_are_found_by_name():
    claim = claim_of(finding(), checks=(Check("dose", ({"dose": 1.0, "share": 0.5},)),))
    assert claim.table("dose")["share"].tolist() == [0.5]
    with pytest.raises(ResultsNotFound, match="no check named 'doze'") as refused:
        claim.check("doze")
    assert refused.value.fix == "claim.check('dose')"


def test_the_picture_shows_every_component_its_interval_delta_and_the_controls():
    rows = tuple({"members": f"z.9.{n}", "share": 0.01 * n} for n in range(3))
    about = {"observed": 0.6, "p": 0.25, "smallest_p": 0.25, "reach": 0, "is_all": True}
    claim = claim_of(
        finding(),
        finding("z.1.1", "absent up to delta"),
        finding("together"),
        checks=(Check("matched sets", rows, about),),
    )
    picture = claim.plot()
    sheet = picture.to_dict()["datasets"]
    assert [row["component"] for row in sheet["findings"]] == ["z.4.4@-1", "z.1.1", "together"]
    assert sheet["delta"] == [{"low": -0.1, "high": 0.1}]
    assert [(row["component"], row["share"]) for row in sheet["controls"]] == [
        ("together", 0.0),
        ("together", 0.01),
        ("together", 0.02),
    ]
    assert {(row["low"], row["high"]) for row in sheet["spans"]} == {(0.55, 0.67)}
    svg = picture.to_svg()
    for text in ("z.4.4@-1", "z.1.1", "together", "supported", "absent up to delta", "3 matched sets of controls"):
        assert text in svg


def test_a_claim_without_intervals_is_drawn_without_whiskers():
    sheet = claim_of(finding(low=np.nan, high=np.nan, verdict="inconclusive")).plot().to_dict()["datasets"]
    assert "spans" not in sheet
    assert "controls" not in sheet


def test_every_pair_is_a_dot_and_those_without_a_gap_are_counted():
    claim = claim_of(finding(), gap=np.array([1.0, 1.0, 1.0, 0.0]))
    picture = claim.plot("pairs")
    rows = picture.to_dict()["datasets"]["pairs"]
    assert [(row["pair"], row["share"]) for row in rows] == [("a", 0.6), ("b", 0.61), ("c", pytest.approx(0.62))]
    assert "not drawn: 1 pair without a gap" in picture.to_svg()
    with pytest.raises(SettingError, match="no chart of kind 'heat'"):
        claim.plot("heat")
