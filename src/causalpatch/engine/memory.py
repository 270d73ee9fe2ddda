"""How many rows fit into memory, and what to do when they do not."""

import gc
from dataclasses import dataclass

import torch

from causalpatch.base.errors import MemoryExhausted
from causalpatch.engine.cone import ModelNumbers
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import ROLES

GIB = 2**30
# Linear algebra on a CPU is fastest at 1,000 to 4,000 tokens at once; more only costs memory.
CPU_TOKENS = 4096
# Rows that go through a layer together on a CPU: 4,096 are 15 to 40 % slower, and below 64 memory is the limit.
CPU_CHUNK_ROWS = 2048
# Copies of the stream that a layer holds at its peak: what comes in, its norm, q, k, v, z, what goes out, and one more.
STREAMS = 8


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
    rows = int(budget_bytes(model.device, budget_gib) // max(1, row_cost(model, n_tokens).total))
    if model.device.type == "cpu":
        rows = min(rows, CPU_TOKENS // max(1, n_tokens))
    return max(1, rows)


def budget_bytes(device: torch.device, budget_gib: float | None) -> int:
    """Return the bytes that activations may take.

    Args:
        device: Where the model is.
        budget_gib: Memory for activations in GiB; by default 2 on a CPU and half of what is free on a GPU.
    """
    if budget_gib is not None:
        return int(budget_gib * GIB)
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 * GIB


def budget_within(model: Model, budget_gib: float | None) -> float | None:
    """Return the memory for activations that a model leaves, where weights and activations share a limit.

    Args:
        model: The model.
        budget_gib: What was asked for, in GiB, or None.
    """
    room = None if model.weights is None else model.weights.room_bytes
    return budget_gib if room is None else min(room, budget_bytes(model.device, budget_gib)) / GIB


def packed_row_bytes(numbers: ModelNumbers, n_keys: int) -> int:
    """Return the bytes that one packed token needs in a layer at its peak, in the MLP or in attention.

    Args:
        numbers: The model.
        n_keys: Keys that the token sees, at most.
    """
    mlp = 3 * numbers.n_neurons * numbers.number_bytes
    # Scores, their softmax and one copy; softmax is taken in float32 at least.
    attention = 3 * n_keys * numbers.n_heads * max(4, numbers.number_bytes)
    return STREAMS * numbers.width * numbers.number_bytes + max(mlp, attention)


def chunk_rows(
    numbers: ModelNumbers, longest_keys: int, budget: int, device_type: str, preferred: int | None = None
) -> int:
    """Return how many packed tokens go through a layer together.

    Args:
        numbers: The model.
        longest_keys: Tokens of the longest prompt: the most keys that a token can see, and the longest segment.
        budget: Bytes for the chunk.
        device_type: ``"cpu"``, ``"cuda"``, …
        preferred: Rows at which the device is fast, as ``calibrate`` finds them; by default 2,048 on a CPU, and
            elsewhere as many as fit.

    Returns:
        What fits and is fast, but never less than one whole segment.
    """
    rows = budget // packed_row_bytes(numbers, longest_keys)
    if preferred is None and device_type == "cpu":
        preferred = CPU_CHUNK_ROWS
    return max(1, longest_keys, rows if preferred is None else min(rows, preferred))


def chunk_bytes(numbers: ModelNumbers, n_rows: int, n_keys: int, n_reads: int = 0, n_columns: int = 0) -> int:
    """Return the bytes that a chunk needs at its peak.

    Args:
        numbers: The model.
        n_rows: Packed tokens in the chunk.
        n_keys: Keys that a token sees, at most.
        n_reads: Tokens of the chunk that metrics read.
        n_columns: Columns of the vocabulary that they read.
    """
    return n_rows * packed_row_bytes(numbers, n_keys) + n_reads * n_columns * max(4, numbers.number_bytes)


def state_bytes(numbers: ModelNumbers, n_rows: int) -> int:
    """Return the bytes of the stream of packed tokens between two layers.

    Args:
        numbers: The model.
        n_rows: Tokens that are held at once, in all chunks together.
    """
    return n_rows * numbers.width * numbers.number_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def exhausted(model: Model, pairs: Pairs, pair: int, n_bytes: int | None = None) -> MemoryExhausted:
    """Return the error for a pair of which not even one run fits into memory.

    Args:
        model: The model.
        pairs: The pairs.
        pair: Which of them.
        n_bytes: What one run needs; by default that of a whole forward.
    """
    n_tokens = max(int(pairs.sizes(role)[pair]) for role in ROLES)
    cost = row_cost(model, n_tokens)
    of_logits = f", {shown_bytes(cost.logits)} of them for logits" if n_bytes is None else ""
    return MemoryExhausted(
        f"one run of pair {pair} of '{pairs.name}' does not fit into memory",
        facts=[
            ("tokens", n_tokens),
            ("needs", f"about {shown_bytes(cost.total if n_bytes is None else n_bytes)}{of_logits}"),
            ("device", model.device),
        ],
        fix="shorten the prompts, open the model in bfloat16, or use a device with more memory",
    )


def shown_bytes(n_bytes: int) -> str:
    """Say a number of bytes in a unit that a reader can take in."""
    return f"{n_bytes / 2**20:,.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:,.0f} KiB"


def release_memory() -> None:
    """Give back what a failed forward still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
