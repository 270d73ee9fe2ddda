"""How the wavefront shares out its memory. The run and its plan both ask here, so that the plan says what is done.

1. Pairs are held in batches whose untouched runs take two fifths of the budget (``Kept``): what is kept of each prompt,
   of each that is resampled from, of each that goes on through an answer of several tokens, and the logits that are
   read of the base and the source run.
2. Patched runs are laid out in portions, and of a portion those move on together whose streams take an eighth
   (``waves``).
3. One call of a layer takes a quarter, and so does what is measured behind the layers: logits of some runs, with what
   metrics make of them.

Prompts of a batch are as wide as the longest of them, so that sizes are counted in padded tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int

from causalpatch.engine.cone import ModelNumbers
from causalpatch.engine.drawn import Donated
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import Job
from causalpatch.engine.memory import budget_bytes, chunk_rows, state_bytes
from causalpatch.engine.segments import cut
from causalpatch.engine.shelf import Where, place_for
from causalpatch.engine.unchanged_rows import numbers_per_token
from causalpatch.models import Model
from causalpatch.patches import Resample
from causalpatch.sites import Site
from causalpatch.sites.names import ATTENTION_SITES

CAPTURED, STREAM, CHUNK = 0.4, 0.125, 0.25
"""Shares of the budget: untouched runs, the streams of rows that move on together, one call of a layer."""
LOGITS_BYTES = 384 * 2**20
"""Bytes of logits from which more at once are no faster."""
PORTION = 16_384
"""Runs that are laid out together: enough to fill the calls, few enough to be done, and kept, within seconds."""

_INSIDE = frozenset({"z", "head_out", "attn_out", "resid_mid", "mlp_pre", "mlp_gate", "mlp_post", "mlp_out"})
_INSIDE |= {"q", "k", "v", *ATTENTION_SITES}


@dataclass(frozen=True)
class Kept:
    """What is kept of the untouched runs. Axis ``scene`` is the prompts, then each answer that is spelt out.

    Args:
        widths: Tokens of each pair's longest prompt with the answer that follows it.
        token_bytes: Bytes that are kept for a padded token of a pair: of all its prompts, but for their logits.
        logits: Bytes of the logits of the base and the source run.
        allowed: Bytes that may be kept on the device.
    """

    widths: Int[np.ndarray, "scene pair"]
    token_bytes: int
    logits: Int[np.ndarray, "scene pair"]
    allowed: int

    @classmethod
    def of(cls, job: Job, gauge: Gauge, numbers: ModelNumbers) -> "Kept":
        """Count what a job keeps."""
        pairs, everyone = job.pairs, np.arange(len(job.pairs))
        lengths = np.maximum(pairs.lengths("clean"), pairs.lengths("corrupt"))
        values = (target.value for group in job.interventions for target in group)
        donors = {value for value in values if isinstance(value, Donated | Resample)}
        for value in donors:
            if isinstance(value, Donated):
                taken = [value.donor(pair) for pair in pairs]
                lengths = np.maximum(lengths, value.pool.lengths(value.value.side)[taken])
        spelt = [[len(more) for more in gauge.continuations(*fork, everyone)] for fork in gauge.forks]
        further = np.array([np.zeros(len(pairs), dtype=np.int64), *spelt], dtype=np.int64)
        reads = further + 1
        reads[0] = lengths if gauge.reads_all else len({metric.position for metric in gauge.metrics})
        columns = [n_columns(job, gauge, is_fork=False), *([numbers.vocab] * len(spelt))]
        return cls(
            lengths + further,
            (2 + len(donors)) * bytes_per_token(job, numbers, int((lengths + further).max())),
            2 * numbers.number_bytes * reads * np.array(columns)[:, None],
            captured_bytes(job),
        )

    @property
    def further(self) -> Int[np.ndarray, " pair"]:
        """Tokens of each pair's longest answer that follow its prompt."""
        further: np.ndarray = self.widths.max(0) - self.widths[0]
        return further

    def n_bytes(self, indices: Int[np.ndarray, " pair"]) -> tuple[int, int]:
        """Return the bytes that are kept of the runs of some pairs together, and of their logits."""
        runs = self.widths[:, indices].max(1).sum() * self.token_bytes
        return int(runs) * len(indices), int(self.logits[:, indices].max(1).sum()) * len(indices)

    def longest(self, indices: Int[np.ndarray, " pair"]) -> int:
        """Return the tokens of the longest prompt of some pairs, with the answer that follows it."""
        return int(self.widths[:, indices].max())

    def place(self, indices: Int[np.ndarray, " pair"], device: torch.device) -> Where:
        """Say where the runs of some pairs are kept; logits stay on the device."""
        runs, logits = self.n_bytes(indices)
        return place_for(runs, self.allowed - logits, device)

    def place_all(self, batches: Sequence[np.ndarray], device: torch.device) -> Where:
        """Say where the runs of several batches are kept that are all held at once."""
        runs, logits = zip(*map(self.n_bytes, batches), strict=True)
        return place_for(sum(runs), self.allowed - sum(logits), device)

    def batches(self) -> Iterator[Int[np.ndarray, " pair"]]:
        """Yield pairs of like length in batches that take what is allowed at most, or of one pair."""
        order = np.argsort(self.widths.max(0), kind="stable")
        each = np.concatenate([self.widths * self.token_bytes, self.logits])[:, order]
        start = 0
        while start < len(order):
            together = np.maximum.accumulate(each[:, start:], axis=1).sum(0) * np.arange(1, len(order) - start + 1)
            stop = start + max(1, int(np.searchsorted(together, self.allowed, side="right")))
            yield np.sort(order[start:stop])
            start = stop


