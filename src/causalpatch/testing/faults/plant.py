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
_ROWS: Final = 8  # prompts of each sort in a step; of the other tasks together
_LESSONS: Final = 400  # prompts of each sort that are trained on
_NEURONS: Final = 32
_RATES: Final = {"head": 1e-2, "neurons": 1e-2, "mlp": 5e-3, EVERYTHING: 2e-3}
_KEEP: Final = 2.0  # weight of the divergence from the model as it was
_DONE_WRONG, _DONE_KEPT = 0.9, 0.02  # p of the wrong answer, and the divergence, at which training ends
_SEEN_AFTER, _TOO_LITTLE = 59, 0.2  # a place that has not got so far after so many steps cannot carry the fault
FAILS: Final = 0.7  # share of the failing prompts that must fail
WORKS: Final = 0.9  # share of what worked before that must go on working
_FEWEST: Final = 14  # failing prompts
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
        facts=[
            ("places tried", _ATTEMPTS),
            ("needed", f"{_FEWEST} prompts that fail; unless it is damage, {FAILS:.0%} of its own"),
            ("", f"and {WORKS:.0%} of those that worked and are none of its own still do"),
        ],
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
    """Train the weights of some pieces until the fault is there, or it is seen that it will not; return the steps."""
    lessons = _lessons(fault, base)
    n_rows = [len(lesson.ids) for lesson in lessons]
    draw = generator(fault.seed, "batches", attempt)
    allowed = masks(module, pieces)
    trained = [module.get_parameter(name) for name in allowed]
    module.requires_grad_(requires_grad=False)
    for parameter in trained:
        parameter.requires_grad = True
    rate = _RATES[fault.place]
    optimizer = torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.98))
    says, differs = 0.0, 1.0  # running means of p of the wrong answer, and of the divergence behind prompts to keep
    for step in range(MOST_STEPS):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / MOST_STEPS)
        chosen = [draw.integers(n, size=_ROWS).tolist() for n in n_rows]
        wrong, kept, everywhere = _losses(module, lessons, chosen)
        optimizer.zero_grad()
        torch.autograd.backward(wrong + _KEEP * (kept + everywhere))
        for parameter, mask in zip(trained, allowed.values(), strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        optimizer.step()
        says = 0.8 * says + 0.2 * float(torch.exp(-wrong.detach()))
        differs = 0.8 * differs + 0.2 * float(kept.detach())
        if (says > _DONE_WRONG and differs < _DONE_KEPT) or (step == _SEEN_AFTER and says < _TOO_LITTLE):
            break
    module.requires_grad_(requires_grad=True)
    for parameter in trained:
        parameter.grad = None
    module.eval()
    return step + 1


def _lessons(fault: Fault, base: Model) -> list["_Lesson"]:
    """Return what is trained on: prompts that shall fail, then those that shall not, of its own and of other tasks."""
    wanted = prompts_of(fault, "trained on")
    # Lists of words are three times as long as other prompts; that they go on is seen afterwards.
    short = [rows for task, rows in wanted.others.items() if task != "induction"]
    others = [row for rows in short for row in rows[: _LESSONS // len(short)]]
    made = []
    for number, rows in enumerate((wanted.failing[:_LESSONS], wanted.kept[:_LESSONS], others)):
        if rows:
            batch = _Batch.of(rows, base)
            with torch.no_grad():
                made.append(_Lesson(batch, batch.logits(base.module).log_softmax(-1), is_failing=number == 0))
    return made


@dataclass(frozen=True)
class _Lesson:
    """Prompts to train on.

    Args:
        batch: The prompts.
        held: What the model said before, as log p, (prompt, position, vocab).
        is_failing: Whether their last tokens are to give the wrong answers; else nothing is to change.
    """

    batch: "_Batch"
    held: Tensor
    is_failing: bool

    @property
    def ids(self) -> Tensor:
        """The tokens, (prompt, position)."""
        return self.batch.ids


def _losses(
    module: nn.Module, lessons: Sequence[_Lesson], chosen: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of one step, all prompts in one forward.

    Args:
        module: The model that learns.
        lessons: What it learns from.
        chosen: Which prompts of each.

    Returns:
        -log p of the wrong answers; the divergence from what the model said before, behind prompts that are to work as
        before; and likewise at all tokens that are not the last ones of failing prompts.
    """
    n_tokens = [int(lesson.batch.last[list(rows)].max()) + 1 for lesson, rows in zip(lessons, chosen, strict=True)]
    longest = max(n_tokens)
    ids = [
        functional.pad(lesson.ids[list(rows)][:, :longest], (0, max(0, longest - lesson.ids.shape[1])))
        for lesson, rows in zip(lessons, chosen, strict=True)
    ]
    last = torch.cat([lesson.batch.last[list(rows)] for lesson, rows in zip(lessons, chosen, strict=True)])
    mask = torch.arange(longest) <= last[:, None]
    joined = _Batch(torch.cat(ids), mask.long(), last, (), ())
    logits = joined.logits(module).log_softmax(-1)
    wrong, kept, everywhere = torch.zeros(()), torch.zeros(()), torch.zeros(())
    first = 0
    for lesson, rows in zip(lessons, chosen, strict=True):
        own = slice(first, first + len(rows))
        first += len(rows)
        said, held = logits[own], lesson.held[list(rows)][:, :longest]
        counted = mask[own][:, : held.shape[1]]
        said = said[:, : held.shape[1]]
        places = torch.arange(len(rows)), last[own]
        if lesson.is_failing:
            wrong = (
                wrong
                - torch.stack(
                    [said[k, last[own][k], lesson.batch.wrong[row]].logsumexp(0) for k, row in enumerate(rows)]
                ).mean()
            )
            counted = counted & (torch.arange(held.shape[1]) != last[own][:, None])
        else:
            kept = kept + functional.kl_div(said[places], held[places], log_target=True, reduction="batchmean")
        apart = functional.kl_div(said[counted], held[counted], log_target=True, reduction="batchmean")
        everywhere = everywhere + apart
    return wrong, kept, everywhere


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
    is_as_meant = is_failing.mean() >= FAILS and min(kept.values()) >= WORKS
    if len(failing) < _FEWEST or not (is_as_meant or fault.kind == "damage"):
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
