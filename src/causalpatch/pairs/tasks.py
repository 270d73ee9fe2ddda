"""The built-in tasks: clean and corrupted prompts, made from templates, with their answers.

Each task asks for one well-studied behaviour. Its pairs share no entity (name, noun, event, year or list word) unless
that is asked for, so that each is an independent component for the statistics. Clean and corrupted prompts differ in
one word, and all words are single tokens of the embedded model ``zoo:stories``. The entities of a pair stood apart when
that model was trained, so a right answer was not learnt by heart.

References:
    Wang et al. 2022, Interpretability in the wild (arXiv 2211.00593): indirect object identification.
    Olsson et al. 2022, In-context learning and induction heads (arXiv 2209.11895).
    Linzen et al. 2016, Assessing the ability of LSTMs to learn syntax-sensitive dependencies (arXiv 1611.01368).
    Hanna et al. 2023, How does GPT-2 compute greater-than? (arXiv 2305.00586).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import PairError, TaskNotFound
from causalpatch.base.seeds import generator
from causalpatch.base.suggest import closest
from causalpatch.pairs.templates import AGREEMENT, GREATER_THAN, INDUCTION, IOI, ListTemplate, Template
from causalpatch.pairs.words import (
    ADJECTIVES,
    CENTURIES,
    EVENTS,
    LIST_WORDS,
    MOODS,
    NAMES,
    NOUNS,
    OBJECTS,
    PLACES,
    YEARS,
    never_meet,
    plural,
)

Row = dict[str, Any]
Couple = tuple[int, int]
_DEFAULT_PAIRS = 48
_COUPLES_PER_LIST = 3
_FIRST_START = 30  # starts from 30 on, so that the corrupted start 01 changes the answer clearly


@dataclass(frozen=True)
class Task:
    """A behaviour that the library can make pairs for.

    Args:
        name: What it is asked for by.
        summary: What is asked of the model, in one line.
        templates: Names of the templates.
        held_out: The template that never occurs in the embedded model's training.
        capacity: The most pairs that share no entity.
        default_pairs: How many pairs are made when no number is given.
        metric: The metric that suits the answers.
    """

    name: str
    summary: str
    templates: tuple[str, ...]
    held_out: str
    capacity: int
    default_pairs: int
    metric: str


def generate(
    name: str,
    n: int | None = None,
    seed: int = 0,
    *,
    entity_disjoint: bool = True,
    templates: Sequence[str] | None = None,
) -> list[Row]:
    """Make the pairs of a task, as rows for ``load_pairs``.

    Args:
        name: Name of the task.
        n: Number of pairs; the task's own default when not given.
        seed: Seed of all choices; the same seed gives the same rows.
        entity_disjoint: No two pairs share an entity. Without it, any number of pairs can be made.
        templates: Names of the templates to use, in turn; all of them when not given.

    Returns:
        Rows with ``id``, ``clean``, ``corrupt``, ``answer``, ``wrong_answer`` (texts or lists of texts), ``template``,
        ``entities`` and ``spans`` (names of text that stands once in each prompt).

    Raises:
        TaskNotFound: No task has this name.
        PairError: No template has this name, or so many pairs cannot be made without sharing an entity.

    Examples:
        >>> row = generate("greater_than", n=1)[0]
        >>> len(row["answer"]) + len(row["wrong_answer"])
        100
    """
    task = find_task(name)
    wanted = task.default_pairs if n is None else n
    if wanted < 1:
        raise PairError(f"{wanted} pairs of {name!r} cannot be made", fix="ask for n=1 or more")
    if entity_disjoint and wanted > task.capacity:
        raise PairError(
            f"{wanted} pairs of {name!r} that share no entity cannot be made",
            facts=[("possible", f"{task.capacity} pairs")],
            fix=f"ask for n={task.capacity} or fewer, or allow sharing with entity_disjoint=False",
        )
    names = _check_templates(task, templates)
    rows: list[Row] = []
    seen: set[str] = set()
    for number, draw in _draws(_MAKERS[name].couples, _MAKERS[name].per_pair, seed, name):
        row = _MAKERS[name].make(draw, names[len(rows) % len(names)], generator(seed, name, number))
        if row["clean"] in seen or row["corrupt"] in seen:
            continue
        seen.update((row["clean"], row["corrupt"]))
        rows.append({"id": f"{name}-{len(rows):03d}", **row})
        if len(rows) == wanted:
            return rows
    raise PairError(
        f"{wanted} different pairs of {name!r} cannot be made",
        facts=[("made", len(rows))],
        fix=f"ask for n={len(rows)} or fewer, or name more templates",
    )


def find_task(name: str) -> Task:
    """Return the task with this name.

    Raises:
        TaskNotFound: No task has this name.
    """
    if name not in TASKS:
        near = closest(name, TASKS)
        raise TaskNotFound(
            f"no task is named {name!r}",
            facts=[("tasks", ", ".join(TASKS))],
            fix=f"use {near[0]!r}" if near else "list the tasks with: causalpatch tasks",
        )
    return TASKS[name]


def _check_templates(task: Task, templates: Sequence[str] | None) -> tuple[str, ...]:
    if templates is None:
        return task.templates
    for template in templates:
        if template not in task.templates:
            raise PairError(
                f"task {task.name!r} has no template {template!r}",
                facts=[("templates", ", ".join(task.templates))],
                fix="name some of these, or leave templates out to use all",
            )
    if not templates:
        raise PairError(f"no template of task {task.name!r} was asked for", fix="leave templates out to use all")
    return tuple(templates)


@dataclass(frozen=True)
class _Maker:
    """How the pairs of one task are made.

    Args:
        couples: Shuffles the entities and returns couples of them that share none and never met in training.
        per_pair: How many couples one pair takes.
        make: Turns couples, a template's name and a random stream into a row.
    """

    couples: Callable[[np.random.Generator], list[Couple]]
    per_pair: int
    make: Callable[[Sequence[Couple], str, np.random.Generator], Row]


def _draws(
    couples: Callable[[np.random.Generator], list[Couple]], per_pair: int, seed: int, name: str
) -> Iterator[tuple[int, list[Couple]]]:
    """Yield the couples of one pair after the other: one round is entity-disjoint, later rounds use entities again."""
    number = 0
    for round_ in range(1000):
        shuffled = couples(generator(seed, name, "couples", round_))
        for start in range(0, len(shuffled) - per_pair + 1, per_pair):
            yield number, shuffled[start : start + per_pair]
            number += 1


def _match(size: int, stream: np.random.Generator) -> list[Couple]:
    """Pair up ``size`` indices so that each couple never met in training; each index is used at most once."""
    classes = [stream.permutation(np.arange(rest, size, 8)).tolist() for rest in range(8)]
    couples = [
        *zip(classes[0][::2], classes[0][1::2], strict=False),
        *zip(classes[4][::2], classes[4][1::2], strict=False),
        *(couple for rest in (1, 2, 3) for couple in zip(classes[rest], classes[8 - rest], strict=False)),
    ]
    turned = [couple if stream.random() < 0.5 else couple[::-1] for couple in couples]
    return [turned[place] for place in stream.permutation(len(turned))]


def _match_years(stream: np.random.Generator) -> list[Couple]:
    """Give each start year another event; its century follows from it, so one couple is (start, event)."""
    starts = stream.permutation(np.arange(_FIRST_START, 99))[: len(EVENTS)].tolist()
    return list(zip(starts, stream.permutation(len(EVENTS)).tolist(), strict=True))


def _pick(words: Sequence[str], stream: np.random.Generator) -> str:
    return words[int(stream.integers(len(words)))]


def _text(templates: Sequence[Template], name: str) -> str:
    return next(template.text for template in templates if template.name == name)


def _word_before(slot: str, text: str) -> str:
    return text.partition(slot)[0].split()[-1]


def _ioi(couples: Sequence[Couple], template: str, stream: np.random.Generator) -> Row:
    """Make two people; in the clean prompt one of them gives, in the corrupted prompt the other."""
    receiver, giver = (NAMES[index] for index in couples[0])
    a, b = (receiver, giver) if stream.random() < 0.5 else (giver, receiver)
    text = _text(IOI, template)
    place, thing = _pick(PLACES, stream), _pick(OBJECTS, stream)
    slots = {"place": place, "object": thing, "adjective": _pick(MOODS, stream)}
    aside = receiver if stream.random() < 0.5 else giver
    verb = text.partition("{giver} ")[2].split()[0]
    return {
        "clean": text.format(a=a, b=b, giver=giver, aside=aside, **slots),
        "corrupt": text.format(a=a, b=b, giver=receiver, aside=aside, **slots),
        "answer": f" {receiver}",
        "wrong_answer": f" {giver}",
        "template": template,
        "entities": [receiver, giver],
        "spans": {
            "names": f"{a} and {b}",
            "place": f"the {place}",
            "giver": {"clean": f"{giver} {verb}", "corrupt": f"{receiver} {verb}"},
        },
    }


def _induction(couples: Sequence[Couple], template: str, stream: np.random.Generator) -> Row:
    """Make a list of words, stated twice, and then one of its words: the next one is asked for."""
    words = [LIST_WORDS[index] for couple in couples for index in couple]
    frame = next(frame for frame in INDUCTION if frame.name == template)
    clean, corrupt = (2 * int(place) for place in stream.permutation(len(couples))[:2])
    stated = " ".join(words)
    return {
        "clean": frame.fill([stated, stated, words[clean]]),
        "corrupt": frame.fill([stated, stated, words[corrupt]]),
        "answer": f" {words[clean + 1]}",
        "wrong_answer": f" {words[corrupt + 1]}",
        "template": template,
        "entities": words,
        "spans": {},
    }


def _agreement(couples: Sequence[Couple], template: str, stream: np.random.Generator) -> Row:
    """Make a subject and an attractor of the other number; the corrupted subject has the attractor's number."""
    subject, attractor = (NOUNS[index] for index in couples[0])
    is_plural = stream.random() < 0.5
    text, adjective = _text(AGREEMENT, template), _pick(ADJECTIVES, stream)
    clean, corrupt = (plural(subject), subject) if is_plural else (subject, plural(subject))
    between = attractor if is_plural else plural(attractor)
    before, near = (_word_before(slot, text).format(adjective=adjective) for slot in ("{subject}", "{attractor}"))
    return {
        "clean": text.format(subject=clean, attractor=between, adjective=adjective),
        "corrupt": text.format(subject=corrupt, attractor=between, adjective=adjective),
        "answer": " are" if is_plural else " is",
        "wrong_answer": " is" if is_plural else " are",
        "template": template,
        "entities": [subject, attractor],
        "spans": {
            "subject": {"clean": f"{before} {clean}", "corrupt": f"{before} {corrupt}"},
            "attractor": f"{near} {between}",
        },
    }


