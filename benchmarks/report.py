"""``RESULTS.md``: targets beside what was measured, and all the numbers that this follows from."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import edges
from benchmarks.machine import MIB
from benchmarks.ours import NAME
from benchmarks.peers import PEERS
from benchmarks.targets import rows_of, share
from benchmarks.workloads import WORKLOADS, Workload

Results = Mapping[str, Mapping[str, Any]]

METHOD = """\
How it was measured:

- Every contender patches the same cells of one model with the same random weights, on the same random prompts, in one
  process and environment, with float32 and the same threads. They take turns; who begins changes from repeat to repeat.
- Before a peer is timed its numbers must agree with ours: the metric of each cell, averaged over pairs, within
  {tolerance:g} x max(1, |metric|). The largest difference is in the tables.
- Peers patch a random part of the cells (seed 0); their time is the run over the clean prompts plus the time per cell
  times all cells. Ours is the whole call of `causalpatch.sweep`, base and source runs, controls and labelled results
  included; what a first call does once (proofs, self-check) is in the column "first".
- Peers are used as their tutorials show: TransformerLens by `generic_activation_patch` on its bridge, nnsight by a
  trace per cell or eight cells stacked in a trace, pyvene by an intervenable model per cell; all of them compute logits
  at every position. Hooks by hand stack eight cells and compute logits at the last position only.
- The share of sgemm is the cone's operations (two per multiplication and addition of the products that cannot be done
  without, counted by `causalpatch.engine.cone`) over seconds, over the best rate of large float32 products in the same
  run. Targets are judged by minima of seconds and the largest rate.
- A model's weights are random but keep the size of what they are given, so that attention looks at something and
  patches have effects.
