"""Refusals of claims."""

import dataclasses

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import (
    ModelUnsupported,
    NoGap,
    PairError,
    ResultsNotFound,
    SettingError,
    SiteNotFound,
    StoreCorrupt,
)
from causalpatch.pairs import Pairs
from causalpatch.testing.known_shares import world

NONE = cp.Checks.none()


@pytest.fixture(scope="module")
def made():
    return world([0.4, 0.2], 12, name="held-out")


def confirm(made, *asked, **how):
    return cp.confirm(made.experiment(), *(asked or (made.sites[:1],)), **{"checks": NONE, **how})


def test_too_few_independent_components(made, refuses):
    with refuses(
        PairError,
        """
        4 independent components are too few for any claim
          pairs        4 of 'held-out'
          independent  those that share no prompt, entity or group, even through others
          needed       10 or more; with 4 p is never below 0.125
          fix: add pairs until pairs.check() counts 10 components; 30 or more for an exact interval
        """,
    ):
        cp.confirm(made.experiment(slice(0, 4)), "z.0.0@-1")


def test_pairs_that_the_search_saw(made, refuses):
    with refuses(
        PairError,
        """
        4 of 12 pairs are not held out: the search saw their prompts, entities or groups
          discovery     4 pairs of 'held-out'
          confirmation  12 pairs of 'held-out'
          shared by     'held-out 0', 'held-out 1', 'held-out 2', …
          fix: discovery, held_out = pairs.split(), and search on the first alone
        """,
    ):
        confirm(made, found_on=made.pairs[:4])


def test_components_that_were_chosen_on_these_pairs(made, refuses):
    with refuses(
        PairError,
        """
        these components were chosen on the pairs that shall confirm them
          pairs    12 of 'held-out'
          why not  the largest of many is too large there
          fix: discovery, held_out = pairs.split(): search on the first, confirm on the second
        """,
    ):
        confirm(made, cp.sweep(made.experiment(), "z@-1").top(1))


def test_no_gap(made, refuses):
    flat = Pairs([dataclasses.replace(pair, corrupt=pair.clean) for pair in made.pairs], name="flat")
    with pytest.raises(NoGap, match="no gap in 'logit_difference'"):
        cp.confirm(cp.Experiment(made.model, flat, show_progress=False), "z.0.0@-1")


def test_components_that_are_not_in_the_model(made, refuses):
    with refuses(
        SiteNotFound,
        """
        no site named 'z.5.0@-1' in 'GPT2LMHeadModel'
          layer  5 was asked for; this model has layer 0 only
          fix: list the sites with: model.site_rows()
        """,
    ):
        confirm(made, "z.5.0@-1")


def test_components_that_are_none(made, refuses):
    with refuses(
        SettingError,
        """
        no component was named to make a claim about
          components  0
          fix: confirm(experiment, ["z.4.4@-1", "z.4.2@-1"])
        """,
    ):
        confirm(made, [])
    with refuses(
        SettingError,
        """
        component 'z.0.0@-1' is named twice
          components  2
          fix: confirm(experiment, ["z.4.4@-1", "z.4.2@-1"])
        """,
    ):
        confirm(made, ["z.0.0@-1", "z.0.0@-1"])
    with refuses(
        SettingError,
        """
        a claim is about sites or about edges, not about both
          given  z.0.0@-1, a0.h0 -> logits
          fix: confirm them in two claims, each on pairs of its own
        """,
    ):
        confirm(made, ["z.0.0@-1", "a0.h0 -> logits"])
    with refuses(
        SettingError,
        """
        3 is no component
          type  int
          fix: name sites such as "z.4.4@-1", or edges such as "a0.h1 -> m2"
        """,
    ):
        confirm(made, [3])


def test_effects_that_do_not_say_which(made, refuses):
    heads = cp.sweep(made.experiment(), "z")
    with refuses(
        SettingError,
        """
        effects are no components: say which of them
          cells  layer x head
          fix: confirm(experiment, effects.top(3), found_on=discovery)
        """,
    ):
        confirm(made, heads)
    walked = cp.sweep(made.experiment(), "resid_pre").top(1)
    with refuses(
        SettingError,
        """
        the rows of this table are no single sites
          axes    layer, position
          needed  layer, and the site's unit where it has one
          fix: name them: confirm(experiment, ["z.4.4@-1"]), or sweep at a position: sweep(experiment, "z@-1")
        """,
    ):
        confirm(made, walked)


