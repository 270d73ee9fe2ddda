"""What a claim says: its statement in fixed words, how it prints, and what to do next.

Of single components it is said that they *restore* (denoise) or *remove* (noise) a share of the gap, and no more:
nothing here says sufficient, necessary, stored, or unimportant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.results.top import readable
from causalpatch.results.words import counted, percent
from causalpatch.statistics.verdicts import ABSENT, SUPPORTED

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.claim import Check, Claim, Finding
else:
    pd = lazy("pandas")

COLUMNS: Final = (
    *("component", "agreement", "p10", "p50", "p90", "beyond", "spread", "discovery"),
    *("share", "low", "high", "p", "verdict", "n_pairs", "n_components"),
)
"""Of the table of findings: how pairs spread stands before the mean."""

NEVER_SAID: Final = (
    "not said: that anything is stored here, that this is the place to edit, that all else is unimportant, or that "
    "this is the only mechanism"
)


def statement(spec: Mapping[str, Any], findings: Sequence[Finding], verdict: str, reasons: Sequence[str]) -> str:
    """Return the statement.

    Args:
        spec: Of the claim.
        findings: Of each component, and of all together.
        verdict: Of the claim.
        reasons: Why it is inconclusive.
    """
    pairs = spec["pairs"]
    where = (
        f"On {counted(pairs['n'], 'held-out pair')} ({counted(pairs['n_components'], 'independent component')})"
        f" of '{pairs['name']}', {_putting(spec)}"
    )
    lines = [f"{verdict}. {where}:", *(f"- {sentence(each, spec)}" for each in findings)]
    return "\n".join([*lines, *(f"inconclusive because {reason}" for reason in reasons)])


def _putting(spec: Mapping[str, Any]) -> str:
    """Return what is put where, and for ablations which run the gap goes to."""
    is_noise, model = spec["direction"] == "noise", spec["model"]["name"]
    into = f"into {'clean' if is_noise else 'corrupted'} runs of '{model}'"
    if spec.get("reference"):
        return f"putting '{spec['value']}' {into} (gap: clean run to the run with {spec['reference']})"
    return f"putting {'corrupted' if is_noise else 'clean'} values {into}"


def sentence(finding: Finding, spec: Mapping[str, Any]) -> str:
    """Return what is said of one component.

    Args:
        finding: Of it.
        spec: Of the claim.
    """
    verb = ("removes" if spec["direction"] == "noise" else "restores") + f" {finding.share:.3f} of the gap"
    single = finding.component != "together"
    verb = verb if single else verb.replace("s ", " ", 1)
    name = finding.component if single else f"together, the {len(spec['components'])} components"
    level = percent(1 - spec["alpha"])
    ends = f"{level} interval {finding.low:.3f} to {finding.high:.3f}" if np.isfinite(finding.low) else "no interval"
    said = f"{name} {verb} in {spec['metric']} ({ends})"
    delta = f"{spec['delta']:g}"
    if finding.verdict == SUPPORTED:
        return f"{said}: " + (f"more than {delta}" if finding.share > 0 else f"against it, by more than {delta}")
    if finding.verdict == ABSENT:
        return f"{said}: absent up to {delta}"
    return f"{said}: inconclusive, {finding.why}"


def why_inconclusive(low: float, high: float, p: float, delta: float, alpha: float, note: str = "") -> str:
    """Return why a component is neither supported nor absent.

    Args:
        low: Lower end of its interval.
        high: Upper end.
        p: p of its share being within delta.
        delta: Share that does not count yet.
        alpha: Probability of even one wrong claim.
        note: What is known beside.
    """
    if not np.isfinite(low):
        return note or "there is no interval"
    if low > delta or high < -delta:
        return f"p {p:.3g} is above {alpha:g}, although the interval lies beyond {delta:g}"
    across = [end for end in (-delta, delta) if low < end < high]
    if across:
        return f"the interval holds {' and '.join(f'{end:g}' for end in across)}: neither more than that nor less"
    return f"the interval lies within {delta:g}, the narrower one for absence does not"


def on_reuse(reused: Mapping[str, int], spec: Mapping[str, Any]) -> str:
    """Say that pairs were opened before."""
    by = f"{counted(len(reused), 'claim')} ({', '.join(reused)})"
    n_again = f"{sum(reused.values())} of {spec['pairs']['n']} pairs"
    return f"reused hold-out: {n_again} were opened before with this model, by {by}"


def on_mixture(findings: Sequence[Finding]) -> str:
    """Say that some components have one verdict and some another."""
    groups = {
        verdict: [each.component for each in findings if each.verdict == verdict] for verdict in (SUPPORTED, ABSENT)
    }
    told = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in groups.items())
    return f"not all components have the same verdict ({told})"


def next_step(verdict: str, spec: Mapping[str, Any], *, is_reused: bool) -> str:
    """Return what to do next.

    Args:
        verdict: Of the claim.
        spec: Of the claim.
        is_reused: Whether pairs were opened before.
    """
    if is_reused:
        return "confirm it once, on pairs that no claim has opened"
    if verdict == SUPPORTED:
        return "keep claim.json, and hold other checkpoints to it: causalpatch recheck claim.json --model NEW"
    if verdict == ABSENT:
        return f"look elsewhere; an effect below {spec['delta']:g} needs a smaller delta, and new pairs"
    return "find out how many new pairs it takes: causalpatch power claim.json"


def describe(claim: Claim) -> list[str]:
    """Return the lines that a claim prints."""
    frame = readable(claim.to_dataframe())
    spec = claim.spec
    family = (
        f"share of the gap in {spec['metric']}; intervals and p hold for all {len(claim.findings)} together "
        f"(max-T, whole components flipped); p cannot be below {spec['smallest_p']:.2g}"
    )
    lines = [claim.statement, "", family, frame.to_string(index=False), ""]
    lines += [f"{one.name}: {line_of(one, claim)}" for one in claim.checks]
    lines += [f"limit: {text}" for text in claim.limits]
    return [*lines, f"next: {claim.next_step}"]


def line_of(check: Check, claim: Claim) -> str:
    """Return what a check says, in one line.

    Args:
        check: The check.
        claim: The claim that it is of.
    """
    if check.skipped:
        return f"not made: {check.skipped}"
    say = _LINES.get(check.name)
    return say(check, claim) if say else counted(len(check.rows), "row")


def _matched(check: Check, claim: Claim) -> str:
    about = check.about
    sizes = np.abs([row["share"] for row in check.rows])
    which = f"all {len(sizes)}" if about["is_all"] else f"{len(sizes)} drawn"
    depth = f", up to {about['reach']} layers off" if about["reach"] else ", of the same layers"
    return (
        f"{which} like it in kind{depth}: median |share| {np.median(sizes):.3f}, largest {sizes.max():.3f}, against "
        f"{abs(about['observed']):.3f}; p {about['p']:.3g} (not below {about['smallest_p']:.2g}), descriptive"
    )


def _shuffled(check: Check, claim: Claim) -> str:
    return "values of other pairs: " + _shares(check, "component")


def _identity(check: Check, claim: Claim) -> str:
    return f"its own values put back change at most {max(row['share'] for row in check.rows):.2g} of the gap"


def _whole(check: Check, claim: Claim) -> str:
    return "; ".join(f"{row['site']} from the source restores {row['share']:.3f}" for row in check.rows)


def _planted(check: Check, claim: Claim) -> str:
    found = [row["component"] for row in check.rows if row["verdict"] == SUPPORTED]
    return (
        f"an effect of {2 * claim.delta:g} with each component's own spread would have been supported for "
        f"{len(found)} of {len(check.rows)}"
    )


def _specificity(check: Check, claim: Claim) -> str:
    parts = []
    for behaviour in dict.fromkeys(row["behaviour"] for row in check.rows):
        rows = [row for row in check.rows if row["behaviour"] == behaviour]
        told = rows[0].get("problem") or ", ".join(
            f"{row['component']} {_number(row['share'])} ({row['verdict']})" for row in rows
        )
        parts.append(f"'{behaviour}': {told}")
    return "; ".join(parts)


def _interactions(check: Check, claim: Claim) -> str:
    counts = {kind: [row for row in check.rows if row["kind"] == kind] for kind in ("synergy", "redundancy")}
    told = [
        f"{kind} {row['first']} with {row['second']} {row['share']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        for kind, rows in counts.items()
        for row in rows
    ]
    return "; ".join(told) if told else f"none of {counted(len(check.rows), 'pair')} beyond {claim.delta:g}"


def _backup(check: Check, claim: Claim) -> str:
    about = check.about
    grown = [row for row in check.rows if row["is_backup"]]
    told = ", ".join(f"{row['component']} +{row['growth']:.3f}" for row in grown) or "none"
    which = f"all {about['n']}" if about["is_all"] else f"{about['n']} drawn of {about['n_all']}"
    return f"others whose effect grows by more than {claim.delta:g} when the set is ablated, of {which}: {told}"


def _direct(check: Check, claim: Claim) -> str:
    return "; ".join(
        f"{row['component']} {row['direct']:.3f} direct, {row['indirect']:.3f} indirect" for row in check.rows
    )


def _metrics(check: Check, claim: Claim) -> str:
    return _by(check, "metric")


def _corruptions(check: Check, claim: Claim) -> str:
    return _by(check, "value")


def _dose(check: Check, claim: Claim) -> str:
    parts = []
    for name in dict.fromkeys(row["component"] for row in check.rows):
        rows = [row for row in check.rows if row["component"] == name]
        parts.append(f"{name} " + ", ".join(f"{row['share']:.2f} at {row['dose']:g}" for row in rows))
    return "; ".join(parts)


def _by(check: Check, column: str) -> str:
    parts = []
    for held in dict.fromkeys(row[column] for row in check.rows):
        rows = [row for row in check.rows if row[column] == held]
        told = rows[0].get("problem") or ", ".join(f"{row['component']} {_number(row['share'])}" for row in rows)
        parts.append(f"{held}: {told}")
    return "; ".join(parts)


def _shares(check: Check, column: str) -> str:
    return ", ".join(f"{row[column]} {_number(row['share'])}" for row in check.rows)


def _number(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.3f}"


_LINES: Final[Mapping[str, Callable[[Any, Any], str]]] = {
    "matched sets": _matched,
    "shuffled pairs": _shuffled,
    "identity": _identity,
    "whole source": _whole,
    "planted effect": _planted,
    "specificity": _specificity,
    "interactions": _interactions,
    "backup": _backup,
    "direct and indirect": _direct,
    "other metrics": _metrics,
    "other corruptions": _corruptions,
    "dose": _dose,
}
