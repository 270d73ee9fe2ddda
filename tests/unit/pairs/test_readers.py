"""Reading pairs from every source, and the column convention."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from causalpatch.base.errors import PairError, PairFileError, RequestError, SettingError, TaskNotFound
from causalpatch.pairs import Pairs, load_pairs
from causalpatch.pairs.tasks import TASKS, generate

ROWS = [
    {"clean": "Tom saw", "corrupt": "Mary saw", "answer": " Ann", "id": "a", "kind": "x", "entities": ["Tom", "Mary"]},
    {"clean": "Jack saw", "corrupt": "Lucy saw", "answer": " Ann", "id": "b", "group": 3, "split": "test"},
]


def test_columns_go_where_the_convention_says(toy):
    one, two = load_pairs(ROWS, toy())
    assert (one.id, one.entities, one.group, one.split) == ("a", ("Tom", "Mary"), None, None)
    assert (two.id, two.entities, two.group, two.split) == ("b", (), "3", "test")
    assert one.extra == {"kind": "x"}
    assert two.extra == {}


def test_pairs_without_ids_are_numbered(toy):
    assert load_pairs([{"clean": "a", "corrupt": "b"}] * 2, toy()).ids == ["0", "1"]


def test_corrupted_is_understood_for_corrupt(toy):
    assert load_pairs([{"clean": "a", "corrupted": "b"}], toy())[0].corrupt_text == "b"


def test_columns_of_other_names_are_renamed(toy):
    rows = [{"prompt": "a", "counterfactual": "b", "target": " c", "clean": "another", "kind": "x"}]
    columns = {"clean": "prompt", "corrupt": "counterfactual", "answer": "target"}
    pair = load_pairs(rows, toy(), columns=columns)[0]
    assert (pair.clean_text, pair.corrupt_text, len(pair.answer)) == ("a", "b", 1)
    assert pair.extra == {"kind": "x"}


def test_two_columns_can_change_places(toy):
    pair = load_pairs([{"clean": "a", "corrupt": "b"}], toy(), columns={"clean": "corrupt", "corrupt": "clean"})[0]
    assert (pair.clean_text, pair.corrupt_text) == ("b", "a")


def test_a_missing_column_is_refused_with_those_that_are_there(tmp_path, toy):
    (tmp_path / "ioi.jsonl").write_text('{"clean": "a", "corrupt": "b"}\n{"clean": "a", "corruption": "b"}\n')
    with pytest.raises(PairFileError) as error:
        load_pairs(tmp_path / "ioi.jsonl", toy())
    assert str(error.value) == (
        "line 2 of 'ioi.jsonl' has no column 'corrupt'\n"
        "  columns  clean, corruption\n"
        '  fix: rename it, or load_pairs(…, columns={"corrupt": "corruption"})'
    )


def test_a_renamed_column_that_is_missing_is_refused(toy):
    with pytest.raises(PairFileError) as error:
        load_pairs([{"a": "x", "b": "y"}], toy(), columns={"clean": "c"})
    assert str(error.value).startswith("row 0 of 'rows' has no column 'c'\n  columns  a, b\n")


def test_an_empty_cell_is_refused(tmp_path, toy):
    (tmp_path / "p.csv").write_text("clean,corrupt\na,b\nc,\n")
    with pytest.raises(PairFileError) as error:
        load_pairs(tmp_path / "p.csv", toy())
    assert str(error.value) == "line 3 of 'p.csv' has an empty 'corrupt'\n  fix: fill it, or delete the row"


def test_a_column_that_has_no_meaning_cannot_be_renamed(toy):
    with pytest.raises(SettingError) as error:
        load_pairs(ROWS, toy(), columns={"corrupts": "b"})
    assert str(error.value).startswith("'corrupts' is not a column that can be renamed\n  columns  corrupt, ")


def test_ids_that_repeat_are_refused(toy):
    with pytest.raises(PairError) as error:
        load_pairs([ROWS[0], {**ROWS[1], "id": "a"}], toy())
    assert str(error.value) == (
        "two pairs of 'rows' are called 'a'\n"
        "  first  row 0 of 'rows'\n"
        "  again  row 1 of 'rows'\n"
        "  fix: give every pair its own id, or leave the column out"
    )


def test_prompts_and_arrays_do_not_mix(toy):
    with pytest.raises(PairError) as error:
        load_pairs([{"clean": "a", "corrupt": "b"}, {"clean": [[1.0]], "corrupt": [[2.0]]}], toy())
    assert str(error.value) == (
        "'rows' mixes prompts and arrays\n"
        "  row 0 of 'rows'  tokens\n"
        "  row 1 of 'rows'  arrays\n"
        "  fix: give prompts and arrays apart"
    )


def test_a_list_without_rows_is_refused(toy):
    with pytest.raises(PairError, match="'rows' holds no pairs"):
        load_pairs([], toy())


@pytest.mark.parametrize("x", [7, np.zeros(3), {"clean": "a"}, ["a"]])
def test_other_things_are_refused(toy, x):
    with pytest.raises(RequestError) as error:
        load_pairs(x, toy())
    assert str(error.value) == (
        f"pairs cannot be read from a value of type {type(x).__name__}\n"
        "  known  name of a task, path of a file, list of dicts, Pairs\n"
        "  fix: give a list of dicts; stacked arrays become pairs with Pairs.from_arrays(…)"
    )


def test_pairs_are_returned_as_they_are(toy, bare):
    pairs = load_pairs(ROWS, toy())
    assert load_pairs(pairs, bare) is pairs
    arrays = Pairs.from_arrays(np.zeros((1, 2)), np.ones((1, 2)))
    assert load_pairs(arrays, bare) is arrays


def test_pairs_are_not_read_in_another_way_a_second_time(toy):
    with pytest.raises(SettingError) as error:
        load_pairs(load_pairs(ROWS, toy()), toy(), first_token=True)
    assert str(error.value) == (
        "'rows' was read already\n  fix: give columns, first_token and name where its file is read"
    )


def test_every_format_gives_the_same_pairs(tmp_path, toy):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"clean": f"{a} saw", "corrupt": f"{b} saw", "answer": " Joseph", "answer_id": None, "spans": {"verb": "saw"}}
        for a, b in [("Tom", "Ann"), ("Jack", "Lucy")]
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    lines = [f'{row["clean"]},{row["corrupt"]}, Joseph,,"{{""verb"": ""saw""}}"' for row in rows]
    (tmp_path / "p.csv").write_text("\n".join(["clean,corrupt,answer,answer_id,spans", *lines]))
    model = toy()
    hashes = {load_pairs(x, model).content_hash for x in (rows, *(str(path) for path in tmp_path.iterdir()))}
    assert len(hashes) == 1


def test_classes_and_ids_in_csv_are_numbers(tmp_path, bare):
    (tmp_path / "p.csv").write_text('clean,corrupt,answer,wrong_answer\n"[[0.5]]","[[1.5]]",3,"[5, 6]"\n')
    pair = load_pairs(tmp_path / "p.csv", bare)[0]
    assert pair.clean.tolist() == [[0.5]]
    assert (pair.answer, pair.wrong_answer) == (((3,),), ((5,), (6,)))


def test_the_name_is_the_files_the_tasks_or_the_given_one(tmp_path, toy):
    (tmp_path / "ioi.jsonl").write_text(json.dumps(ROWS[0]))
    assert load_pairs(str(tmp_path / "ioi.jsonl"), toy()).name == "ioi.jsonl"
    assert load_pairs(ROWS, toy(), name="mine").name == "mine"


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_loads_with_its_spans_and_forty_independent_components(toy, task):
    model = toy()
    model.tokenizer.vocab_size = 100_000
    pairs = load_pairs(task, model)
    assert pairs.name == task
    assert len(set(pairs.components.tolist())) >= 40
    for row, pair in zip(generate(task), pairs, strict=True):
        assert pair.answer
        assert pair.wrong_answer
        assert set(pair.spans) == set(row["spans"])
        assert set(pair.entities) == set(row["entities"])
    assert pairs.check().duplicates == pairs.check().same_input == ()


def test_an_unknown_task_is_refused_with_those_there_are(toy):
    with pytest.raises(TaskNotFound) as error:
        load_pairs("iio", toy())
    assert str(error.value) == (
        "there is no task 'iio'\n"
        f"  tasks  {', '.join(TASKS)}\n"
        "  fix: name a task, or a file that ends in .jsonl .csv .parquet"
    )


@pytest.mark.parametrize(("name", "n_pairs"), [("stories260k", 478), ("babyllama-105", 70), ("nano-sort-gpt2", 120)])
def test_pairs_of_the_trained_models_load(shared, trained, name, n_pairs):
    path = shared / "models" / name / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = load_pairs(path, trained(name))
    assert len(pairs) == len(rows) == n_pairs
    for row, pair in zip(rows, pairs, strict=True):
        assert len(pair.clean) == len(pair.corrupt) == row["n_tokens"]
        assert (pair.answer, pair.wrong_answer) == (((row["answer_id"],),), ((row["wrong_answer_id"],),))
        assert pair.extra["behaviour"] == row["behaviour"]


@pytest.mark.parametrize("name", ["stories260k", "babyllama-105"])
def test_answers_of_trained_models_read_in_context_begin_with_the_recorded_token(shared, trained, name):
    rows = [json.loads(line) for line in (shared / "models" / name / "pairs.jsonl").read_text().splitlines()]
    bare = [{key: value for key, value in row.items() if not key.endswith("_id")} for row in rows]
    pairs = load_pairs(bare, trained(name))
    for row, pair in zip(rows, pairs, strict=True):
        assert (pair.answer[0][0], pair.wrong_answer[0][0]) == (row["answer_id"], row["wrong_answer_id"])


def test_pairs_of_images_load_from_the_arrays_beside_them(shared, bare):
    folder = shared / "models" / "mnist-cnn-burn"
    pairs = load_pairs(folder / "pairs.jsonl", bare)
    with np.load(folder / "pairs.npz") as arrays:
        clean, corrupt, answer = arrays["clean"], arrays["corrupt"], arrays["answer"]
    assert pairs.kind == "arrays"
    assert (pairs.batch("clean").values == clean).all()
    assert (pairs.batch("corrupt", [5, 3]).values == corrupt[[5, 3]]).all()
    assert [pair.answer for pair in pairs] == [((c,),) for c in answer.tolist()]


def test_a_report_is_plain_data(toy):
    assert asdict(load_pairs(ROWS, toy()).check())["n_pairs"] == 2
