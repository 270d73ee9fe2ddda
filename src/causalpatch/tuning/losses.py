"""What training minimises and what is measured: log-probabilities of answers, and how far other tokens moved.

* ``cross_entropy``: ``-log p(wanted)``, of a set of answers of any of them, of several tokens their product.
* ``margin``: ``relu(margin - (log p(wanted) - log p(unwanted)))``: nothing more is asked of what is far enough ahead.
* *retain*: ``KL(base || tuned)`` at every token of the retain set, in nats.

A target pair *succeeds* where the wanted answer is more likely than the unwanted one, or where there is no unwanted
one, where it is the likeliest of all (of several tokens: each of them in turn).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from causalpatch.base.errors import SettingError
from causalpatch.engine.capture import inputs_of
from causalpatch.models import Model
from causalpatch.pairs import Batch, Pairs
from causalpatch.tuning.ways import Way

OBJECTIVES: Final = ("cross_entropy", "margin")
_HELD_BYTES: Final = 256 * 2**20  # of what the base model says at retain tokens, kept rather than computed again


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

    def succeeds(self) -> Bool[Tensor, " pair"]:
        """Return where the wanted answer is ahead."""
        return torch.where(self.unwanted.isinf(), self.is_first, self.wanted > self.unwanted)


def said_of(model: Model, module: nn.Module, pairs: Pairs, numbers: Sequence[int]) -> Said:
    """Return what a module says of the answers of some pairs, differentiable.

    Args:
        model: How the module is called.
        module: What is run.
        pairs: The pairs; their prompts are the clean ones.
        numbers: Which.

    Cost:
        One row for each prompt; where answers have several tokens, one for each beginning of an answer.
    """
    rows: dict[tuple[int, tuple[int, ...]], int] = {}  # pair and beginning of an answer
    spots: list[tuple[int, int, int, int]] = []  # row, token of the answer, id, answer
    answers: list[tuple[int, int]] = []  # pair, side
    for place, number in enumerate(numbers):
        for side, held in enumerate((pairs[number].answer, pairs[number].wrong_answer)):
            for ids in held:
                own = rows.setdefault((place, ids[:-1]), len(rows))
                spots += [(own, k, token, len(answers)) for k, token in enumerate(ids)]
                answers.append((place, side))
    logits, batch = _run(model, module, pairs, [numbers[place] for place, _ in rows], [list(ids) for _, ids in rows])
    device = logits.device
    row, step, token, answer = torch.tensor(spots, device=device).unbind(1)
    last = torch.as_tensor(batch.start + batch.lengths - 1, device=device)
    spoken = _log_p(logits[row, last[row] + step])
    picked = spoken.gather(1, token[:, None])[:, 0]
    total = picked.new_zeros(len(answers)).index_add(0, answer, picked)
    is_top = (spoken.argmax(1) == token).to(picked.dtype)
    steps_right = picked.new_zeros(len(answers)).index_add(0, answer, is_top)
    n_steps = picked.new_zeros(len(answers)).index_add(0, answer, torch.ones_like(picked))
    sides: list[Tensor] = []
    pair_of = torch.tensor([pair for pair, _ in answers], device=device)
    side_of = torch.tensor([side for _, side in answers], device=device)
    for number in (0, 1):
        is_own = side_of == number
        sides.append(_either(total[is_own], pair_of[is_own], len(numbers)))
    first = torch.zeros(len(numbers), dtype=torch.bool, device=device)
    first[pair_of[(side_of == 0) & (steps_right == n_steps)]] = True
    return Said(sides[0], sides[1], first)


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


class Kept:
    """What the base model says at every token of prompts that must stay as they are.

    Args:
        model: The model, as it is.
        pairs: The prompts.
    """

    def __init__(self, model: Model, pairs: Pairs) -> None:
        self.model, self.pairs = model, pairs
        n_bytes = int(pairs.lengths("clean").sum()) * model.vocab_size * 4
        self._known: dict[int, Float[Tensor, "token vocab"]] | None = {} if n_bytes <= _HELD_BYTES else None

    def distances(self, way: Way, numbers: Sequence[int]) -> Float[Tensor, " token"]:
        """Return KL(base || tuned) at every token of some prompts, one prompt behind the other, in nats.

        Args:
            way: What was changed; gradients reach it.
            numbers: Which prompts.
        """
        before = self.base(numbers)  # first: while a way runs, the model is not the base
        with way.running() as module:
            logits, batch = _run(self.model, module, self.pairs, numbers)
        after = _log_p(logits[torch.as_tensor(batch.mask, device=logits.device)])
        return (before.exp() * (before - after)).sum(-1)

    def base(self, numbers: Sequence[int]) -> Float[Tensor, "token vocab"]:
        """Return the base model's log-probabilities at every token of some prompts, in order."""
        missing = list(numbers) if self._known is None else [k for k in dict.fromkeys(numbers) if k not in self._known]
        made: list[Tensor] = []
        if missing:
            with torch.no_grad():
                logits, batch = _run(self.model, self.model.module, self.pairs, missing)
                spoken = _log_p(logits[torch.as_tensor(batch.mask, device=logits.device)])
            made = list(torch.split(spoken, [int(n) for n in batch.mask.sum(1)]))
        if self._known is None:
            return torch.cat(made)
        self._known.update(zip(missing, made, strict=True))
        return torch.cat([self._known[number] for number in numbers])


def next_token_losses(model: Model, module: nn.Module, pairs: Pairs, numbers: Sequence[int]) -> list[np.ndarray]:
    """Return -log p of each token of some prompts given those before it, by prompt, in nats."""
    with torch.no_grad():
        logits, batch = _run(model, module, pairs, numbers)
        found = []
        for row in range(len(numbers)):
            begin, n = int(batch.start[row]), int(batch.lengths[row])
            ids = torch.as_tensor(batch.ids[row, begin + 1 : begin + n], device=logits.device)
            spoken = _log_p(logits[row, begin : begin + n - 1])
            found.append(-spoken.gather(1, ids[:, None])[:, 0].double().cpu().numpy())
    return found


def _run(
    model: Model,
    module: nn.Module,
    pairs: Pairs,
    numbers: Sequence[int],
    continued: Sequence[Sequence[int]] | None = None,
) -> tuple[Float[Tensor, "row position vocab"], Batch]:
    batch = pairs.batch("clean", list(numbers), continuations=continued)
    return model.logits(module(**inputs_of(model, batch))), batch


def _log_p(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _either(total: Float[Tensor, " answer"], pair: Int[Tensor, " answer"], n_pairs: int) -> Float[Tensor, " pair"]:
    """Return the log-probability of any of each pair's answers; minus infinity where it has none."""
    counts: dict[int, int] = {}
    slots = []
    for number in pair.tolist():
        slots.append(counts.get(number, 0))
        counts[number] = slots[-1] + 1
    table = total.new_full((n_pairs, max(counts.values(), default=1)), -torch.inf)
    table = table.index_put((pair, torch.tensor(slots, dtype=torch.long, device=pair.device)), total)
    has_none = table.isinf().all(1)
    # Where there is no answer the sum is taken of zeros: its gradient would be no number.
    return torch.where(has_none, -torch.inf, torch.where(has_none[:, None], 0.0, table).logsumexp(1))
