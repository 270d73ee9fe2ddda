"""Failing prompts as they are given, and the prompts beside them that work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from causalpatch.base.errors import PairError, PairFileError, RequestError
from causalpatch.pairs.edits import Prompt
from causalpatch.pairs.files import Row, read_rows

Given: TypeAlias = str | Path | Sequence[Mapping[str, Any]]
Answer: TypeAlias = Mapping[str, Any]

ANSWER: Final[tuple[str, ...]] = ("answer", "answer_id")
WRONG: Final[tuple[str, ...]] = ("wrong_answer", "wrong_answer_id")
_OURS: Final = ("prompt", *ANSWER, *WRONG, "id", "works", "spans", "replacements", "entities", "group")


@dataclass(frozen=True)
class Working:
    """A prompt that is said to work.

    Args:
        prompt: The prompt.
        answer: What it is to be answered by, as a column of pairs; empty where that is what the failing prompt asks.
        spans: Text of named spans.
        entities: Names that it speaks of.
    """

    prompt: Prompt
    answer: Answer = field(default_factory=dict)
    spans: Mapping[str, str] = field(default_factory=dict)
    entities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A prompt that is said to fail.

    Args:
        where: How errors call its row.
        id: Its name.
        prompt: The prompt.
        answer: The answer that is wanted, as a column of pairs.
        wrong: The wrong answer that the model is said to give, likewise; empty where that is to be found.
        works: Prompts beside it that work.
        spans: Text of named spans.
        replacements: What may stand in place of a span, by name.
        entities: Names that it speaks of.
        group: What ties it to others.
        extra: Other columns.
    """

    where: str
    id: str
    prompt: Prompt
    answer: Answer
    wrong: Answer = field(default_factory=dict)
    works: tuple[Working, ...] = ()
    spans: Mapping[str, str] = field(default_factory=dict)
    replacements: Mapping[str, Sequence[str]] = field(default_factory=dict)
    entities: tuple[str, ...] = ()
    group: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


def read_failures(given: Given) -> tuple[list[Failure], str]:
    """Read failing prompts.

    Args:
        given: A list of mappings, or a file that ends in ``.jsonl``, ``.csv`` or ``.parquet``.

    Returns:
        The failures, and what to call them.

    Raises:
        PairError: There are none, two have one id, or a span does not stand in its prompt.
        PairFileError: The file cannot be read, or a row lacks a prompt or the wanted answer.
    """
    rows, name = rows_of(given, "failures")
    failures = [_failure(row, index) for index, row in enumerate(rows)]
    ids = [failure.id for failure in failures]
    twice = [one for k, one in enumerate(ids) if one in ids[:k]]
    if twice:
        raise PairError(
            f"two prompts of '{name}' are called '{twice[0]}'", fix="give each its own id, or leave the column out"
        )
    return failures, name


def read_working(given: Given | Sequence[str]) -> list[Working]:
    """Read prompts that work: texts, or rows with ``prompt`` and perhaps ``answer``, ``spans``, ``entities``.

    Args:
        given: A list of texts or mappings, or a file.
    """
    if not isinstance(given, str | Path):
        given = [{"prompt": one} if isinstance(one, str) else one for one in given]
    rows, _ = rows_of(given, "works")
    return [_working(row.values, row.where) for row in rows]


def rows_of(given: Given, name: str) -> tuple[list[Row], str]:
    """Return the rows of a list or a file, and what to call them."""
    if isinstance(given, str | Path):
        return read_rows(Path(given)), Path(given).name
    if not isinstance(given, Sequence) or not all(isinstance(row, Mapping) for row in given):
        raise RequestError(
            f"{name} cannot be read from a value of type {type(given).__name__}",
            facts=[("known", "path of a file, list of dicts")],
            fix='give [{"prompt": "…", "answer": " …"}, …]',
        )
    if not given:
        raise PairError(f"'{name}' holds no prompts", fix='give at least one {"prompt": "…", "answer": " …"}')
    rows = [dict(row) for row in given if isinstance(row, Mapping)]
    return [Row(f"row {index} of '{name}'", values) for index, values in enumerate(rows)], name


def _failure(row: Row, index: int) -> Failure:
    values = {column: value for column, value in row.values.items() if value is not None}
    answer: Answer = {column: values[column] for column in ANSWER if column in values}
    if "prompt" not in values or not answer:
        lacking = "answer" if "prompt" in values else "prompt"
        raise PairFileError(
            f"{row.where} has no '{lacking}'",
            facts=[("columns", ", ".join(map(str, row.values)) or "none")],
            fix='write {"prompt": "…", "answer": " what is wanted"} on each line, and wrong_answer where you know it',
        )
    prompt = Prompt.of(values["prompt"], row.where)
    spans = _spans(values.get("spans", {}), prompt, row.where)
    replacements = values.get("replacements", {})
    for name in replacements:
        if name not in spans:
            raise PairError(
                f"{row.where} has replacements for '{name}', which is none of its spans",
                facts=[("spans", ", ".join(spans) or "none")],
                fix=f'add the text that they replace: "spans": {{"{name}": "…"}}',
            )
    works = values.get("works", ())
    works = [works] if isinstance(works, str | Mapping) else works
    return Failure(
        where=row.where,
        id=str(values.get("id", index)),
        prompt=prompt,
        answer=answer,
        wrong={column: values[column] for column in WRONG if column in values},
        works=tuple(_working(one if isinstance(one, Mapping) else {"prompt": one}, row.where) for one in works),
        spans=spans,
        replacements={name: tuple([one] if isinstance(one, str) else one) for name, one in replacements.items()},
        entities=_listed(values.get("entities")),
        group=None if values.get("group") is None else str(values["group"]),
        extra={column: value for column, value in values.items() if column not in _OURS},
    )


def _working(values: Mapping[str, Any], where: str) -> Working:
    prompt = Prompt.of(values.get("prompt"), f"what works beside {where}" if "works" not in where else where)
    return Working(
        prompt,
        {column: values[column] for column in ANSWER if values.get(column) is not None},
        _spans(values.get("spans") or {}, prompt, where),
        _listed(values.get("entities")),
    )


def _spans(spans: Any, prompt: Prompt, where: str) -> dict[str, str]:
    if not isinstance(spans, Mapping) or not all(isinstance(text, str) for text in spans.values()):
        raise PairError(
            f"'spans' of {where} is no mapping from names to texts",
            facts=[("value", repr(spans)[:60])],
            fix='write "spans": {"subject": "Mary"}',
        )
    for name, text in spans.items():
        prompt.find(text, name, f"the prompt of {where}")
    return dict(spans)


def _listed(value: Any) -> tuple[str, ...]:
    return () if value is None else tuple(map(str, [value] if isinstance(value, str) else value))