def test_values_that_are_not_the_sources(made, refuses):
    with refuses(
        PairError,
        """
        'mean over pairs of the corrupt side' would be fitted on the pairs that shall confirm it
          discovery pairs  none were given
          fix: confirm(…, found_on=discovery)
        """,
    ):
        confirm(made, checks=dataclasses.replace(NONE, corruptions=("mean",)))
    on = cp.FittedOn("held-out", made.pairs.content_hash, 12, "clean")
    with refuses(
        PairError,
        f"""
        '{cp.Subspace(np.ones(4), on=on)}' was fitted on the pairs that shall confirm it
          pairs  12 of 'held-out'
          fix: fit it on discovery pairs: experiment.fit(…), learn_subspace(…)
        """,
    ):
        confirm(made, value=cp.Subspace(np.ones(4), on=on))


def test_impossible_numbers(made, refuses):
    with refuses(
        SettingError,
        """
        no test of a share beyond -0.1 at alpha 0.05
          delta  0 or more, a share of the gap
          alpha  between 0 and .5
          fix: delta=0.1, alpha=0.05
        """,
    ):
        confirm(made, delta=-0.1)
    with refuses(
        SettingError,
        """
        20 matched sets are too few to compare with
          needed  99 or more, so that p can be .01; or none
          fix: Checks(n_matched=99)
        """,
    ):
        confirm(made, checks=cp.Checks(n_matched=20))


def test_ledgers_that_cannot_be_used(made, refuses, tmp_path):
    (tmp_path / "file").write_text("")
    with refuses(
        SettingError,
        """
        the ledger of opened pairs cannot be written: 'TMP/file/openings.jsonl'
          error  FileExistsError: File exists
          fix: name a file that can be: confirm(…, ledger="openings.jsonl")
        """,
    ):
        confirm(made, ledger=tmp_path / "file" / "openings.jsonl")
    (tmp_path / "book.jsonl").write_text("{}\n")
    with refuses(
        StoreCorrupt,
        """
        the ledger of opened pairs cannot be read: 'TMP/book.jsonl'
          line    1
          needed  a JSON object of the format 'causalpatch opening'
          fix: mend or take out line 1: without the ledger nothing can be confirmed
        """,
    ):
        confirm(made, ledger=tmp_path / "book.jsonl")


def test_claims_that_cannot_be_read(refuses, tmp_path):
    with refuses(
        ResultsNotFound,
        """
        no saved claim in 'TMP/claim.json'
          fix: name the file that claim.save(path) wrote
        """,
    ):
        cp.Claim.load(tmp_path / "claim.json")
    (tmp_path / "claim.json").write_text('{"format": "a list", "schema": "1"}')
    with refuses(
        StoreCorrupt,
        """
        the claim in 'TMP/claim.json' cannot be read
          why  it is 'a list', not 'causalpatch claim', schema 1
          fix: confirm it again, on new pairs
        """,
    ):
        cp.Claim.load(tmp_path / "claim.json")


def test_checks_and_charts_that_there_are_not(made, refuses):
    claim = confirm(made)
    with refuses(
        ResultsNotFound,
        """
        no check named 'backups' in this claim
          known  planted effect, matched sets, shuffled pairs, identity, whole source, specificity,
                 interactions, backup, direct and indirect, other metrics, other corruptions, dose
          fix: claim.check('backup')
        """,
    ):
        claim.check("backups")
    with refuses(
        SettingError,
        """
        no chart of kind 'heat'
          known  effects, pairs
          fix: claim.plot()
        """,
    ):
        claim.plot("heat")


def test_claims_that_no_model_can_be_held_to(made, refuses, tmp_path):
    confirm(made, ledger=tmp_path / "book.jsonl")
    again = confirm(made, ledger=tmp_path / "book.jsonl")
    with pytest.raises(SettingError) as refused:
        cp.recheck(again, made.model)
    assert refused.value.what == "an inconclusive claim says nothing that another model could be held to"
    assert refused.value.fix == "confirm the components that are supported, on new pairs"
    inside = confirm(made, value=cp.Subspace(np.eye(1, _width(made))[0]))
    with pytest.raises(SettingError, match="cannot be measured again from its file") as refused:
        cp.recheck(dataclasses.replace(inside, reused={}, findings=_decided(inside)), made.model)
    assert refused.value.fix == "confirm the same components with the source's whole value"


