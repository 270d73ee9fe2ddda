"""Charts of the results, as SVG: how many times as fast we are, and how time grows."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from benchmarks.ours import NAME
from benchmarks.peers import PEERS

FONT = "Arial, Helvetica, Liberation Sans, DejaVu Sans, sans-serif"
INK, MUTED = "#1a1a1a", "#6b6b6b"
# Okabe and Ito's colours, told apart by the colour-blind; shapes say the same once more.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


def speed(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw, for each workload, how many times as long as ours each contender takes; nothing if there is none."""
    rows = [
        {"workload": record["title"], "contender": name, "ratio": _low(times) / _low(record["contenders"][NAME])}
        for record in records
        for name, times in record["contenders"].items()
        if name != NAME and times["seconds"]
    ]
    if not rows:
        return
    titles = list(dict.fromkeys(row["workload"] for row in rows))
    names = [peer.name for peer in PEERS if any(row["contender"] == peer.name for row in rows)]
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    most = max(row["ratio"] for row in rows)
    least = min(0.9, *(0.9 * row["ratio"] for row in rows))
    domain = [least, next((tick for tick in ticks if tick >= most), most)]
    axis = alt.Axis(values=ticks, format="~g", labelFontSize=11)
    x = alt.X("ratio:Q", title="times as long as causalpatch (logarithmic)", axis=axis)
    x = x.scale(type="log", domain=domain, nice=False)
    labels = alt.Axis(labelLimit=0, labelFontSize=11, title=None, ticks=False, grid=True, gridColor="#ececec")
    y = alt.Y("workload:N", sort=titles, axis=labels)
    colour = alt.Color("contender:N", sort=names, title=None, scale=alt.Scale(domain=names, range=list(COLOURS)))
    shapes = ["circle", "square", "triangle-up", "diamond", "cross"][: len(names)]
    shape = alt.Shape("contender:N", sort=names, title=None, scale=alt.Scale(domain=names, range=shapes))
    points = alt.Chart(alt.Data(values=rows)).mark_point(filled=True, size=90, opacity=0.9)
    ours = alt.Chart(alt.Data(values=[{"ratio": 1.0}])).mark_rule(color=INK, strokeWidth=1.4).encode(x=x)
    chart = alt.layer(ours, points.encode(x=x, y=y, color=colour, shape=shape))
    chart = chart.properties(width=520, height=30 * len(titles))
    title = alt.TitleParams(
        "The same cells patched in other ways",
        subtitle="seconds of each over ours in the same run, minima; the line at 1 is causalpatch",
        anchor="start",
        frame="bounds",
        offset=12,
    )
    _write(chart.properties(title=title), file)


def growth(found: Mapping[str, Any], file: Path) -> None:
    """Draw seconds against the cone's operations along each series, beside proportionality."""
    panels = []
    for series in dict.fromkeys(point["series"] for point in found["points"]):
        points = [point for point in found["points"] if point["series"] == series]
        pace = statistics.median(min(point["seconds"]) / point["gflop"] for point in points)
        rows = [
            {"GFLOP": point["gflop"], "seconds": min(point["seconds"]), "name": f"{point['size']:,}"}
            for point in points
        ]
        ends = [0.0, 1.08 * max(row["GFLOP"] for row in rows)]
        line = [{"GFLOP": end, "seconds": pace * end} for end in ends]
        x = alt.X("GFLOP:Q", scale=alt.Scale(domain=ends, nice=False), axis=alt.Axis(tickCount=5, format=",~r"))
        y = alt.Y("seconds:Q", axis=alt.Axis(tickCount=5, format="~r"))
        model = alt.Chart(alt.Data(values=line)).mark_line(color=MUTED, strokeDash=[5, 4]).encode(x=x, y=y)
        marks = alt.Chart(alt.Data(values=rows))
        dots = marks.mark_point(filled=True, size=70, color=COLOURS[0]).encode(x=x, y=y)
        texts = marks.mark_text(align="right", dx=-8, dy=-7, color=INK, fontSize=11).encode(x=x, y=y, text="name:N")
        deviation = found["deviation"][series]
        title = alt.TitleParams(f"{series}: within {deviation:.0%}", fontSize=12, fontWeight="normal", anchor="start")
        panels.append(alt.layer(model, dots, texts).properties(width=240, height=180, title=title))
    chart = alt.vconcat(*(alt.hconcat(*panels[i : i + 2]) for i in range(0, len(panels), 2)))
    title = alt.TitleParams(
        "Time against arithmetic",
        subtitle="one number varied at a time; dashed: proportional to the cone's operations",
        anchor="start",
        offset=12,
    )
    _write(chart.properties(title=title), file)


def _low(times: Mapping[str, Any]) -> float:
    return float(min(times["seconds"]))


def _write(chart: Any, file: Path) -> None:
    finished = (
        chart.properties(padding=14)
        .configure(font=FONT, background="white")
        .configure_title(fontSize=14, subtitleFontSize=11, subtitleColor="#555555", fontWeight=600)
        .configure_axis(titleFontSize=12, titleFontWeight="normal", gridColor="#ececec")
        .configure_legend(labelFontSize=11, labelLimit=0)
        .configure_view(stroke=None)
    )
    file.write_text(vl_convert.vegalite_to_svg(finished.to_json()), encoding="utf-8")
