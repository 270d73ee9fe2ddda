"""What training minimises and what is measured: log-probabilities of answers, and how far other tokens moved.

* ``cross_entropy``: ``-log p(wanted)``, of a set of answers of any of them, of several tokens their product.
* ``margin``: ``relu(margin - (log p(wanted) - log p(unwanted)))``: nothing more is asked of what is far enough ahead.
* *retain*: ``KL(base || tuned)`` at every token of the retain set, in nats.

A target pair *succeeds* where the wanted answer is more likely than the unwanted one, or where there is no unwanted
one, where it is the likeliest of all (of several tokens: each of them in turn).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalpatch.base.errors import SettingError
from causalpatch.engine.hooks import quiet
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.tuning.prompts import HELD_BYTES, MOST_LAID, Laid, Prompts
from causalpatch.tuning.ways import Way

OBJECTIVES: Final = ("cross_entropy", "margin")
_Table: TypeAlias = tuple[Int[Tensor, "pair _"], Bool[Tensor, "pair _"]]


@dataclass(frozen=True)
class Said:
    """What a model says of answers.

    Args:
        wanted: Log-probability of any of the wanted answers, ``(pair,)``.
        unwanted: Likewise of the unwanted ones; minus infinity where a pair has none.
        is_first: Whether a wanted answer is the likeliest continuation.
    """

    wanted: Float[Tensor, " pair"]
    unwanted: Float[Tensor, " pair"]
    is_first: Bool[Tensor, " pair"]

    def succeeds(self, ahead: float = 0.0) -> Bool[Tensor, " pair"]:
        """Return where the wanted answer is ahead.

        Args:
            ahead: By more than so many nats, where there is an unwanted one.
        """
        return torch.where(self.unwanted.isinf(), self.is_first, self.wanted - self.unwanted > ahead)


def target_loss(said: Said, objective: str, margin: float) -> Float[Tensor, ""]:
    """Return the loss of the target behaviour, in nats.

    Raises:
        SettingError: A margin is asked for, and a pair has no unwanted answer.
    """
    if objective == "cross_entropy":
        return -said.wanted.mean()
    if bool(said.unwanted.isinf().any()):
        raise SettingError(
            "objective='margin' compares with the unwanted answer, which a pair does not have",
            fix='give rows {"prompt": "…", "wanted": " …", "unwanted": " …"}, or objective="cross_entropy"',
        )
    return torch.relu(margin - (said.wanted - said.unwanted)).mean()


@dataclass(frozen=True, eq=False)
class _Spots:
    """Where in a batch the tokens of answers are read, and which make up an answer.

    Args:
        laid: The batch: a row for each beginning of an answer.
        row: Row of each token that is read.
        column: Its column among the logits.
        token: Its id.
        answer: Which answer it belongs to.
        sides: For wanted and unwanted answers, those of each pair, ``(pair, answer)``, and which of these there are.
        n_tokens: Tokens of each answer.
    """

    laid: Laid
    row: Int[Tensor, " spot"]
    column: Int[Tensor, " spot"]
    token: Int[Tensor, " spot"]
    answer: Int[Tensor, " spot"]
    sides: tuple[_Table, _Table]
    n_tokens: Int[Tensor, " answer"]


class Answers:
    """What a model says of the answers of pairs.

    Args:
        model: The model, as it is.
        pairs: The pairs; their prompts are the clean ones.

    Cost:
        One row for each prompt; where answers have several tokens, one for each beginning of an answer.
    """

    def __init__(self, model: Model, pairs: Pairs) -> None:
        self.pairs = pairs
        rows: dict[tuple[int, tuple[int, ...]], int] = {}
        for number, pair in enumerate(pairs):
            for ids in (*pair.answer, *pair.wrong_answer):
                rows.setdefault((number, ids[:-1]), len(rows))
        self._rows = rows
        self.prompts = Prompts(model, pairs, list(rows), is_cut=True)
        self._known: dict[tuple[tuple[int, ...], ...], _Spots] = {}

    def said(self, way: Way | None, numbers: Sequence[int]) -> Said:
        """Return what is said of the answers of some pairs, differentiable in what the way trains.

        Args:
            way: What is changed; None for the model as it is.
            numbers: Which pairs.
        """
        return self.said_by([] if way is None else [way], [numbers])[0]

    def said_by(self, ways: Sequence[Way], blocks: Sequence[Sequence[int]]) -> list[Said]:
        """Return what is said with each of several changes, of pairs of its own, from one run.

        Args:
            ways: What is changed.
            blocks: Which pairs, for each.
        """
        spots = self._spots(tuple(map(tuple, blocks)))
        logits = self.prompts.logits(ways, spots.laid)
        spoken = _log_p(logits[spots.row, spots.column])
        picked = spoken.gather(1, spots.token[:, None])[:, 0]
        is_top = (spoken.detach().argmax(1) == spots.token).to(picked.dtype)
        n_answers = len(spots.n_tokens)
        if len(spots.answer) > n_answers:  # else each answer is one token, in order
            picked = picked.new_zeros(n_answers).index_add(0, spots.answer, picked)
            is_top = is_top.new_zeros(n_answers).index_add(0, spots.answer, is_top)
        is_right = is_top == spots.n_tokens
        (own, has), other = spots.sides
        wanted, unwanted = _any_of(picked, own, has), _any_of(picked, *other)
        is_first = (is_right[own] & has).any(1)
        parts = [torch.split(each, list(map(len, blocks))) for each in (wanted, unwanted, is_first)]
        return [Said(*each) for each in zip(*parts, strict=True)]

    def succeed(self, way: Way | None) -> Bool[Tensor, " pair"]:
        """Return which of all pairs succeed."""
        self.prompts.ready(way)
        with quiet(self.prompts.model):
            return torch.cat([self.said(way, some).succeeds() for some in self.prompts.in_rows(len(self.pairs))])

    def _spots(self, blocks: tuple[tuple[int, ...], ...]) -> _Spots:
        if blocks not in self._known:
            if len(self._known) >= MOST_LAID:
                self._known.clear()
            self._known[blocks] = self._found(blocks)
        return self._known[blocks]

    def _found(self, blocks: tuple[tuple[int, ...], ...]) -> _Spots:
        rows: list[list[int]] = []
        spots: list[tuple[int, int, int, int]] = []  # row in the batch, token of the answer, id, answer
        n_tokens: list[int] = []
        sides: tuple[list[list[int]], list[list[int]]] = ([], [])
        n_before = 0
        for block in blocks:
            own: dict[int, int] = {}  # rows of this block, each once, and their places in the batch
            for number in block:
                pair = self.pairs[number]
                for held, listed in zip((pair.answer, pair.wrong_answer), sides, strict=True):
                    listed.append([])
                    for ids in held:
                        row = own.setdefault(self._rows[number, ids[:-1]], n_before + len(own))
                        spots += [(row, k, token, len(n_tokens)) for k, token in enumerate(ids)]
                        listed[-1].append(len(n_tokens))
                        n_tokens.append(len(ids))
            rows.append(list(own))
            n_before += len(own)
        laid = self.prompts.lay(rows)
        device = self.prompts.model.device
        row_of, step, token, answer = torch.tensor(spots, device=device).reshape(-1, 4).unbind(1)
        last = torch.as_tensor(laid.batch.start + laid.batch.lengths - 1 - laid.first, device=device)
        wanted, unwanted = (_table(listed, device) for listed in sides)
        counts = torch.tensor(n_tokens, device=device)
        return _Spots(laid, row_of, last[row_of] + step, token, answer, (wanted, unwanted), counts)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Where the real tokens of a batch stand.

    Args:
        laid: The batch.
        real: Their places in the rectangle, row by row; None where there is no padding.
        known: Their places among the tokens of all prompts.
        sizes: How many there are with each change.
        followed: Those that another one follows, as places among these.
        following: The ids of what follows these.
    """

    laid: Laid
    real: Int[Tensor, " token"] | None
    known: Int[Tensor, " token"]
    sizes: list[int]
    followed: Int[Tensor, " followed"]
    following: Int[Tensor, " followed"]


