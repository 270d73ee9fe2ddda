"""Confirmation on models whose truth is known, and claims that must fail."""

import dataclasses

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import NoGap, PairError, SettingError, SiteNotFound
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.known_shares import N_HEADS, world
from causalpatch.validation.bench import Bench
from causalpatch.validation.components import members_of
from causalpatch.validation.ledger import Ledger
from planted import hidden_experiment

NONE = cp.Checks.none()


@pytest.fixture(scope="module")
def made():
    return world([0.4, 0.2, 0.04, 0.0, -0.3], 40)


def test_shares_and_verdicts_are_those_that_were_built_in(made):
    claim = cp.confirm(made.experiment(), made.sites, checks=NONE)
    single = claim.findings[:5]
    np.testing.assert_allclose([each.share for each in single], made.effects.sum(1) / made.gap.sum(), atol=1e-9)
    assert [each.verdict for each in single] == ["supported"] * 2 + ["absent up to delta"] * 2 + ["supported"]
    assert claim.findings[-1].component == "together"
    assert claim.findings[-1].share == pytest.approx(made.effects.sum() / made.gap.sum(), abs=1e-9)
    np.testing.assert_allclose(claim.effects[:5], made.effects, atol=1e-9)
    np.testing.assert_allclose(claim.gap, made.gap, atol=1e-9)
    assert claim.supported == [made.sites[0], made.sites[1], made.sites[4]]
    assert claim.verdict == "inconclusive"
    assert "not all components have the same verdict" in claim.reasons[0]


@pytest.mark.parametrize(("heads", "verdict"), [([0, 1], "supported"), ([2, 3], "absent up to delta")])
def test_a_claim_has_the_verdict_that_all_its_components_have(made, heads, verdict):
    claim = cp.confirm(made.experiment(), [made.sites[n] for n in heads], checks=NONE)
    assert claim.verdict == verdict
    assert claim.reasons == []
    assert claim.statement.startswith(f"{verdict}. On 40 held-out pairs (40 independent components) of 'made'")


def test_noise_removes_what_denoise_restores(made):
    claim = cp.confirm(made.experiment(direction="noise"), made.sites[:2], checks=NONE)
    np.testing.assert_allclose(claim.effects[:2], made.effects[:2], atol=1e-9)
    assert "removes 0.4" in claim.statement
    assert "remove 0." in claim.statement


def test_a_metric_that_is_better_when_smaller_gives_the_same_shares(made):
    smaller = cp.metric(lambda outputs, pairs: -outputs.distribution[:, 1], name="loss", higher_is_better=False)
    claim = cp.confirm(made.experiment(metric=smaller), made.sites[:2], checks=NONE)
    np.testing.assert_allclose(claim.effects[:2], made.effects[:2], atol=1e-9)
    assert claim.verdict == "supported"


def test_the_defaults_of_delta_are_those_of_the_kind(made):
    head = cp.confirm(made.experiment(), made.sites[0], checks=NONE)
    model = cp.open_model("zoo:stories")
    pairs = cp.load_pairs("ioi", model)
    edge = cp.confirm(cp.Experiment(model, pairs, show_progress=False), "a3.h2 -> logits", checks=NONE)
    assert (head.delta, edge.delta) == (0.1, 0.02)
    assert (head.spec["kind"], edge.spec["kind"]) == ("sites", "edges")
    assert edge.verdict == "supported"
    alone = cp.patch_edges(cp.Experiment(model, pairs, show_progress=False), ["a3.h2 -> logits"])
    assert edge.findings[0].share == pytest.approx(float(alone.recovered()[0]), abs=1e-6)


def test_edges_have_controls_of_their_own():
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model), show_progress=False)
    asked = dataclasses.replace(NONE, n_matched=99, n_others=5)
    claim = cp.confirm(experiment, ["a3.h2 -> logits"], checks=asked)
    rows = claim.table("matched sets")
    assert set(rows["members"]) == {f"a3.h{n} -> logits" for n in (0, 1, 3)}
    assert claim.check("backup").about == {"n": 5, "n_all": 478, "is_all": False}


