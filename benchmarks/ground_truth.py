"""Methods that score edges or nodes, held against circuits that are known: ``python -m benchmarks.ground_truth``.

A *method* is a function from a case to its scores: one number for each of ``case.edges``, or of the senders among
``case.nodes``, larger for what is more likely true, NaN for what it does not score; or None where it does not apply. A
method that selects a set gives 1 to what is in it and 0 to the others. All of them see the same cases, which are never
tuned to one.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import causalpatch as cp
from benchmarks.machine import describe, versions
from causalpatch.attribution.edges import EdgeMethod
from causalpatch.attribution.nodes import Method as NodeMethod
from causalpatch.base.errors import NoGradient
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


SENDERS: Mapping[str, tuple[str, ...]] = {"resid_pre.0": ("layer",), "z": ("layer", "head"), "mlp_out": ("layer",)}
"""What the senders of a decoder give, with its axes: the embedding, each head, and each MLP."""


def of_senders(found: Mapping[str, Any]) -> np.ndarray:
    """Put the numbers of ``SENDERS``, of any axes before pairs, in the order of nodes; the mean size over pairs."""
    embedded, heads, mlps = (np.abs(np.asarray(found[site])).mean(-1) for site in SENDERS)
    n_layers = len(mlps)
    by_layer = np.concatenate([heads.reshape(n_layers, -1), mlps.reshape(n_layers, 1)], axis=1)
    return np.append(embedded.reshape(1), by_layer)


def exact_nodes(case: Case) -> np.ndarray:
    """Patch each sender by itself: the mean over pairs of the size of its effect."""
    experiment = case.experiment()
    found = {site: cp.sweep(experiment, site, over, value=carried(case)) for site, over in SENDERS.items()}
    return of_senders({site: each.effect(per_pair=True).values for site, each in found.items()})


def scored_nodes(method: NodeMethod, case: Case) -> np.ndarray | None:
    """Score senders by gradients: the mean over pairs of the size of the score."""
    if case.ablation != "resample":
        return None
    experiment, found = case.experiment(), {}
    sizes = {"layer": experiment.model.shape.n_layers, "head": experiment.model.n_heads}
    for site, over in SENDERS.items():
        try:
            found[site] = cp.attribute(experiment, site, method, over=over).values
        except NoGradient:  # no slope at any of these: all scores are 0
            found[site] = np.zeros([1 if site == "resid_pre.0" else sizes[axis] for axis in over] + [1])
    return of_senders(found)


def random_nodes(case: Case) -> np.ndarray:
    """Draw scores by chance."""
    return generator(0, "random scores of nodes", case.name).random(len(case.nodes) - 1)


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


NODE_METHODS: Mapping[str, Method] = {
    "exact nodes": exact_nodes,
    "AtP": partial(scored_nodes, "atp"),
    "IG": partial(scored_nodes, "ig"),
    "IG activations": partial(scored_nodes, "ig-activations"),
    "clean-corrupted nodes": partial(scored_nodes, "clean-corrupted"),
    "AtP*": partial(scored_nodes, "atp*"),
    "RelP": partial(scored_nodes, "relp"),
    "random nodes": random_nodes,
}
EVERY = [*METHODS, *NODE_METHODS]


@dataclass(frozen=True)
class Row:
    """What a method made of a case.

    Args:
        case: The case's name.
        redundant: Why single patches do not tell all in it, if so.
        method: The method.
        found: Areas and counts; None where the method does not apply.
        taken: How many true and how many false ones have one of the largest scores, as many as there are true ones.
        seconds: Time that it took.
    """

    case: str
    redundant: str | None
    method: str
    found: Against | None
    taken: tuple[int, int]
    seconds: float


def measure(chosen: Iterable[Case], methods: Sequence[str]) -> list[Row]:
    """Hold every method against every case."""
    rows = []
    for case in chosen:
        for name in methods:
            started = time.perf_counter()
            if name in METHODS:
                scores, truth = METHODS[name](case), case.edge_is_true
            else:
                scores, truth = NODE_METHODS[name](case), case.node_is_true[:-1]
            seconds = time.perf_counter() - started
            found = None if scores is None else hold_against(truth, scores, floor=FLOOR)
            taken = (0, 0) if scores is None else count_found(truth, largest(scores, int(truth.sum())))
            rows.append(Row(case.name, case.redundant, name, found, taken, seconds))
            print(_line(rows[-1]), flush=True)
    return rows


def largest(scores: np.ndarray, n: int) -> np.ndarray:
    """Say what has one of the n largest scores; all that tie with the last of them count, zeros and NaN not."""
    known = np.nan_to_num(scores, nan=0.0)
    return (known >= np.sort(known)[-n]) & (known > FLOOR * known.max())


def write(rows: Sequence[Row], command: str) -> str:
    """Return the page: a table of methods by cases for edges, and one for nodes."""
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
        "Under zero ablation a case has clean prompts alone. Edges of `balance` and of the linear model are true of "
        "corrupted prompts only: exact patching stays at 0.56 and 0.86 there, and what no run shows no method finds.",
    ]
    for title, known in (("Edges", METHODS), ("Nodes", NODE_METHODS)):
        some = [row for row in rows if row.method in known]
        if some:
            lines += ["", f"## {title}", "", *ABOUT[title], *_table(title, some)]
    methods = list(dict.fromkeys(row.method for row in rows))
    seconds = {name: sum(row.seconds for row in rows if row.method == name) for name in methods}
    spent = ", ".join(f"{name} {took:.0f}" for name, took in seconds.items())
    lines += ["", f"Seconds for all cases: {spent}.", ""]
    return "\n".join(lines)


ABOUT: Mapping[str, Sequence[str]] = {
    "Edges": (),
    "Nodes": (
        "The embedding, each head (z) and each MLP; true are those that a true edge begins at or ends in. Scores by "
        "gradients are means over pairs of their sizes, where those of edges are sizes of means.",
        "",
    ),
}


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = [f"| case | {title.lower()} (true) | {' | '.join(methods)} |", f"|---|---|{'---|' * len(methods)}"]
    by = {(row.case, row.method): row for row in rows}
    for case in dict.fromkeys(row.case for row in rows):
        cells = [by[case, method] for method in methods]
        known = next((each.found for each in cells if each.found is not None), None)
        size = "" if known is None else f"{known.n_true + known.n_false} ({known.n_true})"
        mark = f" *{cells[0].redundant}*" if cells[0].redundant else ""
        lines.append(f"| {case}{mark} | {size} | {' | '.join(map(_cell, cells))} |")
    return lines


def _cell(row: Row) -> str:
    if row.found is None:
        return "none"
    auroc = "-" if np.isnan(row.found.auroc) else f"{row.found.auroc:.2f}"
    return f"{auroc} {row.found.auprc:.2f} {row.taken[0]}+{row.taken[1]}"


def _line(row: Row) -> str:
    return f"{row.case}: {row.method}: {_cell(row)} ({row.seconds:.1f} s)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ground_truth", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=case_names(), help="programs (default: all)")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="forms of their models")
    parser.add_argument("--methods", nargs="*", choices=EVERY, default=EVERY, help="methods")
    parser.add_argument("--out", type=Path, default=OUT, help="page to write (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows = measure(cases(chosen.only, forms=chosen.forms), chosen.methods)
    chosen.out.write_text(write(rows, "make ground-truth"), encoding="utf-8")
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