def _width(made):
    return made.experiment().model.module.config.n_embd // made.model.module.config.n_head


def _decided(claim):
    return tuple(dataclasses.replace(each, verdict="supported", why="") for each in claim.findings)


def test_pairs_that_are_not_the_claims(made, refuses):
    claim = confirm(made)
    with refuses(
        StoreCorrupt,
        f"""
        these are not the pairs of the claim
          claim  'held-out', hash {made.pairs.content_hash}
          given  {made.pairs[:3].content_hash}
          fix: give the pairs that it was confirmed on, in their order
        """,
    ):
        cp.recheck(claim, made.model, pairs=made.pairs[:3])
    with refuses(
        SettingError,
        f"""
        the claim's file does not hold its pairs
          pairs  'held-out', hash {made.pairs.content_hash}
          why    they are no single prompts of tokens
          fix: give them: recheck(claim, model, pairs=pairs)
        """,
    ):
        cp.recheck(dataclasses.replace(claim, held_out=None), made.model)


def test_models_with_other_tokens(refuses):
    model = cp.open_model("zoo:stories")
    claim = confirm_ioi(model)
    other = {**claim.held_out, "tokens": ["a", "b", *claim.held_out["tokens"][2:]]}
    with pytest.raises(ModelUnsupported) as refused:
        cp.recheck(dataclasses.replace(claim, held_out=other), model)
    assert refused.value.what == "'zoo:stories' reads the claim's prompts as other tokens"
    assert dict(refused.value.facts)["claim"].startswith("'a' 'b'")


def confirm_ioi(model):
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:12], show_progress=False)
    return cp.confirm(experiment, "z.3.2@-1", checks=NONE)


def test_claims_that_are_not_contrasted(made, refuses):
    claim = confirm(made, made.sites)
    with refuses(
        PairError,
        """
        the two claims share pairs, and are not independent
          pairs  'held-out' and 'held-out'
          fix: confirm each behaviour on pairs of its own
        """,
    ):
        cp.dissociate(claim, claim, *made.sites)
    with refuses(
        SettingError,
        """
        one component twice: 'z.0.0@-1'
          holds  z.0.0@-1, z.0.1@-1
          fix: name the component of each behaviour
        """,
    ):
        cp.dissociate(claim, claim, made.sites[0], made.sites[0])
    elsewhere = {**claim.spec, "pairs": {**claim.spec["pairs"], "name": "other", "hash": "another"}}
    other = dataclasses.replace(claim, spec=elsewhere, held_out=None)
    with refuses(
        SettingError,
        """
        nothing says what 'z.9.9' does on 'held-out'
          claim on 'held-out'  holds z.0.0@-1, z.0.1@-1
          claim on 'other'     holds z.0.0@-1, z.0.1@-1
          fix: confirm both on both behaviours, or give each claim the other's pairs: confirm(…, unrelated=[…])
        """,
    ):
        cp.dissociate(claim, other, made.sites[0], "z.9.9")
    noise = dataclasses.replace(claim, spec={**claim.spec, "direction": "noise"})
    with refuses(
        SettingError,
        """
        the two claims are of different directions
          first   denoise
          second  noise
          fix: confirm both in the same way
        """,
    ):
        cp.dissociate(claim, noise, *made.sites)


def test_plans_and_resamples_that_cannot_be_made(made, refuses):
    few = cp.sweep(made.experiment(slice(0, 2)), "z@-1")
    with refuses(
        PairError,
        """
        a pilot of 2 independent components says nothing of how far shares spread
          needed  3 or more, better 10
          fix: measure more independent pairs
        """,
    ):
        cp.power(few)
    with refuses(
        SettingError,
        """
        no number of pairs finds that
          effect  0.1, needed: above delta 0.1
          power   0.8, between 0 and 1
          fix: power(pilot, effect=0.2, delta=0.1, target=0.8)
        """,
    ):
        cp.power(few, effect=0.1)
    with refuses(
        SettingError,
        """
        2 independent components cannot be resampled
          needed  4 or more
          fix: take more independent pairs
        """,
    ):
        cp.selection_stability(few)
    heads = cp.sweep(made.experiment(), "z@-1")
    with refuses(
        SettingError,
        """
        cells that were not measured cannot be run without their experiment
          fix: selection_stability(found, experiment=experiment, rerun=True)
        """,
    ):
        cp.selection_stability(heads, rerun=True)
