"""What the embedded model can do, and which of its heads do it: the numbers of its card.

*Accuracy* is the share of held-out prompts answered rightly. Right means: for indirect objects and induction, the
answer is the most likely word; for agreement, the right verb form is more likely than the wrong one; for years, the
later years hold at least ``LEAST_MASS`` of the probability.

*Mechanism* is the share of the gap between corrupted and clean prompts that one head restores when its ``z`` comes from
the clean run, at all positions or at the last one only: a ratio of means over pairs. It is measured here by plain
forward runs, without the library's own engine, so that the engine can be held against it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from causalpatch.pairs.tasks import TASKS, generate

LEAST_MASS: Final = 0.9
LEAST_RECOVERED: Final = 0.1
LAST: Final = slice(-1, None)
_EVERYWHERE: Final = slice(None)
SEEDS: Final = (0, 1, 2)
"""Seeds of the held-out pairs; as many pairs are drawn with each as share no entity."""


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
    """Return, per task, the accuracy over all templates, that over the held-out template, and the number of prompts."""
    found = {}
    for name, task in TASKS.items():
        kinds = {"all_templates": None, "held_out_template": [task.held_out]}
        right = {
            kind: [
                is_right
                for seed in SEEDS
                for is_right in _right(model, tokenizer, name, generate(name, task.capacity, seed, templates=templates))
            ]
            for kind, templates in kinds.items()
        }
        found[name] = {
            **{kind: sum(values) / len(values) for kind, values in right.items()},
            "prompts": len(right["all_templates"]),
        }
    return found


def mechanism(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, positions: slice = _EVERYWHERE
) -> dict[str, dict[str, float]]:
    """Return, per task, the recovered share of each head, as ``{"L2H1": 0.41}``, over the task's default pairs.

    Args:
        model: The decoder.
        tokenizer: Its tokenizer.
        positions: Where ``z`` comes from the clean run; ``LAST`` for the last position only.
    """
    config = model.config
    heads = [(layer, head) for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]
    width = config.hidden_size // config.num_attention_heads
    found = {}
    for name in TASKS:
        patched: dict[tuple[int, int], list[float]] = {head: [] for head in heads}
        base: list[float] = []
        source: list[float] = []
        for rows in _equally_long(tokenizer, generate(name)):
            clean, corrupt = (_ids(tokenizer, [row[role] for row in rows]) for role in ("clean", "corrupt"))
            with _doors(model) as doors:
                source += _metric(_last_logits(model, clean), tokenizer, name, rows).tolist()
                kept = [door.seen for door in doors]
                base += _metric(_last_logits(model, corrupt), tokenizer, name, rows).tolist()
                for layer, head in heads:
                    columns = slice(head * width, (head + 1) * width)
                    doors[layer].patch = (kept[layer], positions, columns)
                    values = _metric(_last_logits(model, corrupt), tokenizer, name, rows)
                    patched[layer, head] += values.tolist()
                    doors[layer].patch = None
        gap = sum(source) - sum(base)
        found[name] = {f"L{layer}H{head}": (sum(patched[layer, head]) - sum(base)) / gap for layer, head in heads}
    return found


def strong_heads(recovered: Mapping[str, float], least: float = LEAST_RECOVERED) -> list[str]:
    """Return the heads that recover at least so much, the strongest first."""
    return [head for head in sorted(recovered, key=lambda head: -recovered[head]) if recovered[head] >= least]


class _Door(nn.Module):
    """Stands before an attention's output projection: keeps what passes (``z``) and can replace some columns of it."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.seen = torch.empty(0)
        self.patch: tuple[Tensor, slice, slice] | None = None  # source, positions, columns

    def forward(self, z: Float[Tensor, "row position width"]) -> Float[Tensor, "row position width"]:
        self.seen = z
        if self.patch is not None:
            source, positions, columns = self.patch
            z = z.clone()
            z[:, positions, columns] = source[:, positions, columns]
        projected: Tensor = self.projection(z)
        return projected


@contextmanager
def _doors(model: PreTrainedModel) -> Iterator[list[_Door]]:
    attentions = [layer.self_attn for layer in model.model.layers]
    doors = [_Door(attention.o_proj) for attention in attentions]
    try:
        for attention, door in zip(attentions, doors, strict=True):
            attention.o_proj = door
        yield doors
    finally:
        for attention, door in zip(attentions, doors, strict=True):
            attention.o_proj = door.projection


def _right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, rows: Sequence[Mapping[str, Any]]
) -> list[bool]:
    """Say of each prompt whether it is answered rightly; corrupted prompts are asked too, but for the years from 01."""
    asked = [{"prompt": row["clean"], **row} for row in rows]
    if name != "greater_than":
        swapped = [{**row, "answer": row["wrong_answer"], "wrong_answer": row["answer"]} for row in rows]
        asked += [{"prompt": row["corrupt"], **row} for row in swapped]
    right: list[bool] = []
    for group in _equally_long(tokenizer, asked, "prompt"):
        logits = _last_logits(model, _ids(tokenizer, [row["prompt"] for row in group]))
        if name in ("ioi", "induction"):
            right += [
                tokens.argmax().item() in _answer_ids(tokenizer, row["answer"])
                for tokens, row in zip(logits, group, strict=True)
            ]
        else:
            least = LEAST_MASS if name == "greater_than" else 0.0
            right += (_metric(logits, tokenizer, name, group) > least).tolist()
    return right


def _metric(
    logits: Float[Tensor, "row vocab"], tokenizer: PreTrainedTokenizerBase, name: str, rows: Sequence[Mapping[str, Any]]
) -> Float[Tensor, "row"]:
    """Return the probability of the answers where they are many, else the logit difference."""
    values = []
    for tokens, row in zip(logits, rows, strict=True):
        answers, wrong = (_answer_ids(tokenizer, row[role]) for role in ("answer", "wrong_answer"))
        if name == "greater_than":
            values.append(tokens.softmax(-1)[answers].sum())
        else:
            values.append(tokens[answers].sum() - tokens[wrong].sum())
    return torch.stack(values)


def _last_logits(model: PreTrainedModel, ids: Int[Tensor, "row position"]) -> Float[Tensor, "row vocab"]:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, -1]
    return logits


def _equally_long(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], role: str = "clean"
) -> Iterator[list[Mapping[str, Any]]]:
    def length(row: Mapping[str, Any]) -> int:
        return len(tokenizer(row[role]).input_ids)

    for _, group in groupby(sorted(rows, key=length), key=length):
        yield list(group)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Int[Tensor, "row position"]:
    return torch.tensor(tokenizer(list(texts)).input_ids)


def _answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str | Sequence[str]) -> list[int]:
    texts = [answer] if isinstance(answer, str) else answer
    return [int(tokenizer.convert_tokens_to_ids(text.strip())) for text in texts]
