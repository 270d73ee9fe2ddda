"""A progress bar with the time left, on the error stream, only where a person looks at it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from causalpatch.base.extras import lazy

if TYPE_CHECKING:
    import rich.console as rich_console
    import rich.progress as rich_progress
else:
    rich_console = lazy("rich.console")
    rich_progress = lazy("rich.progress")


@runtime_checkable
class Advance(Protocol):
    """Tells the bar that some units of work are done."""

    def __call__(self, done: int) -> None:
        """Move the bar on by ``done`` units."""


@contextmanager
def bar(label: str, total: int, *, is_shown: bool | None = None) -> Iterator[Advance]:
    """Show a bar while work goes on.

    Args:
        label: What is being done.
        total: Units of work in all.
        is_shown: Whether to show it; None shows it where the error stream is a terminal.

    Yields:
        A function that moves the bar on.
    """
    if not (sys.stderr.isatty() if is_shown is None else is_shown):
        yield lambda done: None
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=rich_console.Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)