def test_the_tables_of_sweeps_name_their_sites_and_their_shares():
    made = world([0.4, 0.2, 0.0, 0.0], 60)
    discovery, held_out = made.experiment(slice(0, 20)), made.experiment(slice(20, 60))
    top = cp.sweep(discovery, "z@-1").top(2)
    claim = cp.confirm(held_out, top, found_on=discovery, checks=NONE)
    assert claim.components == ["z.0.0@-1", "z.0.1@-1"]
    assert [each.discovery for each in claim.findings[:2]] == pytest.approx(list(top["recovered"]))
    assert "discovery" in claim.to_dataframe().columns
    assert claim.spec["found_on"]["hash"] == discovery.pairs.content_hash
    assert not any("where the components were found" in text for text in claim.limits)


def test_what_has_components_is_taken(made):
    holder = type("Found", (), {"components": ["z.0.0@-1"]})()
    claim = cp.confirm(made.experiment(), holder, checks=NONE)
    assert claim.components == ["z.0.0@-1"]
    assert any("the claim is void" in text for text in claim.limits)


def test_what_a_search_found_is_confirmed_with_what_it_left_closed():
    made = world([0.4, 0.2, 0.0, 0.0, 0.3], 60)
    discovery, held_out = made.experiment(slice(0, 20)), made.experiment(slice(20, 60))
    found = cp.localize(discovery, "1000 runs", positions=["-1"])
    claim = cp.confirm(held_out, found, found_on=discovery, checks=NONE)
    assert claim.components == [str(site) for site in found.components]
    assert {"z.0.0@-1", "z.0.1@-1", "z.1.0@-1"} <= set(claim.supported)
    told = {row["component"]: row["effect"] for row in found.summary().to_dict("records")}
    assert {each.component: each.discovery for each in claim.findings[:-1]} == pytest.approx(told)
    with pytest.raises(PairError, match="chosen on the pairs"):
        cp.confirm(discovery, found, checks=NONE)


def test_components_that_were_chosen_on_the_test_pairs_are_refused(made):
    experiment = made.experiment()
    top = cp.sweep(experiment, "z@-1").top(2)
    with pytest.raises(PairError, match="chosen on the pairs that shall confirm them"):
        cp.confirm(experiment, top, checks=NONE)
    with pytest.raises(PairError, match="40 of 40 pairs are not held out"):
        cp.confirm(experiment, made.sites[0], found_on=experiment, checks=NONE)
    with pytest.raises(PairError, match="5 of 40 pairs are not held out"):
        cp.confirm(experiment, made.sites[0], found_on=made.pairs[:5], checks=NONE)


def test_a_shared_entity_is_an_overlap_too(made):
    rows = [dataclasses.replace(pair, entities=("Tom",) if n == 0 else ()) for n, pair in enumerate(made.pairs)]
    discovery = Pairs([dataclasses.replace(rows[0], clean=np.array([1]), corrupt=np.array([2]))], name="search")
    experiment = cp.Experiment(made.model, Pairs(rows), show_progress=False)
    with pytest.raises(PairError, match="1 of 40 pairs are not held out"):
        cp.confirm(experiment, made.sites[0], found_on=discovery, checks=NONE)


def test_a_single_example_is_no_claim(made):
    with pytest.raises(PairError, match="1 independent components are too few for any claim"):
        cp.confirm(made.experiment(slice(0, 1)), made.sites[0], checks=NONE)


def test_many_pairs_of_few_independent_components_are_too_few():
    few = world([0.4], 45, n_each=5)
    with pytest.raises(PairError, match="9 independent components are too few"):
        cp.confirm(few.experiment(), few.sites[0], checks=NONE)
    enough = world([0.4], 50, n_each=5)
    claim = cp.confirm(enough.experiment(), enough.sites[0], checks=NONE)
    assert claim.findings[0].n_components == 10
    assert claim.findings[0].is_approximate
    assert any(text.startswith("approximate: fewer than 20") for text in claim.limits)


