"""What features of a dictionary are in the untouched runs of pairs, and how much of the tensor they explain.

A patch that gives a feature the value that it has already changes nothing. So the features that can have an effect are
those whose values differ between the two runs at the patched tokens, or, for an ablation, those that are not 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import Captured, capture
from causalpatch.engine.job import Job, batches_of_pairs
from causalpatch.engine.resolve import Placement, Placer, Target
from causalpatch.models import FeatureView
from causalpatch.models.dictionaries.coder import NUMBERS_AT_ONCE


@dataclass(frozen=True)
class Activity:
    """Features of a dictionary at the patched tokens of pairs.

    Args:
        base: Mean activation in the base runs, over tokens and then over pairs.
        source: Mean activation in the source runs, at the tokens that are taken from there.
        n_differing: In how many pairs the two differ.
        n_active: In how many pairs a feature is not 0 in the base run.
        explained: Share of the variance of the described vectors that the dictionary explains, in the base runs; NaN
            where there is a single vector.
    """

    base: Float[np.ndarray, " feature"]
    source: Float[np.ndarray, " feature"]
    n_differing: Int[np.ndarray, " feature"]
    n_active: Int[np.ndarray, " feature"]
    explained: float


def read_activity(job: Job) -> Activity:
    """Read all features of a dictionary in the untouched runs.

    Args:
        job: A job whose first target is any feature of the dictionary, at the tokens in question.

    Raises:
        MemoryExhausted: One pair does not fit into memory.
        PairError: A pair does not have the tokens, or no alignment.

    Cost:
        Two runs per pair, and the encoder at the patched tokens.
    """
    target, placer = job.interventions[0][0], Placer(job.pairs, job.base)
    parts = list(in_batches(job, batches_of_pairs(job), partial(_read, job, target, placer)))
    found = [one for part in parts for one in part]
    totals = sum((one.sums for one in found), _Sums())
    n_pairs = max(1, len(found))
    return Activity(
        base=np.sum([one.base for one in found], axis=0) / n_pairs,
        source=np.sum([one.source for one in found], axis=0) / n_pairs,
        n_differing=np.sum([one.differs for one in found], axis=0),
        n_active=np.sum([one.is_active for one in found], axis=0),
        explained=totals.explained,
    )


@dataclass(frozen=True)
class _Sums:
    """Sums over vectors: how many, the vectors, their squares, and the squares of what is not explained."""

    n: int = 0
    vectors: Float[np.ndarray, " width"] | float = 0.0
    squares: float = 0.0
    errors: float = 0.0

    def __add__(self, other: "_Sums") -> "_Sums":
        both = (self.vectors + other.vectors, self.squares + other.squares, self.errors + other.errors)
        return _Sums(self.n + other.n, *both)

    @property
    def explained(self) -> float:
        variance = self.squares - float(np.square(self.vectors).sum()) / max(1, self.n)
        return 1.0 - self.errors / variance if self.n > 1 and variance > 0 else float("nan")


@dataclass(frozen=True)
class _OfPair:
    base: Float[np.ndarray, " feature"]
    source: Float[np.ndarray, " feature"]
    differs: Float[np.ndarray, " feature"] | np.ndarray
    is_active: np.ndarray
    sums: _Sums


def _read(job: Job, target: Target, placer: Placer, indices: Int[np.ndarray, " pair"]) -> list[_OfPair]:
    sides = (job.base, job.source) if target.needs_source else (job.base,)
    batches = (job.pairs.batch(side, indices, padding_side=job.padding_side) for side in sides)
    runs = [capture(job.model, batch, [target.site]) for batch in batches]
    places = placer.places(target, indices.tolist())
    return [_of_pair(job, target, runs, local, place) for local, place in enumerate(places) if place is not None]


def _of_pair(job: Job, target: Target, runs: Sequence[Captured], local: int, place: Placement) -> _OfPair:
    given, described = _vectors(job, target, runs[0], local, place.base)
    coder = cast(FeatureView, job.model.tap(target.site).view).coded.coder
    most = max(1, NUMBERS_AT_ONCE // coder.n_features)
    base = torch.cat([coder.encode(part) for part in torch.split(given, most)])
    source = base
    if len(runs) > 1:
        ranges = [np.arange(start, stop) for start, stop in zip(place.start, place.stop, strict=True)]
        there, _ = _vectors(job, target, runs[1], local, np.concatenate(ranges))
        every = torch.cat([coder.encode(part) for part in torch.split(there, most)])
        source = torch.stack([part.mean(0) for part in torch.split(every, [len(some) for some in ranges])])
    explained = torch.cat(
        [coder.decode(*parts) for parts in zip(torch.split(base, most), torch.split(given, most), strict=True)]
    )
    y, error = described.double(), (described.to(explained) - explained).double()
    sums = _Sums(len(y), y.sum(0).cpu().numpy(), float(y.square().sum()), float(error.square().sum()))
    differs = (base != source).any(0) if len(runs) > 1 else (base != 0).any(0)
    means = (base.double().mean(0), source.double().mean(0))
    arrays = [each.cpu().numpy() for each in (*means, differs.long(), (base != 0).any(0).long())]
    return _OfPair(arrays[0], arrays[1], arrays[2], arrays[3], sums)


def _vectors(
    job: Job, target: Target, run: Captured, local: int, tokens: Int[np.ndarray, " token"]
) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token width_out"]]:
    """Return what a dictionary encodes and what it describes at tokens of a pair."""
    tap = job.model.tap(target.site)
    coded, companions = cast(FeatureView, tap.view).coded, tuple(run.tensors[port] for port in tap.companions)
    row = local if run.slots is None else int(run.slots[local])
    columns = torch.as_tensor(run.batch.start[row] + tokens, device=run.tensors[tap.port].device)
    own = tuple(each[row : row + 1] for each in companions)
    x = run.tensors[tap.port][row : row + 1]
    return coded.encoded(x, own)[0, columns], coded.described(x, own)[0, columns]
