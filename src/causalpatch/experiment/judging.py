"""Which prompts fail and which partners work: runs, verdicts, and what is dropped for which reason."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from torch import Tensor

from causalpatch.base.errors import PairError
from causalpatch.experiment.experiment import Experiment
from causalpatch.metrics import Metric, Outputs, log_probability_difference, logit_difference
from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs, load_pairs
from causalpatch.pairs.align import changed_range
from causalpatch.pairs.candidates import Candidate
from causalpatch.pairs.components import vertices
from causalpatch.pairs.edits import Prompt
from causalpatch.pairs.failures import Failure
from causalpatch.pairs.made import (
    ANSWERED_RIGHT,
    NOT_AGAINST,
    OTHER_CHOICE,
    OTHER_FAILS,
    PARTNER_FAILS,
    SAME_ANSWER,
    SAME_TOKENS,
    SHARED,
    UNREADABLE,
    Dropped,
    account,
)
from causalpatch.pairs.pair import Answers

CHANGED: Final = "changed"
"""The span from the first to the last token in which the two prompts of a made pair differ."""


def _first_choice(outputs: Outputs, pairs: Pairs) -> Tensor:
    return outputs.distribution.argmax(-1).to(outputs.distribution.dtype)


_FIRST_CHOICE = Metric("first_choice", _first_choice, columns="all")


@dataclass(frozen=True)
class ReadCandidate:
    """A pair, with the row that it is read from.

    Args:
        candidate: What it was made as.
        row: Its row for ``load_pairs``.
        pair: The pair.
    """

    candidate: Candidate
    row: dict[str, Any]
    pair: Pair


@dataclass(frozen=True)
class Verdicts:
    """What the untouched runs of pairs say, each with axis (pair,).

    Args:
        difference: By how much the answer is preferred to the wrong one, on the clean and the corrupted side.
        choice: Id of the first choice, likewise.
    """

    difference: tuple[np.ndarray, np.ndarray]
    choice: tuple[np.ndarray, np.ndarray]


class Judge:
    """Runs prompts, and keeps account of what is dropped.

    Args:
        model: The model.
        name: What the prompts are called.
        strict: Whether answers must also be first choices.
        first_token: Whether answers are cut to their first token.
        at: Where outputs are read.
        against: Another model, which runs the clean prompts of pairs.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        strict: bool,
        first_token: bool,
        at: int | str,
        against: Model | None = None,
    ) -> None:
        self.model = model
        self.against = against
        self.name = name
        self.dropped: list[Dropped] = []
        self._strict = strict
        self._first_token = first_token
        self._at = at
        self._lengths: dict[Prompt, int] = {}

    def length(self, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt."""
        if prompt not in self._lengths:
            row = {"clean": prompt.given, "corrupt": prompt.given}
            self._lengths[prompt] = len(self._load([row])[0].clean)
        return self._lengths[prompt]

    def failing(self, failures: Sequence[Failure]) -> list[Failure]:
        """Return the prompts that fail, each with the wrong answer that the model gives.

        A prompt that no answer is wanted of counts as one: whether it gives its own is seen beside its partner.

        Raises:
            PairError: None does.
        """
        asked = [failure for failure in failures if failure.answer]
        found = {failure.id: failure for failure in failures if not failure.answer}
        if asked:
            given = [failure.prompt.given for failure in asked]
            sides = [{"clean": prompt, "corrupt": prompt} for prompt in given]
            pairs = self._load([{**side, **f.answer, **f.wrong} for side, f in zip(sides, asked, strict=True)])
            for is_named in (True, False):
                some = [k for k, failure in enumerate(asked) if bool(failure.wrong) == is_named]
                found |= self._failing([asked[k] for k in some], pairs.take(some)) if some else {}
        if not found:
            raise PairError(
                f"none of the {len(failures)} prompts of '{self.name}' fails in '{self.model.name}'",
                facts=account(self.dropped),
                fix="check that answer is what is wanted (mostly with a space in front), and that this is the model",
            )
        return [found[failure.id] for failure in failures if failure.id in found]

    def working(self, made: Sequence[Candidate], *, entity_disjoint: bool) -> list[ReadCandidate]:
        """Return the candidates that work beside a prompt that fails, as pairs.

        Args:
            made: The candidates.
            entity_disjoint: Whether to keep such alone as share no prompt and no entity.
        """
        tried = [self._read(one, number, entity_disjoint=entity_disjoint) for number, one in enumerate(made)]
        read = [one for one in tried if one is not None]
        kept = list(self._kept(read)) if read else []
        return self._disjoint(kept) if entity_disjoint else kept

    def _load(self, rows: Sequence[Mapping[str, Any]]) -> Pairs:
        return load_pairs(rows, self.model, first_token=self._first_token, name=self.name)

    def _failing(self, failures: Sequence[Failure], pairs: Pairs) -> dict[str, Failure]:
        said = self._measured(pairs)
        found = {}
        for failure, pair, difference, choice in zip(failures, pairs, said.difference[0], said.choice[0], strict=True):
            if not pair.wrong_answer:
                if choice in _firsts(pair.answer):
                    self._drop(failure, None, ANSWERED_RIGHT, failure.prompt)
                else:
                    found[failure.id] = replace(failure, wrong={"wrong_answer_id": [int(choice)]})
            elif difference >= 0:
                self._drop(failure, None, ANSWERED_RIGHT, failure.prompt, f"answer ahead by {difference:.2f}")
            elif self._strict and choice not in _firsts(pair.wrong_answer):
                self._drop(failure, None, OTHER_CHOICE, failure.prompt, self._label(int(choice)))
            else:
                found[failure.id] = failure
        return found

    def _measured(self, pairs: Pairs, against: Model | None = None) -> Verdicts:
        """Run both sides of pairs, the clean one in another model if there is one.

        There is no difference where a wrong answer is lacking.
        """
        compares = all(pair.wrong_answer for pair in pairs)
        metrics = [_FIRST_CHOICE.at(self._at)]
        if compares:
            metrics.append(comparing(pairs).at(self._at))
        baseline = Experiment(self.model, pairs, metric=metrics, source_model=against).baseline
        sides = (baseline.clean, baseline.corrupt)
        differences = [side[1] if compares else np.full(len(pairs), np.nan) for side in sides]
        return Verdicts((differences[0], differences[1]), (sides[0][0].astype(int), sides[1][0].astype(int)))

    def _read(self, candidate: Candidate, number: int, *, entity_disjoint: bool) -> ReadCandidate | None:
        """Read a candidate as a pair; None where that cannot be."""
        failure = candidate.failure
        entities = (*candidate.entities, *(candidate.changed if entity_disjoint else ()))
        row: dict[str, Any] = {
            **failure.extra,
            "id": f"{failure.id}/{candidate.way}-{number}",
            "clean": candidate.prompt.given,
            "corrupt": failure.prompt.given,
            **candidate.answer,
            **failure.wrong,
            "entities": list(dict.fromkeys(entities)),
            "group": failure.group,
            "spans": {name: {"clean": a, "corrupt": b} for name, (a, b) in candidate.spans.items()},
            "failure": failure.id,
            "way": candidate.way,
            **candidate.extra,
        }
        try:
            pair = self._load([row])[0]
        except PairError as error:
            why = SAME_ANSWER if "both right and wrong" in error.what else UNREADABLE
            self._drop(failure, candidate.way, why, candidate.prompt, error.what)
            return None
        inputs = pair.encoder or pair
        if self.against is None and np.array_equal(inputs.clean, inputs.corrupt):
            self._drop(failure, candidate.way, SAME_TOKENS, candidate.prompt)
            return None
        if self.against is None and CHANGED not in row["spans"]:
            clean, corrupt = changed_range(inputs.clean, inputs.corrupt)
            row["spans"][CHANGED] = {"clean": list(clean), "corrupt": list(corrupt)}
            pair = self._load([row])[0]
        return ReadCandidate(candidate, row, pair)

    def _kept(self, read: Sequence[ReadCandidate]) -> Iterator[ReadCandidate]:
        pairs = Pairs([one.pair for one in read], name=self.name, tokenizer=self.model.tokenizer)
        said = self._measured(pairs, self.against)
        fails = PARTNER_FAILS if self.against is None else OTHER_FAILS
        for k, one in enumerate(read):
            clean, corrupt = (side[k] for side in said.difference)
            right, wrong = (side[k] for side in said.choice)
            failure, way = one.candidate.failure, one.candidate.way
            if not clean > 0:
                self._drop(failure, way, fails, one.candidate.prompt, f"wrong answer ahead by {-clean:.2f}")
            elif not corrupt < 0:
                detail = f"its answer ahead by {corrupt:.2f}"
                self._drop(failure, way, NOT_AGAINST, one.candidate.prompt, detail)
            elif self._strict and right not in _firsts(one.pair.answer):
                self._drop(failure, way, OTHER_CHOICE, one.candidate.prompt, self._label(int(right)))
            elif self._strict and wrong not in _firsts(one.pair.wrong_answer):
                self._drop(failure, way, OTHER_CHOICE, failure.prompt, self._label(int(wrong)))
            else:
                yield one

    def _disjoint(self, kept: Sequence[ReadCandidate]) -> list[ReadCandidate]:
        """Choose pairs that share nothing: first what shares least with others that are left, templates in turn."""
        held = [set(vertices(one.pair)) for one in kept]
        kinds = [str(one.candidate.extra.get("template", one.candidate.way)) for one in kept]
        shared = Counter(vertex for each in held for vertex in each)
        n_of: Counter[str] = Counter()
        left = list(range(len(kept)))
        chosen: list[int] = []
        while left:
            best = min(left, key=lambda k: (sum(shared[vertex] for vertex in held[k]), n_of[kinds[k]]))
            chosen.append(best)
            n_of[kinds[best]] += 1
            gone = [k for k in left if not held[best].isdisjoint(held[k])]
            for k in gone:
                shared.subtract(held[k])
                if k != best:
                    self._drop(kept[k].candidate.failure, kept[k].candidate.way, SHARED, kept[k].candidate.prompt)
            left = [k for k in left if k not in set(gone)]
        return [kept[k] for k in sorted(chosen)]

    def _label(self, token: int) -> str:
        return repr(self.model.tokenizer.label(token)) if self.model.tokenizer else str(token)

    def _drop(self, failure: Failure, way: str | None, why: str, prompt: Prompt, detail: str = "") -> None:
        self.dropped.append(Dropped(failure.id, way, why, str(prompt), detail))


def comparing(pairs: Pairs) -> Metric:
    """Return what compares right and wrong answers: logits, or log-probabilities where answers have several tokens."""
    is_short = all(len(answer) == 1 for pair in pairs for answer in (*pair.answer, *pair.wrong_answer))
    return logit_difference if is_short else log_probability_difference


def _firsts(answers: Answers) -> set[int]:
    return {answer[0] for answer in answers}
