"""The ledger of opened pairs: what counts as opened, and that it is never passed over."""

import json

import pytest

from causalpatch.base.errors import SettingError, StoreCorrupt
from causalpatch.testing.known_shares import world
from causalpatch.validation.ledger import Ledger, default_path


@pytest.fixture(scope="module")
def made():
    return world([0.4], 12)


def test_what_was_opened_is_known_by_its_inputs_and_its_model(made, tmp_path):
    book = Ledger(tmp_path / "deep" / "openings.jsonl")
    assert book.opened(made.experiment()) == {}
    book.write(made.experiment(slice(0, 4)), "one")
    book.write(made.experiment(slice(3, 6)), "two")
    assert book.opened(made.experiment()) == {"one": [0, 1, 2, 3], "two": [4, 5]}
    assert book.opened(made.experiment(slice(6, 12))) == {}
    other = world([0.3], 12, seed=9)
    assert book.opened(other.experiment()) == {}


def test_renamed_and_reordered_pairs_are_opened_all_the_same(made, tmp_path):
    book = Ledger(tmp_path / "openings.jsonl")
    book.write(made.experiment(), "one")
    assert book.opened(made.experiment([5, 2])) == {"one": [0, 1]}


def test_a_line_says_what_it_is(made, tmp_path):
    book = Ledger(tmp_path / "openings.jsonl")
    book.write(made.experiment(), "one")
    (line,) = book.path.read_text().splitlines()
    record = json.loads(line)
    assert record["format"] == "causalpatch opening"
    assert (record["spec"], record["pairs"], len(record["inputs"])) == ("one", "made", 24)


@pytest.mark.parametrize("line", ["{", "[]", '{"format": "other"}', "3"])
def test_a_ledger_that_cannot_be_read_stops_everything(made, tmp_path, line):
    book = Ledger(tmp_path / "openings.jsonl")
    book.write(made.experiment(), "one")
    with book.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StoreCorrupt, match="cannot be read") as refused:
        book.opened(made.experiment(slice(0, 1)))
    assert ("line", 2) in refused.value.facts


def test_a_ledger_that_cannot_be_written_stops_everything(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="cannot be written"):
        Ledger(tmp_path / "file" / "openings.jsonl").write(made.experiment(), "one")


def test_the_ledger_stands_in_the_users_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "causalpatch" / "openings.jsonl"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert default_path() == tmp_path / "me" / ".local" / "state" / "causalpatch" / "openings.jsonl"
