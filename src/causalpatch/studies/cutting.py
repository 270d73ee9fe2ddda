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

How large a shard is follows from the plan of its runs, which is arithmetic on the sizes of model and prompts, so that
it is the same everywhere: two trillion operations, and 64 to 20,000 runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from causalpatch.experiment import Experiment
from causalpatch.experiment.measured import Measured
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

_FLOP: Final = 2e12
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


def cut(experiment: Experiment, asked: Sequence[Intervention], shards: ShardsPart) -> list[Piece]:
    """Return the shards of a request, cells of the first pairs first.

    Args:
        experiment: Model and pairs.
        asked: The interventions.
        shards: What the study says of their size.
    """
    n_cells, n_pairs = len(asked), len(experiment.pairs)
    cuts_pairs, cuts_cells = is_of_one_pair(experiment, asked), _is_by_itself(asked)
    is_told = shards.runs or (shards.pairs and shards.cells) or not (cuts_pairs or cuts_cells)
    runs = shards.runs or (1 if is_told else _fitting_runs(experiment, asked))
    pairs = shards.pairs or max(1, runs // n_cells)
    pairs = min(pairs, n_pairs) if cuts_pairs else n_pairs
    cells = shards.cells or max(1, runs // pairs)
    cells = min(cells, n_cells) if cuts_cells else n_cells
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


def is_of_one_pair(experiment: Experiment, asked: Sequence[Intervention]) -> bool:
    """Say whether the numbers of a pair depend on no other pair of the experiment.

    Args:
        experiment: Model and pairs.
        asked: The interventions.
    """
    has_columns = any(patch.column is not None for each in asked for patch in each.patches)
    put = _values(asked)
    return all(isinstance(value, _OF_ONE_PAIR) for value in put) and (not has_columns or _has_same_columns(experiment))


def _is_by_itself(asked: Sequence[Intervention]) -> bool:
    """Say whether the numbers of a cell, and what they are shares of, depend on no other cell."""
    return all(isinstance(value, _MOVING) for value in _values(asked))


def _values(asked: Sequence[Intervention]) -> list[Value]:
    found = {id(patch.value): patch.value for each in asked for patch in each.patches}
    return [value.of if isinstance(value, Subspace) else value for value in found.values()]


def _has_same_columns(experiment: Experiment) -> bool:
    """Say whether every part of the pairs has the columns that all of them have."""
    pairs = experiment.pairs
    sizes = [np.unique(pairs.sizes(role)) for role in ("clean", "corrupt")]
    return all(len(size) == 1 for size in sizes)


def _fitting_runs(experiment: Experiment, asked: Sequence[Intervention]) -> int:
    """Return how many runs make a shard: the plan of some cells on a pair of middling length says what a run takes."""
    sizes = experiment.pairs.sizes("clean")
    pair = int(np.argsort(sizes, kind="stable")[len(sizes) // 2])
    cells = asked[:: -(-len(asked) // _SAMPLE)]
    setting = replace(Setting.of(experiment), precision=None)  # a screen's plan would time the machine
    plan = setting.experiment(experiment.model, experiment.pairs.take([pair]), experiment.source_model).plan(cells)
    flop = plan.flops if plan.tier_flops is None else plan.tier_flops
    return int(np.clip(_FLOP * len(cells) / max(1.0, flop), _LEAST, _MOST))


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
        "noise_floor": {name: max(each["noise_floor"][name] for each in records) for name in first["noise_floor"]},
        "notes": list(dict.fromkeys(note for each in records for note in each["notes"])),
        "complete": all(each["complete"] for each in records),
        "cost": {name: round(sum(each["cost"][name] for each in records), 3) for name in first["cost"]},
    }
