"""Scores held against exact effects, on every trained model at hand: ``python -m benchmarks.scores``.

Every cell of a grid is patched by itself, which is the truth; a *method* scores the same cells from a few runs. How
near the scores come to the effects is told by four numbers (``Agreement``). Nothing is tuned: pairs are the first ones
of each behaviour, metrics and settings are the defaults.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy import stats

import causalpatch as cp
from benchmarks.machine import ROOT, describe, versions
from causalpatch.attribution.edges import EdgeMethod
from causalpatch.attribution.nodes import Method
from causalpatch.experiment.experiment import Direction
from causalpatch.pairs import Pairs

OUT = Path(__file__).parent / "SCORES.md"
MODELS = ROOT.parent / "shared" / "models"
MOST_PAIRS: Final = 24
SHARE: Final = 0.1  # of the cells are the top that a score should find; at least LEAST of them
LEAST: Final = 5
NEGLIGIBLE: Final = 0.01  # of the largest |effect|: below it an effect's sign is no matter of concern

KINDS: Mapping[str, str] = {"heads": "z", "MLPs by position": "mlp_out", "neurons, last position": "mlp_post@-1"}
NODE_METHODS: tuple[Method, ...] = ("atp", "atp*", "relp", "ig", "clean-corrupted")
EDGE_METHODS: tuple[EdgeMethod, ...] = ("eap", "eap-ig", "clean-corrupted")
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
EDGES = "edges"


@dataclass(frozen=True)
class Agreement:
    """How near scores come to effects; NaN where it is not defined.

    Args:
        pearson: Correlation; of magnitudes where the scores have no sign.
        spearman: Correlation of ranks, likewise.
        sign: Share of the cells whose score has the sign of the effect, among those whose effect is not negligible.
        recall: Share of the cells with the largest |effect| that are among as many with the largest |score|.
    """

    pearson: float
    spearman: float
    sign: float
    recall: float


@dataclass(frozen=True)
class Row:
    """A grid on the pairs of one behaviour.

    Args:
        behaviour: Model and behaviour.
        direction: Direction of the patches.
        kind: What the cells are.
        cells: How many there are.
        largest: Largest |effect| over the mean gap between clean and corrupted runs.
        found: By method.
        seconds: By method, and ``exact``.
    """

    behaviour: str
    direction: str
    kind: str
    cells: int
    largest: float
    found: Mapping[str, Agreement]
    seconds: Mapping[str, float]


def agreement(exact: np.ndarray, scores: np.ndarray, *, has_sign: bool) -> Agreement:
    """Compare scores with the effects of the same cells.

    Args:
        exact: Effects, NaN where a cell could not be patched.
        scores: Scores.
        has_sign: Whether scores have a sign.
    """
    known = np.isfinite(exact) & np.isfinite(scores)
    exact, scores = exact[known], scores[known]
    one, other = (exact, scores) if has_sign else (np.abs(exact), np.abs(scores))
    is_varied = len(one) > 2 and np.ptp(one) > 0 and np.ptp(other) > 0
    counts = np.abs(exact) > NEGLIGIBLE * np.abs(exact).max(initial=0)
    n_top = min(len(exact), max(LEAST, round(SHARE * len(exact))))
    top, taken = (set(np.argsort(-np.abs(each), kind="stable")[:n_top].tolist()) for each in (exact, scores))
    return Agreement(
        float(stats.pearsonr(one, other).statistic) if is_varied else np.nan,
        float(stats.spearmanr(one, other).statistic) if is_varied else np.nan,
        float((np.sign(exact) == np.sign(scores))[counts].mean()) if has_sign and counts.any() else np.nan,
        len(top & taken) / n_top if n_top else np.nan,
    )


def behaviours() -> Iterator[tuple[str, cp.Model, Pairs]]:
    """Yield the models at hand, each with the pairs of one of its behaviours."""
    embedded = cp.open_model("zoo:stories", device="cpu")
    yield "zoo:stories, ioi", embedded, cp.load_pairs("ioi", embedded)
    for folder in sorted(MODELS.glob("*/config.json")) if MODELS.is_dir() else []:
        model = cp.open_model(folder.parent, device="cpu")
        pairs = cp.load_pairs(folder.parent / "pairs.jsonl", model)
        for behaviour in dict.fromkeys(pair.extra["behaviour"] for pair in pairs):
            yield f"{folder.parent.name}, {behaviour}", model, pairs.where(behaviour=behaviour)


def measure(
    named: tuple[str, cp.Model, Pairs], kinds: Sequence[str], directions: Sequence[Direction], most_pairs: int
) -> Iterator[Row]:
    """Patch and score every cell of the grids of one behaviour."""
    name, model, pairs = named
    for direction in directions:
        experiment = cp.Experiment(model, pairs[:most_pairs], direction=direction, show_progress=False)
        gap = abs(float(experiment.baseline.clean[0].mean() - experiment.baseline.corrupt[0].mean()))
        for kind in kinds:
            seconds: dict[str, float] = {}
            methods = _edge_methods(experiment) if kind == EDGES else _node_methods(experiment, KINDS[kind])
            exact = _timed("exact", methods.pop("exact"), seconds)
            found = {
                method: agreement(exact, _timed(method, score, seconds), has_sign=method != "atp*")
                for method, score in methods.items()
            }
            largest = float(np.nanmax(np.abs(exact))) / gap
            yield Row(name, direction, kind, int(np.isfinite(exact).sum()), largest, found, seconds)


_Scored = Callable[[], np.ndarray]


def _timed(name: str, make: _Scored, seconds: dict[str, float]) -> np.ndarray:
    started = time.perf_counter()
    values = make()
    seconds[name] = time.perf_counter() - started
    return values


def _node_methods(experiment: cp.Experiment, site: str) -> dict[str, _Scored]:
    def exact() -> np.ndarray:
        return np.asarray(cp.sweep(experiment, site).effect().values).reshape(-1)

    def scored(method: Method) -> np.ndarray:
        return np.asarray(cp.attribute(experiment, site, method).score().values).reshape(-1)

    return {"exact": exact} | {method: lambda method=method: scored(method) for method in NODE_METHODS}


def _edge_methods(experiment: cp.Experiment) -> dict[str, _Scored]:
    exists = cp.graph_of(experiment).exists

    def exact() -> np.ndarray:
        return np.asarray(cp.patch_edges(experiment).effect().values)  # in the order of the graph's edges

    def scored(method: EdgeMethod) -> np.ndarray:
        return np.asarray(cp.attribute_edges(experiment, method).score().values)[exists]

    return {"exact": exact} | {method: lambda method=method: scored(method) for method in EDGE_METHODS}


def write(rows: Sequence[Row], command: str, most_pairs: int) -> str:
    """Return the page: a table for each kind of cell, and the means over all rows."""
    machine, used = describe(), versions()
    lines = [
        "# Scores against exact effects",
        "",
        f"Made by `{command}` on {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in used.items())
        + ".",
        "",
        "The truth is the effect of patching each cell by itself (`sweep`; of edges `patch_edges`), a mean over the "
        f"first {most_pairs} pairs of a behaviour at most. Each entry: **Pearson's** correlation of scores and "
        "effects / **Spearman's** / share of equal **signs** among the cells whose |effect| is above "
        f"{NEGLIGIBLE:.0%} of the largest / **recall**, the share of the cells with the largest |effect| ({SHARE:.0%} "
        f"of all, at least {LEAST}) that are among as many with the largest |score|. Scores of `atp*` have no sign: "
        "correlations are those of magnitudes there. *Largest*: the largest |effect| over the mean gap between clean "
        "and corrupted runs. `ig` and `eap-ig` take 5 steps.",
        "",
    ]
    for kind in dict.fromkeys(row.kind for row in rows):
        some = [row for row in rows if row.kind == kind]
        methods = list(some[0].found)
        lines += [f"## {kind[0].upper()}{kind[1:]}", ""]
        lines += [f"| behaviour | cells | largest | {' | '.join(methods)} |", f"|---|---|---|{'---|' * len(methods)}"]
        for row in some:
            cells = " | ".join(_cell(row.found[method]) for method in methods)
            lines.append(f"| {row.behaviour}, {row.direction} | {row.cells:,} | {row.largest:.2f} | {cells} |")
        means = " | ".join(_cell(mean([row.found[method] for row in some])) for method in methods)
        lines += [f"| **mean** | | | {means} |", ""]
        spent = {name: sum(row.seconds[name] for row in some) for name in ("exact", *methods)}
        lines += ["Seconds for all rows: " + ", ".join(f"{name} {took:.1f}" for name, took in spent.items()) + ".", ""]
    return "\n".join(lines)


def mean(some: Sequence[Agreement]) -> Agreement:
    """Return the mean of each number over those for which it is defined."""
    table = np.array([[one.pearson, one.spearman, one.sign, one.recall] for one in some])
    known = np.isfinite(table)
    sums = np.where(known, table, 0).sum(0)
    return Agreement(*np.divide(sums, known.sum(0), out=np.full(4, np.nan), where=known.any(0)).tolist())


def _cell(one: Agreement) -> str:
    numbers = (one.pearson, one.spearman, one.sign, one.recall)
    return " / ".join("-" if np.isnan(number) else f"{number:.2f}" for number in numbers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    known = (*KINDS, EDGES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scores", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="behaviours whose name holds this, such as stories260k")
    parser.add_argument("--kinds", nargs="*", choices=known, default=list(known), help="what is scored")
    parser.add_argument("--directions", nargs="*", choices=DIRECTIONS, default=list(DIRECTIONS), help="directions")
    parser.add_argument("--pairs", type=int, default=MOST_PAIRS, help="pairs of each behaviour (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="page to write (default: %(default)s)")
    chosen: Any = parser.parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows = []
    for named in behaviours():
        if chosen.only not in named[0]:
            continue
        for row in measure(named, chosen.kinds, chosen.directions, chosen.pairs):
            best = ", ".join(f"{method} {_cell(found)}" for method, found in row.found.items())
            print(f"{row.behaviour}, {row.direction}, {row.kind} ({row.cells}): {best}", flush=True)
            rows.append(row)
    if not rows:
        parser.error(f"no behaviour is called like {chosen.only!r}")
    command = "make scores" if arguments is None else "python -m benchmarks.scores"
    chosen.out.write_text(write(rows, command, chosen.pairs), encoding="utf-8")
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
