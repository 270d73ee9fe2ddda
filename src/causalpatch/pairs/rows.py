"""One row of a file to one pair: inputs, answers and spans, each with the errors that name the row."""

import operator
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from causalpatch.base.errors import AnswerError, PairError, PairFileError
from causalpatch.base.suggest import closest
from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs.chat import ChatPrompts, Ranges, is_chat, shared_spans
from causalpatch.pairs.decoder import DECODER_COLUMNS, DecoderPrompts, frames_of
from causalpatch.pairs.files import Row
from causalpatch.pairs.pair import Answers, Array, Pair, TokenRange, as_numbers
from causalpatch.pairs.placed import Kind
from causalpatch.pairs.prompts import Prompts
from causalpatch.pairs.role import ROLE_WORDS, ROLES, Role

_ARRAY_FILE = re.compile(r"(?P<file>.+\.npz):(?P<name>[^\[\]:]+)\[(?P<index>\d+)\]")
COLUMNS: Final = (
    "clean",
    "corrupt",
    "answer",
    "wrong_answer",
    "answer_id",
    "wrong_answer_id",
    "id",
    "group",
    "split",
    "spans",
    "entities",
    *DECODER_COLUMNS,
)


_SIDES: Final[Mapping[str, tuple[Role, ...]]] = {"clean": ROLES[:1], "corrupt": ROLES[1:], "corrupted": ROLES[1:]}
MASK: Final = "mask"
"""The span that is named without being asked for: the one masked token, of tokenizers that have such."""


class HasTokenizer(Protocol):
    """A model, as far as reading pairs goes."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where there is none."""


@runtime_checkable
class TakesMore(Protocol):
    """A model that says which further arguments its forward takes."""

    @property
    def further(self) -> tuple[str, ...]:
        """Their names."""


@runtime_checkable
class HasDecoder(Protocol):
    """A model that says what its decoder begins with, where it has one beside an encoder."""

    @property
    def decoder_prompt(self) -> tuple[int, ...] | None:
        """Token ids; empty where the model names none, None where it has one stream."""


