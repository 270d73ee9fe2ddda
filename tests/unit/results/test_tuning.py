"""Verdicts of tuning reports, from arms whose damage is written down."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from causalpatch.base.errors import ResultsNotFound, SettingError, StoreCorrupt
from causalpatch.results.tuning import Arm, Endpoint, Margins, TuningReport


def endpoint(estimate, low, high, margin=0.02):
    return Endpoint("retain KL, mean", estimate, low, high, margin, "nat per token", 20)


def arm(name, kind, moved, *, reached=True, success=1.0, spread=0.2, seed=0, endpoints=()):
    """Return an arm whose documents of 10 tokens each moved by about so much."""
    draw = np.random.default_rng(seed)
    per_token = moved * (1 + spread * draw.standard_normal(20))
    per_token *= moved / max(per_token.mean(), 1e-12)
    documents = np.stack([10 * per_token, np.full(20, 10.0)], axis=1)
    return Arm(name, kind, (name,), 10, 5, 0.01, (reached,) * 3, (success,) * 3, (moved,) * 3, (), documents, endpoints)


def report(located, random, *more, **how):
    arms = [arm("base", "base", 0.0, reached=False, success=0.0), located]
    arms += [
        arm(f"random {k}", "random", *given, seed=k + 1) if isinstance(given, tuple) else given
        for k, given in enumerate(random)
    ]
    spec = {"alpha": 0.05, "model": {"name": "m", "hash": "x"}, "way": "slice", "schedule": {"enough": 0.95}}
    return TuningReport(spec, (*arms, *more), **how)


def test_better_is_said_where_the_rank_and_the_interval_agree():
    made = report(arm("located", "located", 0.01), [(0.05,)] * 19)
    assert (made.p_better, made.smallest_p) == (0.05, 0.05)
    assert made.verdict == "located better than random"
    assert made.contrast("random").estimate == pytest.approx(-0.04)
    assert made.contrast("random").high < 0
    assert made.reasons == []


def test_one_draw_with_as_little_damage_is_no_evidence():
    made = report(arm("located", "located", 0.01), [(0.05,)] * 18 + [(0.009,)])
    assert made.p_better == pytest.approx(0.1)
    assert made.verdict == "no evidence of advantage"
    assert "1 of 19 draws did no more damage" in made.reasons


def test_a_target_that_test_pairs_do_not_reach_is_not_matched():
    """Two of ten test prompts are fewer than chance allows where 95 % are the target; nine of ten are not."""
    seen = {n: replace(arm("located", "located", 0.01, success=n / 10), n_tested=10, enough=0.95) for n in (2, 9)}
    assert [each.is_matched for each in seen.values()] == [False, True]
    assert [math.isinf(each.damage) for each in seen.values()] == [True, False]
    made = report(seen[2], [(0.05,)] * 19)
    assert made.verdict == "located worse than random"
    assert math.isnan(made.contrast("random").estimate)
    assert "target reached on validation pairs, but not on test pairs: infinite damage" in str(made)
    kept = Arm.of_plain(json.loads(json.dumps(seen[2].to_plain())))
    assert (kept.n_tested, kept.enough, kept.is_matched) == (10, 0.95, False)


def test_few_matched_sets_can_never_be_evidence():
    made = report(arm("located", "located", 0.01), [(0.5,)] * 7)
    assert made.verdict == "no evidence of advantage"
    assert made.reasons[0] == "only 7 matched sets could be drawn: no p below 0.125 is possible"


def test_worse_is_said_too():
    made = report(arm("located", "located", 0.2), [(0.05,)] * 19)
    assert made.verdict == "located worse than random"
    unreached = report(arm("located", "located", 0.2, reached=False, success=0.5), [(0.05,)] * 19)
    assert unreached.verdict == "located worse than random"
    assert math.isinf(unreached.located.damage)


def test_arms_that_never_reach_the_target_have_infinite_damage():
    lost = [arm(f"random {k}", "random", 0.01, reached=False, success=0.3) for k in range(19)]
    made = report(arm("located", "located", 0.05), lost)
    assert made.verdict == "located better than random"
    assert math.isnan(made.contrast("random").estimate)
    assert "19 of 19 did not reach the target" in made.statement
    both = report(arm("located", "located", 0.05, reached=False), lost)
    assert both.verdict == "no evidence of advantage"
    assert "the located arm did not reach the target" in both.reasons


def test_a_contrast_with_full_fine_tuning_has_an_interval_over_documents():
    made = report(arm("located", "located", 0.01), [(0.05,)] * 19, arm("full", "full", 0.012, seed=50))
    found = made.contrast("full")
    assert found.low < found.estimate < found.high
    assert "located - full: -0.0020 nat per retain token (95% interval" in made.statement


def test_not_disrupted_needs_every_endpoint_within_its_margin():
    inside, outside, unclear = endpoint(0.01, 0.005, 0.015), endpoint(0.05, 0.03, 0.07), endpoint(0.01, 0.0, 0.03)
    few = endpoint(0.0, np.nan, np.nan)
    assert [each.verdict for each in (inside, outside, unclear, few)] == ["within", "beyond", "not shown", "not shown"]
    assert arm("a", "full", 0.1, endpoints=(inside, inside)).verdict == "not disrupted"
    assert arm("a", "full", 0.1, endpoints=(inside, unclear)).verdict == "not shown to be undisturbed"
    assert arm("a", "full", 0.1, endpoints=(inside, few)).verdict == "not shown to be undisturbed"
    assert arm("a", "full", 0.1, endpoints=(inside, outside)).verdict == "disrupted"
    with pytest.raises(SettingError, match="a margin of accuracy"):
        Margins(accuracy=-0.1)


def test_reports_are_saved_read_and_guarded(tmp_path):
    own = arm("located", "located", 0.01, endpoints=(endpoint(0.01, 0.0, np.nan),))
    made = report(own, [(0.05,)] * 19, mechanism={"relearning": ({"arm": "located", "steps": 3},)}, notes=("a note",))
    path = made.save(tmp_path / "report.json")
    again = TuningReport.load(path)
    assert str(again) == str(made)
    assert again.to_dataframe().equals(made.to_dataframe())
    assert np.array_equal(again.located.documents, made.located.documents)
    held = json.loads(path.read_text())
    held["report"]["verdict"] = "located better than anything"
    path.write_text(json.dumps(held))
    with pytest.raises(StoreCorrupt, match="changed after it was written"):
        TuningReport.load(path)
    with pytest.raises(ResultsNotFound, match="no saved report"):
        TuningReport.load(tmp_path / "other.json")
    with pytest.raises(ResultsNotFound, match="no arm named 'best'"):
        made.arm("best")


def test_the_chart_joins_the_arms_that_none_beats():
    lost = arm("random 20", "random", 0.002, reached=False, success=0.4)
    made = report(arm("located", "located", 0.01), [*[(0.05,)] * 19, lost], arm("full", "full", 0.03))
    spec = made.plot().to_dict()
    assert [row["arm"] for row in spec["datasets"]["front"]] == ["base", "random 20", "located"]
    assert {row["arm"] for row in spec["datasets"]["hollow"]} == {"base", "random 20"}