"""


def write(results: Results, command: str, peers: Mapping[str, str], *, is_tiny: bool) -> str:
    """Return the report.

    Args:
        results: All that was measured.
        command: The command that the last part was measured with.
        peers: Names of peers that cannot be used here, with the reason.
        is_tiny: Whether sizes are those that only show that it works.
    """
    setups = _setups(results)
    lines = ["# Results", ""]
    if is_tiny:
        lines += ["**Tiny sizes: these numbers show that the benchmark works, nothing else.**", ""]
    lines += [f"Command: `{command}`. Parts are measured anew one by one; each has its date.", ""]
    lines += [*_on_setups(setups), ""]
    lines += [f"Skipped: **{name}**: {why}." for name, why in peers.items()] + [""] * bool(peers)
    lines += ["## Targets", "", *_targets(results), ""]
    if any(_has_peers(record) for record in results["workloads"].values()):
        lines += ["![How many times as long the others take](speed.svg)", ""]
    lines += ["## GPT-2 small's shape", "", *_seconds(results, setups, lambda each: each.shape == "gpt2"), ""]
    lines += ["## Other families", "", *_seconds(results, setups, lambda each: each.shape != "gpt2"), ""]
    lines += ["## Where our time goes", "", *_spent(results), ""]
    lines += ["## Memory", "", *_memory(results), "", "## A small model", "", *_small(results), ""]
    lines += ["## Every single edge", "", *edges.lines_exact(results.get("edges", {})), ""]
    lines += [*(f"Skipped: **{name}**: {why}." for name, why in edges.PEERS.items()), ""]
    lines += ["## Scores of edges", "", *edges.lines_scores(results.get("edge-scores", {})), ""]
    lines += ["## Growth", "", *_growth(results), "", "## Start-up", "", *_start(results), ""]
    tolerance = max((each.get("tolerance", 0.0) for each in results["workloads"].values()), default=0.0)
    return "\n".join([*lines, "## Method", "", METHOD.format(tolerance=tolerance)])


def _setups(results: Results) -> list[tuple[str, ...]]:
    """Return the different machines and versions that parts were measured with, in words."""
    found = {_setup(part) for part in _parts(results)}
    return sorted(found)


def _setup(part: Mapping[str, Any]) -> tuple[str, ...]:
    machine, versions = part["machine"], part["versions"]
    what = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['instructions']}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "commit")
    return (f"{what}, {machine['memory']}; {machine['system']}", packages)


def _parts(results: Results) -> Iterator[Mapping[str, Any]]:
    for name, part in results.items():
        yield from (each for each in (part.values() if name in ("workloads", "memory") else [part]) if "date" in each)


def _on_setups(setups: Sequence[tuple[str, ...]]) -> list[str]:
    if len(setups) == 1:
        return [f"Machine: {setups[0][0]}.", f"Versions: {setups[0][1]}."]
    return [f"- Setup {chr(65 + number)}: {machine}. {found}." for number, (machine, found) in enumerate(setups)]


def _targets(results: Results) -> list[str]:
    rows = rows_of(results)
    lines = ["| workload | what | target | measured | |", "|---|---|---|---|---|"]
    lines += [f"| {row.what} | {row.of} | {row.target} | {row.measured} | {row.verdict} |" for row in rows]
    known = [row for row in rows if row.is_met is not None]
    met = sum(bool(row.is_met) for row in known)
    return [f"{met} of {len(known)} measured targets are met; {len(rows) - len(known)} were not measured.", "", *lines]


def _seconds(results: Results, setups: Sequence[tuple[str, ...]], is_wanted: Any) -> list[str]:
    wanted = [each for each in WORKLOADS.values() if is_wanted(each) and each.name in results["workloads"]]
    if not wanted:
        return ["Not run."]
    records = [results["workloads"][each.name] for each in wanted]
    names = [peer.name for peer in PEERS if any(_shown(record, peer.name) for record in records)]
    lines = [
        "Seconds for all cells: minima (medians). Below a peer's: largest difference from our numbers.",
        "",
        f"| workload | cells x pairs (run), engine | {NAME} | first | share of sgemm | {' | '.join(names)} | when |",
        "|" + "---|" * (6 + len(names)),
    ]
    lines += [_line(each, record, names, setups) for each, record in zip(wanted, records, strict=True)]
    return [*lines, "", *_notes(wanted, records)]


def _shown(record: Mapping[str, Any], peer: str) -> bool:
    times = record.get("contenders", {}).get(peer, {})
    return bool(times.get("seconds") or "only" not in times.get("skipped", "only"))


def _has_peers(record: Mapping[str, Any]) -> bool:
    return any(times["seconds"] for name, times in record.get("contenders", {}).items() if name != NAME)


def _line(
    workload: Workload, record: Mapping[str, Any], names: Sequence[str], setups: Sequence[tuple[str, ...]]
) -> str:
    if "skipped" in record:
        return f"| {workload.title} | skipped: {record['skipped']} |" + " |" * (4 + len(names))
    ours = record["contenders"][NAME]
    run = record["cells"] * record["pairs"] - record["derived"]
    letter = f" ({chr(65 + setups.index(_setup(record)))})" if len(setups) > 1 else ""
    cells = [
        workload.title,
        f"{record['cells']:,} x {record['pairs']} ({run:,}), {record['engine']}",
        _pair_of(ours["seconds"]),
        f"{ours['first']:.2f}",
        f"{share(record):.1%} ({share(record, median=True):.1%}) of {max(record['gemm']):.0f} GFLOP/s",
        *(_peer(record["contenders"].get(name)) for name in names),
        record["date"] + letter,
    ]
    return f"| {' | '.join(cells)} |"


def _peer(times: Mapping[str, Any] | None) -> str:
    if times is None:
        return "left out"
    if not times["seconds"]:
        return f"skipped: {times['skipped']}"
    return f"{_pair_of(times['seconds'])}<br>{times['difference']:.0e}"


def _pair_of(seconds: Sequence[float]) -> str:
    low, middle = min(seconds), statistics.median(seconds)
    digits = 0 if low >= 100 else 2 if low >= 0.1 else 4
    return f"{low:,.{digits}f} ({middle:,.{digits}f})"


def _notes(wanted: Sequence[Workload], records: Sequence[Mapping[str, Any]]) -> list[str]:
    measured = [each for each in zip(wanted, records, strict=True) if "skipped" not in each[1]]
    lines = []
    for workload, record in measured:
        parts = {each["cells"] for name, each in record["contenders"].items() if name != NAME and each["seconds"]}
        run, needed = record["cells"] * record["pairs"] - record["derived"], record["runs_needed"]
        beside = "" if run == needed else f"; {needed:,} needed to be run, {run:,} were"
        repeats = len(record["contenders"][NAME]["seconds"])
        lines.append(
            f"- {workload.title} (`--only {workload.name}`): {repeats} repeats, peers on "
            f"{', '.join(map(str, sorted(parts))) or 'no'} cells; {record['gflop']:,.0f} GFLOP, largest |effect| "
            f"{record['largest_effect']:.2g}{beside}; a run adds {record['contenders'][NAME]['grown_mib']:,.0f} MiB"
            + "".join(_grown(name, each) for name, each in record["contenders"].items() if name != NAME)
        )
    return lines


def _grown(name: str, times: Mapping[str, Any]) -> str:
    return f", {name} {times['grown_mib']:,.0f}" if times["seconds"] else ""


def _spent(results: Results) -> list[str]:
    records = [results["workloads"].get(name, {}) for name in WORKLOADS]
    records = [record for record in records if "spent" in record]
    if not records:
        return ["Not run."]
    groups = list(records[0]["spent"]["groups"])
    lines = [
        "One run under torch's profiler, seconds by kind of operator; Python is what no operator accounts for. The "
        "products' operations stand beside the cone's: more are the untouched runs, the control, and tokens whose "
        "values are made anew though they are known. *Alone* are the same products made by themselves, and which share "
        "of sgemm that would be if nothing else took time.",
        "",
        f"| workload | products (cone), GFLOP | alone | {' | '.join(groups)} |",
        "|---|---|---|" + "---|" * len(groups),
    ]
    for record in records:
        spent = record["spent"]
        most = record["gflop"] / spent["alone"] / max(record["gemm"])
        cells = [
            record["title"],
            f"{spent['gflop']:,.0f} ({record['gflop']:,.0f})",
            f"{spent['alone']:,.2f} ({most:.0%})",
            *(f"{spent['groups'][name]:,.2f}" for name in groups),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _memory(results: Results) -> list[str]:
    found = results["memory"]
    if not found:
        return ["Not run."]
    lines = [
        "One sweep in a process of its own; resident memory in MiB. Seconds are those of a first run.",
        "",
        "| workload | libraries | and the model | peak | sweep adds | in all (GB) | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        added = each["peak_mib"] - each["before_mib"]
        lines.append(
            f"| {WORKLOADS[name].title} | {each['loaded_mib']:,} | {each['before_mib']:,} | {each['peak_mib']:,} "
            f"| {added:,} | {each['peak_mib'] * MIB / 1e9:.2f} | {each['seconds']:.2f} |"
        )
    return lines


def _small(results: Results) -> list[str]:
    part = results.get("small", {})
    if "sites" not in part:
        return [f"Skipped: {part['skipped']}." if part else "Not run."]
    lines = [
        f"stories260k ({part['date']}): seconds of a sweep, beside one forward over as many whole prompts as cells "
        "were run, logits at the last position only; minima (medians).",
        "",
        "| site | cells x pairs x tokens | prompts run | sweep | one forward |",
        "|---|---|---|---|---|",
    ]
    for each in part["sites"]:
        size = f"{each['cells']:,} x {each['pairs']} x {each['tokens']}"
        times = f"{_pair_of(each['sweep'])} | {_pair_of(each['forward'])}"
        lines.append(f"| {each['site']} | {size} | {each['rows']:,} | {times} |")
    return lines


def _growth(results: Results) -> list[str]:
    part = results.get("growth", {})
    if "points" not in part:
        return ["Not run."]
    lines = [
        "GPT-2's architecture with 512 columns and 8 layers, 4 pairs x 16 tokens; one number varied. Layers are "
        "measured on 16 pairs, tokens on 8, so that the 0.15 s that any sweep takes are not most of it "
        f"({part['date']}).",
        "",
        "![Time against arithmetic](growth.svg)",
        "",
        "| series | size | cells | GFLOP | seconds: minima (medians) | GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for each in part["points"]:
        rate = each["gflop"] / min(each["seconds"])
        lines.append(
            f"| {each['series']} | {each['size']:,} | {each['cells']:,} | {each['gflop']:,.1f} "
            f"| {_pair_of(each['seconds'])} | {rate:,.0f} |"
        )
    return lines


def _start(results: Results) -> list[str]:
    part = results.get("start", {})
    if "records" not in part:
        return ["Not run."]
    lines = [f"Seconds, each in a new process ({part['date']}).", "", "| what | smallest (median) |", "|---|---|"]
    return lines + [f"| {each['what']} | {_pair_of(each['seconds'])} |" for each in part["records"]]
