"""Candidates: what may stand beside a failing prompt, made in four ways; whether it works is for the model to say.

===============  ===================================================================================================
``works``        a prompt that is said to work, as it is
``substitution`` the failing prompt with some of its words replaced: of each stretch in which it differs from a prompt
                 that works by what stands there; of a span that is named by its replacements, or by what spans of that
                 name hold elsewhere
``template``     a template that the failing prompt fits, with other fillers
``length``       the failing prompt with one word or span replaced by another of as many tokens, from a vocabulary or
                 from the other prompts
===============  ===================================================================================================
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from causalpatch.base.errors import PairError
from causalpatch.base.seeds import generator
from causalpatch.pairs.edits import Place, Prompt, differences, words_of
from causalpatch.pairs.failures import Answer, Failure, Working

WAYS: Final = ("works", "substitution", "template", "length")
_SLOT = re.compile(r"\{(\w+)\}")

Length = Callable[[Prompt], int]
Slots = Mapping[str, str]


@dataclass(frozen=True)
class Candidate:
    """A failing prompt, and what may be its partner.

    Args:
        failure: The failing prompt.
        prompt: The partner.
        way: How it was made.
        answer: What the partner is to be answered by, as a column of pairs.
        changed: The words that the two differ in.
        entities: Names that the two are said to speak of.
        spans: Text of named spans in the partner and in the failing prompt.
        extra: Further columns, such as the template.
    """

    failure: Failure
    prompt: Prompt
    way: str
    answer: Answer
    changed: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()
    spans: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptTemplate:
    """A text with slots in braces, and what may stand in them.

    Args:
        name: How it is reported.
        prompt: The text.
        fillers: The slots of each way to fill it; a slot that the text lacks may stand in the answer.
        answer: The answer, with slots; None where every filling is to be answered as the failing prompt is.
    """

    name: str
    prompt: str
    fillers: tuple[Slots, ...]
    answer: str | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any], number: int) -> "PromptTemplate":
        """Read a template.

        Args:
            value: ``prompt`` and ``fillers``: a list of mappings from slot to filler, or a mapping from slots to lists,
                of which every combination is made; perhaps ``answer`` and ``name``.
            number: Which one it is, for its name and for errors.

        Raises:
            PairError: A slot has no filler, or the prompt has no slot.
        """
        prompt, fillers, answer = value.get("prompt"), value.get("fillers"), value.get("answer")
        slots = _SLOT.findall(prompt) if isinstance(prompt, str) else []
        needed = dict.fromkeys([*slots, *_SLOT.findall(answer or "")])
        listed = _combined(fillers) if isinstance(fillers, Mapping) else list(fillers or ())
        lacking = [slot for slot in needed if not listed or any(slot not in one for one in listed)]
        if not slots or lacking:
            raise PairError(
                f"template {number} cannot be filled" if slots else f"template {number} has no slot",
                facts=[("prompt", repr(prompt)[:80]), ("without fillers", ", ".join(lacking) or "none")],
                fix='write {"prompt": "{name} ran to", "fillers": {"name": ["Mary", "Tom"]}}',
            )
        return cls(str(value.get("name", number)), str(prompt), tuple(listed), answer)

    def filled(self, slots: Slots) -> str:
        """Return the prompt with its slots filled."""
        return fill(self.prompt, slots)

    def fitting(self, prompt: Prompt) -> tuple[int, Slots] | None:
        """Return which part of a prompt the template is, and what fills its slots there; None where it fits none."""
        pieces, seen = [], set()
        for k, piece in enumerate(_SLOT.split(self.prompt)):
            again = k % 2 and piece in seen
            pieces.append(f"(?P={piece})" if again else f"(?P<{piece}>.+?)" if k % 2 else re.escape(piece))
            seen |= {piece} if k % 2 else set()
        for part, text in enumerate(prompt.parts):
            found = re.fullmatch("".join(pieces), text, re.DOTALL)
            if found:
                return part, found.groupdict()
        return None


def candidates(
    failure: Failure,
    ways: Sequence[str],
    material: "Material",
    length: Length,
    tries: int,
    seed: int,
    equally: Sequence[str] = ("length",),
) -> tuple[list[Candidate], dict[str, int]]:
    """Return what may stand beside a failing prompt.

    Args:
        failure: The prompt.
        ways: In which ways.
        material: What candidates are made of.
        length: Counts the tokens of a prompt.
        tries: The most of each way.
        seed: Seed of the draw among more.
        equally: In which ways partners must have as many tokens.

    Returns:
        The candidates, each prompt once, and how many of each way were not tried.
    """
    found: list[Candidate] = []
    beyond: dict[str, int] = {}
    seen = {failure.prompt}
    for way in ways:
        made = []
        for one in _MAKERS[way](failure, material, length):
            if one.prompt not in seen:
                seen.add(one.prompt)
                made.append(one)
        n_fitting = 0
        # What is nearest stands first where prompts that work are given; else any is as good as another.
        order = range(len(made)) if way == "works" else generator(seed, way, failure.id).permutation(len(made)).tolist()
        for n_seen, k in enumerate(order):
            if n_fitting == tries:
                beyond[way] = len(made) - n_seen
                break
            if way not in equally or length(made[k].prompt) == length(failure.prompt):
                n_fitting += 1
                found.append(made[k])
    return found, beyond


@dataclass(frozen=True)
class Material:
    """What candidates are made of.

    Args:
        works: Prompts that work, for every failing prompt.
        templates: Templates.
        spans: Texts of spans by name, of all prompts.
        vocabulary: Words for replacements of as many tokens.
    """

    works: tuple[Working, ...]
    templates: tuple[PromptTemplate, ...]
    spans: Mapping[str, Sequence[str]]
    vocabulary: Sequence[str]

    @classmethod
    def of(
        cls,
        failures: Sequence[Failure],
        works: Sequence[Working],
        templates: Sequence[PromptTemplate],
        vocabulary: Sequence[str] | None,
    ) -> "Material":
        """Gather it from all prompts."""
        everything: list[Failure | Working] = [
            *failures,
            *works,
            *(one for failure in failures for one in failure.works),
        ]
        spans: dict[str, list[str]] = {}
        for each in everything:
            for name, text in each.spans.items():
                spans.setdefault(name, []).append(text)
        words = vocabulary if vocabulary is not None else words_of([str(each.prompt) for each in everything])
        return cls(
            tuple(works), tuple(templates), {name: list(dict.fromkeys(texts)) for name, texts in spans.items()}, words
        )


def _works(failure: Failure, material: Material, length: Length) -> Iterator[Candidate]:
    """Yield the prompts that work: its own ones, then of the common ones the nearest, equally long ones first."""
    for work in _nearest(failure, material, length):
        words = _changed(failure.prompt, differences(failure.prompt, work.prompt))
        entities = tuple(dict.fromkeys((*failure.entities, *work.entities)))
        spans = {name: (work.spans[name], text) for name, text in failure.spans.items() if name in work.spans}
        yield Candidate(failure, work.prompt, "works", work.answer or failure.answer, words, entities, spans)


def _nearest(failure: Failure, material: Material, length: Length) -> list[Working]:
    own = list(failure.works)
    others = [work for work in material.works if work.prompt != failure.prompt]
    size = length(failure.prompt)

    def far(work: Working) -> tuple[bool, bool, int]:
        changed = differences(failure.prompt, work.prompt)
        n_words = sum(max(len(failure.prompt.text(place).split()), len(text.split())) for place, text in changed)
        return work.prompt.roles != failure.prompt.roles, length(work.prompt) != size, n_words

    return [*own, *sorted(others, key=far)]


def _substitutions(failure: Failure, material: Material, length: Length) -> Iterator[Candidate]:
    for name in failure.spans:
        for other in failure.replacements.get(name) or material.spans.get(name, ()):
            yield _replaced(failure, name, other, "substitution", failure.answer)
    for work in _nearest(failure, material, length):
        changed = differences(failure.prompt, work.prompt)
        if len(changed) > 1:  # of one alone the prompt that works is the substitution
            for place, other in changed:
                yield _replaced(failure, place, other, "substitution", work.answer or failure.answer)


def _from_templates(failure: Failure, material: Material, length: Length) -> Iterator[Candidate]:
    del length
    for template in material.templates:
        fit = template.fitting(failure.prompt)
        if fit is None:
            continue
        part, has = fit
        whole = Place(part, 0, len(failure.prompt.parts[part]))
        for slots in template.fillers:
            prompt = failure.prompt.replaced(whole, template.filled(slots))
            answer = failure.answer if template.answer is None else {"answer": fill(template.answer, slots)}
            if "answer" in answer and answer["answer"] == failure.wrong.get("wrong_answer"):
                continue  # answered alike, so no partner
            both = {slot: (slots[slot], held) for slot, held in has.items()}
            words = tuple(dict.fromkeys(text for pair in both.values() if pair[0] != pair[1] for text in pair))
            once = [str(prompt).count(one) == 1 == str(failure.prompt).count(two) for one, two in both.values()]
            spans = {slot: both[slot] for slot, is_once in zip(both, once, strict=True) if is_once}
            more = {"template": template.name}
            yield Candidate(failure, prompt, "template", answer, words, failure.entities, spans, more)


def _of_equal_length(failure: Failure, material: Material, length: Length) -> Iterator[Candidate]:
    """Yield replacements of each named span, or of each word where none is named; those as long are picked later."""
    del length
    for place in [*failure.spans] or failure.prompt.words:
        for word in material.vocabulary:
            yield _replaced(failure, place, word, "length", failure.answer)


def _replaced(failure: Failure, where: Place | str, text: str, way: str, answer: Answer) -> Candidate:
    """Put a text in place of a span, or of what stands at a place."""
    named = {} if isinstance(where, Place) else {where: text}
    place = where if isinstance(where, Place) else failure.prompt.find(failure.spans[where], where, failure.where)
    prompt = failure.prompt.replaced(place, text)
    spans = {
        name: (named.get(name, held), held)
        for name, held in failure.spans.items()
        if str(prompt).count(named.get(name, held)) == 1
    }
    changed = _changed(failure.prompt, [(place, text)])
    return Candidate(failure, prompt, way, answer, changed, failure.entities, spans)


def _changed(prompt: Prompt, found: Sequence[tuple[Place, str]]) -> tuple[str, ...]:
    """Return the words that two prompts differ in, of both."""
    texts = [text for place, other in found for text in (prompt.text(place), other)]
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def fill(text: str, slots: Slots) -> str:
    """Return a text with its slots filled."""
    return _SLOT.sub(lambda found: str(slots[found[1]]), text)


def prompts_of(templates: Sequence[PromptTemplate]) -> list[Failure]:
    """Return every prompt of templates as one whose partner is to be answered otherwise, by its own answer.

    Args:
        templates: Templates that say the answer.

    Raises:
        PairError: One does not.
    """
    made = []
    for template in templates:
        if template.answer is None:
            raise PairError(
                f"template {template.name} does not say how its prompts are to be answered",
                facts=[("prompt", repr(template.prompt)[:80])],
                fix='add "answer": " {slot}", or give failing prompts beside the templates',
            )
        for number, slots in enumerate(template.fillers):
            name = f"{template.name}-{number}"
            wrong = {"wrong_answer": fill(template.answer, slots)}
            made.append(Failure(f"template {template.name}", name, Prompt((template.filled(slots),)), {}, wrong))
    return made


def _combined(fillers: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    made: list[dict[str, str]] = [{}]
    for slot, texts in fillers.items():
        made = [{**one, slot: text} for one in made for text in texts]
    return made if fillers else []


_MAKERS: Final[Mapping[str, Callable[[Failure, Material, Length], Iterator[Candidate]]]] = {
    "works": _works,
    "substitution": _substitutions,
    "template": _from_templates,
    "length": _of_equal_length,
}
