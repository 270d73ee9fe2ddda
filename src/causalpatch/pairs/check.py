"""The report on a set of pairs: what would make its numbers mean less than they seem to."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from causalpatch.pairs.align import first_unequal
from causalpatch.pairs.pair import PROMPT, Pair
from causalpatch.pairs.prompts import is_unknown

if TYPE_CHECKING:
    from causalpatch.pairs.collection import Pairs

# Below 10 independent groups no interval is printed, below 30 it is approximate.
FEW_GROUPS = 10
APPROXIMATE_GROUPS = 30
# Above this share the second direction repeats the first.
MIRRORED = 0.1


@dataclass(frozen=True)
class PairReport:
    """What ``Pairs.check()`` found; ``str()`` is a table to read.

    Args:
        name: Name of the pairs.
        n_pairs: Number of pairs.
        n_components: Number of independent components: pairs that share no prompt, entity or group, even indirectly.
        mirrored_share: Share of pairs whose mirror (inputs and answers exchanged) is again a pair, from 0 to 1.
        duplicates: Ids of pairs that repeat an earlier one.
        same_input: Ids of pairs whose clean and corrupted inputs are equal: they have no gap.
        unknown_words: Ids of pairs with a word that the tokenizer does not know (a token ``<unk>`` or ``[UNK]``).
        unequal_lengths: Ids of pairs whose clean and corrupted prompts have different numbers of tokens.
        answer_tokens: Number of answers, right and wrong ones, by their number of tokens.
        without_answer: Ids of pairs without an answer.
        without_wrong_answer: Ids of pairs without a wrong answer.
        leaks: For each component that stands in several of the given splits, the ids of its pairs.
        split_sizes: Number of pairs in each given split.
        notes: What follows from the numbers, in words.
    """

    name: str
    n_pairs: int
    n_components: int
    mirrored_share: float
    duplicates: tuple[str, ...] = ()
    same_input: tuple[str, ...] = ()
    unknown_words: tuple[str, ...] = ()
    unequal_lengths: tuple[str, ...] = ()
    answer_tokens: Mapping[int, int] = field(default_factory=dict)
    without_answer: tuple[str, ...] = ()
    without_wrong_answer: tuple[str, ...] = ()
    leaks: tuple[tuple[str, ...], ...] = ()
    split_sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counted = ", ".join(f"{n} of {size}" for size, n in sorted(self.answer_tokens.items())) or "no answers"
        rows = [
            ("pairs", str(self.n_pairs)),
            ("independent components", str(self.n_components)),
            ("mirrored", f"{self.mirrored_share:.0%}"),
            ("duplicates", _listed(self.duplicates)),
            ("clean equals corrupted", _listed(self.same_input)),
            ("unknown words", _listed(self.unknown_words)),
            ("unequal lengths", _listed(self.unequal_lengths)),
            ("tokens per answer", counted),
            ("without answer", _listed(self.without_answer)),
            ("without wrong answer", _listed(self.without_wrong_answer)),
        ]
        if self.split_sizes:
            rows.append(("splits", ", ".join(f"{split} {n}" for split, n in self.split_sizes.items())))
            rows.append(("components in two splits", str(len(self.leaks))))
        width = max(len(word) for word, _ in rows)
        lines = [f"pairs of '{self.name}'", *(f"  {word:<{width}}  {value}" for word, value in rows)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def report(pairs: "Pairs") -> PairReport:
    """Look through a set of pairs.

    Args:
        pairs: The pairs.
    """
    keys = [_key(pair) for pair in pairs]
    known = set(keys)
    mirrored = [_mirror(key) in known for key in keys]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    sizes = Counter(len(answer) for pair in pairs for answer in (*pair.answer, *pair.wrong_answer))
    unequal = [pair.id for pair in pairs if _is_unequal(pair)] if pairs.kind == "tokens" else []
    found = PairReport(
        name=pairs.name,
        n_pairs=len(pairs),
        n_components=len(set(pairs.components.tolist())),
        mirrored_share=sum(mirrored) / len(pairs),
        duplicates=tuple(pairs[i].id for i, key in enumerate(keys) if first[key] < i),
        same_input=tuple(pair.id for pair, key in zip(pairs, keys, strict=True) if key[0] == key[1]),
        unknown_words=tuple(_with_unknown_words(pairs)),
        unequal_lengths=tuple(unequal),
        answer_tokens=dict(sorted(sizes.items())),
        without_answer=tuple(pair.id for pair in pairs if not pair.answer),
        without_wrong_answer=tuple(pair.id for pair in pairs if not pair.wrong_answer),
        leaks=tuple(tuple(pairs[i].id for i in members) for members in leaking(pairs)),
        split_sizes=dict(sorted(Counter(pair.split for pair in pairs if pair.split is not None).items())),
    )
    return _with_notes(found)


def leaking(pairs: "Pairs") -> list[list[int]]:
    """Return the pairs of each component that stands in several of the given splits."""
    members: dict[int, list[int]] = {}
    for index, component in enumerate(pairs.components.tolist()):
        members.setdefault(component, []).append(index)
    return [held for held in members.values() if len({pairs[i].split for i in held} - {None}) > 1]


def _with_unknown_words(pairs: "Pairs") -> list[str]:
    """Return the ids of pairs that hold a token which stands for any unknown word."""
    if pairs.kind != "tokens" or pairs.tokenizer is None:
        return []
    held = [_ids_of(pair) for pair in pairs]
    used = np.unique(np.concatenate(held))
    unknown = [token for token in used.tolist() if is_unknown(pairs.tokenizer, token)]
    return [pair.id for pair, ids in zip(pairs, held, strict=True) if np.isin(ids, unknown).any()] if unknown else []


def _ids_of(pair: Pair) -> NDArray[np.int64]:
    """Return all ids of a pair's prompts."""
    of_encoder = [_ids_of(pair.encoder)] if pair.encoder is not None and pair.encoder.is_called == PROMPT else []
    return np.concatenate([pair.clean, pair.corrupt, *of_encoder])


def _is_unequal(pair: Pair) -> bool:
    return first_unequal([pair, *([pair.encoder] if pair.encoder else [])]) is not None


def _listed(ids: Sequence[str]) -> str:
    if not ids:
        return "0"
    return f"{len(ids)}: {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}"


def _with_notes(found: PairReport) -> PairReport:
    notes = []
    if found.n_components < FEW_GROUPS:
        notes.append(f"fewer than {FEW_GROUPS} independent components: no interval can be given")
    elif found.n_components < APPROXIMATE_GROUPS:
        notes.append(f"fewer than {APPROXIMATE_GROUPS} independent components: intervals are approximate")
    if found.mirrored_share > MIRRORED:
        notes.append("mirrored pairs: denoise and noise give the same numbers; the second is redundant by construction")
    if found.same_input:
        notes.append("pairs with equal inputs have no gap; drop them")
    if found.unknown_words:
        notes.append("words that the model does not know are all one token to it; use words of its vocabulary")
    if found.leaks:
        notes.append("given splits share prompts, entities or groups; use pairs.split()")
    return PairReport(**{**vars(found), "notes": tuple(notes)})


def _key(pair: Pair) -> tuple[str, str, Hashable, Hashable]:
    return *pair.digests, frozenset(pair.answer), frozenset(pair.wrong_answer)


def _mirror(key: tuple[str, str, Hashable, Hashable]) -> tuple[str, str, Hashable, Hashable]:
    clean, corrupt, answer, wrong = key
    return corrupt, clean, wrong, answer
