"""A circuit as a drawing: components in rows by depth, edges as lines, as wide as what goes along them.

The embedding stands at the bottom and the logits on top; in between each layer has a row of heads and one for its MLP,
of which only those that are used are drawn. MLPs stand right of the heads. Lines into a head end left, in the
middle or right of it: at its queries, keys or values, and each has its colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, FAINT, INK, RED, Sheet, finished, layer_of, plain, records
from causalpatch.results.pictures import Picture
from causalpatch.sites.graph import KINDS, Graph

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

alt = lazy("altair")


_COLUMN, _ROW = 96, 58  # px between heads of a row, and between rows
_APART = 0.16  # of a column, between the ends of lines into queries, keys and values
_WIDEST = 6.0  # px of the widest line
_COLOURS = {"q": RED, "k": "#b35806", "v": BLUE, "": INK}
_READS = {"q": "queries", "k": "keys", "v": "values", "": "MLP, logits"}


def draw(graph: Graph, edges: np.ndarray, values: np.ndarray | None, *, title: str, lines: Sequence[str]) -> Picture:
    """Draw some edges of a graph.

    Args:
        graph: All components.
        edges: Numbers of sender and receiver of each edge, ``(edge, 2)``.
        values: What goes along each, in any unit, for the width of its line; None for lines of one width.
        title: What stands above.
        lines: Smaller lines below the title.
    """
    frame = _table(graph, edges, values)
    places = _places(graph, [*frame["sender"], *frame["component"]])
    shares = frame["value"].abs() / max(float(frame["value"].abs().max()), 1e-30)
    rows = []
    for row, share in zip(records(frame), shares.tolist(), strict=True):
        (x, y), (x2, y2) = places[row["sender"]], places[row["component"]]
        side = _APART * (KINDS.index(row["kind"]) - 1) if row["kind"] else 0.0
        ends = {"x": x, "y": y, "x2": x2 + side, "y2": y2, "width": max(share, 0.08), "reads": _READS[row["kind"]]}
        rows.append({**{key: plain(value) for key, value in row.items()}, **ends})
    rows.sort(key=lambda row: row["width"])
    nodes = [{"name": name, "x": x, "y": y} for name, (x, y) in places.items()]
    columns, heights = zip(*places.values(), strict=True)
    n_columns, n_rows = max(columns) - min(columns) + 1, len(set(heights))
    sheet: Sheet = {}
    kinds = [kind for kind in _COLOURS if kind in set(frame["kind"])]
    scale = alt.Scale(domain=[_READS[kind] for kind in kinds], range=[_COLOURS[kind] for kind in kinds])
    colour = alt.Color(
        "reads:N", title="into", scale=scale, legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2)
    )
    x, y = (
        alt.X("x:Q", axis=None, scale=alt.Scale(zero=False, padding=34)),
        alt.Y("y:Q", axis=None, scale=alt.Scale(padding=20)),
    )
    width = alt.StrokeWidth("width:Q", scale=alt.Scale(domain=[0, 1], range=[0, _WIDEST]), legend=None)
    told = ["edge:N"] if values is None else ["edge:N", "value:Q"]
    line = layer_of(sheet, "edges", rows).mark_rule(opacity=0.75, strokeCap="round")
    size = width if values is not None else alt.value(1.6)
    drawn = line.encode(x=x, y=y, x2="x2:Q", y2="y2:Q", color=colour, strokeWidth=size, tooltip=told)
    held = layer_of(sheet, "components", nodes)
    box = held.mark_rect(fill="white", stroke=FAINT, cornerRadius=4, width=46, height=19).encode(x=x, y=y)
    name = held.mark_text(fontSize=11, color=INK).encode(x=x, y=y, text="name:N")
    pixels = int(max(320, n_columns * _COLUMN))
    chart = alt.layer(drawn, box, name).properties(width=pixels, height=int(n_rows * _ROW))
    return Picture(finished(chart, Caption(title), lines, pixels + 110), frame, sheet)


def _table(graph: Graph, edges: np.ndarray, values: np.ndarray | None) -> pd.DataFrame:
    """Return a row per edge: its name, both ends, which input it goes into, and what goes along it."""
    receivers = [graph.receiver_label(int(receiver)) for _, receiver in edges]
    return pd.DataFrame(
        {
            "edge": list(graph.names(edges)),
            "sender": [graph.sender_label(int(sender)) for sender, _ in edges],
            "receiver": receivers,
            "component": [each.partition("<")[0] for each in receivers],
            "kind": [each.partition("<")[2][:1] for each in receivers],
            "value": np.ones(len(edges)) if values is None else np.asarray(values, dtype=float),
        }
    )


def _places(graph: Graph, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return where components stand: heads by their number in rows by depth, in rows that are used alone."""
    used = {"embed", "logits", *names}
    middle = (graph.n_heads - 1) / 2
    found: dict[str, tuple[float, int]] = {"embed": (middle, -1), "logits": (middle, 2 * graph.n_layers)}
    for layer in range(graph.n_layers):
        found |= {f"a{layer}.h{head}": (head, 2 * layer) for head in range(graph.n_heads)}
        # Beside the heads, so that no line between these runs behind it; not all in one column, for lines between MLPs.
        found[f"m{layer}"] = (graph.n_heads + 0.4 * (layer % 3), 2 * layer + 1)
    depths = sorted({depth for name, (_, depth) in found.items() if name in used})
    return {name: (x, float(depths.index(depth))) for name, (x, depth) in found.items() if name in used}