def _greater_than(couples: Sequence[Couple], template: str, stream: np.random.Generator) -> Row:
    """Make an event that starts in a year and ends later in its century; the corrupted start is year 01."""
    ((start, event),) = couples
    centuries = [century for place, century in enumerate(CENTURIES) if never_meet(place, start)]
    century = _pick(centuries, stream)
    text, slots = _text(GREATER_THAN, template), {"event": EVENTS[event], "century": century}
    return {
        "clean": text.format(start=century + YEARS[start], **slots),
        "corrupt": text.format(start=century + "01", **slots),
        "answer": list(YEARS[start + 1 :]),
        "wrong_answer": list(YEARS[: start + 1]),
        "template": template,
        "entities": [EVENTS[event], YEARS[start]],
        "spans": {
            "event": f"{_word_before('{event}', text)} {EVENTS[event]}",
            "start": {"clean": century + YEARS[start], "corrupt": century + "01"},
        },
    }


_MAKERS: Final[Mapping[str, _Maker]] = {
    "ioi": _Maker(lambda stream: _match(len(NAMES), stream), 1, _ioi),
    "induction": _Maker(lambda stream: _match(len(LIST_WORDS), stream), _COUPLES_PER_LIST, _induction),
    "agreement": _Maker(lambda stream: _match(len(NOUNS), stream), 1, _agreement),
    "greater_than": _Maker(_match_years, 1, _greater_than),
}


def _task(name: str, summary: str, templates: Sequence[Template | ListTemplate], metric: str) -> Task:
    maker = _MAKERS[name]
    capacity = len(maker.couples(generator(0, name, "couples", 0))) // maker.per_pair
    names = tuple(template.name for template in templates)
    return Task(name, summary, names, names[-1], capacity, min(_DEFAULT_PAIRS, capacity), metric)


TASKS: Final[Mapping[str, Task]] = MappingProxyType(
    {
        "ioi": _task("ioi", "Mary and John ... John gave a drink to: Mary", IOI, "logit_difference"),
        "induction": _task("induction", "a list of words, stated again: its next word", INDUCTION, "logit_difference"),
        "agreement": _task(
            "agreement", "the key near the cabinets: is, whatever stands between", AGREEMENT, "logit_difference"
        ),
        "greater_than": _task(
            "greater_than", "from the year 1732 to the year 17: a later year", GREATER_THAN, "probability"
        ),
    }
)
"""The built-in tasks by name."""