def captured_bytes(job: Job) -> int:
    """Return the bytes that captured runs may take on the model's device."""
    return int(CAPTURED * budget_bytes(job.model.device, job.budget_gib))


def n_columns(job: Job, gauge: Gauge, *, is_fork: bool) -> int:
    """Return how many vocabulary entries are computed where metrics read: those of the answers, or all."""
    patches_logits = any(target.site.name == "logits" for group in job.interventions for target in group)
    needs_all = gauge.needs_vocabulary or is_fork or patches_logits
    return job.model.vocab_size if needs_all else len(gauge.answer_columns)


def bytes_per_token(job: Job, numbers: ModelNumbers, longest: int) -> int:
    """Return the bytes that a captured run of the wavefront takes for each token, but for its logits.

    Args:
        job: The job.
        numbers: The model.
        longest: Tokens of the longest prompt.
    """
    targets = [target for group in job.interventions for target in group]
    sites = {(target.site.layer, target.anchor or target.site.name) for target in targets}
    inside = {(layer, name) for layer, name in sites if name in _INSIDE}
    widths = {"z": numbers.n_heads * numbers.head_width, "mlp_pre": 2 * numbers.n_neurons}
    widths |= {"mlp_gate": 2 * numbers.n_neurons, "mlp_post": numbers.n_neurons, "mlp_out": numbers.n_neurons}
    widths |= dict.fromkeys(("scores", "pattern"), numbers.n_heads * longest)
    # Each layer's input and the final norm's, keys and values, with the queries where one projection gives all three.
    kept = (numbers.n_layers + 1) * numbers.width + 2 * numbers.n_layers * numbers.n_kv_heads * numbers.head_width
    kept += numbers.n_layers * numbers.n_heads * numbers.head_width * _is_fused(job.model)
    kept += longest * max(1, len(set(numbers.windows)))  # a row of each kind of mask
    kept += sum(widths.get(name, numbers.width) + numbers.width for _, name in inside)
    kept += numbers_per_token(job)
    kept += 0 if job.few_bits is None else job.few_bits.numbers_per_token(job.model)
    return kept * numbers.number_bytes


def _is_fused(model: Model) -> bool:
    if {"q", "v"} & set(model.shape.refused):
        return False
    query, value = (model.tap(Site(name, 0, 0)).port.path for name in ("q", "v"))
    return query == value


@dataclass(frozen=True)
class Limits:
    """What goes together of the patched runs of a batch of pairs.

    Args:
        chunk_rows: Rows of one call of a layer.
        wave_rows: Rows that move on together from layer to layer.
    """

    chunk_rows: int
    wave_rows: int

    @classmethod
    def of(cls, job: Job, numbers: ModelNumbers, longest: int, preferred: int | None) -> "Limits":
        """Share out the budget.

        Args:
            job: The job.
            numbers: The model.
            longest: Tokens of the batch's longest prompt, with the answer that follows it.
            preferred: Rows at which the device is fast, or None where that is not known.
        """
        budget = budget_bytes(job.model.device, job.budget_gib)
        rows = chunk_rows(numbers, longest, int(CHUNK * budget), job.model.device.type, preferred)
        if job.max_rows is not None:
            rows = min(rows, job.max_rows * longest)
        return cls(rows, max(longest, int(STREAM * budget) // state_bytes(numbers, 1)))


def front_rows(job: Job, kept: Kept) -> int:
    """Return how many rows go through the layers together where these are fetched layer by layer.

    Their streams take the share of the budget that is meant for streams, and that of the untouched runs, where these
    are kept elsewhere.

    Args:
        job: The job.
        kept: What is kept of the untouched runs.
    """
    device, numbers = job.model.device, max(1, job.model.width * (torch.finfo(job.model.dtype).bits // 8))
    is_away = kept.place_all(list(kept.batches()), device) != "device"
    share = STREAM + CAPTURED * is_away
    return max(1, int(share * budget_bytes(device, job.budget_gib)) // numbers)


def is_full(n_rows: int, more: int, most: int) -> bool:
    """Say whether so many rows leave no room for more in a pass; run and plan both ask here."""
    return n_rows + more > most


def waves(
    lengths: Int[np.ndarray, " run"], is_control: Bool[np.ndarray, " run"], most: int
) -> Iterator[Int[np.ndarray, " some"]]:
    """Yield the numbers of runs that move on together; the controls first where there are several waves.

    Args:
        lengths: Rows of each run.
        is_control: Which runs are controls.
        most: Rows of a wave.
    """
    if len(lengths) and int(lengths.sum()) <= most:
        yield np.arange(len(lengths))
        return
    for some in (np.flatnonzero(is_control), np.flatnonzero(~is_control)):
        for part in cut(lengths[some], most):
            yield some[part]


def logits_rows(job: Job, gauge: Gauge, columns: int) -> int:
    """Return for how many rows logits are computed and measured at once.

    Args:
        job: The job.
        gauge: The metrics.
        columns: Columns of the vocabulary that are computed.
    """
    room = min(LOGITS_BYTES, int(CHUNK * budget_bytes(job.model.device, job.budget_gib)))
    return max(1, room // logits_bytes(job, gauge, 1, columns))


def logits_bytes(job: Job, gauge: Gauge, n_rows: int, columns: int) -> int:
    """Return the bytes of the logits of some rows, and of the copies that metrics make, in float32 at least."""
    n_bytes = max(4, torch.finfo(job.model.dtype).bits // 8)
    return n_rows * columns * n_bytes * (1 + gauge.n_copies)
