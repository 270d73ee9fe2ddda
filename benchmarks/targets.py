"""What was measured beside what should be reached: one row for each target."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import edges, growth, small, start
from benchmarks.machine import MIB
from benchmarks.ours import NAME
from benchmarks.workloads import WORKLOADS, Workload

Results = Mapping[str, Mapping[str, Any]]

MOST_RESIDENT_GB = 1.3  # a sweep of resid_pre, 4 x 16, in all
LEAST_OF_GPT2 = 0.85  # other families' share of sgemm, over that of GPT-2's shape
MOST_ERRORS = {"median": 5e-3, "ninth decile": 2e-2}  # of screened effects, relative to each cell's own


@dataclass(frozen=True)
class Row:
    """One target.

    Args:
        what: The workload.
        of: What is compared.
        target: What should be reached.
        measured: What was; the reason where nothing was.
        is_met: Whether it was reached; None where nothing was measured.
    """

    what: str
    of: str
    target: str
    measured: str
    is_met: bool | None

    @property
    def verdict(self) -> str:
        """Met, missed, or not measured."""
        return {True: "met", False: "**missed**", None: "not measured"}[self.is_met]


def rows_of(results: Results) -> list[Row]:
    """Compare all that was measured with what should be reached."""
    found = []
    for workload in WORKLOADS.values():
        found += _of_workload(workload, results["workloads"].get(workload.name), results)
    return [
        *found,
        *_of_edges(results),
        *_of_small(results),
        *_of_memory(results),
        *_of_growth(results),
        *_of_start(results),
    ]


def share(record: Mapping[str, Any], *, median: bool = False) -> float:
    """Return the share of the machine's sgemm rate: of the cone's operations, at minima or at medians."""
    seconds, rates = record["contenders"][NAME]["seconds"], record["gemm"]
    pace, rate = (statistics.median(seconds), statistics.median(rates)) if median else (min(seconds), max(rates))
    return float(record["gflop"] / pace / rate)


def ratio(record: Mapping[str, Any], peer: str, *, median: bool = False) -> float | None:
    """Return how many times as long as ours a peer takes, at minima or at medians."""
    times = record["contenders"].get(peer, {}).get("seconds")
    take = statistics.median if median else min
    return float(take(times) / take(record["contenders"][NAME]["seconds"])) if times else None


def _of_workload(workload: Workload, record: Mapping[str, Any] | None, results: Results) -> list[Row]:
    if record is None or "skipped" in record:
        why = record["skipped"] if record else "not run"
        return [Row(workload.title, "", "", why, None)] if _has_targets(workload) else []
    found, title = [], workload.title
    value, middle = share(record), share(record, median=True)
    measured = f"{value:.1%} (medians: {middle:.1%})"
    if workload.share is not None:
        found.append(Row(title, "share of sgemm", f"≥ {workload.share:.0%}", measured, value >= workload.share))
    if workload.shape != "gpt2":
        found.append(_beside_gpt2(workload, value, measured, results))
    for peer, least in workload.ratios.items():
        times = ratio(record, peer)
        if times is None:
            why = record["contenders"].get(peer, {}).get("skipped") or "left out of the run"
            found.append(Row(title, f"against {peer}", f"≥ {least:g} x", why, None))
        else:
            text = f"{times:.1f} x (medians: {ratio(record, peer, median=True):.1f} x)"
            found.append(Row(title, f"against {peer}", f"≥ {least:g} x", text, times >= least))
    for name, error in record.get("errors", {}).items():
        most = MOST_ERRORS[name]
        found.append(Row(title, f"error of effects, {name}", f"≤ {most:g}", f"{error:.1e}", error <= most))
    return found


def _beside_gpt2(workload: Workload, value: float, measured: str, results: Results) -> Row:
    same = results["workloads"].get(workload.kind)
    target = f"≥ {LEAST_OF_GPT2:g} of GPT-2's share"
    if same is None or "skipped" in same:
        return Row(workload.title, "share of sgemm", target, measured, None)
    part = value / share(same)
    return Row(workload.title, "share of sgemm", target, f"{measured}: {part:.2f} of it", part >= LEAST_OF_GPT2)


def _has_targets(workload: Workload) -> bool:
    return bool(workload.share or workload.ratios or workload.shape != "gpt2")


def _of_small(results: Results) -> list[Row]:
    part = results.get("small", {})
    of, target = "over one batched forward of the same rows", f"≤ {small.MOST:g} x"
    if "sites" not in part:
        return [Row("stories260k", of, target, part.get("skipped", "not run"), None)]
    found = []
    for record in part["sites"]:
        times = min(record["sweep"]) / min(record["forward"])
        middle = statistics.median(record["sweep"]) / statistics.median(record["forward"])
        text = f"{times:.2f} x (medians: {middle:.2f} x)"
        found.append(Row(f"stories260k, {record['site']}", of, target, text, times <= small.MOST))
    return found


def _of_edges(results: Results) -> list[Row]:
    part, what = results.get("edges", {}), "every single edge, 4 x 16"
    of, target = f"against a forward for each edge, {edges.SPLIT}", f"≥ {edges.LEAST_EXACT:g} x"
    if "strata" not in part:
        found = [Row(what, of, target, "not run", None)]
    else:
        times = edges.times_as_fast(part, edges.SPLIT)
        text = f"{times:.1f} x; {edges.times_as_fast(part, edges.HOOKED):.1f} x against {edges.HOOKED}"
        found = [Row(what, of, target, text, times >= edges.LEAST_EXACT)]
        one = edges.implied(part) / part["edges"]
        found += _published(part, "edge", one, Row(what, "against auto-circuit's own code", target, "", None))
        if "growth" in part:
            off, target = edges.off_proportion(part), f"≤ {edges.MOST_OFF:.0%} off proportionality"
            found.append(
                Row("growth with single edges", "time to their number", target, f"{off:.0%}", off <= edges.MOST_OFF)
            )
    part = results.get("edge-scores", {})
    if "times" not in part:
        return [*found, Row("scores of edges, 8 x 16", "", "", "not run", None)]
    plain = part["times"]["plain"][edges.PLAIN]
    for name in ("eap", "eap-ig"):
        ours, other = part["times"][name][edges.OURS], part["times"][name][edges.SPLIT]
        times = min(other["seconds"]) / min(ours["seconds"])
        text = f"{times:.1f} x; {min(ours['seconds']) / min(plain['seconds']):.1f} x {edges.PLAIN}"
        title = f"{name}, 8 x 16"
        found.append(
            Row(title, f"against {edges.SPLIT}", f"≥ {edges.LEAST_SCORES:g} x", text, times >= edges.LEAST_SCORES)
        )
        row = Row(title, "against EAP-IG's own code", f"≥ {edges.LEAST_SCORES:g} x", "", None)
        found += _published(part, name, min(ours["seconds"]), row)
        memory = max(ours["added_mib"]) / max(1.0, *plain["added_mib"])
        target = f"≤ {edges.MOST_MEMORY:g} x that of {edges.PLAIN}"
        text = f"{memory:.2f} x ({max(ours['added_mib']):,.0f} MiB)"
        found.append(Row(title, "added memory", target, text, memory <= edges.MOST_MEMORY))
    return found


def _published(part: Mapping[str, Any], name: str, ours: float, row: Row) -> list[Row]:
    """Return a target beside a program's own seconds, one row for each way in which they are scaled."""
    least = edges.LEAST_EXACT if name == "edge" else edges.LEAST_SCORES
    found = []
    for how, seconds in (
        (edges.BY_GEMM, edges.by_gemm(part, name)),
        (edges.BY_PROTOTYPE, edges.by_prototype(part, name)),
    ):
        of = f"{row.of}, {how}"
        if seconds is None:
            found.append(replace(row, of=of, measured="the prototype is not at hand"))
        else:
            times = seconds / ours
            found.append(replace(row, of=of, measured=f"{times:.1f} x", is_met=times >= least))
    return found


