"""The page of families and sites says what the library does now."""

from pathlib import Path

from causalpatch.models import FAMILIES
from causalpatch.models.experts import EXPERT_SITES
from causalpatch.models.families import Absent
from causalpatch.testing.pictures import TABLES
from causalpatch.testing.support import CROSS, SITES, Tried, main, make_page, shapes_of_large_models, try_family
from causalpatch.testing.tiny import ENCODER_DECODERS, FAMILY_NAMES
from worlds import LACKS

PAGE = Path(__file__).parents[3] / "docs" / "support.md"


# One test for both, so that the trials are made once and not by each process that runs tests.
def test_the_page_is_what_the_trials_give_and_these_refuse_what_the_tables_do_not_have_and_no_more():
    tried = [each for name in (*FAMILY_NAMES, *ENCODER_DECODERS) for each in try_family(name)]
    for each in tried:
        refused = {name for name, why in each.outcomes.items() if why is not None}
        if not each.stream:
            assert refused == LACKS[each.family] & set(SITES), each.title
        else:
            assert refused.isdisjoint({"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", *CROSS})
        assert each.engine in ("wavefront", "restart", "rows")
    seeing = [each for name in TABLES for each in try_family(name)]
    for each in seeing:
        named = next(family.sites for family in FAMILIES if family.name == each.family)
        tables = {name for name, fact in named.items() if isinstance(fact, Absent)}
        # The first two are in no such model; one vector stands for a whole input.
        refused = {name for name, why in each.outcomes.items() if why is not None}
        assert refused == (tables | EXPERT_SITES | {"logits"}) & set(SITES), each.family
        assert each.engine in ("restart", "rows", "reference")
    tried += seeing
    wanted = make_page(tried, shapes_of_large_models())
    assert PAGE.read_text() == wanted, "docs/support.md is stale: make support"


def test_a_site_that_fails_its_proof_shows_on_the_page():
    outcomes = dict.fromkeys(SITES) | {"z": "algebra: z.0.0 against attention is off by 1.0"}
    page = make_page([Tried("llama", ("llama",), "rows", outcomes)], [])
    assert "refused: 1 |" in page
    assert "1. algebra: z.0.0 against attention is off by 1.0" in page


def test_the_page_goes_to_the_file_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("causalpatch.testing.support.FAMILY_NAMES", ("llama",))
    monkeypatch.setattr("causalpatch.testing.support.ENCODER_DECODERS", ("t5",))
    monkeypatch.setattr("causalpatch.testing.support.TABLES", ("vit",))
    main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text().startswith("# Which families have which sites")
