"""Reading pairs: a file, a built-in task or a list of dicts becomes ``Pairs``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from causalpatch.base.errors import PairError, PairFileError, RequestError, SettingError, TaskNotFound
from causalpatch.base.suggest import closest
from causalpatch.pairs.collection import Pairs
from causalpatch.pairs.files import ENDINGS, Row, read_rows
from causalpatch.pairs.placed import Kind
from causalpatch.pairs.rows import COLUMNS, HasTokenizer, RowReader
from causalpatch.pairs.tasks import TASKS, generate

_ALSO = {"corrupt": "corrupted", "corrupt_decoder": "corrupted_decoder"}

Source: TypeAlias = str | Path | Sequence[Mapping[str, Any]] | Pairs


def load_pairs(
    x: Source,
    model: HasTokenizer | None,
    *,
    columns: Mapping[str, str] | None = None,
    first_token: bool = False,
    name: str | None = None,
) -> Pairs:
    """Read pairs of clean and corrupted inputs.

    One row is one pair. These columns have a meaning; all others are kept in ``Pair.extra`` and can be selected with
    ``pairs.where(column=value)``.

    ==================  ============================================================================================
    column              meaning
    ==================  ============================================================================================
    ``clean``           The clean input: a text; a chat, ``[{"role": "user", "content": …}, …]``, which the tokenizer's
                        template writes and whose turns become the spans ``system``, ``user``, ``assistant``; a list of
                        token ids, taken as it is (special tokens included); or, for models that are not text, numbers
                        of any shape, or ``"FILE.npz:NAME[i]"``: entry i of an array in a file beside this one.
    ``corrupt``         The corrupted input, likewise; ``corrupted`` is understood too.
    ``answer``          The right answer to the clean input: a text, as it follows the prompt (mostly with a space in
                        front), or a token id, or the number of a class. A list is a set of answers that all count.
    ``wrong_answer``    The answer that the corrupted input suggests, likewise.
    ``answer_id``,      Token ids instead of text; they win where both are given. A list is a set of answers, a list
    ``wrong_answer_id`` of lists a set of answers of several tokens.
    ``id``              Name of the pair, unique; by default its number from 0.
    ``group``           What else ties pairs together, such as an author: pairs of one group are never counted as
                        independent.
    ``split``           The split that the pair belongs to, for ``pairs.split_by_column()``.
    ``spans``           Named parts of the prompts, for sites such as ``z.9@subject``: a mapping from name to a text
                        that stands once in both prompts, to ``[first, last + 1]`` in tokens of both, or to
                        ``{"clean": …, "corrupt": …}`` with one of these for each.
    ``entities``        A list of names that the pair speaks of: pairs that share one are not independent.
    ``decoder``         For models with an encoder and a decoder, which both inputs above then are the encoder's: the
                        text that the decoder begins with, behind the model's own beginning, or all of its ids;
                        ``clean_decoder`` and ``corrupt_decoder`` where they differ. By default the beginning alone.
    ``decoder_spans``   Named parts of the decoder's prompts, likewise.
    ``clean_ARGUMENT``, A further argument of the model's forward for each side, such as ``clean_pixel_values``: numbers
    ``corrupt_…``,      of any shape or ``"FILE.npz:NAME[i]"``; under its bare name one for both sides. Pairs that share
    ``ARGUMENT``        one are not independent.
    ==================  ============================================================================================

    Only ``clean`` and ``corrupt`` must be there; which answers are needed, the metric says. Texts get the model's
    special tokens once, and none if they already begin with them. Answers are tokenised in context:
    ids(prompt + answer) without ids(prompt), which must come out alike after the clean and the corrupted prompt;
    where there is a decoder, after its prompt.
    In CSV every cell is text, but cells that are JSON lists or mappings are read as such, ``answer_id`` and
    ``wrong_answer_id`` as numbers, and empty cells are missing.

    Args:
        x: Name of a built-in task such as ``"ioi"``; path of a file that ends in ``.jsonl``, ``.csv`` or
            ``.parquet``; a list of mappings; or ``Pairs``, which are returned as they are.
        model: What ``open_model`` returned, or anything with an attribute ``tokenizer``; None for arrays and ids.
        columns: What the file calls our columns, such as ``{"clean": "prompt", "answer": "target"}``.
        first_token: Cut answers of several tokens to their first one.
        name: How messages and results call the pairs; by default the name of the file or task.

    Returns:
        The pairs, in the order of the file. Nothing is dropped.

    Raises:
        PairFileError: The file is not there, is empty, has a malformed line (whose number is given), an unknown ending,
            or lacks a column.
        TaskNotFound: There is no such task.
        AnswerError: An answer has different tokens after the two prompts, merges with the end of the prompt, is not in
            the vocabulary, or is both right and wrong.
        PairError: An input is neither text, ids nor numbers; texts come without a tokenizer; or a span does not stand
            exactly once in its prompt.

    Examples:
        >>> rows = [{"clean": [4, 7, 1], "corrupt": [4, 8, 1], "answer_id": 9, "wrong_answer_id": 3}]
        >>> pairs = load_pairs(rows, None, name="three ids")
        >>> pairs
        Pairs('three ids', 1 pairs of 3 to 3 tokens)
        >>> pairs[0].answer, pairs[0].wrong_answer
        (((9,),), ((3,),))
    """
    if isinstance(x, Pairs):
        if columns or first_token or name:
            raise SettingError(
                f"'{x.name}' was read already", fix="give columns, first_token and name where its file is read"
            )
        return x
    ours = _checked_columns(columns)
    rows, folder, found_name = _rows(x)
    reader = RowReader(model, name=name or found_name, folder=folder, first_token=first_token)
    read = [reader.pair(_renamed(row, ours, reader.name), index) for index, row in enumerate(rows)]
    _refuse_mixture(rows, [kind for _, kind in read], reader.name)
    _refuse_repeated_ids(rows, [pair.id for pair, _ in read], reader.name)
    return Pairs(
        [pair for pair, _ in read],
        name=reader.name,
        kind=read[0][1],
        tokenizer=reader.tokenizer,
    )


def _rows(x: object) -> tuple[list[Row], Path, str]:
    """Return the rows of a source, the folder that its array files stand in, and its name."""
    if isinstance(x, str) and x in TASKS:
        return _listed(generate(x), x), Path(), x
    if isinstance(x, Path) or (isinstance(x, str) and (Path(x).suffix or len(Path(x).parts) > 1)):
        path = Path(x)
        return read_rows(path), path.parent, path.name
    if isinstance(x, str):
        near = closest(x, TASKS)
        raise TaskNotFound(
            f"there is no task {x!r}",
            facts=[("tasks", ", ".join([*near, *(task for task in TASKS if task not in near)]))],
            fix=f"name a task, or a file that ends in {' '.join(ENDINGS)}",
        )
    if isinstance(x, Sequence) and all(isinstance(row, Mapping) for row in x):
        return _listed(x, "rows"), Path(), "rows"
    raise RequestError(
        f"pairs cannot be read from a value of type {type(x).__name__}",
        facts=[("known", "name of a task, path of a file, list of dicts, Pairs")],
        fix="give a list of dicts; stacked arrays become pairs with Pairs.from_arrays(…)",
    )


def _listed(rows: Sequence[Mapping[str, Any]], name: str) -> list[Row]:
    if not rows:
        raise PairError(f"'{name}' holds no pairs", fix='give at least one {"clean": …, "corrupt": …}')
    return [Row(f"row {index} of '{name}'", values) for index, values in enumerate(rows)]


def _checked_columns(columns: Mapping[str, str] | None) -> Mapping[str, str]:
    for ours in columns or {}:
        if ours not in COLUMNS:
            raise SettingError(
                f"{ours!r} is not a column that can be renamed",
                facts=[
                    (
                        "columns",
                        ", ".join([*closest(ours, COLUMNS), *(c for c in COLUMNS if c not in closest(ours, COLUMNS))]),
                    )
                ],
                fix='write our name first, then the file\'s: columns={"clean": "prompt"}',
            )
    return columns or {}


def _renamed(row: Row, columns: Mapping[str, str], name: str) -> Row:
    """Return a row under our names of columns; the two that must be there are there."""
    for theirs in columns.values():
        if theirs not in row.values:
            raise _missing(row, theirs, name)
    values = {column: value for column, value in row.values.items() if column not in columns.values()}
    values |= {ours: row.values[theirs] for ours, theirs in columns.items()}
    for ours, also in _ALSO.items():
        if ours not in values and also in values:
            values[ours] = values.pop(also)
    for needed in ("clean", "corrupt"):
        if needed not in values:
            raise _missing(row, needed, name)
        if values[needed] is None:
            raise PairFileError(f"{row.where} has an empty '{needed}'", fix="fill it, or delete the row")
    return replace(row, values=values)


def _missing(row: Row, column: str, name: str) -> PairFileError:
    near = [c for c in closest(column, row.values) if c not in COLUMNS]
    return PairFileError(
        f"{row.where} has no column '{column}'",
        facts=[("columns", ", ".join(map(str, row.values)) or "none")],
        fix=f'rename it, or load_pairs(…, columns={{"{column}": "{near[0] if near else "its name in the file"}"}})',
    )


def _refuse_mixture(rows: Sequence[Row], kinds: Sequence[Kind], name: str) -> None:
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        raise PairError(
            f"'{name}' mixes prompts and arrays",
            facts=[(rows[0].where, kinds[0]), (rows[odd].where, kinds[odd])],
            fix="give prompts and arrays apart",
        )


def _refuse_repeated_ids(rows: Sequence[Row], ids: Sequence[str], name: str) -> None:
    first: dict[str, int] = {}
    for index, pair_id in enumerate(ids):
        if first.setdefault(pair_id, index) != index:
            raise PairError(
                f"two pairs of '{name}' are called '{pair_id}'",
                facts=[("first", rows[first[pair_id]].where), ("again", rows[index].where)],
                fix="give every pair its own id, or leave the column out",
            )