class RowReader:
    """Turns rows into pairs.

    Args:
        model: What has the tokenizer; None for ids and arrays.
        name: Name of the pairs.
        folder: Where files of arrays stand.
        first_token: Whether answers of several tokens are cut to their first one.
    """

    def __init__(self, model: HasTokenizer | None, *, name: str, folder: Path, first_token: bool) -> None:
        self.tokenizer: Tokenizer | None = getattr(model, "tokenizer", None)
        self.name = name
        self._folder = folder
        self._first_token = first_token
        self._prompts = None if self.tokenizer is None else Prompts(self.tokenizer)
        self._chats = None if self.tokenizer is None else ChatPrompts(self.tokenizer)
        # A model may have more rows in its embedding than its tokenizer has ids.
        sizes = [getattr(model, "vocab_size", None) or None, getattr(self.tokenizer, "vocab_size", None)]
        self._n_ids = max((size for size in sizes if size is not None), default=None)
        self._further = model.further if isinstance(model, TakesMore) else ()
        self._files: dict[Path, Mapping[str, Array]] = {}
        start = model.decoder_prompt if isinstance(model, HasDecoder) else None
        self._sound = getattr(model, "sound", None)
        self._decoder = None if start is None else DecoderPrompts(self.tokenizer, start)

    def pair(self, row: Row, index: int) -> tuple[Pair, Kind]:
        """Return the pair of a row, and whether it holds prompts or arrays.

        Args:
            row: The row, under our names of columns.
            index: Its number, which names the pair where the row does not.
        """
        values = row.values
        clean, corrupt = (self._input(role, row) for role in ROLES)
        if clean.kind != corrupt.kind:
            raise PairError(
                f"{row.where} pairs a prompt with an array",
                facts=[("clean", clean.kind), ("corrupt", corrupt.kind)],
                fix="give both as text, both as token ids or both as arrays",
            )
        decoder = None if self._decoder is None else tuple(self._decoder_input(role, row) for role in ROLES)
        answered = decoder or (clean, corrupt)
        answer, wrong = (self._answers(side, row, answered) for side in ("answer", "wrong_answer"))
        shared = sorted(set(answer) & set(wrong))
        if shared:
            cut = (
                "drop the pair, or read it whole: first_token=False" if self._first_token else "give different answers"
            )
            raise AnswerError(
                f"an answer of {row.where} is both right and wrong", facts=[("ids", list(shared[0]))], fix=cut
            )
        beside, columns = self._beside(row)
        ours = [column for column in COLUMNS if decoder is not None or column not in DECODER_COLUMNS]
        is_sound = decoder is not None and clean.kind == "arrays"
        turns = shared_spans(clean.turns, corrupt.turns)
        spans = {} if is_sound else self._masked(clean, corrupt) | turns | self._spans(row, (clean, corrupt), "spans")
        encoder = None
        if decoder is not None:
            texts = {"clean_text": clean.text, "corrupt_text": corrupt.text}
            encoder = Pair(clean.array, corrupt.array, spans=spans, **texts)
            if is_sound:
                encoder, argument = frames_of(self._sound, (clean.array, corrupt.array), row.where)
                frames = _Input(encoder.clean, "tokens")
                encoder = replace(encoder, spans=self._spans(row, (frames, frames), "spans"))
                beside = {**beside, argument: (clean.array, corrupt.array)}
            (clean, corrupt), spans = decoder, self._spans(row, decoder, "decoder_spans")
        pair = Pair(
            clean=clean.array,
            corrupt=corrupt.array,
            answer=answer,
            wrong_answer=wrong,
            id=str(index) if values.get("id") is None else str(values["id"]),
            group=None if values.get("group") is None else str(values["group"]),
            split=None if values.get("split") is None else str(values["split"]),
            spans=spans,
            entities=_entities(values.get("entities")),
            clean_text=clean.text,
            corrupt_text=corrupt.text,
            extra={column: value for column, value in values.items() if column not in (*ours, *columns)},
            beside=beside,
            encoder=encoder,
        )
        return pair, clean.kind

    def _decoder_input(self, role: Role, row: Row) -> "_Input":
        """Read a decoder's prompt."""
        if self._decoder is None:
            raise LookupError(role)  # only models with a decoder beside an encoder come here
        ids, text = self._decoder.read(row.values, role, row.where)
        found = _sequences(ids, f"the decoder's '{role}'", row)
        flat = [token for one in found for token in one]
        array = self._ids(flat, role, row)
        return _Input(array, "tokens", text, self._decoder.prompts, len(self._decoder.start))

    def _input(self, role: Role, row: Row) -> "_Input":
        """Read one input: a text, a list of ids, a reference to an array in a file, or numbers."""
        value = row.values[role]
        if isinstance(value, str):
            found = _ARRAY_FILE.fullmatch(value)
            if found:
                return _Input(self._array(found["file"], found["name"], int(found["index"]), row), "arrays")
            if self._prompts is None:
                raise PairError(
                    f"'{role}' of {row.where} is a text, but the model has no tokenizer",
                    facts=[("text", repr(value[:60]))],
                    fix="open_model(…, tokenizer=…), or give token ids or arrays",
                )
            return _Input(self._ids(self._prompts.ids(value), role, row), "tokens", value, self._prompts)
        if is_chat(value) and self._chats is not None:
            text, turns = self._chats.read(value, f"the {ROLE_WORDS[role]} prompt of {row.where}")
            known = self._chats.prompts
            ids = [] if known is None else known.ids(text)
            return _Input(self._ids(ids, role, row), "tokens", text, known, turns=turns)
        try:
            array = as_numbers(value)
        except PairError as error:
            raise PairError(
                f"'{role}' of {row.where} is neither text, token ids nor numbers",
                facts=[("value", repr(value)[:60])],
                fix="give a text, a list of ids, or numbers in rows of equal length",
            ) from error
        if array.ndim == 1 and (array.dtype.kind in "iu" or not len(array)):
            return _Input(self._ids(array.tolist(), role, row), "tokens")
        if not array.ndim:
            raise PairError(f"'{role}' of {row.where} is a single number", facts=[("value", value)], fix="give a list")
        return _Input(array, "arrays")

    def _beside(self, row: Row) -> tuple[dict[str, tuple[Array, Array]], list[str]]:
        """Read further arguments of the forward: columns with their names, one for both sides or one for each.

        Returns:
            The arguments, (clean, corrupted), and the columns that they came from.
        """
        found: dict[str, dict[Role, str]] = {}
        for column, value in row.values.items():
            if column in COLUMNS or value is None:
                continue
            side, _, rest = column.partition("_")
            roles = _SIDES.get(side, ROLES)
            name = column if roles == ROLES else rest
            if name in self._further or (isinstance(value, str) and _ARRAY_FILE.fullmatch(value)):
                found.setdefault(name, {}).update(dict.fromkeys(roles, column))
        for name, columns in found.items():
            if name not in self._further and self._further:
                raise self._not_taken(name, row)
            if len(columns) < len(ROLES):
                (has,) = columns
                raise PairError(
                    f"{row.where} has '{columns[has]}', but no '{name}' for the other side",
                    facts=[("needed", " and ".join(f"{role}_{name}" for role in ROLES))],
                    fix=f"give both, or '{name}' for both sides",
                )
        arrays = {name: {role: self._numbers(columns[role], row) for role in ROLES} for name, columns in found.items()}
        beside = {name: (both["clean"], both["corrupt"]) for name, both in arrays.items()}
        return beside, [column for columns in found.values() for column in columns.values()]

    def _numbers(self, column: str, row: Row) -> Array:
        """Read the numbers of a column: a reference to an array in a file, or the numbers themselves."""
        value = row.values[column]
        reference = _ARRAY_FILE.fullmatch(value) if isinstance(value, str) else None
        if reference:
            return self._array(reference["file"], reference["name"], int(reference["index"]), row)
        try:
            return as_numbers(value)
        except PairError as error:
            raise PairError(
                f"'{column}' of {row.where} is given to the model, but holds no numbers",
                facts=[("value", repr(value)[:60])],
                fix='give numbers, or a file of them: "FILE.npz:NAME[i]"',
            ) from error

    def _not_taken(self, name: str, row: Row) -> PairError:
        near = closest(name, self._further, 1)
        return PairError(
            f"{row.where} gives the model '{name}', which its forward does not take",
            facts=[("takes", ", ".join(self._further))],
            fix=f"call the column '{near[0]}'" if near else "leave the column out",
        )

    def _ids(self, ids: Sequence[int], role: Role, row: Row) -> Array:
        if not ids:
            raise PairError(f"'{role}' of {row.where} has no tokens", fix="give a prompt of at least one token")
        self._in_vocabulary(ids, f"'{role}'", row, PairError)
        return np.array(ids, dtype=np.int64)

    def _in_vocabulary(self, ids: Sequence[int], what: str, row: Row, error: type[PairError]) -> None:
        outside = [i for i in ids if i < 0 or (self._n_ids is not None and i >= self._n_ids)]
        if outside:
            known = "0 or more" if self._n_ids is None else f"0 to {self._n_ids - 1}"
            raise error(
                f"{what} of {row.where} holds {outside[0]}, which is no token id",
                facts=[("ids", known)],
                fix="check that the pairs were made for this model's tokenizer",
            )

    def _array(self, file: str, name: str, index: int, row: Row) -> Array:
        """Read one entry of an array in a file beside the pairs; the file is opened once."""
        path = self._folder / file
        if path not in self._files:
            if not path.is_file():
                raise PairFileError(
                    f"{row.where} needs the file '{path}', which is not there", fix="put it beside the pairs"
                )
            try:
                opened = np.load(path, allow_pickle=False)
                self._files[path] = dict(opened) if isinstance(opened, Mapping) else {}
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise PairFileError(
                    f"'{path}' cannot be read as arrays",
                    facts=[("problem", error)],
                    fix="write it with numpy.savez(file, NAME=array)",
                ) from error
        arrays = self._files[path]
        if name not in arrays or index >= len(arrays[name]):
            held = ", ".join(f"{key} of {len(value)}" for key, value in arrays.items())
            raise PairFileError(
                f"{row.where} needs {name}[{index}], which '{file}' does not hold",
                facts=[("arrays", held or "none")],
                fix="write FILE.npz:NAME[i] with a name and an index that are there",
            )
        return np.asarray(arrays[name][index])

    def _answers(self, side: str, row: Row, inputs: tuple["_Input", "_Input"]) -> Answers:
        """Read an answer set; ids win over text."""
        ids, value = row.values.get(f"{side}_id"), row.values.get(side)
        if ids is not None:
            found = _sequences(ids, f"'{side}_id'", row)
        elif value is None:
            return ()
        else:
            found = []
            for one in value if isinstance(value, list | tuple | np.ndarray) and len(value) else [value]:
                is_text = isinstance(one, str)
                found += [self._in_context(one, side, row, inputs)] if is_text else _sequences([one], f"'{side}'", row)
        for answer in found:
            self._in_vocabulary(answer, f"'{side}'", row, AnswerError)
        cut = [answer[:1] if self._first_token else answer for answer in found]
        return tuple(dict.fromkeys(cut))

    def _in_context(self, text: str, side: str, row: Row, inputs: tuple["_Input", "_Input"]) -> tuple[int, ...]:
        """Tokenise an answer after both prompts, where it must have the same tokens."""
        prompts, known = [one.text for one in inputs if one.text is not None], inputs[0].prompts
        if known is None or len(prompts) < len(inputs):
            if row.untyped and text.isdecimal():
                return (int(text),)
            raise AnswerError(
                f"'{side}' of {row.where} is a text, but its prompts are not",
                facts=[("text", repr(text))],
                fix=f"give its id in a column {side}_id",
            )
        where = f"{row.where}"
        after = [known.answer(prompt, text, where) for prompt in prompts]
        if after[0] != after[1]:
            shown = [" ".join(repr(known.tokenizer.label(token)) for token in ids) for ids in after]
            raise AnswerError(
                f"the answer {text!r} of {row.where} has different tokens after its two prompts",
                facts=[("clean", shown[0]), ("corrupted", shown[1])],
                fix=f"end both prompts alike, or give {side}_id",
            )
        return after[0]

    def _masked(self, clean: "_Input", corrupt: "_Input") -> dict[str, tuple[TokenRange, TokenRange]]:
        """Name the masked token of both prompts, where each has just one."""
        mask_id = getattr(self.tokenizer, "mask_id", None)
        if mask_id is None or "arrays" in (clean.kind, corrupt.kind):
            return {}
        places = [np.flatnonzero(one.array == mask_id).tolist() for one in (clean, corrupt)]
        if any(len(found) != 1 for found in places):
            return {}
        (first,), (second,) = places
        return {MASK: ((first, first + 1), (second, second + 1))}

    def _spans(
        self, row: Row, inputs: tuple["_Input", "_Input"], column: str
    ) -> dict[str, tuple[TokenRange, TokenRange]]:
        spans = row.values.get(column)
        if spans is None:
            return {}
        if not isinstance(spans, Mapping):
            raise PairError(
                f"'{column}' of {row.where} is not a mapping",
                facts=[("value", repr(spans)[:60])],
                fix='write {"subject": " Mary"} or {"subject": [3, 5]}',
            )
        found = {}
        for name, value in spans.items():
            if value is None:  # parquet fills every name of the column into every row
                continue
            of_role = [value.get(role) if isinstance(value, Mapping) else value for role in ROLES]
            clean, corrupt = (
                self._span(str(name), v, role, one, row) for v, role, one in zip(of_role, ROLES, inputs, strict=True)
            )
            found[str(name)] = (clean, corrupt)
        return found

    def _span(self, name: str, value: Any, role: Role, one: "_Input", row: Row) -> TokenRange:
        """Read one span in one prompt: a text to find, or a range of tokens."""
        if isinstance(value, str) and one.prompts is not None and one.text is not None:
            found = one.prompts.span(one.text, value, name, f"the {ROLE_WORDS[role]} prompt of {row.where}")
            return found[0] + one.n_before, found[1] + one.n_before
        length = len(one.array) if one.kind == "tokens" else 0
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(end, int | None) for end in value):
            start, stop, _ = slice(*value).indices(length)
            if start < stop and all(end is None or -length <= end <= length for end in value):
                return start, stop
        raise PairError(
            f"span '{name}' of {row.where} is no part of the {ROLE_WORDS[role]} prompt",
            facts=[("value", repr(value)), (ROLE_WORDS[role], f"{length} tokens" + ("" if one.text else ", no text"))],
            fix=f'give a text that stands in it, or its tokens: {{"{name}": [first, last + 1]}}',
        )


@dataclass(frozen=True, eq=False)
class _Input:
    """One input of a pair as read: with what it was tokenised, how many ids stand before its text, a chat's turns."""

    array: Array
    kind: Kind
    text: str | None = None
    prompts: Prompts | None = None
    n_before: int = 0
    turns: Ranges = field(default_factory=dict)


def _sequences(value: Any, what: str, row: Row) -> list[tuple[int, ...]]:
    """Read ids: one, a set of them, or a set of lists of them."""
    try:
        listed = [operator.index(value)] if not isinstance(value, list | tuple | np.ndarray) else list(value)
        found = [
            tuple(map(operator.index, one)) if isinstance(one, list | tuple | np.ndarray) else (operator.index(one),)
            for one in listed
        ]
    except TypeError:
        found = [()]
    if not found or not all(found):
        raise AnswerError(
            f"{what} of {row.where} is not a token id",
            facts=[("value", repr(value)[:60])],
            fix="give a whole number, a list of them (a set), or a list of lists (answers of several tokens)",
        ) from None
    return found


def _entities(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(dict.fromkeys(map(str, [value] if isinstance(value, str) else value)))
