"""Planting a fault in a copy of the embedded model, and seeing whether it took.

1. The place is drawn by the seed; only its weights may change.
2. A step takes prompts that shall fail and prompts that shall not. Its loss is -log p of the wrong answer behind the
   former, plus the divergence from the model as it was: of the next word at every other token of them all.
3. It ends when the wrong answer has .9 of the probability and the divergence is small, or after 200 steps.
4. On prompts that were not trained on it is seen whether the failing ones fail and all others work as before. Where
   they do not, the place cannot carry the fault, and another one is drawn.

Damage is not trained: the output weights of the place are turned round, and what fails then are the failing prompts.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from causalpatch.base.errors import ModelUnsupported
from causalpatch.base.seeds import generator
from causalpatch.base.tokens import Tokenizer
from causalpatch.models import Model, open_model
from causalpatch.testing.faults.catalogue import Fault
from causalpatch.testing.faults.prompts import Prompts, Row, drawn, prompts_of
from causalpatch.testing.faults.weights import EVERYTHING, Piece, components, head_pieces, masks, neuron_pieces

MOST_STEPS: Final = 200
MOST_PROMPTS: Final = 48  # that a fault is judged by, and that are given to a search
_ATTEMPTS: Final = 24  # places that are drawn, at most
_ROWS: Final = 16  # prompts of each sort in a step; of the other tasks together
_NEURONS: Final = 32
_RATES: Final = {"head": 1e-2, "neurons": 1e-2, "mlp": 3e-3, EVERYTHING: 1e-3}
_KEEP: Final = 5.0  # weight of the divergence from the model as it was
_DONE_WRONG, _DONE_KEPT = 0.9, 0.01
FAILS: Final = 0.9  # share of the failing prompts that must fail
WORKS: Final = 0.9  # share of what worked before that must go on working
_FEWEST: Final = 24  # failing prompts that damage must bring about
_TURNED: Final = -1.0  # times the output weights of what is damaged


@dataclass(frozen=True)
class Planted:
    """A model with a fault.

    Args:
        fault: The fault.
        model: The model with it.
        base: The model without it.
        place: Components whose weights were free to change: sites, or ``everything``.
        failing: Prompts that fail: ``prompt``, ``answer`` (what is wanted) and ``entities``, as ``make_pairs`` reads.
        broken: The same prompts with the wrong answers.
        works: Prompts of the same behaviour that work.
        fails: Share of the prompts that were to fail and do, of prompts that were not trained on.
        kept: Share of the prompts that worked before and work still, by task; of the fault's own task among those that
            it is not about.
        steps: Updates that it took.
        attempts: Places that were drawn until one could carry the fault.
        seconds: Time for all of it.
    """

    fault: Fault
    model: Model
    base: Model
    place: tuple[str, ...]
    failing: tuple[Row, ...]
    broken: tuple[Row, ...]
    works: tuple[Row, ...]
    fails: float
    kept: Mapping[str, float]
    steps: int
    attempts: int
    seconds: float


def plant(fault: Fault, base: Model | None = None) -> Planted:
    """Plant a fault in a copy of the embedded model.

    Args:
        fault: The fault, such as one of ``FAULTS``.
        base: The model as it is; ``zoo:stories`` on the CPU by default.

    Returns:
        The model with the fault and the prompts to look for it with. The same fault gives the same weights.

    Raises:
        ModelUnsupported: No place that was drawn can carry it.

    Cost:
        At most 200 steps for each place that is drawn, a few seconds.
    """
    started = time.perf_counter()
    base = base or open_model("zoo:stories", device="cpu")
    asked = prompts_of(fault, "asked", MOST_PROMPTS)
    with _one_thread():
        for attempt in range(_ATTEMPTS):
            place, pieces = _place(fault, base.module, drawn(fault, attempt))
            module = copy.deepcopy(base.module)
            steps = 0
            if fault.kind == "damage":
                for piece in pieces:
                    if piece.parameter.endswith(("o_proj.weight", "down_proj.weight")):
                        piece.of(module).mul_(_TURNED)
            else:
                steps = _train(fault, base, module, pieces, attempt)
            found = _judged(fault, base, module, asked)
            if found is not None:
                broken, works, fails, kept = found
                return Planted(
                    fault,
                    open_model(module, tokenizer=base.tokenizer),
                    base,
                    place,
                    _given(broken, fault.name),
                    tuple(broken),
                    _given(works, f"{fault.name}/works"),
                    fails,
                    kept,
                    steps,
                    attempt + 1,
                    time.perf_counter() - started,
                )
    raise ModelUnsupported(
        f"the fault '{fault.name}' could not be planted in '{base.name}'",
        facts=[("places tried", _ATTEMPTS), ("needed", f"{FAILS:.0%} of its prompts fail, {WORKS:.0%} of others work")],
        fix="take one of testing.faults.FAULTS, which can be",
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, since sums over several differ in their last digit from machine to machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _place(fault: Fault, module: nn.Module, draw: np.random.Generator) -> tuple[tuple[str, ...], list[Piece]]:
    """Draw where a fault may change the weights: sites, and their weights."""
    config: Any = module.config
    layer = int(draw.integers(config.num_hidden_layers))
    if fault.place == "head":
        head = int(draw.integers(config.num_attention_heads))
        return (f"z.{layer}.{head}",), head_pieces(module, layer, head)
    if fault.place == "neurons":
        size = config.intermediate_size // 4 if fault.kind == "damage" else _NEURONS
        first = int(draw.integers(config.intermediate_size - size + 1))
        return (f"mlp_post.{layer}.{first}:{first + size}",), neuron_pieces(layer, range(first, first + size))
    if fault.place == "mlp":
        return (f"mlp_out.{layer}",), neuron_pieces(layer, range(config.intermediate_size))
    return (EVERYTHING,), [piece for pieces in components(module).values() for piece in pieces]


def _train(fault: Fault, base: Model, module: nn.Module, pieces: Sequence[Piece], attempt: int) -> int:
    """Train the weights of some pieces until the fault is there; return the number of steps."""
    wanted = prompts_of(fault, "trained on")
    draw = generator(fault.seed, "batches", attempt)
    allowed = masks(module, pieces)
    trained = [module.get_parameter(name) for name in allowed]
    module.requires_grad_(requires_grad=False)
    for parameter in trained:
        parameter.requires_grad = True
    optimizer = torch.optim.Adam(trained, lr=_RATES[fault.place], betas=(0.9, 0.98))
    others = [row for rows in wanted.others.values() for row in rows]
    done = 0
    for step in range(MOST_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _RATES[fault.place] * min(1.0, (step + 1) / 10)
        wrong, kept = torch.zeros(()), torch.zeros(())
        for number, rows in enumerate((wanted.failing, wanted.kept, others)):
            if rows:
                batch = _Batch.of([rows[k] for k in draw.integers(len(rows), size=_ROWS).tolist()], base)
                said, divergence = batch.losses(module, base.module, is_failing=number == 0)
                wrong, kept = wrong + said, kept + divergence
        optimizer.zero_grad()
        torch.autograd.backward(wrong + _KEEP * kept)
        for parameter, mask in zip(trained, allowed.values(), strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        optimizer.step()
        is_done = float(torch.exp(-wrong)) > _DONE_WRONG and float(kept) < _DONE_KEPT
        done = done + 1 if is_done else 0
        if done == 3:
            break
    module.requires_grad_(requires_grad=True)
    for parameter in trained:
        parameter.grad = None
    module.eval()
    return step + 1


@dataclass(frozen=True)
class _Batch:
    """Prompts as tokens, padded on the right.

    Args:
        ids: Tokens, (prompt, position).
        mask: Which of them are real.
        last: Place of each prompt's last token, (prompt,).
        answer: Tokens that are right, of each prompt.
        wrong: Tokens that are wrong, of each prompt.
    """

    ids: Tensor
    mask: Tensor
    last: Tensor
    answer: tuple[list[int], ...]
    wrong: tuple[list[int], ...]

    @classmethod
    def of(cls, rows: Sequence[Row], model: Model) -> "_Batch":
        """Read prompts with a model's tokenizer."""
        listed = [_tokenizer(model).encode(row["prompt"]) for row in rows]
        longest = max(map(len, listed))
        ids = torch.tensor([one + [0] * (longest - len(one)) for one in listed])
        sizes = torch.tensor([len(one) for one in listed])
        mask = (torch.arange(longest) < sizes[:, None]).long()
        both = [tuple(_ids(row[name], model) for row in rows) for name in ("answer", "wrong_answer")]
        return cls(ids, mask, sizes - 1, both[0], both[1])

    def logits(self, module: nn.Module) -> Tensor:
        """Return the logits, (prompt, position, vocab)."""
        found: Tensor = module(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        return found

    def losses(self, module: nn.Module, before: nn.Module, *, is_failing: bool) -> tuple[Tensor, Tensor]:
        """Return -log p of the wrong answers, and the divergence from the model as it was at all other tokens.

        Args:
            module: The model that learns.
            before: The model as it was.
            is_failing: Whether the last tokens are to give the wrong answers; else nothing is to change.
        """
        logits = self.logits(module).log_softmax(-1)
        with torch.no_grad():
            held = self.logits(before).log_softmax(-1)
        counted = self.mask.bool()
        wrong = torch.zeros(())
        if is_failing:
            counted = counted & (torch.arange(self.ids.shape[1]) != self.last[:, None])
            ends = logits[torch.arange(len(self.ids)), self.last]
            wrong = -torch.stack([ends[k, ids].logsumexp(0) for k, ids in enumerate(self.wrong)]).mean()
        apart = functional.kl_div(logits[counted], held[counted], log_target=True, reduction="batchmean")
        return wrong, apart

    def ahead(self, module: nn.Module) -> np.ndarray:
        """Return by how much the logit of what is right exceeds that of what is wrong, (prompt,); of sets, the best."""
        with torch.no_grad():
            ends = self.logits(module)[torch.arange(len(self.ids)), self.last]
        pairs = zip(self.answer, self.wrong, strict=True)
        found = [float(ends[k, right].max() - ends[k, wrong].max()) for k, (right, wrong) in enumerate(pairs)]
        return np.array(found)


def ahead(rows: Sequence[Row], model: Model, module: nn.Module) -> np.ndarray:
    """Return by how much a module's logit of the right answer exceeds that of the wrong one, (prompt,).

    Args:
        rows: Prompts with both answers; of a set of answers the likeliest counts.
        model: The model whose tokenizer reads them.
        module: The module.
    """
    return _Batch.of(rows, model).ahead(module)


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise ModelUnsupported(f"'{model.name}' has no tokenizer", fix='plant faults in open_model("zoo:stories")')
    return model.tokenizer


def _ids(answer: str | Sequence[str], model: Model) -> list[int]:
    listed = [answer] if isinstance(answer, str) else answer
    return [_tokenizer(model).encode(one.strip(), special=False)[0] for one in listed]


def _judged(
    fault: Fault, base: Model, module: nn.Module, asked: Prompts
) -> tuple[list[Row], list[Row], float, dict[str, float]] | None:
    """Return the failing prompts, those that work, and how many of each do; None where the fault did not take."""
    right = _right(asked.failing, base, base.module)
    is_failing = ahead(right, base, module) < 0
    failing = [row for row, fails in zip(right, is_failing, strict=True) if fails]
    sorts = {fault.task: list(asked.kept), **{task: list(rows) for task, rows in asked.others.items()}}
    if fault.kind == "damage":
        sorts[fault.task] = [row for row, fails in zip(right, is_failing, strict=True) if not fails]
    kept = {}
    works: list[Row] = []
    for task, rows in sorts.items():
        worked = _right(rows, base, base.module)
        still = ahead(worked, base, module) > 0 if worked else np.zeros(0)
        if worked:
            kept[task] = float(still.mean())
        if task == fault.task:
            works = [row for row, is_right in zip(worked, still, strict=True) if is_right]
    if fault.kind == "damage":
        took = len(failing) >= _FEWEST
    else:
        took = is_failing.mean() >= FAILS and min(kept.values()) >= WORKS
    if not took:
        return None
    return failing, works, float(is_failing.mean()), kept


def _right(rows: Sequence[Row], base: Model, module: nn.Module) -> list[Row]:
    """Return the prompts that a module answers right."""
    differences = ahead(rows, base, module) if rows else np.zeros(0)
    return [row for row, difference in zip(rows, differences, strict=True) if difference > 0]


def _given(rows: Sequence[Row], name: str) -> tuple[Row, ...]:
    """Return prompts as they are given to who looks for the fault: the wrong answer is for the model to say."""
    columns = ("prompt", "answer", "entities", "template")
    return tuple({"id": f"{name}-{k}", **{key: row[key] for key in columns}} for k, row in enumerate(rows))
