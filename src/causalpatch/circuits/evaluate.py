"""Evaluation of circuits: all sizes, their complements and random circuits from one clean and one corrupted run.

1. Circuits are given, or taken from scores at each share of the edges, by importance (for CPR) and by magnitude (for
   CMD).
2. Clean and corrupted prompts run once. All circuits, all complements and random circuits of the same sizes are sets of
   edges in rows of the same runs; sets that are alike run once.
3. ``Evaluation`` says what follows: f at each size with its interval and spread, areas, and the test of equivalence.

A random circuit is the beginning of a random order of all edges, so that those of one draw lie in each other as those
of scores do.

References:
    Wang et al. 2023, "Interpretability in the Wild", 2211.00593 (faithfulness, knock-out of the complement); Mueller et
    al. 2025, "MIB: A Mechanistic Interpretability Benchmark", 2504.13151 (CPR, CMD).
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from causalpatch.base.counts import require_count
from causalpatch.base.errors import SettingError
from causalpatch.base.seeds import generator
from causalpatch.circuits.circuit import CIRCUIT, Circuit, record_of
from causalpatch.circuits.discover import By, Search, describe_scores, ranking, share_of
from causalpatch.circuits.exact import graph_of
from causalpatch.circuits.keep import Kept, first_metric, require_independent, run_while_wanted
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_jobs import carried_of
from causalpatch.pairs import Pairs
from causalpatch.patches import Mean, Value
from causalpatch.results import evaluation
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.evaluation import Evaluation
from causalpatch.sites.graph import Graph
from causalpatch.statistics.areas import FRACTIONS

Evaluated = Circuit | Iterable[Circuit] | EdgeScores
_ORDERS: tuple[By, ...] = ("importance", "magnitude")


def evaluate_circuit(
    experiment: Experiment,
    circuit: Evaluated,
    *,
    fractions: Sequence[float] = FRACTIONS,
    method: Search = "top",
    n_random: int = 20,
    found_on: Pairs | None = None,
    value: Value | str = "source",
) -> Evaluation:
    """Measure how much of a behaviour circuits keep by themselves.

    Args:
        experiment: Model, pairs and metric, of several the first. Give it pairs that the circuit was not found on:
            ``pairs.split()`` makes two sets that share nothing. Circuits run on clean prompts, whatever its direction.
        circuit: A circuit, several, or scores: then circuits of all sizes are taken from these.
        fractions: Shares of the edges at which circuits are taken from scores, each rounded down.
        method: How they are taken: ``"top"`` or ``"greedy"``.
        n_random: Random circuits of each size.
        found_on: The pairs that it was found on: it is an error if these share a prompt with those of the experiment.
            Means are those of these pairs.
        value: What ablated edges carry: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``. Give what the circuit was
            found with: another ablation gives other numbers.

    Returns:
        The runs, with f, areas and a chart. Stopped by Ctrl-C, those that were made on all pairs (or all of them, on
        the pairs on which all were made), with a warning and a note; a study keeps them and goes on with the others.

    Raises:
        ModelUnsupported: The circuit or the scores are of another model.
        RequestError: A circuit has no edges.
        SettingError: No circuits, shares of edges that are none, or a search that is not known.
        PairError: Pairs are not independent of those that the circuit was found on.
        NoGap: Importance is asked for where base and source have the same mean.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> circuit = cp.discover_circuit(cp.attribute_edges(experiment), fraction=0.2)
        >>> found = cp.evaluate_circuit(experiment, circuit, n_random=2)
        >>> len(found.runs)
        4

    Cost:
        Per pair two forwards, and one for each different set of edges: with ten sizes and 20 random circuits about 220.
        A mask of all edges is held for each.
    """
    require_count("n_random", n_random, 0, usual=20)
    if found_on is not None:
        require_independent(experiment.pairs, found_on, "the pairs that the circuit was found on")
    graph = graph_of(experiment)
    circuits = _circuits(experiment, circuit, fractions, method)
    started = time.perf_counter()
    made = first_metric(experiment)
    runs: list[dict[str, Any]] = []
    masks: list[np.ndarray] = []
    for order, fraction, each in circuits:
        for kind, mask in ((evaluation.CIRCUIT, each.mask), (evaluation.COMPLEMENT, graph.exists & ~each.mask)):
            runs.append({"kind": kind, "order": order, "fraction": fraction, "n_edges": each.n_edges, "draw": -1})
            masks.append(mask)
    sizes = sorted({each.n_edges for _, _, each in circuits})
    for draw in range(n_random):
        order_of_edges = generator(experiment.seed, "random circuit", draw).permutation(graph.n_edges)
        for size in sizes:
            fraction = size / graph.n_edges
            runs.append({"kind": evaluation.RANDOM, "order": "", "fraction": fraction, "n_edges": size, "draw": draw})
            masks.append(mask_of(graph, order_of_edges[:size]))
    kept = run_while_wanted(made, np.stack(masks), value, found_on)
    made_runs = [runs[int(number)] for number in kept.sets]
    if not any(run["kind"] == evaluation.CIRCUIT for run in made_runs):
        raise KeyboardInterrupt
    fact = _fact_of(value)
    record = {
        **kept.provenance,
        "site": "circuits",
        "reference": "everything ablated",
        "facts": {**circuits[0][2].facts, "value": fact, "circuit": f"{CIRCUIT}; and complements"},
        "found": [each.record["found"] for _, _, each in circuits],
        "notes": _notes(experiment, [each for _, _, each in circuits], found_on, value)
        + _stopped(kept, len(runs), made),
        "cost": {**kept.provenance["cost"], "seconds": round(time.perf_counter() - started, 3)},
    }
    return Evaluation(made_runs, kept.values, kept.clean, kept.empty, made.pairs.components[kept.pairs], record)


def _fact_of(value: Value | str) -> str:
    """Return what facts say that ablated edges carry."""
    return str(record_of({}, {}, str(carried_of(value)))["facts"]["value"])


def _stopped(kept: Kept, n_runs: int, experiment: Experiment) -> list[str]:
    """Say what was measured where the user stopped the runs."""
    if kept.is_complete:
        return []
    of = f"{len(kept.sets)} of {n_runs} runs on {len(kept.pairs)} of {len(experiment.pairs)} pairs"
    return [f"stopped by the user: {of} were made, and are all that is counted"]


def mask_of(graph: Graph, numbers: np.ndarray) -> np.ndarray:
    """Return the mask of edges by their numbers among ``graph.edges``."""
    mask = np.zeros(graph.shape, dtype=bool)
    mask[tuple(graph.edges[numbers].T)] = True
    return mask


def _circuits(
    experiment: Experiment, given: Evaluated, fractions: Sequence[float], method: Search
) -> list[tuple[str, float, Circuit]]:
    """Return the circuits to evaluate, each with how it was found and the share of edges that was asked for."""
    if not isinstance(given, EdgeScores):
        circuits: list[Any] = (
            list(given) if isinstance(given, Iterable) and not isinstance(given, str | Circuit) else [given]
        )
        strange = [type(each).__name__ for each in circuits if not isinstance(each, Circuit)]
        if strange:
            raise SettingError(
                f"{strange[0]} is no circuit",
                facts=[("needed", "a circuit, several, or scores of edges")],
                fix="cp.discover_circuit(cp.attribute_edges(experiment), 20)",
            )
        if not circuits:
            raise SettingError("there are no circuits to evaluate", fix="evaluate_circuit(experiment, circuit)")
        for each in circuits:
            each.require(experiment.model)
            each.require_edges()
        return [(each.method, each.fraction, each) for each in circuits]
    graph = given.graph
    whole = Circuit(graph, graph.exists, record_of(given.provenance, {"method": "scores"}))
    whole.require(experiment.model)
    wrong = [each for each in fractions if not 0 < each <= 1]
    if wrong or not len(fractions):
        raise SettingError(
            f"{wrong[0] if wrong else 'nothing'} is no share of the edges",
            facts=[("allowed", "above 0, at most 1")],
            fix="leave fractions= out for the usual ten",
        )
    scores = describe_scores(given)
    carried = given.provenance.get("facts", {}).get("value", "source")
    made: list[tuple[str, float, Circuit]] = []
    for by in _ORDERS:
        taken, _ = ranking(given, share_of(graph, max(fractions)), method, by)
        for fraction in sorted(set(fractions)):
            some = taken[: share_of(graph, fraction)]
            found = {"method": f"{method} by {by}", "n_edges": len(some), "scores": scores}
            made.append(
                (by, fraction, Circuit(graph, mask_of(graph, some), record_of(given.provenance, found, carried)))
            )
    return made


def _notes(
    experiment: Experiment, circuits: Sequence[Circuit], found_on: Pairs | None, value: Value | str
) -> list[str]:
    """Say on which pairs circuits were found, and with what in the place of ablated edges, where that is another."""
    fact = _fact_of(value)
    others = sorted({each.facts["value"] for each in circuits if each.method != "given"} - {fact})
    notes = [f"found with another ablation ({', '.join(others)}) than measured with ({fact})"] if others else []
    hashes = {each.record["pairs"]["hash"] for each in circuits if "pairs" in each.record}
    if isinstance(carried_of(value), Mean) and found_on is None:
        notes.append("means are those of the pairs that are measured, and fit these better than others: give found_on")
    if experiment.pairs.content_hash in hashes:
        return [*notes, "measured on the pairs that the circuit was found on: f is too high on these"]
    if found_on is None and hashes:
        notes.append("measured on other pairs than those it was found on; whether they share prompts was not looked at")
    if found_on is not None and hashes - {found_on.content_hash}:
        notes.append(
            "found_on are other pairs than those on record for the circuit: whether these share prompts was "
            "not looked at"
        )
    return notes
