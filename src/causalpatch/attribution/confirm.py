"""Screen, then verify: exact effects of the largest scores, and of a random sample of all others.

1. Components are ranked by |score|: cells of a grid, or edges.
2. The largest are patched exactly, and of the others a sample stratified by |score|: cells as ``sweep`` patches them,
   edges as ``patch_edges`` interchanges them.
3. ``Confirmation`` says how far both agree, and how many of the others can matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.base.counts import require_count
from causalpatch.base.errors import NotFinite, SettingError
from causalpatch.base.seeds import generator
from causalpatch.experiment import Experiment
from causalpatch.experiment.cells import grid_of
from causalpatch.experiment.edge_sets import EdgeSets
from causalpatch.experiment.edges import run_edges
from causalpatch.experiment.provenance import require_same_model
from causalpatch.results.confirmation import Confirmation
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.effects import Effects
from causalpatch.results.score_words import UNSIGNED
from causalpatch.results.scores import Scores
from causalpatch.sites import parse
from causalpatch.statistics.missed import check_level, draw_stratified, sample_for

FINE, COARSE = 0.02, 0.1  # shares of the gap that matter: of neurons, features and edges; of layers and heads
_FINE_AXES = {"neuron", "feature"}


def confirm_scores(
    experiment: Experiment,
    scores: Scores | EdgeScores,
    top: int = 50,
    random_sample: int = 100,
    *,
    at_most: int | None = None,
    delta: float | None = None,
    level: float = 0.95,
) -> Confirmation:
    """Patch the largest and a random sample of the others, and hold scores against these exact effects.

    Args:
        experiment: The model whose scores they are, and pairs to measure effects on, these or others; its first metric.
        scores: Of ``attribute`` or ``attribute_edges``.
        top: How many of the largest |score| are measured; all where there are no more.
        random_sample: How many of the others are drawn, stratified by |score|, by the experiment's seed.
        at_most: Instead, as many as bound what was missed by this number, if none is found.
        delta: Which |effect| matters, as a share of the gap; by default .02 of neurons, features and edges, .1 of all
            else.
        level: With which probability the bound on what was missed holds.

    Raises:
        ModelUnsupported: The scores are of another model.
        SettingError: The scores are of another metric, direction or grid, or tell positions of edges apart; or the
            numbers are impossible.
        NoGap: Clean and corrupted runs do not differ enough, so a share means nothing.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4], show_progress=False)
        >>> found = cp.confirm_scores(experiment, cp.attribute(experiment, "z"), top=4, random_sample=6)
        >>> int(found.is_top.sum()), int(found.sampled.sum()), found.n_components
        (4, 6, 16)

    Cost:
        One run per pair and component that is measured.
    """
    _check_numbers(top, random_sample, delta)
    if at_most is not None:
        require_count("at_most", at_most, 0, usual=20)
    check_level(level)
    _check_setting(experiment, scores)
    asked = _of_edges(experiment, scores) if isinstance(scores, EdgeScores) else _of_cells(experiment, scores)
    ranked = asked.ranked()
    first, rest = ranked[:top], ranked[top:]
    n_drawn = random_sample if at_most is None else sample_for(len(rest), at_most, level)
    sample = draw_stratified(rest, n_drawn, generator(experiment.seed, "confirm"))
    numbers = np.concatenate([first, sample.chosen])
    effects, names = asked.measure(numbers)
    exact = _shares(effects, names)
    gap = float(scores.provenance["mean_source"]) - float(scores.provenance["mean_base"])
    is_unsigned = bool(scores.provenance.get(UNSIGNED))
    fine = isinstance(scores, EdgeScores) or bool(_FINE_AXES & set(scores.axes))
    return Confirmation(
        asked.axes(numbers),
        asked.values[numbers] / (abs(gap) if is_unsigned else gap),
        exact,
        np.concatenate([np.full(len(first), -1), sample.stratum]),
        sample.sizes,
        {
            **effects.provenance,
            "delta": delta if delta is not None else FINE if fine else COARSE,
            "level": level,
            "scores": {**scores.provenance, "of": asked.noun},
            "notes": _notes(effects, scores),
        },
    )


@dataclass(frozen=True, eq=False)
class _Asked:
    """What can be measured.

    Args:
        values: Mean score of each component, (component,); NaN where it has none.
        axes: From numbers of components to their coordinates by axis.
        run: From numbers of components to their effects, one in each run.
        noun: What components are called.
    """

    values: np.ndarray
    axes: Callable[[np.ndarray], dict[str, list[Any]]]
    run: Callable[[Experiment, np.ndarray, Sequence[str]], Effects]
    experiment: Experiment
    noun: str

    def ranked(self) -> np.ndarray:
        """Return the numbers of components that have a score, that of the largest magnitude first."""
        order = np.argsort(-np.abs(np.nan_to_num(self.values)), kind="stable")
        found: np.ndarray = order[np.isfinite(self.values[order])]
        return found

    def measure(self, numbers: np.ndarray) -> tuple[Effects, list[str]]:
        """Return the effects of some components, and what each is called.

        Raises:
            KeyboardInterrupt: The user stopped the runs: what is missing is no random part of what was asked.
        """
        made = self.experiment.measuring(self.experiment.metrics[:1])
        made.precision = None  # a screen would hold scores against approximations
        axes = self.axes(numbers)
        names = [
            ", ".join(f"{axis} {at}" for axis, at in zip(axes, place, strict=True))
            for place in zip(*axes.values(), strict=True)
        ]
        effects = self.run(made, numbers, names)
        if not effects.is_complete:
            raise KeyboardInterrupt
        return effects, names


def _of_cells(experiment: Experiment, scores: Scores) -> _Asked:
    """Return the cells of a grid."""
    wanted = parse(str(scores.provenance["site"]))
    alone = list(scores.coordinates) == ["intervention"] and wanted.module is None
    grid = grid_of(experiment, wanted, () if alone else scores.axes)
    shape = tuple(len(held) for held in scores.coordinates.values())
    if {axis: list(held) for axis, held in grid.axes.items()} != scores.coordinates:
        raise SettingError(
            f"the scores of '{wanted}' stand on another grid than this experiment has",
            facts=[
                ("scores", " x ".join(f"{axis} {len(held)}" for axis, held in scores.coordinates.items())),
                ("experiment", " x ".join(f"{axis} {len(held)}" for axis, held in grid.axes.items())),
            ],
            fix="score it by the same experiment, or at a named position: attribute(experiment, 'resid_pre@-1')",
        )

    def axes(numbers: np.ndarray) -> dict[str, list[Any]]:
        places = np.unravel_index(numbers, shape)
        return {
            axis: [held[n] for n in at] for (axis, held), at in zip(scores.coordinates.items(), places, strict=True)
        }

    def run(made: Experiment, numbers: np.ndarray, names: Sequence[str]) -> Effects:
        held = axes(numbers)
        cells = (dict(zip(held, place, strict=True)) for place in zip(*held.values(), strict=True))
        return made.run(list(map(grid.intervention, cells)), axes={"intervention": names}, title=str(wanted))

    mean = scores.score().values.reshape(-1)
    return _Asked(mean, axes, run, experiment, f"cells of {wanted}")


def _of_edges(experiment: Experiment, scores: EdgeScores) -> _Asked:
    """Return the edges of a graph."""
    graph = scores.graph
    if scores.has_positions:
        raise SettingError(
            "edges are interchanged at all positions, and these scores tell positions apart",
            fix="scores.over_positions().confirm(…)",
        )

    def axes(numbers: np.ndarray) -> dict[str, list[Any]]:
        return {"edge": list(graph.names(graph.edges[numbers]))}

    def run(made: Experiment, numbers: np.ndarray, names: Sequence[str]) -> Effects:
        return run_edges(made, EdgeSets.of_edges(graph.edges[numbers], names))

    return _Asked(scores.values[tuple(graph.edges.T)], axes, run, experiment, "edges")


def _shares(effects: Effects, names: Sequence[str]) -> np.ndarray:
    """Return exact effects as shares of the gap.

    Raises:
        NoGap: Clean and corrupted runs do not differ enough.
        NotFinite: An effect is not a number.
    """
    exact = np.asarray(effects.recovered().values)
    wrong = np.flatnonzero(~np.isfinite(exact))
    if len(wrong):
        raise NotFinite(
            f"the effect of {names[wrong[0]]} is not a number",
            facts=[("model", effects.provenance["model"]["name"]), ("such", f"{len(wrong)} of {len(exact)}")],
            fix="open the model in float32",
        )
    return exact


def _notes(effects: Effects, scores: Scores | EdgeScores) -> list[str]:
    """Say what must be said of both, and whether both are of the same pairs."""
    own = [*effects.provenance.get("notes", []), *scores.provenance.get("notes", [])]
    both = [each.provenance.get("pairs", {}).get("hash") for each in (effects, scores)]
    if both[0] != both[1]:
        own.append("scores are of other pairs than exact effects")
    return list(dict.fromkeys(map(str, own)))


def _check_numbers(top: int, random_sample: int, delta: float | None) -> None:
    require_count("top", top, 0, usual=50)
    require_count("random_sample", random_sample, 0, usual=100)
    wrong = [f"delta={delta}"] if delta is not None and not delta >= 0 else []
    wrong += ["top=0, random_sample=0"] if top == random_sample == 0 else []
    if wrong:
        raise SettingError(
            f"scores cannot be confirmed with {wrong[0]}",
            facts=[("allowed", "0 or more, not both 0")],
            fix="top=50, random_sample=100",
        )


def _check_setting(experiment: Experiment, scores: Scores | EdgeScores) -> None:
    """Make sure that scores approximate effects in this experiment.

    Raises:
        ModelUnsupported: They are of another model.
        SettingError: They are of another metric or direction.
    """
    record = scores.provenance
    require_same_model(experiment.model, record["model"], "scores are confirmed in the model that they are of")
    own = {"metric": experiment.metrics[0].name, "direction": experiment.direction}
    (metric, *_) = record.get("metrics", [own["metric"]])  # a graph file does not say what was scored
    theirs = {"metric": metric, "direction": record["direction"]}
    for name, value in own.items():
        if theirs[name] != value:
            fix = f'experiment.{"measuring" if name == "metric" else "turned"}("{theirs[name]}")'
            raise SettingError(
                f"scores and exact effects are of different {name}s",
                facts=[("scores", theirs[name]), ("experiment", value)],
                fix=f"confirm_scores({fix}, scores)",
            )
