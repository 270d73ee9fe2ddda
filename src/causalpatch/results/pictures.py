"""Pictures: a declarative chart with its table, shown and saved without a network or a browser.

Altair's own display and HTML fetch their drawing code from the network, and it refuses more than 5,000 rows. So a
picture puts the rows into the finished specification, once for all formats, shows itself as SVG and PNG, and writes
HTML with the drawing code in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy

if TYPE_CHECKING:
    import pandas as pd

vl_convert = lazy("vl_convert")

ENDINGS = (".svg", ".png", ".html", ".csv", ".json")
# Two pixels of the file per pixel of the chart: 192 dots per inch, sharp in print at the size of a column.
PNG_SCALE = 2.0
# Pixels. Many viewers refuse wider ones, and a file of 15,000 takes twice as long.
PNG_WIDEST = 10_000.0

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
</head>
<body>
<div id="chart"></div>
<script>window.causalpatchChart = {spec};</script>
<script>{code}</script>
</body>
</html>
"""
_EMBED = 'vegaEmbed("#chart", window.causalpatchChart, {renderer: "svg", actions: false});'


class Picture:
    """A chart and the table behind it.

    Args:
        chart: The Altair chart, which knows its rows by name.
        frame: The table that is drawn, a row per cell.
        rows: The rows by these names.
    """

    def __init__(self, chart: Any, frame: pd.DataFrame, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.chart = chart
        self.frame = frame
        self._rows = rows

    def to_dict(self) -> dict[str, Any]:
        """Return the Vega-Lite specification."""
        spec: dict[str, Any] = json.loads(self._spec)
        return spec

    @cached_property
    def _spec(self) -> str:
        """The specification as JSON, made once."""
        return json.dumps(self.chart.to_dict(validate=False) | {"datasets": self._rows})

    @cached_property
    def _svg(self) -> str:
        return str(vl_convert.vegalite_to_svg(self._spec, allowed_base_urls=[]))

    def to_svg(self) -> str:
        """Return the picture as SVG; its texts stay texts."""
        return self._svg

    def to_png(self, scale: float | None = None) -> bytes:
        """Return the picture as PNG.

        Args:
            scale: Pixels of the file per pixel of the chart; 2 unless given, less where that is over 10,000 wide.
        """
        if scale is None:
            width = float(ElementTree.fromstring(self._svg).get("width", PNG_WIDEST / PNG_SCALE))
            scale = min(PNG_SCALE, PNG_WIDEST / width)
        return bytes(vl_convert.svg_to_png(self._svg, scale=scale))

    def to_html(self) -> str:
        """Return a page that needs nothing from outside; pointing at a cell shows its numbers."""
        # A token may be "</script>" or "<!--": as JSON escapes they cannot end or change the page's script.
        spec = self._spec.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        return _PAGE.format(title="causalpatch", spec=spec, code=_drawing_code())

    def save(self, path: str | Path) -> Path:
        """Write the picture in the format that the ending names.

        Args:
            path: Ends in ``.svg``, ``.png``, ``.html``; in ``.csv`` for the table behind the picture, in ``.json`` for
                its Vega-Lite specification with the same rows.

        Returns:
            The path.

        Raises:
            SettingError: The ending is none of these.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in ENDINGS:
            facts = [("known", " ".join(ENDINGS))]
            raise SettingError(f"no picture format ends in {ending!r}", facts=facts, fix=f"{path.stem}.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == ".png":
            path.write_bytes(self.to_png())
        elif ending == ".csv":
            self.frame.to_csv(path, index=False, encoding="utf-8")
        else:
            text = self._spec if ending == ".json" else self.to_svg() if ending == ".svg" else self.to_html()
            path.write_text(text, encoding="utf-8")
        return path

    def _repr_mimebundle_(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"image/svg+xml": self.to_svg(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"Picture of {len(self.frame)} cells; picture.save('NAME.svg'), or .png .html .csv .json"


@lru_cache(maxsize=1)
def _drawing_code() -> str:
    return str(vl_convert.javascript_bundle(_EMBED))
