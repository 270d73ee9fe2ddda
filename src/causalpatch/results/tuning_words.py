"""What a report of tuning says: its statement in fixed words, and how it prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from causalpatch.results.words import counted, joined, percent

if TYPE_CHECKING:
    from causalpatch.results.tuning import Arm, Contrast, TuningReport

NOT_DISRUPTED: Final = "not disrupted"
DISRUPTED: Final = "disrupted"
UNCLEAR: Final = "not shown to be undisturbed"
NEVER_SAID: Final = (
    "not said: that anything is stored in the located parts, or that they are the right place to edit in other models "
    "or for other behaviours"
)


def statement(report: TuningReport) -> str:
    """Return what was found."""
    located, spec = report.located, report.spec
    lines = [
        f"{report.verdict}. Changing {joined(list(located.components[:6]))} of '{spec['model']['name']}' "
        f"(way '{spec['way']}', {counted(located.n_trained, 'number')}), target success on test pairs "
        f"{success(located)}, {damage(located)}; other behaviour and text: {located.verdict}.",
        *_ranked(report),
        *(contrast(report.contrast(name)) for name in contrasts(report)),
        *(f"no evidence because {reason}" for reason in reasons(report)),
    ]
    return "\n".join(lines)


def _ranked(report: TuningReport) -> list[str]:
    """Return what the rank test says; nothing where there are no draws."""
    draws = report.of_kind("random")
    if not draws:
        return []
    return [
        f"Rank among {counted(len(draws), 'random matched draw')}: p {report.p_better:.3g} of so little damage; the "
        f"smallest that is attainable is {report.smallest_p:.3g}."
    ]


def contrasts(report: TuningReport) -> list[str]:
    """Return what the located arm is held against: random draws, and full fine-tuning where it was made."""
    found = ["random"] if report.of_kind("random") else []
    return found + [each.name for each in report.of_kind("full")]


def reasons(report: TuningReport) -> list[str]:
    """Say why there is no evidence of an advantage; nothing where there is, or evidence of the contrary."""
    draws, alpha = report.of_kind("random"), float(report.spec["alpha"])
    if report.verdict.startswith("located"):
        return []
    found = [] if report.is_complete else ["not all arms were made"]
    if not draws:
        return [*found, "there is nothing of this kind to compare with"]
    if report.smallest_p > alpha:
        found.append(
            f"only {counted(len(draws), 'matched set')} could be drawn: no p below {report.smallest_p:.3g} is possible"
        )
    if math.isinf(report.located.damage):
        found.append("the located arm did not reach the target")
    elif report.p_better > alpha:
        k = sum(each.damage <= report.located.damage for each in draws)
        found.append(f"{k} of {counted(len(draws), 'draw')} did no more damage")
    held = report.contrast("random")
    if np.isfinite(held.low) and held.low <= 0 <= held.high:
        found.append("the interval of the contrast with random draws holds 0")
    elif not np.isfinite(held.low) and np.isfinite(held.estimate):
        found.append(f"the contrast with random draws has no interval: {held.note}")
    return found


def contrast(found: Contrast) -> str:
    """Return a contrast in words."""
    name = f"located - {found.against}"
    if not np.isfinite(found.estimate):
        return f"{name}: no number; {found.note}"
    ends = f"95% interval {found.low:+.4f} to {found.high:+.4f}" if np.isfinite(found.low) else "no interval"
    note = f"; {found.note}" if found.note else ""
    return f"{name}: {found.estimate:+.4f} nat per retain token ({ends}{note})"


def success(arm: Arm) -> str:
    """Return the target success on test pairs in words."""
    return percent(round(float(np.mean(arm.success)), 3)) if arm.success else "-"


def damage(arm: Arm) -> str:
    """Return the damage in words."""
    if math.isinf(arm.damage):
        n = sum(not each for each in arm.reached)
        if not n:
            return "target reached on validation pairs, but not on test pairs: infinite damage"
        return f"target not reached by {n} of {counted(len(arm.reached), 'seed')}: infinite damage"
    return f"damage {arm.damage:.4f} nat per retain token"


def row(arm: Arm) -> dict[str, Any]:
    """Return an arm as a row of a table."""
    is_as_tested = arm.is_matched or not all(arm.reached)
    return {
        "arm": arm.name,
        "kind": arm.kind,
        "components": " + ".join(arm.components),
        "n_trained": arm.n_trained,
        "n_trainings": arm.n_trainings,
        "rate": arm.rate,
        "success": float(np.mean(arm.success)) if arm.success else math.nan,
        "reached": f"{sum(arm.reached)}/{len(arm.reached)}{'' if is_as_tested else ', not on test'}",
        "moved": float(np.mean(arm.moved)) if arm.moved else math.nan,
        "damage": arm.damage,
        "paraphrases": float(np.mean(arm.paraphrased)) if arm.paraphrased else math.nan,
        "verdict": arm.verdict,
    }


def describe(report: TuningReport) -> list[str]:
    """Return a report as lines: the statement, a table of arms, endpoints of the located one, the mechanism, limits."""
    lines = [report.statement, "", _table([_shown(row(arm)) for arm in report.arms])]
    lines += ["", "located, what must not change:"]
    lines.append(
        _table(
            [
                {
                    "endpoint": one.name,
                    "estimate": f"{one.estimate:.4f}",
                    "one-sided 95%": f"{one.high:.4f}" if np.isfinite(one.high) else f"none: {one.note}",
                    "margin": f"{one.margin:g}",
                    "verdict": one.verdict,
                    "groups": str(one.n_groups),
                }
                for one in report.located.endpoints
            ]
        )
    )
    for name, rows in report.mechanism.items():
        lines += ["", f"{name}:", _table([{key: _text(value) for key, value in one.items()} for one in rows])]
    return [*lines, "", *(f"limit: {note}" for note in (*report.notes, NEVER_SAID))]


def _shown(held: Mapping[str, Any]) -> dict[str, str]:
    names = held["components"]
    return {
        "arm": held["arm"],
        "changed": names if len(names) <= 36 else f"{names[:33]}...",
        "numbers": f"{held['n_trained']:,}",
        "trainings": str(held["n_trainings"]),
        "success": _text(held["success"]),
        "reached": held["reached"],
        "KL": _text(held["moved"]),
        "damage": _text(held["damage"]),
        "other": held["verdict"],
    }


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else "inf" if math.isinf(value) else f"{value:.4g}"
    return "-" if value is None else str(value)


def _table(rows: list[dict[str, str]]) -> str:
    """Return rows of texts in columns."""
    if not rows:
        return "  nothing"
    names = list(rows[0])
    widths = [max(len(name), *(len(each[name]) for each in rows)) for name in names]
    lines = [dict(zip(names, names, strict=True)), *rows]
    said = ("  ".join(f"{each[name]:<{width}}" for name, width in zip(names, widths, strict=True)) for each in lines)
    return "\n".join(f"  {line.rstrip()}" for line in said)
