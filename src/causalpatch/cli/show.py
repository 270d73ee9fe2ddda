"""What the command line shows: tables for people, JSON for programs, and the files that it writes."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causalpatch.base.errors import CausalPatchError
from causalpatch.base.extras import lazy

if TYPE_CHECKING:
    import rich.console as rich_console
    import rich.markup as rich_markup
    import rich.table as rich_table

    from causalpatch.base import spec
    from causalpatch.results import words
else:
    spec = lazy("causalpatch.base.spec")
    rich_console = lazy("rich.console")
    rich_markup = lazy("rich.markup")
    rich_table = lazy("rich.table")
    words = lazy("causalpatch.results.words")


# Shares from here on are spoken of.
LARGE = 0.1


def text(line: str) -> None:
    """Print a line as it is."""
    print(line)


def heading(line: str) -> None:
    """Print a heading with a blank line before it."""
    print(f"\n{line}\n{'-' * len(line)}")


def problem(line: str) -> None:
    """Print a line on the error stream."""
    print(line, file=sys.stderr)


def is_watched() -> bool:
    """Say whether a person looks at the error stream."""
    return sys.stderr.isatty()


def progress(line: str, *, is_last: bool) -> None:
    """Print how far something is on the error stream, over the line before where a person looks at it.

    Args:
        line: What to say.
        is_last: Whether the line stays.
    """
    start = "\r\033[K" if is_watched() else ""
    print(f"{start}{line}", end="\n" if is_last else "", file=sys.stderr, flush=True)


def end_of_progress() -> None:
    """Leave the line of progress, where there is one."""
    if is_watched():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line on the error stream."""
    problem(f"note: {message}")


def error(found: CausalPatchError, *, as_json: bool) -> None:
    """Show an error: on the error stream, or as JSON on standard output."""
    if as_json:
        facts = {name: str(value) for name, value in found.facts}
        shown = {"kind": type(found).__name__, "what": found.what, "facts": facts, "fix": found.fix}
        json_object({"error": shown, "exit_code": found.exit_code})
    else:
        problem(f"{type(found).__name__}: {found}")


def json_object(value: Mapping[str, Any]) -> None:
    """Print one JSON object; what is not a number is null."""
    print(json.dumps(_finite(spec.to_plain(value)), indent=1, ensure_ascii=False))


