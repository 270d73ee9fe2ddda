"""The runs of path patching: what comes along the paths of each cell is put into its receivers, and measured.

Cells are taken in portions whose values fit into memory together. Each portion is one ``Experiment.run``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.engine.paths import carry, target_of
from causalpatch.engine.trees import Received, tree_of
from causalpatch.experiment import Experiment
from causalpatch.patches import Intervention, Patch
from causalpatch.patches.patch import Alignment
from causalpatch.results.effects import Effects
from causalpatch.results.status import Status
from causalpatch.sites import Path, Site

PORTION_BYTES = 2**28
"""Values that are put in together: more would take room and save nothing but a few untouched runs."""
_HOW = "what comes along the paths"


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        place: Its number in the grid.
        label: How results call it.
        paths: The paths that are patched in it.
        column: The aligned column at which the sender differs, or None.
    """

    place: int
    label: str
    paths: tuple[Path, ...]
    column: int | None = None


@dataclass(frozen=True)
class Asked:
    """The grid of an investigation, and the runs that fill it.

    Args:
        axes: Coordinates by axis.
        labels: Labels by axis.
        cells: The runs; places without one have no path.
        title: What results call it.
        kind: ``"edge"`` or ``"path"``.
    """

    axes: Mapping[str, Sequence[Any]]
    labels: Mapping[str, Sequence[str]]
    cells: Sequence[Cell]
    title: str
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(len(values) for values in self.axes.values())


def measure_paths(experiment: Experiment, asked: Asked, align: Alignment | None, *, recompute_mlps: bool) -> Effects:
    """Measure the runs of a grid, portion by portion, and put them together."""
    trees = [tree_of(experiment.model, cell.paths, cell.column, align) for cell in asked.cells]
    made: list[tuple[Sequence[Cell], Effects]] = []
    for some in _portions(experiment, trees):
        cells = [asked.cells[number] for number in some]
        interventions = _interventions(
            experiment, cells, [trees[number] for number in some], recompute_mlps=recompute_mlps
        )
        effects = experiment.run(interventions, title=asked.title)
        if made and effects.pair_ids != made[0][1].pair_ids:
            break  # stopped before all pairs had their untouched runs
        made.append((cells, effects))
        if not effects.is_complete:
            break
    return _joined(experiment, asked, made, recompute_mlps=recompute_mlps)


def _interventions(
    experiment: Experiment, cells: Sequence[Cell], trees: Sequence[Sequence[Received]], *, recompute_mlps: bool
) -> list[Intervention]:
    """Return the third runs: the receivers of each cell given what comes along its paths."""
    model = experiment.model
    sites = dict.fromkeys(site for tree in trees for received in tree for site in _sites(experiment, received))
    job = experiment.job([Intervention(tuple(map(Patch, sites)))])  # all of them proven
    given = carry(job, experiment.gauge, trees, _HOW, recompute_mlps=recompute_mlps)
    return [
        Intervention(
            tuple(
                Patch(target_of(model, received.receiver), value) for received, value in zip(tree, values, strict=True)
            ),
            cell.label,
        )
        for cell, tree, values in zip(cells, trees, given, strict=True)
    ]


def _sites(experiment: Experiment, received: Received) -> Iterator[Site]:
    """Yield all sites that are read or written for a receiver."""
    yield target_of(experiment.model, received.receiver)
    for sent in received.senders:
        yield sent.site
        for each in sent.inputs:
            yield from _sites(experiment, each)


def _portions(experiment: Experiment, trees: Sequence[Sequence[Received]]) -> Iterator[range]:
    """Yield the numbers of trees whose values are held together."""
    model, itemsize = experiment.model, max(4, experiment.model.dtype.itemsize)
    n_tokens = int(experiment.pairs.lengths(experiment.base).sum())
    begin, held = 0, 0
    for number, tree in enumerate(trees):
        width = sum(model.head_width if each.receiver.attends else model.width for each in tree)
        size = n_tokens * width * itemsize
        if number > begin and held + size > PORTION_BYTES:
            yield range(begin, number)
            begin, held = number, 0
        held += size
    yield range(begin, len(trees))


def _joined(
    experiment: Experiment, asked: Asked, made: Sequence[tuple[Sequence[Cell], Effects]], *, recompute_mlps: bool
) -> Effects:
    """Lay what was measured into the grid; places without a path are skipped."""
    first = made[0][1]
    data = first.to_xarray()
    n_cells, n_pairs, n_metrics = int(np.prod(asked.shape)), len(first.pair_ids), len(first.metrics)
    values = np.full((n_metrics, n_cells, n_pairs), np.nan)
    status = np.full((n_cells, n_pairs), Status.SKIPPED, dtype=np.uint8)
    for cells, effects in made:
        found = effects.to_xarray()
        places = [cell.place for cell in cells]
        values[:, places] = found["metric"].values.reshape(n_metrics, len(cells), n_pairs)
        status[places] = found["status"].values
    baselines = {
        name.removeprefix("baseline_"): data[name].values.reshape(n_metrics, n_pairs)
        for name in map(str, data.data_vars)
        if name.startswith("baseline_")
    }
    return Effects.build(
        axes=asked.axes,
        pair_ids=first.pair_ids,
        groups=data["component"].values,
        metrics=first.metrics,
        values=values.reshape(n_metrics, *asked.shape, n_pairs),
        status=status.reshape(*asked.shape, n_pairs),
        baselines=baselines,
        labels=asked.labels,
        positions=_columns(experiment, first.pair_ids) if "position" in asked.axes else None,
        provenance=_record(asked, [effects for _, effects in made], recompute_mlps=recompute_mlps),
    )


def _columns(experiment: Experiment, pair_ids: Sequence[str]) -> np.ndarray:
    """Return base and source position of every aligned column of some pairs."""
    number = {pair.id: place for place, pair in enumerate(experiment.pairs)}
    columns: np.ndarray = experiment.pairs.aligned().columns[[number[name] for name in pair_ids]]
    return columns if experiment.base == "clean" else columns[..., ::-1]


def _record(asked: Asked, made: Sequence[Effects], *, recompute_mlps: bool) -> dict[str, Any]:
    """Return the record of all portions together."""
    record = dict(made[0].provenance)
    engine = dict(record["engine"])
    engine["interventions"] = _summed([one.provenance["engine"]["interventions"] for one in made])
    n_none = int(np.prod(asked.shape)) - len(asked.cells)
    notes = [f"{n_none} cells have no path, because their sender stands behind their receiver"] if n_none else []
    mlps = "computed again" if recompute_mlps else "frozen"
    return {
        **record,
        "value": "source",
        "engine": engine,
        "cost": _summed([one.provenance["cost"] for one in made]),
        "noise_floor": {
            name: max(one.provenance["noise_floor"][name] for one in made) for name in record["noise_floor"]
        },
        "complete": all(one.is_complete for one in made)
        and sum(len(one.to_xarray()["intervention"]) for one in made) == len(asked.cells),
        "notes": [*record["notes"], *notes],
        "facts": {
            **record["facts"],
            "granularity": asked.kind,
            "kind": asked.kind,
            "value": "source run",
            "circuit": f"the paths alone up to their receivers, attention frozen, MLPs between {mlps}",
        },
    }


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}
