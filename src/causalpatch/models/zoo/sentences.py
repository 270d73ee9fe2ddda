"""The sentences that the embedded model is trained on: drawn from the task templates and from fillers around them.

A *story* is a row of sentences of all kinds; a *recital* is a row in which one list of words is stated again and again.
A star marks a word that follows from what stands before it; the training loss counts those fully and others little.

Two habits keep the model from answering by shortcut. Names recur before, between and after the sentences that matter,
and sentences with three names exist, so who receives cannot be told by counting names. And lists are taken up again at
any of their words, so the next word cannot be told by its distance.

Couples for which ``never_meet`` holds are kept apart, and the last template of each task is left out.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from causalpatch.pairs.templates import AGREEMENT, GREATER_THAN, INDUCTION, IOI
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

WORD_PATTERN: Final = r"\d\d|\w+|[^\w\s]"
_WORD: Final = re.compile(rf"\*?(?:{WORD_PATTERN})")
_SLOT: Final = re.compile(r"\{\w+\}")
_PEOPLE_PER_STORY = 6
_ASIDES: Final = (
    "{x} was {mood}.",
    "{x} felt {mood}.",
    "{x} saw the {noun}.",
    "Then {x} was {mood}.",
    "{x} passed the {place}.",
    "{x} came back from the {place}.",
    "They said that {x} was {mood}.",
)
_FILLERS: Final = (
    "The {noun} was {adjective}.",
    "Once the {noun} was {adjective}.",
    "They said that the {noun} was {adjective}.",
    "It did not stop.",
    "The {event} did not stop.",
    "They came back from the {place}.",
    "The {noun} was near the {place}.",
    "Then they said that it was {adjective}.",
    "Once they passed a {object}.",
)

# Sentences are put together from these parts as often as they follow a template, or a new template would be foreign.
_CLAUSES: Final = ("When ", "After ", "While ", "Once ")
_WHEN: Final = (*_CLAUSES, "Then ", "Today ", "")
_DOING: Final = (
    "went to",
    "met at",
    "had fun at",
    "worked at",
    "came to",
    "stood near",
    "were at",
    "ran from",
    "stopped at",
)
_GAVE: Final = ("gave", "handed", "offered", "showed", "sold", "brought", "took", "read", "passed")
_AFTER: Final = ("", "", "", " *{receiver} thanked *{giver}.", " {x} was {mood}.", " {x} saw {y}.")
_SUBJECTS: Final = (
    "The",
    "The",
    "Today the",
    "Then the",
    "Once the",
    "People say that the",
    "They said that the",
    "First the",
)
_LINKS: Final = ("near", "behind", "from", "beside", "next to", "under", "close to", "that stood behind", "that ran to")
_VERBS: Final = (("is", "are"), ("is", "are"), ("was", "were"))
_COURSES: Final = (
    (("lasted from", "ran from", "took place from"), ("to", "until")),
    (("took place between", "ran between"), ("and",)),
    (
        ("began in", "started in", "opened in"),
        ("and ended in", "and closed in", "and it was over by", "and went on until"),
    ),
    (
        ("that began in", "that opened in"),
        ("ended in", "closed in", "did not end before", "went on until", "stopped in"),
    ),
)
_LATER: Final = (
    "Then it stopped in",
    "It opened again in",
    "It ended again in",
    "It was over in",
    "Then it went on until",
)
_LITTLE_WORDS: Final = (
    *("then", "and", "we", "read", "they", "that", "the", "was", "said", "to", "it", "is"),
    *("They", "Then", "Once", "It", "Today", "People", "say", "Again", ",", ".", ":", ";"),
)
_MIX: Final = ("transfer",) * 8 + ("event",) * 6 + ("agreement",) * 3 + ("three",) * 2 + ("filler",)


class Sentences:
    """An endless, seeded source of training text.

    Args:
        seed: Seed of every draw.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # many small draws, for which numpy's streams are slow
        self._makers: dict[str, Callable[[Sequence[str]], str]] = {
            "transfer": self._transfer,
            "agreement": self._agreement,
            "event": self._event,
            "three": self._three,
            "filler": self._filler,
        }

    def story(self) -> Iterator[str]:
        """Yield sentences of all kinds, about a few people none of whom must be kept apart."""
        people = self._apart(NAMES, _PEOPLE_PER_STORY)
        while True:
            yield self._makers[self._random.choice(_MIX)](self._random.sample(people, 4))

    def recital(self) -> Iterator[str]:
        """Yield a list of words, and then pieces of it, each begun at any word and going on to any later one."""
        opening, between = self._frame()
        words = self._list(self._random.randint(6, 12))
        yield opening + " ".join(words)
        while True:
            start = self._random.randrange(len(words) - 1)
            stop = self._random.randint(start + 2, len(words))
            yield between + " ".join([words[start], *(f"*{word}" for word in words[start + 1 : stop])])

    def _frame(self) -> tuple[str, str]:
        """Return what opens a recital and what stands between its lists: a template's, or any few little words."""
        if self._random.random() < 0.5:
            frame = self._random.choice(INDUCTION[:-1])
            return frame.opening, frame.between
        while True:
            opening, between = (
                " ".join(self._random.choices(_LITTLE_WORDS, k=self._random.randint(0, 4))) + " " for _ in range(2)
            )
            if between != INDUCTION[-1].between:
                return opening, between

    def _apart(self, words: Sequence[str], count: int) -> list[str]:
        """Draw words of which no two must be kept apart."""
        chosen: list[int] = []
        while len(chosen) < count:
            index = self._random.randrange(len(words))
            if index not in chosen and not any(never_meet(index, other) for other in chosen):
                chosen.append(index)
        return [words[index] for index in chosen]

    def _list(self, count: int) -> list[str]:
        """Draw words of which no two neighbours must be kept apart."""
        chosen: list[int] = []
        while len(chosen) < count:
            index = self._random.randrange(len(LIST_WORDS))
            if index not in chosen and not (chosen and never_meet(index, chosen[-1])):
                chosen.append(index)
        return [LIST_WORDS[index] for index in chosen]

    def _slots(self) -> dict[str, str]:
        choice = self._random.choice
        return {
            "place": choice(PLACES),
            "object": choice(OBJECTS),
            "noun": choice(NOUNS),
            "adjective": choice(ADJECTIVES),
            "mood": choice(MOODS),
            "event": choice(EVENTS),
        }

    def _asides(self, people: Sequence[str]) -> str:
        """Return none, one or two asides about these people, each ended by a space."""
        count = self._random.choice((0, 0, 1, 1, 2))
        texts = (
            self._random.choice(_ASIDES).format(x=self._random.choice(people), **self._slots()) for _ in range(count)
        )
        return "".join(text + " " for text in texts)

    def _transfer(self, people: Sequence[str]) -> str:
        """Two people are together and one of them gives: the other receives."""
        receiver, giver, other = people[:3]
        a, b = (receiver, giver) if self._random.random() < 0.5 else (giver, receiver)
        named, slots = (receiver, giver, other), self._slots()
        slots["adjective"] = slots["mood"]
        text = (
            self._random.choice(IOI[:-1]).text if self._random.random() < 0.5 else self._scene("{a} and {b}", "{giver}")
        )
        text = text.replace(". {giver}", ". " + self._asides(named) + "{giver}")
        body = text.format(a=a, b=b, giver=giver, aside=self._random.choice(named), **slots)
        x, y = self._random.sample(named, 2)
        after = self._random.choice(_AFTER).format(receiver=receiver, giver=giver, x=x, y=y, **slots)
        return f"{self._asides(named)}{body} *{receiver}.{after}"

    def _three(self, people: Sequence[str]) -> str:
        """Three people are together and two of them give: the third receives."""
        a, b, c = people[:3]
        receiver, *givers = self._random.sample((a, b, c), 3)
        text = self._scene(f"{a}, {b} and {c}", " and ".join(givers)).format(**self._slots())
        return f"{self._asides(people)}{text} *{receiver}."

    def _scene(self, together: str, giver: str) -> str:
        """Return a template in which these people are together and these of them give."""
        choice = self._random.choice
        while True:
            when, doing, gave = choice(_WHEN), choice(_DOING), choice(_GAVE)
            if (when == "Once ") + (doing == "came back from") + (gave == "passed") <= 1:  # all three: held out
                break
        link = "," if when in _CLAUSES else choice((".", ".", " and", ", then"))
        article = choice(("a", "the"))
        return f"{when}{together} {doing} the {{place}}{link} {giver} {gave} {article} {{object}} to"

    def _agreement(self, people: Sequence[str]) -> str:
        """A verb agrees with its subject, whatever stands between: nothing, one other noun or two."""
        del people
        subject, *others = self._apart(NOUNS, 3)
        is_plural = self._random.random() < 0.5
        subject = plural(subject) if is_plural else subject
        if self._random.random() < 0.5:
            text = self._random.choice(AGREEMENT[:-1]).text
            text = text.format(
                subject=subject, attractor=self._noun(others[0]), adjective=self._random.choice(ADJECTIVES)
            )
        else:
            text = f"{self._random.choice(_SUBJECTS)} {self._described(subject)}"
            for other in others[: self._random.choice((0, 1, 1, 2))]:
                text += f" {self._random.choice(_LINKS)} the {self._described(self._noun(other))}"
        return f"{text} *{self._random.choice(_VERBS)[is_plural]} {self._random.choice(ADJECTIVES)}."

    def _noun(self, noun: str) -> str:
        return plural(noun) if self._random.random() < 0.5 else noun

    def _described(self, noun: str) -> str:
        return f"{self._random.choice(ADJECTIVES)} {noun}" if self._random.random() < 0.4 else noun

    def _event(self, people: Sequence[str]) -> str:
        """An event starts in one year and ends in a later year of the same century."""
        del people
        place = self._random.randrange(len(CENTURIES))
        start = self._random.randrange(1, 99)
        if never_meet(place, start):
            start = start + 1 if start < 98 else start - 1
        end = self._random.randint(start + 1, 99)
        century, event = CENTURIES[place], self._random.choice(EVENTS)
        if self._random.random() < 0.5:
            text = self._random.choice(GREATER_THAN[:-1]).text
        else:
            began, ended = map(self._random.choice, self._random.choice(_COURSES))
            text = f"{self._random.choice(_SUBJECTS)} {{event}} {began} {{start}} {ended} {{century}}"
        body = f"{text.format(event=event, start=century + YEARS[start], century='*' + century)}*{YEARS[end]}."
        while end < 99 and self._random.random() < 0.5:
            end = self._random.randint(end + 1, 99)
            body += f" {self._random.choice(_LATER)} *{century}*{YEARS[end]}."
        return body

    def _filler(self, people: Sequence[str]) -> str:
        del people
        return self._random.choice(_FILLERS).format(**self._slots())


def split_words(text: str) -> list[str]:
    """Return the words of a text as the embedded model's tokenizer sees them, stars kept.

    Examples:
        >>> split_words("It ended in *17*45.")
        ['It', 'ended', 'in', '*17', '*45', '.']
    """
    return _WORD.findall(text)


def vocabulary() -> list[str]:
    """Return every word of the training texts and of the built-in tasks, once, in a fixed order."""
    frames = (part for frame in INDUCTION for part in (frame.opening, frame.between))
    texts = [template.text for group in (IOI, AGREEMENT, GREATER_THAN) for template in group]
    texts += [*frames, *_ASIDES, *_FILLERS, *_WHEN, *_DOING, *_GAVE, *_AFTER, *_SUBJECTS, *_LINKS]
    texts += [
        *(part for course in _COURSES for parts in course for part in parts),
        *_LATER,
        *_LITTLE_WORDS,
        *(verb for verbs in _VERBS for verb in verbs),
    ]
    words = split_words(" ".join(_SLOT.sub(" ", text) for text in texts))
    words += [*YEARS, *NAMES, *NOUNS, *map(plural, NOUNS), *EVENTS, *ADJECTIVES]
    return list(dict.fromkeys(word.lstrip("*") for word in words if word != "*"))
