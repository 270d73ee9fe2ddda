"""From failing prompts to a claim: a head that was turned round is found and confirmed, what stops it is told."""

import copy
import json

import pytest

import causalpatch as cp
from causalpatch.base.errors import ResultsNotFound, SettingError
from causalpatch.cli.main import main
from causalpatch.pairs.tasks import generate
from causalpatch.studies.debug import divided, one_each

QUICK = {"checks": cp.Checks.none(), "budget": 700, "positions": "all"}


@pytest.fixture(scope="module")
def base():
    return cp.open_model("zoo:stories", device="cpu")


@pytest.fixture(scope="module")
def broken(base):
    """The model with head 2 of layer 0 turned round."""
    module = copy.deepcopy(base.module)
    module.model.layers[0].self_attn.o_proj.weight.data[:, 48:72].mul_(-1)
    return cp.open_model(module, tokenizer=base.tokenizer)


@pytest.fixture(scope="module")
def failing(base, broken):
    """Prompts of which the broken model says the wrong name and the whole one the right one, by no code of ours."""
    rows = []
    for row in generate("ioi", n=60):
        ids = {name: base.tokenizer.encode(row[name].strip(), special=False)[0] for name in ("answer", "wrong_answer")}
        is_right = []
        for model in (base, broken):
            prompt = model.tokenizer.tokenizer(row["clean"], return_tensors="pt")
            logits = model.module(input_ids=prompt["input_ids"]).logits[0, -1]
            is_right.append(bool(logits[ids["answer"]] > logits[ids["wrong_answer"]]))
        if is_right == [True, False]:
            rows.append({"prompt": row["clean"], "answer": row["answer"], "entities": row["entities"]})
    return rows


def test_what_carries_the_failure_is_found_confirmed_and_written(base, broken, failing, tmp_path):
    asked = {**QUICK, "budget": 120, "level": "layers", "most": 1, "out": tmp_path / "out"}
    found = cp.debug(broken, failing[:13], against=base, **asked)
    assert found.supported[0] == "attn_out.0"
    assert found.exit_code == 0
    assert not set(found.discovery.ids) & set(found.held_out.ids)
    report = (tmp_path / "out" / "REPORT.md").read_text()
    assert found.outcome in report
    assert found.claim.statement.splitlines()[1] in report


@pytest.mark.slow
def test_a_head_that_was_turned_round_is_found_and_confirmed(base, broken, failing, tmp_path):
    asked = {"against": base, "budget": 1500, "checks": cp.Checks.none(), "ledger": tmp_path / "ledger.jsonl"}
    found = cp.debug(broken, failing[:24], **asked, out=tmp_path / "out")
    assert "head_out.0.2" in found.supported
    share = next(each.share for each in found.claim.findings if each.component == "head_out.0.2")
    assert share == pytest.approx(1, abs=1e-3)  # nothing else differs between the two models
    assert found.exit_code == 0
    assert not set(found.discovery.ids) & set(found.held_out.ids)
    assert found.runs["search"] <= 1500
    assert {*found.seconds} == {"pairs", "split", "search", "confirm"}
    written = json.loads((tmp_path / "out" / "debugging.json").read_text())
    assert written["supported"] == found.supported
    assert written["next"] == found.next_step != ""
    assert cp.Claim.load(tmp_path / "out" / "claim.json").statement == found.claim.statement
    assert len(cp.load_pairs(tmp_path / "out" / "pairs.jsonl", broken)) == len(found.made.pairs)
    again = cp.debug(broken, failing[:24], **asked)
    assert (again.supported, again.exit_code) == ([], 1)  # held-out pairs confirm once
    assert "reused hold-out" in str(again)


def test_prompts_that_do_not_fail_stop_it_at_the_pairs_and_leave_a_report(base, failing, tmp_path):
    found = cp.debug(base, failing[:4], out=tmp_path)
    assert (found.stop.stage, found.exit_code) == ("pairs", 2)
    assert "none of the 4 prompts of 'failures' fails" in found.outcome
    assert "against=" in found.next_step
    assert found.outcome in (tmp_path / "REPORT.md").read_text()
    with pytest.raises(ResultsNotFound, match="no search"):
        found.plot()