def _of_memory(results: Results) -> list[Row]:
    found = []
    whole = results.get("memory", {}).get("resid_pre")
    target = f"≤ {MOST_RESIDENT_GB:g} GB resident in all"
    if whole is None:
        found.append(Row(WORKLOADS["resid_pre"].title, "memory", target, "not run", None))
    else:
        gb = whole["peak_mib"] * MIB / 1e9
        found.append(Row(WORKLOADS["resid_pre"].title, "memory", target, f"{gb:.2f} GB", gb <= MOST_RESIDENT_GB))
    name = "resid_pre-1024"
    record = results.get("memory", {}).get(name)
    budget = WORKLOADS[name].settings["budget_gib"]
    target = f"≤ {budget:g} GiB on top of the model"
    if record is None:
        found.append(Row(WORKLOADS[name].title, "memory", target, "not run", None))
    else:
        gib = (record["peak_mib"] - record["before_mib"]) / 1024
        found.append(Row(WORKLOADS[name].title, "memory", target, f"{gib:.2f} GiB", gib <= budget))
    return found


def _of_growth(results: Results) -> list[Row]:
    part = results.get("growth", {})
    target = f"≤ {growth.MOST:.0%} off proportionality"
    if "deviation" not in part:
        return [Row("growth", "time to arithmetic", target, part.get("skipped", "not run"), None)]
    return [
        Row(f"growth with {series}", "time to arithmetic", target, f"{value:.0%}", value <= growth.MOST)
        for series, value in part["deviation"].items()
    ]


def _of_start(results: Results) -> list[Row]:
    part = results.get("start", {})
    target = f"< {start.MOST:g} s"
    if "records" not in part:
        return [Row("start-up", "torch loaded", target, part.get("skipped", "not run"), None)]
    seconds = {each["what"]: min(each["seconds"]) for each in part["records"]}
    ready, beside = seconds[start.READY], seconds[start.READY_BESIDE]
    text = f"{ready:.2f} s; {beside:.2f} s if transformers' models are loaded too"
    return [Row("start-up", start.READY, target, text, ready < start.MOST)]
