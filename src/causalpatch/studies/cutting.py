"""How a request is cut into shards, and how their numbers are put together again.

Pairs are cut first: the untouched runs of a pair then are made once. Cells are cut where one pair has more of them than
a shard holds. Neither is cut where a number depends on what else is asked for:

============================================  =========  =========
values                                        pairs cut  cells cut
============================================  =========  =========
source, interpolations                        yes        yes
zero, constants, directions                   yes        no: a share is one of what ablating all of them does
means, noise, other pairs' values, fits       no         no: they are made of all pairs
============================================  =========  =========

Sets of edges and scores say themselves how they are cut (``works``).

How large a shard is follows from the sizes of model and prompts alone, so that it is the same everywhere: ten trillion
operations, by the plan of its runs where it has one, else as if each run were a forward; and 64 to 20,000 runs. To
begin a shard takes some tenths of a second: the engine's way through all layers, and untouched runs where the pairs are
new; so it is to be half a minute's work of a CPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from causalpatch.experiment import Experiment
from causalpatch.experiment.measured import Measured, Work, has_same_columns
from causalpatch.patches import (
    Constant,
    Identity,
    Interpolate,
    Intervention,
    ProjectOut,
    Source,
    Steer,
    Subspace,
    Value,
    Zero,
)
from causalpatch.studies.shards import Setting
from causalpatch.studies.study import ShardsPart

_FLOP: Final = 1e13
_LEAST, _MOST = 64, 20_000
_SAMPLE: Final = 256  # cells that are planned, on one pair
_MOVING: Final = (Source, Identity, Interpolate)
_OF_ONE_PAIR: Final = (*_MOVING, Zero, Constant, Steer, ProjectOut)


@dataclass(frozen=True)
class Piece:
    """Which cells and pairs a shard holds.

    Args:
        cells: From the first to behind the last.
        pairs: Likewise.
    """

    cells: tuple[int, int]
    pairs: tuple[int, int]

    @property
    def places(self) -> tuple[slice, slice]:
        """Where they stand in a table of cells and pairs."""
        return slice(*self.cells), slice(*self.pairs)


def cut(experiment: Experiment, work: Work, shards: ShardsPart, asked: Sequence[Intervention] = ()) -> list[Piece]:
    """Return the shards of a work, cells of the first pairs first.

    Args:
        experiment: Model and pairs.
        work: What is asked for.
        shards: What the study says of their size.
        asked: Its interventions, if it is of any: their plan says what a run takes.
    """
    n_cells, n_pairs = work.n_cells, len(experiment.pairs)
    cuts = work.cuts(experiment)
    is_told = shards.runs or (shards.pairs and shards.cells) or not (cuts.pairs or cuts.cells)
    runs = 1 if is_told and not shards.runs else runs_of_shard(experiment, shards, asked)
    pairs = shards.pairs or (runs if cuts.cells_first else max(1, runs // work.runs_per_pair))
    pairs = min(pairs, n_pairs) if cuts.pairs else n_pairs
    cells = shards.cells or max(1, runs // pairs)
    cells = min(cells, n_cells) if cuts.cells else n_cells
    return [
        Piece((first, min(first + cells, n_cells)), (start, min(start + pairs, n_pairs)))
        for start in range(0, n_pairs, pairs)
        for first in range(0, n_cells, cells)
    ]


def join(pieces: Sequence[Piece], found: Sequence[Measured]) -> Measured:
    """Put the numbers of shards together.

    Args:
        pieces: Where each stands.
        found: Their numbers.
    """
    if found[0].record.get("pooled"):
        return _pooled(pieces, found)
    n_cells, n_pairs = (max(stop) for stop in zip(*((p.cells[1], p.pairs[1]) for p in pieces), strict=True))
    n_metrics = len(found[0].values)
    values = np.full((n_metrics, n_cells, n_pairs), np.nan)
    status = np.zeros((n_cells, n_pairs), dtype=np.uint8)
    baselines = {role: np.full((n_metrics, n_pairs), np.nan) for role in found[0].baselines}
    for piece, one in zip(pieces, found, strict=True):
        cells, pairs = piece.places
        values[:, cells, pairs] = one.values
        status[cells, pairs] = one.status
        for role, table in one.baselines.items():
            baselines[role][:, pairs] = table
    return Measured(values, status, baselines, np.arange(n_pairs), _record([one.record for one in found]))


def _pooled(pieces: Sequence[Piece], found: Sequence[Measured]) -> Measured:
    """Put sums over pairs together."""
    roles = {role: np.concatenate([one.baselines[role] for one in found], axis=1) for role in found[0].baselines}
    values, status = np.sum([one.values for one in found], axis=0), found[0].status
    return Measured(values, status, roles, np.arange(pieces[-1].pairs[1]), _record([one.record for one in found]))


def is_of_one_pair(experiment: Experiment, asked: Sequence[Intervention]) -> bool:
    """Say whether the numbers of a pair depend on no other pair of the experiment.

    Args:
        experiment: Model and pairs.
        asked: The interventions.
    """
    has_columns = any(patch.column is not None for each in asked for patch in each.patches)
    put = _values(asked)
    return all(isinstance(value, _OF_ONE_PAIR) for value in put) and (not has_columns or has_same_columns(experiment))


def is_by_itself(asked: Sequence[Intervention]) -> bool:
    """Say whether the numbers of a cell, and what they are shares of, depend on no other cell.

    Args:
        asked: The interventions.
    """
    return all(isinstance(value, _MOVING) for value in _values(asked))


def _values(asked: Sequence[Intervention]) -> list[Value]:
    found = {id(patch.value): patch.value for each in asked for patch in each.patches}
    return [value.of if isinstance(value, Subspace) else value for value in found.values()]


def runs_of_shard(experiment: Experiment, shards: ShardsPart, asked: Sequence[Intervention] = ()) -> int:
    """Return how many runs make a shard: what the study says, or what follows from the sizes of model and prompts.

    Args:
        experiment: Model and pairs.
        shards: What the study says.
        asked: The interventions that are to be run, if it is these.
    """
    if shards.runs:
        return shards.runs
    flop = _planned(experiment, asked) if asked else _of_a_forward(experiment)
    return int(np.clip(_FLOP / max(1.0, flop), _LEAST, _MOST))


def _planned(experiment: Experiment, asked: Sequence[Intervention]) -> float:
    """Return the operations of a run by the plan of some cells on a pair of middling length."""
    sizes = experiment.pairs.sizes("clean")
    pair = int(np.argsort(sizes, kind="stable")[len(sizes) // 2])
    cells = asked[:: -(-len(asked) // _SAMPLE)]
    setting = replace(Setting.of(experiment), precision=None)  # a screen's plan would time the machine
    plan = setting.experiment(experiment.model, experiment.pairs.take([pair]), experiment.source_model).plan(cells)
    return (plan.flops if plan.tier_flops is None else plan.tier_flops) / len(cells)


def _of_a_forward(experiment: Experiment) -> float:
    """Return the operations of a forward, about."""
    n_weights = sum(weight.numel() for weight in experiment.model.module.parameters())
    is_tokens = experiment.pairs.kind == "tokens"
    return 2.0 * n_weights * (float(experiment.pairs.sizes("clean").mean()) if is_tokens else 1.0)


def _record(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one record of several."""
    first = records[0]
    if len(records) == 1:
        return dict(first)
    made: dict[str, int] = {}
    for each in records:
        for name, number in each["engine"].get("interventions", {}).items():
            made[name] = made.get(name, 0) + number
    return {
        **first,
        "engine": {**first["engine"], "interventions": made},
        **_largest(records, "noise_floor"),
        **({"steepest": max(each["steepest"] for each in records)} if "steepest" in first else {}),
        **(
            {"notes": list(dict.fromkeys(note for each in records for note in each["notes"]))}
            if "notes" in first
            else {}
        ),
        "complete": all(each["complete"] for each in records),
        "cost": {name: round(sum(each["cost"][name] for each in records), 3) for name in first["cost"]},
    }


def _largest(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """Return the largest numbers of several records under a name, where they have it."""
    if name not in records[0]:
        return {}
    return {name: {key: max(each[name][key] for each in records) for key in records[0][name]}}