def test_an_alpha_that_no_p_can_reach_is_refused_with_the_number_needed(made):
    few = made.experiment(slice(0, 12))
    with pytest.raises(PairError) as refused:
        cp.confirm(few, made.sites[0], alpha=1e-4, checks=NONE)
    assert dict(refused.value.facts)["needed"].startswith("15 or more")
    assert cp.confirm(few, made.sites[0], alpha=0.001, checks=NONE).spec["smallest_p"] == 2.0**-11


def test_random_labels_have_no_gap(made):
    flipped = [
        dataclasses.replace(pair, answer=pair.wrong_answer, wrong_answer=pair.answer) if n % 2 else pair
        for n, pair in enumerate(made.pairs)
    ]
    with pytest.raises(NoGap):
        cp.confirm(cp.Experiment(made.model, Pairs(flipped), show_progress=False), made.sites[0], checks=NONE)


def test_a_second_opening_of_the_same_pairs_is_inconclusive_with_the_reason(made, tmp_path):
    book = tmp_path / "openings.jsonl"
    first = cp.confirm(made.experiment(), made.sites[:2], checks=NONE, ledger=book)
    again = cp.confirm(made.experiment(), made.sites[:2], checks=NONE, ledger=book)
    assert (first.verdict, again.verdict) == ("supported", "inconclusive")
    assert again.reused == {first.spec_hash: 40}
    assert "reused hold-out: 40 of 40 pairs were opened before with this model" in again.reasons[0]
    assert {each.verdict for each in again.findings} == {"inconclusive"}
    assert first.findings[0].share == again.findings[0].share
    assert again.next_step == "confirm it once, on pairs that no claim has opened"


def test_opening_some_of_the_pairs_spoils_all(made, tmp_path):
    book = tmp_path / "openings.jsonl"
    cp.confirm(made.experiment(slice(0, 15)), made.sites[0], checks=NONE, ledger=book)
    other = cp.confirm(made.experiment(slice(10, 40)), made.sites[1], checks=NONE, ledger=book)
    assert sum(other.reused.values()) == 5
    assert other.verdict == "inconclusive"
    fresh = cp.confirm(
        cp.Experiment(world([0.4], 20, seed=5, spread=0.02).model, world([0.4], 20, seed=5).pairs, show_progress=False),
        "z.0.0@-1",
        checks=NONE,
        ledger=book,
    )
    assert not fresh.reused


def test_the_users_own_ledger_is_used_unless_another_is_named(made):
    claim = cp.confirm(made.experiment(), made.sites[0], checks=NONE)
    assert str(Ledger().path) == claim.record["ledger"]
    assert Ledger().opened(made.experiment()) == {claim.spec_hash: list(range(40))}
    assert cp.confirm(made.experiment(), made.sites[0], checks=NONE).verdict == "inconclusive"


def test_what_was_refused_opened_nothing(made, tmp_path):
    book = tmp_path / "openings.jsonl"
    with pytest.raises(SiteNotFound):
        cp.confirm(made.experiment(), "z.7.0@-1", checks=NONE, ledger=book)
    with pytest.raises(PairError):
        cp.confirm(made.experiment(), made.sites[0], found_on=made.pairs, checks=NONE, ledger=book)
    assert not book.exists()


@pytest.mark.parametrize("asked", [[], ["z.0.0@-1", "z.0.0@-1"], ["z.0.0@-1", "a0.h0 -> logits"], 3])
def test_what_names_no_components_is_refused(made, asked):
    with pytest.raises(SettingError):
        cp.confirm(made.experiment(), asked, checks=NONE)


def test_a_subspace_that_was_learnt_on_the_test_pairs_is_refused(made):
    on = cp.FittedOn("made", made.pairs.content_hash, 40, "clean")
    value = cp.Subspace(np.ones(made.model.head_width if hasattr(made.model, "head_width") else 3), on=on)
    with pytest.raises(PairError, match="was fitted on the pairs that shall confirm it"):
        cp.confirm(made.experiment(), made.sites[0], value=value, checks=NONE)