@pytest.mark.slow
def test_too_few_components_are_searched_but_nothing_is_confirmed(base, broken, failing, tmp_path):
    found = cp.debug(broken, failing[:6], against=base, **QUICK, out=tmp_path)
    assert (found.stop.stage, found.exit_code, found.claim) == ("split", 1, None)
    assert found.next_step == "give 6 more failing prompts apart"
    assert "head_out.0.2" in found.found
    assert cp.Localization.load(tmp_path / "localization.npz").components == found.localization.components


def test_a_search_that_cannot_be_made_keeps_the_pairs(base, broken, failing, tmp_path):
    found = cp.debug(broken, failing[:6], against=base, budget=5, out=tmp_path)
    assert (found.stop.stage, found.exit_code) == ("search", 2)
    assert (tmp_path / "pairs.jsonl").read_text().count("\n") == 6
    assert "a budget of 5" in str(found)


@pytest.mark.slow
def test_where_nothing_restores_more_than_delta_it_says_what_came_nearest(base, broken, failing):
    found = cp.debug(broken, failing[:6], against=base, delta=2.0, **QUICK)
    assert (found.stop.stage, found.exit_code) == ("search", 1)
    assert dict(found.stop.facts)["largest"].startswith(("attn_out.0 +1.0", "head_out.0.2 +1.0", "attn_out.1 +1.0"))
    assert "smaller delta" in found.next_step


def test_each_failing_prompt_keeps_one_partner_that_others_do_not_have(base):
    def row(failure, clean):
        return {"clean": clean, "corrupt": f"{failure} met the dog", "failure": failure}

    rows = [row("Mary", "John met the cat"), row("Mary", "Paul met the cat")]
    rows += [row("Linda", "John met the cat"), row("Linda", "Eric met the cow"), row("Susan", "John met the cat")]
    assert one_each(cp.load_pairs(rows, base)) == [0, 3, 4]


def test_what_is_held_out_suffices_for_a_claim_or_is_nothing(base, broken, failing):
    made = cp.make_pairs(failing[:13], broken, against=base)
    discovery, held_out = divided(made, 10, 0)
    assert (len(discovery), len(held_out)) == (3, 10)
    everything, nothing = divided(made, 12, 0)
    assert (len(everything), nothing) == (13, None)


def test_partners_of_other_lengths_are_aligned_by_the_words_that_they_share(base):
    couples = [("Mary", "John"), ("Linda", "Paul"), ("Susan", "Mark"), ("Karen", "Eric")]
    rows = [
        {
            "prompt": f"When {a} and {b} went to the park, {a} gave a ring to",
            "answer": f" {a}",
            "works": f"Today {a} was happy. When {a} and {b} went to the park, {b} gave a ring to",
        }
        for a, b in couples
    ]
    made = cp.make_pairs(rows, base, ways=["works"])
    assert len(made.pairs) == 4
    sides = divided(made, 2, 0)
    assert [len(side) for side in sides] == [2, 2]
    assert all(side.alignment.how == "difference" for side in sides)


def test_a_search_that_the_user_ends_confirms_nothing(base, broken, failing, monkeypatch):
    def ended(*asked, **more):
        found = cp.localize(*asked, **more)
        found.provenance["stopped"] = True
        return found

    monkeypatch.setattr("causalpatch.studies.debug.localize", ended)
    found = cp.debug(broken, failing[:13], against=base, **{**QUICK, "budget": 120, "level": "layers"})
    assert (found.stop.stage, found.exit_code, found.claim) == ("search", 130, None)
    assert found.localization is not None


def test_claims_of_no_component_are_refused_before_anything_runs(base):
    with pytest.raises(SettingError, match="most=0"):
        cp.debug(base, [{"prompt": "x", "answer": " y"}], most=0)


@pytest.mark.slow
def test_the_command_ends_with_what_came_of_it(base, broken, failing, tmp_path, capsys):
    broken.module.save_pretrained(tmp_path / "broken")
    base.tokenizer.tokenizer.save_pretrained(tmp_path / "broken")
    given = tmp_path / "failures.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in failing[:24]))
    words = ["debug", str(tmp_path / "broken"), str(given), "--out", str(tmp_path / "out"), "--few-checks"]
    words += ["--budget", "400", "--level", "layers"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--against", "zoo:stories", "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["supported"]
    assert any(path.endswith("REPORT.md") for path in told["files"])
    with pytest.raises(SystemExit) as ended:
        main(["debug", "zoo:stories", str(given), "--out", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert "stopped at pairs: none of the 24 prompts" in capsys.readouterr().out
    assert (tmp_path / "none" / "REPORT.md").is_file()
