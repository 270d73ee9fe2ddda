"""Files of pairs as rows, and what is said of files that are none."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from causalpatch.base.errors import PairFileError
from causalpatch.pairs.files import read_rows

GOOD = '{"clean": "a", "corrupt": "b"}'
# Text that survives CSV as it is: not empty, not JSON of a list or mapping, and no carriage returns within.
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1).filter(
    lambda t: t[0] not in "[{"
)


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path):
    with pytest.raises(PairFileError) as error:
        read_rows(path)
    return str(error.value)


def test_json_lines_keep_values_and_their_line_numbers(tmp_path):
    rows = read_rows(write(tmp_path, "p.jsonl", f'\n{GOOD}\n\n{{"clean": [1, 2], "corrupt": null}}\n'))
    assert [row.where for row in rows] == ["line 2 of 'p.jsonl'", "line 4 of 'p.jsonl'"]
    assert [row.values for row in rows] == [{"clean": "a", "corrupt": "b"}, {"clean": [1, 2], "corrupt": None}]


def test_line_ends_and_marks_of_other_systems_are_understood(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
    assert len(read_rows(path)) == 2
    path = tmp_path / "p.csv"
    path.write_bytes(b"\xef\xbb\xbfclean,corrupt\r\na,b\r\n")
    assert read_rows(path)[0].values == {"clean": "a", "corrupt": "b"}


def test_a_malformed_line_is_refused_with_its_number(tmp_path):
    text = refusal(write(tmp_path, "ioi.jsonl", f'{GOOD}\n{GOOD}\n{{"clean": "a", corrupt: "b"}}\n'))
    assert text == (
        "line 3 of 'ioi.jsonl' is malformed\n"
        '  line     {"clean": "a", corrupt: "b"}\n'
        "  problem  Expecting property name enclosed in double quotes: line 1 column 16 (char 15)\n"
        "  fix: write one JSON object per line"
    )


def test_a_line_that_is_no_object_is_refused_with_its_number(tmp_path):
    assert refusal(write(tmp_path, "ioi.jsonl", f'{GOOD}\n["a", "b"]\n')) == (
        "line 2 of 'ioi.jsonl' is malformed\n"
        '  line     ["a", "b"]\n'
        "  problem  a list, not an object\n"
        '  fix: write {"clean": …, "corrupt": …} on each line'
    )


@pytest.mark.parametrize(
    ("name", "text"), [("p.jsonl", ""), ("p.jsonl", "\n \n"), ("p.csv", ""), ("p.csv", "clean,corrupt\n")]
)
def test_a_file_without_pairs_is_refused(tmp_path, name, text):
    assert refusal(write(tmp_path, name, text)) == (
        f"'{name}' holds no pairs\n"
        f"  size  {len(text)} bytes\n"
        '  fix: write one pair per line, for instance {"clean": "…", "corrupt": "…", "answer": " …"}'
    )


def test_an_unknown_ending_is_refused(tmp_path):
    assert refusal(write(tmp_path, "p.xlsx", GOOD)) == (
        "'p.xlsx' has an ending that is not known\n"
        "  ending  .xlsx\n"
        "  known   .jsonl .csv .parquet\n"
        "  fix: save the pairs as JSON lines, or read them yourself and give a list of dicts"
    )


def test_a_file_that_is_not_there_is_refused_with_those_beside_it(tmp_path):
    write(tmp_path, "ioi.jsonl", GOOD)
    assert refusal(tmp_path / "ido.jsonl") == (
        f"there is no file '{tmp_path / 'ido.jsonl'}'\n  pairs beside it  ioi.jsonl\n  fix: correct the path"
    )


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b"clean,corrupt\na,\xff\n")
    assert refusal(path) == "'p.csv' is not UTF-8 text\n  first wrong byte  16\n  fix: save it as UTF-8"


def test_csv_cells_are_text_but_for_lists_mappings_ids_and_nothing(tmp_path):
    text = 'clean,corrupt,answer,answer_id,spans,note\n"a, ""b""",12, She,338,"{""name"": ""a""}",\n'
    (row,) = read_rows(write(tmp_path, "p.csv", text))
    assert row.values == {
        "clean": 'a, "b"',
        "corrupt": "12",
        "answer": " She",
        "answer_id": 338,
        "spans": {"name": "a"},
        "note": None,
    }
    assert row.untyped


def test_csv_counts_lines_of_the_file_across_cells_of_several_lines(tmp_path):
    rows = read_rows(write(tmp_path, "p.csv", 'clean,corrupt\n"a\nb",c\nd,e\n'))
    assert [(row.where, row.values["clean"]) for row in rows] == [
        ("line 2 of 'p.csv'", "a\nb"),
        ("line 4 of 'p.csv'", "d"),
    ]


def test_a_csv_line_of_another_length_is_refused_with_its_number(tmp_path):
    assert refusal(write(tmp_path, "p.csv", "clean,corrupt\na,b\nOne day, Tim,c\n")) == (
        "line 3 of 'p.csv' is malformed\n"
        "  line     One day, Tim,c\n"
        "  problem  3 cells under 2 columns\n"
        '  fix: put cells that hold a comma in "quotes"'
    )


def test_an_open_quote_in_csv_is_refused(tmp_path):
    assert refusal(write(tmp_path, "p.csv", 'clean,corrupt\na,"b\n')) == (
        "line 2 of 'p.csv' is malformed\n  problem  unexpected end of data\n  fix: close every \"quote\""
    )


@given(st.lists(st.fixed_dictionaries({"clean": CELLS, "corrupt": CELLS}), min_size=1, max_size=4))
def test_what_is_written_as_csv_or_json_lines_is_read_again(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("files")
    with (folder / "p.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["clean", "corrupt"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    write(folder, "p.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert [row.values for row in read_rows(folder / "p.csv")] == rows
    assert [row.values for row in read_rows(folder / "p.jsonl")] == rows


def test_parquet_keeps_types(tmp_path):
    rows = [{"clean": [1, 2], "corrupt": [1, 3], "answer_id": 4}, {"clean": [5], "corrupt": [6], "answer_id": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    read = read_rows(tmp_path / "p.parquet")
    assert [row.values for row in read] == rows
    assert [row.where for row in read] == ["row 0 of 'p.parquet'", "row 1 of 'p.parquet'"]


def test_a_file_that_only_calls_itself_parquet_is_refused(tmp_path):
    assert refusal(write(tmp_path, "p.parquet", GOOD)).startswith("'p.parquet' is not a parquet file\n  problem  ")
