"""Failing prompts to a claim, on models with planted faults: ``python -m benchmarks.faults``.

Each fault of ``causalpatch.testing.faults`` is planted in a copy of the embedded model and looked for in two or three
ways:

==========  ===========================================================================================================
``alone``   with the failing prompts alone: partners differ in one word that is taken from these prompts
``works``   with prompts of the same behaviour beside them that the faulty model answers right
``against`` with the model as it was before, in which the same prompts work
==========  ===========================================================================================================

A search *hits at k* where the component whose old weights mend most (``what_changed``) is among the first k components
that it found: heads and the MLPs of layers, 20 in all, neurons counted as their MLP. Beside each stands a full grid on
the same pairs, of every head at every position, every MLP at all positions and every neuron at all positions, as plain
hooks and full forwards would make it. Nothing is tuned to any fault: all settings are the defaults.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

import causalpatch as cp
from benchmarks.machine import describe, versions
from causalpatch.experiment.judging import comparing
from causalpatch.testing.faults import FAULTS, Changed, Fault, Planted, plant, what_changed

OUT = Path(__file__).parent / "FAULTS.md"
WAYS: Final = ("alone", "works", "against")
AT: Final = (1, 3, 5)
LEVEL: Final = "heads"
Way = Literal["alone", "works", "against"]


@dataclass(frozen=True)
class Grid:
    """A full grid on the pairs that the search saw.

    Args:
        ranked: Components, first the one of which a cell restores most.
        cells: How many there are.
        runs: Forwards of one prompt that it takes.
        seconds: What they take as full forwards with plain hooks, from those of some cells.
    """

    ranked: tuple[str, ...]
    cells: int
    runs: int
    seconds: float


@dataclass(frozen=True)
class Look:
    """One way to look for a fault, and what came of it.

    Args:
        way: Which one.
        outcome: In words.
        verdict: ``confirmed``, ``not confirmed``, or where it stopped.
        ranked: Components that the search found, the most important first.
        supported: Components that were confirmed.
        seconds: All of it.
        runs: Likewise.
        grid: The full grid on the same pairs; None where there were no pairs.
    """

    way: Way
    outcome: str
    verdict: str
    ranked: tuple[str, ...]
    supported: tuple[str, ...]
    seconds: float
    runs: int
    grid: Grid | None


@dataclass(frozen=True)
class Row:
    """A fault.

    Args:
        fault: The fault.
        place: Where it was planted.
        changed: What planting changed, what mends most first.
        fails: Share of its prompts that fail.
        kept: Least share of what worked before that works still, over tasks.
        planted_in: Seconds, steps and places tried.
        looks: By way.
    """

    fault: Fault
    place: str
    changed: tuple[Changed, ...]
    fails: float
    kept: float
    planted_in: tuple[float, int, int]
    looks: Mapping[str, Look]

    @property
    def target(self) -> str:
        """The component that the planting changed most."""
        return self.changed[0].component


def component(name: str) -> str:
    """Return the head or MLP that a site is of, or a part of: ``z.L.H`` or ``mlp_out.L``; of others its own name.

    Args:
        name: The text of a site.
    """
    site = cp.Site.parse(name)
    if site.name in ("mlp_post", "mlp_out"):
        return f"mlp_out.{site.layer}"
    if site.name in ("z", "head_out"):
        return f"z.{site.layer}.{site.unit}"
    return str(site.at(None))


def ranked(names: Sequence[str]) -> tuple[str, ...]:
    """Return components of sites in order, each once."""
    return tuple(dict.fromkeys(map(component, names)))


def hits(target: str, found: Sequence[str], k: int) -> bool:
    """Say whether a component is among the first k."""
    return target in found[:k]


def look(planted: Planted, way: Way) -> Look:
    """Look for a fault in one way, and beside it with a full grid on the same pairs."""
    given: dict[str, Any] = {"works": planted.works} if way == "works" else {}
    if way == "against":
        given = {"against": planted.base}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "openings.jsonl"
        found = cp.debug(planted.model, list(planted.failing), **given, level=LEVEL, ledger=ledger)
    seconds = time.process_time() - started
    verdict = "confirmed" if found.supported else "not confirmed"
    return Look(
        way,
        found.outcome,
        verdict if found.stop is None else f"stopped at {found.stop.stage}",
        ranked(found.found),
        tuple(found.supported),
        seconds,
        sum(found.runs.values()),
        None if found.discovery is None else grid(planted, found.discovery, way),
    )


def grid(planted: Planted, pairs: cp.Pairs, way: Way) -> Grid:
    """Measure every cell of a full grid; whole heads as full forwards with plain hooks, for the time."""
    source = planted.base if way == "against" else None
    asked: dict[str, Any] = {"metric": comparing(pairs), "source_model": source, "show_progress": False}
    aligned = pairs if all(len(pair.clean) == len(pair.corrupt) for pair in pairs) else pairs.align("difference")
    experiment = cp.Experiment(planted.model, aligned, **asked)
    effects: dict[str, float] = {}
    n_cells, n_runs = 0, 2 * len(pairs)
    heads = "head_out" if source is not None else "z"
    axes: dict[str, tuple[str, ...]] = {heads: ("layer", "head", "position"), "mlp_out": ("layer",)}
    axes["mlp_post"] = ("layer", "neuron")
    for site, over in axes.items():
        budget = {"budget": 10**9} if site == "mlp_post" else {}
        swept = cp.sweep(experiment, site, over, **budget)
        share = np.nan_to_num(swept.recovered().values)
        n_cells += share.size
        n_runs += int(np.isfinite(swept.to_xarray()["metric"].values).sum())
        largest = share.max(axis=tuple(range(2, share.ndim))) if site == heads else share
        for place, value in np.ndenumerate(largest):
            name = f"z.{place[0]}.{place[1]}" if site == heads else f"mlp_out.{place[0]}"
            effects[name] = max(effects.get(name, -np.inf), float(value))
    order = sorted(effects, key=lambda name: -effects[name])
    return Grid(tuple(order), n_cells, n_runs, n_runs * _seconds_a_run(planted.model, aligned, asked))


def _seconds_a_run(model: cp.Model, pairs: cp.Pairs, asked: Mapping[str, Any]) -> float:
    """Return what a full forward of one prompt with a plain hook takes, from the cells of whole heads."""
    sites = [f"z.{layer}.{head}" for layer in range(model.shape.n_layers) for head in range(model.n_heads)]
    experiment = cp.Experiment(model, pairs, engine="reference", max_rows=1, **asked)
    experiment.run(sites[:1])  # proofs are made once, and are no part of a grid
    started = time.process_time()
    experiment.run(sites)
    return (time.process_time() - started) / ((len(sites) + 3) * len(pairs))


def measure(faults: Sequence[Fault], ways: Sequence[Way]) -> Iterator[Row]:
    """Plant faults and look for each."""
    for fault in faults:
        started = time.process_time()
        planted = plant(fault)
        took = time.process_time() - started
        yield Row(
            fault,
            " + ".join(planted.place),
            tuple(what_changed(planted)),
            planted.fails,
            min(planted.kept.values()),
            (took, planted.steps, planted.attempts),
            {way: look(planted, way) for way in ways},
        )


def write(rows: Sequence[Row], command: str) -> str:
    """Return the page."""
    machine, used = describe(), versions()
    ways = list(rows[0].looks)
    n_threads = torch.get_num_threads()
    lines = [
        "# Faults: from failing prompts to a claim",
        "",
        f"Made by `{command}` on {machine['cpu']}, {machine['cores']} cores, {n_threads} threads; "
        + ", ".join(f"{name} {version}" for name, version in used.items())
        + ".",
        "",
        *_METHOD.format(n=len(rows)).splitlines(),
        "",
        "## In short",
        "",
        *_totals(rows, ways),
        "",
        "Where everything was free to change, no component mends much: which one mends most then says little, and it "
        "may be the embedding, which is in no head and no MLP.",
        "",
        *_by("place", lambda row: row.fault.place, rows, ways),
        "",
        "## By kind",
        "",
        *_by("kind", lambda row: row.fault.kind, rows, ways),
        "",
        "## What was planted",
        "",
        "*Mended*: share of the failure that goes away where the old weights of this one component are put back. "
        "*Fail*: of prompts that were not trained on, how many give the wrong answer. *Kept*: of what worked before, "
        "the least share over the four tasks that works still.",
        "",
        "| fault | planted in | mended by old weights of | fail | kept | steps, places tried | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        most = ", ".join(f"{one.component} {one.mended:.2f}" for one in row.changed[:3] if one.mended > 0.005)
        seconds, steps, tries = row.planted_in
        lines.append(
            f"| {row.fault.name} | {row.place} | {most} | {row.fails:.0%} | {row.kept:.0%} | {steps}, {tries} | "
            f"{seconds:.1f} |"
        )
    for way in ways:
        lines += ["", f"## {way[0].upper()}{way[1:]}", "", _WAY[way], "", *_table(rows, way)]
    lines += ["", "## Misses", "", *_misses(rows, ways), ""]
    return "\n".join(lines)


_METHOD: Final = """\
{n} faults are planted by training or by damage into copies of the embedded model `zoo:stories`; kinds, places and what
is measured as changed are described in `causalpatch.testing.faults`. What is changed is drawn by a seed, and the search
is told nothing of it. `debug` runs with its defaults, down to heads and MLPs. A *hit at k*: the component whose old
weights mend most of the failure is among the first k components that the search found, what restores most first (20 in
all; by chance .05, .15 and .25). It is a hard mark: patching finds what *carries* the wrong answer, also behind the
place that was changed, and weights were changed at one place. The *grid* patches every head at every position, every
MLP and every neuron at all positions, on the same discovery pairs; its components rank by the cell that restores most.
Its seconds are its runs times the mean time of a full forward with a plain hook, one prompt at a time, in the 16 cells
of whole heads on all these pairs. Seconds are processor seconds, since other work ran beside. Those of `debug` are for
all that a user waits for, from the failing prompts to the claim with its controls; the grid makes no pairs and claims
nothing."""

_WAY: Final = {
    "alone": "Given are failing prompts with the answers that are wanted, nothing else.",
    "works": "Given are also prompts of the same behaviour that the faulty model answers right.",
    "against": "Given is the model as it was before; a pair is one failing prompt in both models.",
}


_COLUMNS: Final = (
    "faults | with a search | confirmed | hit@1 | hit@3 | hit@5 | grid hit@1 | @3 | @5 | median s | grid s | "
    "median runs | grid runs"
)


def _totals(rows: Sequence[Row], ways: Sequence[str]) -> list[str]:
    lines = [
        f"| way | {_COLUMNS} |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way in ways:
        lines.append(f"| {way} | {_summary(rows, way)} |")
    return lines


def _by(what: str, of: Callable[[Row], str], rows: Sequence[Row], ways: Sequence[str]) -> list[str]:
    lines = [f"| {what} | way | {_COLUMNS} |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for value in dict.fromkeys(map(of, rows)):
        some = [row for row in rows if of(row) == value]
        lines += [f"| {value} | {way} | {_summary(some, way)} |" for way in ways]
    return lines


def _summary(rows: Sequence[Row], way: str) -> str:
    """Return counts over faults and medians over those that were searched."""
    both = [(row.target, row.looks[way]) for row in rows]
    searched = [(target, found, found.grid) for target, found in both if found.grid is not None]
    ours = [sum(hits(target, found.ranked, k) for target, found in both) for k in AT]
    grids = [sum(hits(target, held.ranked, k) for target, _, held in searched) for k in AT]
    medians = ["-"] * 4
    if searched:
        columns = (
            [found.seconds for _, found, _ in searched],
            [held.seconds for *_, held in searched],
            [found.runs for _, found, _ in searched],
            [held.runs for *_, held in searched],
        )
        medians = [f"{np.median(each):,.{0 if n > 1 else 1}f}" for n, each in enumerate(columns)]
    confirmed = sum(found.verdict == "confirmed" for _, found in both)
    return " | ".join(map(str, [len(rows), len(searched), confirmed, *ours, *grids, *medians]))


def _table(rows: Sequence[Row], way: str) -> list[str]:
    lines = [
        "| fault | changed most | found first | hit@1 / 3 / 5 | verdict | confirmed | s | runs | grid first | "
        "grid hit@1 / 3 / 5 | grid s | grid runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = row.looks[way]
        held = found.grid
        beside = ["-"] * 4
        if held is not None:
            beside = [
                ", ".join(held.ranked[:3]),
                _marks(row.target, held.ranked),
                f"{held.seconds:.1f}",
                f"{held.runs:,}",
            ]
        cells = [
            row.fault.name,
            row.target,
            ", ".join(found.ranked[:3]) or "-",
            _marks(row.target, found.ranked),
            found.verdict,
            ", ".join(found.supported) or "-",
            f"{found.seconds:.1f}",
            f"{found.runs:,}",
            *beside,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _misses(rows: Sequence[Row], ways: Sequence[str]) -> list[str]:
    lines = []
    for row in rows:
        missed = [way for way in ways if not hits(row.target, row.looks[way].ranked, AT[-1])]
        for way in missed:
            found = row.looks[way]
            told = f"found {', '.join(found.ranked) or 'nothing'}" if found.grid is not None else "no search"
            lines.append(
                f"- {row.fault.name}, {way}: {row.target} is not among the first {AT[-1]}; {told}; {found.outcome}"
            )
    return lines or ["None: every fault was among the first five in every way."]


def _marks(target: str, found: Sequence[str]) -> str:
    return " / ".join("yes" if hits(target, found, k) else "no" for k in AT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="faults whose name holds this, such as trigger or ioi-head")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["alone", "against"], help="how they are looked for")
    parser.add_argument("--out", type=Path, default=OUT, help="page to write (default: %(default)s)")
    chosen: Any = parser.parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    faults = [fault for fault in FAULTS if chosen.only in fault.name]
    if not faults:
        parser.error(f"no fault is called like {chosen.only!r}")
    rows = []
    for row in measure(faults, chosen.ways):
        told = "; ".join(
            f"{way} {found.verdict} {_marks(row.target, found.ranked)} {found.seconds:.1f} s"
            for way, found in row.looks.items()
        )
        print(f"{row.fault.name} in {row.place}, most {row.target}: {told}", flush=True)
        rows.append(row)
        command = "make faults" if arguments is None else "python -m benchmarks.faults"
        chosen.out.write_text(write(rows, command), encoding="utf-8")  # what was measured is kept if the rest is not
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
