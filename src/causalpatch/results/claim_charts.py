"""Charts of a claim: shares with their simultaneous intervals, delta and the controls; and the share of every pair.

The grey band is ``-delta`` to ``delta``. Ticks below the set are matched sets of controls. Colour says the verdict, and
so does the shape: filled circles are supported, hollow ones absent up to delta, crosses inconclusive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, FAINT, INK, Sheet, finished, layer_of, plain, records
from causalpatch.results.pictures import Picture
from causalpatch.results.words import counted, percent, short_name
from causalpatch.statistics.verdicts import ABSENT, INCONCLUSIVE, SUPPORTED

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.claim import Claim
else:
    pd = lazy("pandas")

alt = lazy("altair")

_WIDTH, _ROW = 420, 30  # px
_LOOKS: Final = {SUPPORTED: (BLUE, "circle"), ABSENT: ("#6b6b6b", "square"), INCONCLUSIVE: ("#b35806", "cross")}


def draw(claim: Claim, kind: str) -> Picture:
    """Draw a claim.

    Args:
        claim: The claim.
        kind: ``"effects"`` or ``"pairs"``.

    Raises:
        SettingError: There is no such kind.
    """
    kinds = {"effects": _effects, "pairs": _pairs}
    if kind not in kinds:
        raise SettingError(f"no chart of kind {kind!r}", facts=[("known", ", ".join(kinds))], fix="claim.plot()")
    return kinds[kind](claim)


def _effects(claim: Claim) -> Picture:
    frame = claim.to_dataframe()
    names = list(frame["component"])
    rows = [{key: plain(value) for key, value in row.items()} for row in records(frame)]
    sheet: Sheet = {}
    x, y = _x(claim), _y(names)
    layers = _ground(sheet, claim, names)
    controls = _controls(claim, names)
    lines = []
    if controls:
        ticks = layer_of(sheet, "controls", controls).mark_tick(color="#8c6bb1", thickness=1.2, size=12, yOffset=9)
        layers.append(ticks.encode(x=x, y=y, tooltip=["members:N", "share:Q"]))
        lines.append(f"purple ticks: {counted(len(controls), 'matched set')} of controls")
    spans = [row for row in rows if row["low"] is not None and row["high"] is not None]
    if spans:
        rule = layer_of(sheet, "spans", spans).mark_rule(color=INK, strokeWidth=1.6)
        layers.append(rule.encode(y=y, x=alt.X("low:Q"), x2="high:Q"))
        for end in ("low", "high"):
            cap = layer_of(sheet, "spans", spans).mark_tick(color=INK, thickness=1.6, size=8)
            layers.append(cap.encode(y=y, x=alt.X(f"{end}:Q")))
    used = [verdict for verdict in _LOOKS if verdict in set(frame["verdict"])]
    colour = alt.Color("verdict:N", title="verdict", scale=_scale(used, 0))
    shape = alt.Shape("verdict:N", title="verdict", scale=_scale(used, 1))
    told = ["component:N", "share:Q", "low:Q", "high:Q", "p:Q", "agreement:Q", "verdict:N"]
    point = layer_of(sheet, "findings", rows).mark_point(filled=True, size=90, opacity=1)
    layers.append(point.encode(x=x, y=y, color=colour, shape=shape, tooltip=told))
    if spans:
        lines.insert(0, f"whiskers: {percent(1 - claim.spec['alpha'])} intervals that hold for all together")
    else:
        lines.insert(0, "no intervals")
    return _finished(claim, layers, lines, frame, sheet, len(names))


def _pairs(claim: Claim) -> Picture:
    names = [each.component for each in claim.findings]
    shares = claim.own_shares()
    rows = [
        {"component": name, "pair": pair, "group": int(group), "share": float(share)}
        for name, row in zip(names, shares, strict=True)
        for pair, group, share in zip(claim.pair_ids, claim.group, row, strict=True)
        if np.isfinite(share)
    ]
    frame = pd.DataFrame(rows, columns=["component", "pair", "group", "share"])
    sheet: Sheet = {}
    x, y = _x(claim), _y(names)
    layers = _ground(sheet, claim, names)
    dot = layer_of(sheet, "pairs", rows).mark_point(filled=True, size=22, opacity=0.45, color=BLUE)
    layers.append(dot.encode(x=x, y=y, tooltip=["pair:N", "group:Q", "share:Q"]))
    means = [{"component": each.component, "share": plain(each.share)} for each in claim.findings]
    mean = layer_of(sheet, "means", means).mark_tick(color=INK, thickness=2.2, size=22)
    layers.append(mean.encode(x=x, y=y, tooltip=["component:N", "share:Q"]))
    missing = int((~np.isfinite(shares)).sum())
    lines = ["a dot for each pair; tick: the share of all, a ratio of means"]
    if missing:
        lines.append(f"not drawn: {counted(missing, 'pair')} without a gap of its own or not measured")
    return _finished(claim, layers, lines, frame, sheet, len(names))


def _controls(claim: Claim, names: list[str]) -> list[dict[str, Any]]:
    """Return the shares of matched sets, at the row of the set that they are matched to."""
    held = [one for one in claim.checks if one.name == "matched sets"]
    return [
        {"component": names[-1], "members": row["members"], "share": plain(row["share"])}
        for one in held
        for row in one.rows
        if row["share"] is not None
    ]


def _ground(sheet: Sheet, claim: Claim, names: list[str]) -> list[Any]:
    band = layer_of(sheet, "delta", [{"low": -claim.delta, "high": claim.delta}])
    nought = layer_of(sheet, "nought", [{"share": 0.0}])
    return [
        band.mark_rect(color=FAINT, opacity=0.22).encode(x=alt.X("low:Q"), x2="high:Q"),
        nought.mark_rule(color=INK, strokeWidth=1).encode(x=alt.X("share:Q")),
    ]


def _x(claim: Claim) -> Any:
    word = "removed" if claim.spec["direction"] == "noise" else "restored"
    return alt.X("share:Q", title=f"share of the gap {word}", axis=alt.Axis(format=".3~g", tickCount=6))


def _y(names: list[str]) -> Any:
    axis = alt.Axis(title=None, labelLimit=0, labelOverlap=False, ticks=False)
    return alt.Y("component:N", sort=None, scale=alt.Scale(domain=names), axis=axis)


def _scale(used: list[str], place: int) -> Any:
    return alt.Scale(domain=used, range=[_LOOKS[verdict][place] for verdict in used])


def _finished(
    claim: Claim, layers: list[Any], lines: list[str], frame: pd.DataFrame, sheet: Sheet, n_rows: int
) -> Picture:
    pairs = claim.spec["pairs"]
    where = (
        f"'{short_name(claim.spec['model']['name'])}' · '{pairs['name']}' · {counted(pairs['n'], 'held-out pair')}, "
        f"{counted(pairs['n_components'], 'independent component')}"
    )
    title = f"{claim.verdict}: share of the gap in {claim.spec['metric']}"
    said = [where, f"grey: up to delta, {claim.delta:g} of the gap", *lines, *claim.reasons]
    chart = alt.layer(*layers).properties(width=_WIDTH, height=_ROW * max(n_rows, 2))
    return Picture(finished(chart, Caption(title), said, _WIDTH + 190), frame, sheet)
