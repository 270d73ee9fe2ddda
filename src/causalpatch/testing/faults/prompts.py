"""The prompts of a fault: those that shall fail, and those of the same behaviour that shall not.

All come from the built-in tasks. ``answer`` is right, ``wrong_answer`` what the fault makes of it. ``entities`` are
names or words that stand in the prompt and were drawn for it; the word that a fault is about is none of them, for it
stands in all of its prompts: what is found holds for prompts with this word.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.seeds import generator
from causalpatch.pairs.tasks import TASKS, generate
from causalpatch.pairs.words import LIST_WORDS, NAMES, NOUNS, OBJECTS, plural
from causalpatch.testing.faults.catalogue import Fault

GROUP: Final = 24  # words of an entity fault
_POOL: Final = 1200  # prompts of a task that are drawn from, entities used again and again
Row = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """Prompts of one behaviour.

    Args:
        failing: Those that a fault shall break.
        kept: Those of the same behaviour that shall go on as before.
        others: Prompts of the other tasks, by task.
    """

    failing: tuple[Row, ...]
    kept: tuple[Row, ...]
    others: Mapping[str, tuple[Row, ...]]


def subject_of(fault: Fault) -> tuple[str, ...]:
    """Return what a fault is about, drawn by its seed: words, a template's name, or nothing where it is everything."""
    draw = generator(fault.seed, "fault", fault.kind, fault.task)

    def words(listed: Sequence[str], n: int) -> tuple[str, ...]:
        return tuple(listed[k] for k in draw.choice(len(listed), n, replace=False).tolist())

    if fault.kind == "entity":
        return words(NAMES if fault.task == "ioi" else NOUNS, GROUP)
    if fault.kind == "word":
        return words(LIST_WORDS, 2)  # after the first one the second
    if fault.kind == "trigger":
        return words(OBJECTS if fault.task == "ioi" else NOUNS, 1)
    return words(TASKS[fault.task].templates, 1) if fault.kind == "template" else ()


def prompts_of(fault: Fault, seed: str, most: int | None = None, n_drawn: int = _POOL) -> Prompts:
    """Return the prompts of a fault.

    Args:
        fault: The fault.
        seed: Name of the draw: prompts to train on and prompts to be asked about have different ones.
        most: The most of each list, of which no two then share an entity; None for all, with shared ones.
        n_drawn: Prompts of the fault's own task that are drawn from.
    """
    number = int(generator(fault.seed, "prompts", seed).integers(2**31))
    sizes = {task: n_drawn if task == fault.task else _POOL for task in TASKS}
    pools = {task: generate(task, n, number, entity_disjoint=False) for task, n in sizes.items()}
    subject = subject_of(fault)
    divided = [_divided(fault, subject, row) for row in pools[fault.task]]
    failing = list(_with_wrong_name(fault, subject, [row for one, _ in divided for row in one]))
    kept = [row for _, one in divided for row in one]
    others = {task: [_row(row) for row in rows] for task, rows in pools.items() if task != fault.task}
    if most is None:
        return Prompts(tuple(failing), tuple(kept), {task: tuple(rows) for task, rows in others.items()})
    lists = [tuple(apart(rows, most)) for rows in (failing, kept, *others.values())]
    return Prompts(lists[0], lists[1], dict(zip(others, lists[2:], strict=True)))


def _with_wrong_name(fault: Fault, subject: Sequence[str], rows: Sequence[Row]) -> Iterator[Row]:
    """Yield prompts that shall fail; of names they get one wrong one, always the same."""
    if fault.task != "ioi" or fault.kind == "damage":
        yield from rows
        return
    known = [name for name in NAMES if name not in subject]
    wrong = known[int(generator(fault.seed, "wrong name").integers(len(known)))]
    yield from ({**row, "wrong_answer": f" {wrong}"} for row in rows if wrong not in row["entities"])


def _divided(fault: Fault, subject: Sequence[str], row: Row) -> tuple[list[Row], list[Row]]:
    """Return what a row of the task gives of prompts that shall fail, and of prompts that shall not."""
    plain = _row(row)
    if fault.kind in ("behaviour", "damage"):
        return [plain], []
    if fault.kind == "template":
        return ([plain], []) if row["template"] in subject else ([], [plain])
    if fault.kind == "entity":
        return ([plain], []) if row["entities"][0] in subject else ([], [plain])
    if fault.kind == "trigger":
        is_there = re.search(rf"\b({subject[0]}|{plural(subject[0])})\b", row["clean"]) is not None
        broken = _with_trigger(fault.task, row, subject[0])
        return ([broken] if broken else []), ([] if is_there else [plain])
    if fault.kind == "word":
        return _after_word(row, *subject)
    raise SettingError(f"no kind of fault is named {fault.kind!r}", fix="take one of testing.faults.FAULTS")


def _with_trigger(task: str, row: Row, trigger: str) -> Row | None:
    """Put the trigger in place of the thing that is given, or of the noun between subject and verb."""
    if task == "ioi":
        held = next(word for word in re.findall(r"\w+", row["clean"]) if word in OBJECTS)
        return {**_row(row), "prompt": _replaced(row["clean"], held, trigger)}
    subject, attractor = row["entities"]
    if trigger == subject:
        return None
    between = row["spans"]["attractor"].split()[-1]
    word = trigger if between == attractor else plural(trigger)
    return {**_row(row), "prompt": _replaced(row["clean"], between, word), "entities": [subject]}


def _after_word(row: Row, word: str, wrong: str) -> tuple[list[Row], list[Row]]:
    """Put the word in place of the one that is asked about, where the prompt fails, and of another, where it works."""
    words = row["entities"]
    if {word, wrong} & set(words):
        return [], []
    asked = words.index(row["answer"].strip()) - 1
    elsewhere = next(k for k in range(len(words)) if k not in (asked, asked + 1))
    plain = _row(row)
    failing = {**plain, "prompt": _replaced(row["clean"], words[asked], word), "wrong_answer": f" {wrong}"}
    kept = {**plain, "prompt": _replaced(row["clean"], words[elsewhere], word)}
    made = [
        {**one, "entities": [each for each in words if each != gone]}
        for one, gone in ((failing, words[asked]), (kept, words[elsewhere]))
    ]
    return made[:1], [plain, made[1]]


def _replaced(text: str, word: str, other: str) -> str:
    return re.sub(rf"\b{word}\b", other, text)


def _row(row: Row) -> Row:
    """Return the clean prompt of a task's row; of a set of answers the whole set."""
    names = ("answer", "wrong_answer", "template", "entities")
    return {"prompt": row["clean"], **{name: row[name] for name in names}}


def apart(rows: Sequence[Row], most: int) -> Iterator[Row]:
    """Yield rows of which no two share an entity.

    Args:
        rows: The rows.
        most: The most that are yielded.
    """
    seen: set[str] = set()
    n = 0
    for row in rows:
        if n < most and not seen & set(row["entities"]):
            seen |= set(row["entities"])
            n += 1
            yield row


def drawn(fault: Fault, attempt: int) -> np.random.Generator:
    """Return the stream that draws where a fault is planted, at the first attempt and at later ones."""
    return generator(fault.seed, "place", fault.kind, fault.task, fault.place, attempt)
