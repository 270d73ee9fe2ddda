"""A trained language model, from all of its parts to claims: which heads copy names and things, and which agree.

Pairs are made from templates and answered right. The search sees some templates, the claims are confirmed on others.
"""

from pathlib import Path

import pytest

import causalpatch as cp
from causalpatch.testing.stories import BEHAVIOURS, templates

RUNS_PER_PAIR = 600
LEAST = 0.2  # of the gap: twice delta
HEADS = {"name_copy": {"z.4.4@-1"}, "object_copy": {"z.4.4@-1", "z.4.3@-1", "z.4.2@-1"}, "pronoun": {"z.4.2@-1"}}
"""Heads of ``stories260k_heads.json``, which plain hooks measured on other pairs of the same behaviours."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(shared: Path) -> cp.Model:
    return cp.open_model(shared / "models" / "stories260k")


@pytest.fixture(scope="module")
def sides(model: cp.Model) -> dict[str, tuple[cp.Pairs, cp.Pairs]]:
    """Pairs of each behaviour: for the search, and held out by their templates."""
    found = {}
    for name in BEHAVIOURS:
        made = cp.make_pairs(
            None,
            model,
            templates=templates(name),
            tries=2,
            entity_disjoint=True,
            equal_length=True,
            first_token=True,
            name=name,
        )
        assert made.n_components == len(made.pairs) >= 40
        assert len({pair.extra["template"] for pair in made.pairs}) >= 6
        assert all(len(pair.clean) == len(pair.corrupt) for pair in made.pairs)
        assert made.pairs.check().mirrored_share == 0.0
        found[name] = made.pairs.split(0.4, by="template")
    return found


@pytest.fixture(scope="module")
def searches(model: cp.Model, sides: dict[str, tuple[cp.Pairs, cp.Pairs]]) -> dict[str, cp.Localization]:
    return {
        name: cp.localize(cp.Experiment(model, discovery, show_progress=False), RUNS_PER_PAIR * len(discovery))
        for name, (discovery, _) in sides.items()
    }


@pytest.fixture(scope="module")
def claims(model, sides, searches, tmp_path_factory) -> dict[str, cp.Claim]:
    ledgers = tmp_path_factory.mktemp("ledgers")
    return {
        name: cp.confirm(
            cp.Experiment(model, held_out, show_progress=False),
            searches[name].select("head", beyond=LEAST),
            found_on=discovery,
            unrelated=[pairs for other, (_, pairs) in sides.items() if other != name],
            ledger=ledgers / f"{name}.jsonl",
        )
        for name, (discovery, held_out) in sides.items()
    }


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_no_template_and_no_name_or_thing_stands_on_both_sides(name, sides):
    discovery, held_out = sides[name]
    for values in (lambda pair: {pair.extra["template"]}, lambda pair: set(pair.entities)):
        seen, kept = (set().union(*map(values, pairs)) for pairs in (discovery, held_out))
        assert not seen & kept
    assert len(set(held_out.components.tolist())) >= 20


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_search_comes_down_from_all_parts_to_the_heads(name, sides, searches):
    found = searches[name]
    assert {str(site) for site in found.select("head", beyond=LEAST).components} == HEADS[name]
    assert found.spent["runs"] <= RUNS_PER_PAIR * len(sides[name][0])
    assert {cell.level for cell in found.cells} >= {"sublayer", "position", "head", "neuron"}
    stable = cp.selection_stability(found)
    largest = found.select("head", beyond=LEAST).components[0]
    assert str(largest) in stable.stable


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_heads_are_supported_on_templates_that_the_search_never_saw(name, claims):
    claim = claims[name]
    assert claim.verdict == "supported", str(claim)
    assert set(claim.supported) == HEADS[name]
    assert all(finding.low > claim.delta == 0.1 for finding in claim.findings)
    assert claim.check("matched sets").about["p"] < 0.05
    assert not claim.reused


def test_copying_names_and_agreeing_are_done_by_different_heads(claims):
    found = cp.dissociate(claims["name_copy"], claims["pronoun"], "z.4.4@-1", "z.4.2@-1")
    assert found.verdict == "supported"
    assert found.low > 2 * found.delta
    assert found.shares["name_copy"]["z.4.4@-1"] > 0.8
    assert found.shares["pronoun"]["z.4.2@-1"] > 0.6
    for name, other in (("name_copy", "z.4.2@-1"), ("pronoun", "z.4.4@-1")):
        low, high = found.ends[name][other]
        assert -found.delta < low < high < found.delta