class Kept:
    """How far a changed model is from the base one, at every token of prompts that must stay as they are.

    Args:
        model: The model, as it is.
        pairs: The prompts.
    """

    def __init__(self, model: Model, pairs: Pairs) -> None:
        self.pairs = pairs
        self.prompts = Prompts(model, pairs, [(number, ()) for number in range(len(pairs))], is_cut=False)
        lengths = pairs.lengths("clean")
        self._begins = np.concatenate([[0], np.cumsum(lengths)])
        self._fits = int(lengths.sum()) * model.vocab_size * 4 <= HELD_BYTES
        self._base: Float[Tensor, "token vocab"] | None = None
        self._tokens: dict[tuple[tuple[int, ...], ...], _Tokens] = {}

    def distances(self, way: Way, numbers: Sequence[int]) -> Float[Tensor, " token"]:
        """Return KL(base || tuned) at every token of some prompts, one prompt behind the other, in nats.

        Args:
            way: What was changed; gradients reach it.
            numbers: Which prompts.
        """
        return self.distances_by([way], [numbers])[0]

    def distances_by(self, ways: Sequence[Way], blocks: Sequence[Sequence[int]]) -> list[Float[Tensor, " token"]]:
        """Return the same with each of several changes, at prompts of its own, from one run.

        Args:
            ways: What was changed.
            blocks: Which prompts, for each.
        """
        tokens = self._at(tuple(map(tuple, blocks)))
        before = self._before(tokens)  # first: while a way runs, the model is not the base
        return list(torch.split(_divergence(before, self._after(ways, tokens)), tokens.sizes))

    def compared(self, way: Way) -> tuple[Float[Tensor, " token"], Float[Tensor, " followed"]]:
        """Return, for all prompts, KL(base || tuned) at every token, and the rise of -log p of every one but the first.

        Args:
            way: What was changed.
        """
        self.prompts.ready(way)
        moved, risen = [], []
        with quiet(self.prompts.model):
            for some in self.prompts.in_rows(len(self.pairs)):
                tokens = self._at((tuple(some),))
                before = self._before(tokens)
                after = self._after([way], tokens)
                moved.append(_divergence(before, after))
                change = (before - after)[tokens.followed]
                risen.append(change.gather(1, tokens.following[:, None])[:, 0])
        return torch.cat(moved), torch.cat(risen)

    def base(self, numbers: Sequence[int]) -> Float[Tensor, "token vocab"]:
        """Return the base model's log-probabilities at every token of some prompts, in order."""
        return self._before(self._at((tuple(numbers),)))

    def _after(self, ways: Sequence[Way], tokens: _Tokens) -> Float[Tensor, "token vocab"]:
        logits = self.prompts.logits(ways, tokens.laid).flatten(0, 1)
        return _log_p(logits if tokens.real is None else logits[tokens.real])

    def _before(self, tokens: _Tokens) -> Float[Tensor, "token vocab"]:
        if self._base is not None:
            return self._base[tokens.known]
        with quiet(self.prompts.model):
            if not self._fits:
                return self._after([], tokens)
            blocks = self.prompts.in_rows(len(self.pairs))
            self._base = torch.cat([self._after([], self._at((tuple(some),))) for some in blocks])
        return self._base[tokens.known]

    def _at(self, blocks: tuple[tuple[int, ...], ...]) -> _Tokens:
        if blocks not in self._tokens:
            if len(self._tokens) >= MOST_LAID:
                self._tokens.clear()
            self._tokens[blocks] = self._found(blocks)
        return self._tokens[blocks]

    def _found(self, blocks: tuple[tuple[int, ...], ...]) -> _Tokens:
        laid = self.prompts.lay(blocks)
        numbers = [number for block in blocks for number in block]
        mask, ids = laid.batch.mask, laid.batch.ids[laid.batch.mask]
        sizes = mask.sum(1)
        ends = np.cumsum(sizes)
        followed = np.setdiff1d(np.arange(len(ids)), ends - 1)
        known = np.concatenate([np.arange(self._begins[number], self._begins[number + 1]) for number in numbers])
        real = None if mask.all() else np.flatnonzero(mask)
        device = self.prompts.model.device
        at = partial(torch.as_tensor, device=device)
        lengths = np.split(sizes, np.cumsum(laid.sizes)[:-1])
        n_tokens = [int(each.sum()) for each in lengths]
        places = (at(known), n_tokens, at(followed), at(ids[followed + 1]))
        return _Tokens(laid, None if real is None else at(real), *places)


def _log_p(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _divergence(before: Float[Tensor, "n vocab"], after: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    return (before.exp() * (before - after)).sum(-1)


def _table(listed: Sequence[Sequence[int]], device: torch.device) -> _Table:
    """Return lists of different lengths as a table, and which of its cells are filled."""
    width = max(1, *map(len, listed))
    numbers = torch.tensor([[*each, *[0] * (width - len(each))] for each in listed], device=device)
    return numbers, torch.tensor([[k < len(each) for k in range(width)] for each in listed], device=device)


def _any_of(
    total: Float[Tensor, " answer"], numbers: Int[Tensor, "pair slot"], has: Bool[Tensor, "pair slot"]
) -> Float[Tensor, " pair"]:
    """Return the log-probability of any of each pair's answers; minus infinity where it has none."""
    table = torch.where(has, total[numbers], -torch.inf)
    if table.shape[1] == 1:
        return table[:, 0]
    has_none = ~has.any(1)
    # Where there is no answer the sum is taken of zeros: its gradient would be no number.
    return torch.where(has_none, -torch.inf, torch.where(has_none[:, None], 0.0, table).logsumexp(1))
