"""How many rows fit into memory, and what to do when they do not."""

import gc
from dataclasses import dataclass

import torch

from causalpatch.base.errors import MemoryExhausted
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import ROLES

GIB = 2**30
# Linear algebra on a CPU is fastest at 1,000 to 4,000 tokens at once; more only costs memory.
CPU_TOKENS = 4096


@dataclass(frozen=True)
class RowCost:
    """Bytes that one row (one run of one prompt) needs at its peak, as the plan estimates it.

    Args:
        activations: Residual stream, MLP and attention of the widest layer.
        logits: The output and one copy of it.
    """

    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.activations + self.logits


def row_cost(model: Model, n_tokens: int) -> RowCost:
    """Estimate the memory of one row of ``n_tokens`` tokens.

    Per token: about four copies of the stream, three of the MLP's inside, and per head one row of scores with its
    softmax; then the logits in the model's dtype and once more in float32.
    """
    size = torch.finfo(model.dtype).bits // 8 if model.dtype.is_floating_point else 4
    if not model.width:
        # Nothing is known of a generic model: what its parameters take is a fair guess for its activations.
        largest = max((p.numel() for p in model.module.parameters()), default=1)
        return RowCost(largest * size, 0)
    units = model.shape.units
    attention = units.get("head", 0) * n_tokens * n_tokens * 3
    stream = n_tokens * (4 * model.width + 3 * units.get("neuron", 4 * model.width))
    return RowCost((attention + stream) * size, n_tokens * model.vocab_size * (size + 4))


def rows_per_forward(model: Model, n_tokens: int, budget_gib: float | None) -> int:
    """Return how many rows of ``n_tokens`` tokens go into one forward.

    Args:
        model: The model.
        n_tokens: Tokens in a row.
        budget_gib: Memory for activations in GiB; by default 2 on a CPU and half of what is free on a GPU.
    """
    if budget_gib is None:
        is_cuda = model.device.type == "cuda"
        budget_gib = 0.5 * torch.cuda.mem_get_info(model.device)[0] / GIB if is_cuda else 2.0
    rows = int(budget_gib * GIB // max(1, row_cost(model, n_tokens).total))
    if model.device.type == "cpu":
        rows = min(rows, CPU_TOKENS // max(1, n_tokens))
    return max(1, rows)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def exhausted(model: Model, pairs: Pairs, pair: int) -> MemoryExhausted:
    """Return the error for a pair of which not even one run fits into memory."""
    n_tokens = max(int(pairs.lengths(role)[pair]) for role in ROLES)
    needed = row_cost(model, n_tokens)
    return MemoryExhausted(
        f"one run of pair {pair} of '{pairs.name}' does not fit into memory",
        facts=[
            ("tokens", n_tokens),
            ("needs", f"about {needed.total / 2**20:,.0f} MiB, {needed.logits / 2**20:,.0f} of them for logits"),
            ("device", model.device),
        ],
        fix="shorten the prompts, open the model in bfloat16, or use a device with more memory",
    )


def release_memory() -> None:
    """Give back what a failed forward still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