def test_every_set_is_run_once(made):
    bench = Bench(made.experiment())
    first, second = members_of(made.sites[:2], made.model)
    bench.measure([[first], [second], [second, first]])
    assert bench.n_runs == 120
    bench.measure([[first, second], [second]])
    assert bench.n_runs == 120
    np.testing.assert_allclose(bench.effects([[first, second]])[0], made.effects[:2].sum(0), atol=1e-9)
    assert bench.effects([[]]).tolist() == [[0.0] * 40]


def test_heterogeneity_stands_before_the_mean(made):
    claim = cp.confirm(made.experiment(), made.sites[:2], checks=NONE)
    columns = list(claim.to_dataframe().columns)
    assert max(map(columns.index, ("agreement", "p10", "p90", "beyond", "spread"))) < columns.index("share")
    own = made.effects[0] / made.gap
    finding = claim.findings[0]
    assert (finding.p10, finding.p50, finding.p90) == pytest.approx(tuple(np.quantile(own, (0.1, 0.5, 0.9))))
    assert finding.beyond == pytest.approx((own > 0.1).mean())
    assert finding.spread == pytest.approx(own.std(ddof=1))
    assert finding.agreement == 1.0


def test_mirrored_pairs_are_said_to_make_the_other_direction_redundant(made):
    mirrored = [*made.pairs, *(_mirror(pair) for pair in made.pairs)]
    experiment = cp.Experiment(made.model, Pairs(mirrored, name="mirrored"), show_progress=False)
    claim = cp.confirm(experiment, made.sites[0], checks=NONE)
    assert claim.spec["pairs"]["n_components"] == 40
    assert any("redundant by construction" in text for text in claim.limits)


def _mirror(pair):
    swapped = pair.swapped()
    answers = {"answer": pair.wrong_answer, "wrong_answer": pair.answer}
    return dataclasses.replace(swapped, **answers, id=f"{pair.id} mirrored")


def test_fewer_than_99_matched_sets_are_refused(made):
    with pytest.raises(SettingError, match="20 matched sets are too few"):
        cp.confirm(made.experiment(), made.sites[0], checks=cp.Checks(n_matched=20))


def test_pairs_of_arrays_are_claimed_too():
    experiment = hidden_experiment([1.0, 1.0], [[0.7, 0.3]])
    claim = cp.confirm(experiment, "module(into).output axes=(channel)#0", delta=0.1, checks=NONE)
    assert claim.findings[0].share == pytest.approx(0.7)
    assert claim.held_out is None


def test_the_constructed_model_is_what_it_says(made):
    effects = cp.sweep(made.experiment(), "z@-1").effect(per_pair=True).values.reshape(-1, 40)[:5]
    np.testing.assert_allclose(effects, made.effects, atol=1e-9)
    assert made.sites[4] == f"z.{4 // N_HEADS}.0@-1"
    assert isinstance(made.pairs[0], Pair)


@pytest.mark.slow
def test_even_one_false_claim_is_rare_over_whole_studies():
    """200 studies from the pairs to the claim: two planted heads of 2 delta, six nulls of which two are at delta."""
    shares = [0.2, 0.2, 0.1, 0.1, 0.06, -0.04, 0.02, 0.0]
    made = world(shares, 200 * 60, spread=0.1, gap_spread=0.2, n_each=2)
    false = found = 0
    for study in range(200):
        experiment = made.experiment(slice(study * 60, study * 60 + 60), seed=study)
        claim = cp.confirm(experiment, made.sites, checks=dataclasses.replace(NONE, n_draws=999))
        assert claim.spec["pairs"]["n_components"] == 30
        false += any(name in claim.supported for name in made.sites[2:])
        found += sum(name in claim.supported for name in made.sites[:2])
    assert false <= 20  # 99.9 % of binomials with .05 have at most 20 of 200
    assert found / 400 >= 0.8
