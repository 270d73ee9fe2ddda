"""Pictures: a declarative chart with its table, shown and saved without a network or a browser.

Altair's own display and HTML fetch their drawing code from the network, and it refuses more than 5,000 rows. So a
picture holds its rows inside the chart, shows itself as SVG and PNG, and writes HTML with the drawing code in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy

if TYPE_CHECKING:
    import pandas as pd

vl_convert = lazy("vl_convert")

ENDINGS = (".svg", ".png", ".html", ".csv")
# Two pixels of the file per pixel of the chart: 192 dots per inch, sharp in print at the size of a column.
PNG_SCALE = 2.0

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
        chart: The Altair chart, its rows inside.
        frame: The table that is drawn, a row per cell.
    """

    def __init__(self, chart: Any, frame: pd.DataFrame) -> None:
        self.chart = chart
        self.frame = frame

    def to_dict(self) -> dict[str, Any]:
        """Return the Vega-Lite specification."""
        spec: dict[str, Any] = self.chart.to_dict()
        return spec

    def to_svg(self) -> str:
        """Return the picture as SVG; its texts stay texts."""
        return str(vl_convert.vegalite_to_svg(self.to_dict(), allowed_base_urls=[]))

    def to_png(self, scale: float = PNG_SCALE) -> bytes:
        """Return the picture as PNG.

        Args:
            scale: Pixels of the file per pixel of the chart.
        """
        return bytes(vl_convert.vegalite_to_png(self.to_dict(), scale=scale, allowed_base_urls=[]))

    def to_html(self) -> str:
        """Return a page that needs nothing from outside; pointing at a cell shows its numbers."""
        # A token may be "</script>" or "<!--": as JSON escapes they cannot end or change the page's script.
        spec = json.dumps(self.to_dict()).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        return _PAGE.format(title="causalpatch", spec=spec, code=vl_convert.javascript_bundle(_EMBED))

    def save(self, path: str | Path) -> Path:
        """Write the picture in the format that the ending names.

        Args:
            path: Ends in ``.svg``, ``.png``, ``.html``, or ``.csv`` for the table behind the picture.

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
            path.write_text(self.to_svg() if ending == ".svg" else self.to_html(), encoding="utf-8")
        return path

    def _repr_mimebundle_(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"image/svg+xml": self.to_svg(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"Picture of {len(self.frame)} cells; picture.save('NAME.svg'), or .png .html .csv"
