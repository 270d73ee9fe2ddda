"""Methods that score edges, held against circuits that are known: ``python -m benchmarks.ground_truth``.

A *method* is a function from a case to its scores: one number for each of ``case.edges``, larger for what is more
likely true, NaN for what it does not score; or None where it does not apply. A method that selects a set of edges gives
1 to these and 0 to the others. All of them see the same cases, which are never tuned to one.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import causalpatch as cp
from benchmarks.machine import describe, versions
from causalpatch.attribution.edges import EdgeMethod
from causalpatch.base.seeds import generator
from causalpatch.circuits.against import Against, count_found, hold_against
from causalpatch.circuits.ground_truth import FORMS, Case, case_names, cases
from causalpatch.circuits.learn import Learning

OUT = Path(__file__).parent / "GROUND_TRUTH.md"
FLOOR = 1e-6  # of the largest score: what is smaller is rounding, also where a method multiplies in float32
STEPS, RATE = 100, 0.2  # of learning; chosen on "fraction" and "reverse", plain
SHARE = 1e-3  # of the gap: the loss that an edge must prevent to be kept by ACDC
Method = Callable[[Case], np.ndarray | None]


def exact(case: Case) -> np.ndarray:
    """Patch each edge by itself: the mean over pairs of the size of its effect."""
    effects = cp.patch_edges(case.experiment(), list(case.edges), value=carried(case))
    return np.abs(effects.effect(per_pair=True).values).mean(-1)


def scored(method: EdgeMethod, case: Case) -> np.ndarray | None:
    """Score edges by gradients: the size of the mean over pairs."""
    if case.ablation != "resample":
        return None
    values = cp.attribute_edges(case.experiment(), method).to_dataframe().set_index("edge")["score"]
    return np.abs(values[list(case.edges)].to_numpy())


def carried(case: Case) -> str:
    """Return what edges carry in a case."""
    return "source" if case.ablation == "resample" else "zero"


def acdc(case: Case) -> np.ndarray:
    """Take edges away one by one, in clean runs, whatever the direction of the case."""
    experiment = case.experiment()
    gap = float(abs(experiment.baseline.clean.mean() - experiment.baseline.corrupt.mean()))
    kept = set(cp.acdc(experiment, SHARE * gap, value=carried(case)).edges())
    return np.array([float(edge in kept) for edge in case.edges])


def learnt(method: Learning, case: Case) -> np.ndarray:
    """Learn gates of all edges in clean runs; those that are held to a size to as many edges as are true."""
    n_edges = None if method == "sigmoid-topk" else len(case.true_edges)
    gates = cp.learn_edges(case.experiment(), method, n_edges, steps=STEPS, rate=RATE, value=carried(case))
    values = gates.to_dataframe().set_index("edge")["score"]
    return values[list(case.edges)].to_numpy()


def random(case: Case) -> np.ndarray:
    """Draw scores by chance."""
    return generator(0, "random scores", case.name).random(len(case.edges))


METHODS: Mapping[str, Method] = {
    "exact edges": exact,
    "EAP": partial(scored, "eap"),
    "EAP-IG": partial(scored, "eap-ig"),
    "EAP-IG activations": partial(scored, "eap-ig-activations"),
    "clean-corrupted": partial(scored, "clean-corrupted"),
    "ACDC": acdc,
    "hard concrete": partial(learnt, "hard-concrete"),
    "UGS": partial(learnt, "ugs"),
    "top-k": partial(learnt, "sigmoid-topk"),
    "random": random,
}


@dataclass(frozen=True)
class Row:
    """What a method made of a case.

    Args:
        case: The case's name.
        redundant: Why single patches do not tell all in it, if so.
        method: The method.
        found: Areas and counts; None where the method does not apply.
        taken: How many true and how many false edges have one of the largest scores, as many as there are true ones.
        seconds: Time that it took.
    """

    case: str
    redundant: str | None
    method: str
    found: Against | None
    taken: tuple[int, int]
    seconds: float


def measure(chosen: Iterable[Case], methods: Mapping[str, Method]) -> list[Row]:
    """Hold every method against every case."""
    rows = []
    for case in chosen:
        for name, method in methods.items():
            started = time.perf_counter()
            scores = method(case)
            seconds = time.perf_counter() - started
            found = None if scores is None else hold_against(case.edge_is_true, scores, floor=FLOOR)
            taken = (0, 0) if scores is None else count_found(case.edge_is_true, largest(scores, len(case.true_edges)))
            rows.append(Row(case.name, case.redundant, name, found, taken, seconds))
            print(_line(rows[-1]), flush=True)
    return rows


def largest(scores: np.ndarray, n: int) -> np.ndarray:
    """Say which edges have one of the n largest scores; all that tie with the last of them count, zeros and NaN not."""
    known = np.nan_to_num(scores, nan=0.0)
    return (known >= np.sort(known)[-n]) & (known > FLOOR * known.max())


def write(rows: Sequence[Row], command: str) -> str:
    """Return the page: a table of methods by cases for each area."""
    machine, used = describe(), versions()
    lines = [
        "# Methods against known circuits",
        "",
        f"Made by `{command}` on {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in used.items())
        + ".",
        "",
        "What the cases are stands in [docs/ground_truth.md](../docs/ground_truth.md). Each cell: area under the ROC "
        "curve, area under the precision-recall curve, and of as many edges as are true those with the largest scores: "
        "how many of them are true + how many false (ties counted whole). `none`: the method does not apply. *or*, "
        "*and*: single patches cannot tell all true edges there. *cancelling*: two of them undo each other. "
        f"ACDC gives one set, with a threshold of {SHARE:g} of the gap, found in clean runs in both directions. "
        f"Gates are learnt in clean runs too, by {STEPS} steps at a rate of {RATE:g} on the gap; hard concrete and UGS "
        "are told how many edges are true.",
        "",
    ]
    methods = list(dict.fromkeys(row.method for row in rows))
    lines += [f"| case | edges (true) | {' | '.join(methods)} |", f"|---|---|{'---|' * len(methods)}"]
    by = {(row.case, row.method): row for row in rows}
    for case in dict.fromkeys(row.case for row in rows):
        cells = [by[case, method] for method in methods]
        known = next((each.found for each in cells if each.found is not None), None)
        size = "" if known is None else f"{known.n_true + known.n_false} ({known.n_true})"
        mark = f" *{cells[0].redundant}*" if cells[0].redundant else ""
        lines.append(f"| {case}{mark} | {size} | {' | '.join(map(_cell, cells))} |")
    seconds = {name: sum(row.seconds for row in rows if row.method == name) for name in methods}
    spent = ", ".join(f"{name} {took:.0f}" for name, took in seconds.items())
    lines += ["", f"Seconds for all cases: {spent}.", ""]
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row.found is None:
        return "none"
    return f"{row.found.auroc:.2f} {row.found.auprc:.2f} {row.taken[0]}+{row.taken[1]}"


def _line(row: Row) -> str:
    return f"{row.case}: {row.method}: {_cell(row)} ({row.seconds:.1f} s)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ground_truth", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=case_names(), help="programs (default: all)")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="forms of their models")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), help="methods")
    parser.add_argument("--out", type=Path, default=OUT, help="page to write (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    methods = {name: METHODS[name] for name in chosen.methods}
    rows = measure(cases(chosen.only, forms=chosen.forms), methods)
    chosen.out.write_text(write(rows, "make ground-truth"), encoding="utf-8")
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