def facts(found: Mapping[str, str]) -> None:
    """Print names and values, aligned."""
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def table(rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """Print rows with equal keys as a table."""
    shown = rich_table.Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        shown.add_column(name, justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        shown.add_row(*(rich_markup.escape(str(value)) for value in row.values()))
    _console().print(shown)
    if note:
        print(f"note: {note}")


def records(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print each row as a block of names and values."""
    for row in rows:
        facts({name: repr(value) if isinstance(value, str) else json.dumps(value) for name, value in row.items()})
        print()


def doctor_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of a model's sites."""
    shown = rich_table.Table(box=None, pad_edge=False, header_style="bold")
    for name in ("site", "axes", "shape", "proofs"):
        shown.add_column(name)
    for row in rows:
        if row["refused"]:
            proofs = f"[red]refused[/red]: {rich_markup.escape(row['refused'])}"
        else:
            proofs = f"[green]{', '.join(row['passed'])}[/green]" if row["passed"] else "as it runs"
        shown.add_row(row["site"], row["axes"], row["shape"], proofs)
    _console().print(shown)
    n_refused = sum(row["refused"] is not None for row in rows)
    print(f"{len(rows) - n_refused} sites can be patched, {n_refused} are refused")


def engine(effects: Any) -> None:
    """Print which engine made the runs, and why that one."""
    print(f"engine {words.engine_of(effects.provenance) or 'not recorded'}")


def top_table(found: Any) -> None:
    """Print the largest cells with their notes."""
    print(found)


def summary(effects: Any) -> None:
    """Print every cell."""
    frame = effects.summary()
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    for note in frame.attrs.get("notes", []):
        print(f"note: {note}")


def conclusion(found: Mapping[str, Any]) -> None:
    """Say in words which cells restore a tenth of the gap or more, as far as their intervals tell."""
    heading("In short (exploratory: chosen and estimated on the same pairs)")
    for name, effects in found.items():
        print(f"{name}, patching {effects.provenance['site']}")
        frame = effects.top(5).to_dataframe()
        sure = frame[frame["low"] >= LARGE].to_dict("records")
        for row in sure:
            share = f"{row['recovered']:.2f} of the gap ({row['low']:.2f} to {row['high']:.2f})"
            print(f"  {_cell(row, effects.axes)} restores {share}, {_p(row['p_bh'])}")
        if not sure:
            print("  no cell surely restores a tenth of the gap")


def effects_object(effects: Any, top: int, *, everything: bool = False) -> dict[str, Any]:
    """Return effects as plain data: how they were obtained, and their largest cells or all of them, by metric."""
    cells, notes = {}, []
    for metric in effects.metrics:
        one = effects.metric(metric)
        found = one.summary() if everything else one.over_draws().top(top)
        frame = found if everything else found.to_dataframe()
        cells[metric] = [{name: _plain(value) for name, value in cell.items()} for cell in frame.to_dict("records")]
        notes += [note for note in (frame.attrs["notes"] if everything else found.notes) if note not in notes]
    return {
        "axes": list(effects.axes),
        "metrics": effects.metrics,
        "label": "all cells" if everything else "exploratory",
        "cells": cells,
        "notes": notes,
        "provenance": effects.provenance,
    }


def lens_rows(read: Any) -> list[dict[str, Any]]:
    """Return a row for each layer of the logit lens: what the metric is behind it, means over pairs."""
    means = read.mean("pair")
    layers = means["layer"].values
    sides = {"clean": means["clean"].values, "corrupted": means["corrupt"].values}
    return [
        {"layer": int(layer), **{name: float(values[number]) for name, values in sides.items()}}
        for number, layer in enumerate(layers)
    ]


def sender_rows(parts: Any) -> list[dict[str, Any]]:
    """Return a row for each sender of direct logit attribution, means over pairs."""
    means = parts.mean("pair")
    columns = (means["sender"].values, means["layer"].values, means["head"].values, means.values)
    return [
        {"sender": str(sender), "layer": int(layer), "head": int(head), "logits": float(logits)}
        for sender, layer, head, logits in zip(*columns, strict=True)
    ]


def features_object(found: Any) -> dict[str, Any]:
    """Return the top features of a dictionary as plain data."""
    kinds = ("whole", "all features", "not explained")
    layers = {
        str(layer): {
            "features": len(activity.base),
            "explained": _finite(activity.explained),
            "totals": {what: found.total(layer, what) for what in kinds},
        }
        for layer, activity in found.activities.items()
    }
    rows = [{name: _plain(value) for name, value in row.items()} for row in found.table().to_dict("records")]
    return {"layers": layers, "top": rows}


def save(effects: Any, folder: Path, name: str, *, alone: bool) -> list[str]:
    """Write effects, their table and their pictures; return the files' paths.

    Args:
        effects: The effects.
        folder: Where to; several sweeps get a folder each.
        name: Name of the sweep.
        alone: Whether it is the only sweep of its command.
    """
    place = folder if alone else folder / file_name(name)
    effects.save(place)
    written = [place / "manifest.json"]
    for metric in effects.metrics:
        one = effects.over_draws().metric(metric)
        end = "" if len(effects.metrics) == 1 else f"-{metric}"
        one.summary().to_csv(place / f"summary{end}.csv", index=False)
        written.append(place / f"summary{end}.csv")
        pictures = {"bars": one.plot("bars")}
        if len(one.axes) == 2:
            pictures["heat"] = one.plot("heat")
        for kind, picture in pictures.items():
            written += [picture.save(place / f"{kind}{end}.{ending}") for ending in ("svg", "png", "html")]
    return [str(path) for path in written]


def file_name(name: str) -> str:
    """Return a name as a file may have it."""
    return "".join(c if c.isalnum() or c in "-_.@" else "_" for c in name)


def _p(adjusted: float) -> str:
    return "adjusted p < 0.001" if adjusted < 0.001 else f"adjusted p {adjusted:.3f}"


def _cell(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    shared = row.get("token") not in (None, "(varies)")
    token = f" ({row['token']!r})" if shared else ""
    return ", ".join(f"{axis} {row[axis]}" for axis in axes) + token


def _console() -> rich_console.Console:
    return rich_console.Console(width=None if sys.stdout.isatty() else 140)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
