"""How far a step is and how long it will still take, from what the journal tells."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Pace:
    """The step that is being made.

    Args:
        name: Its name.
        place: Which of how many it is.
        planned: Patched runs that it takes; None where that depends on what it finds.
    """

    name: str = ""
    place: tuple[int, int] = (0, 0)
    planned: int | None = None
    _there: int = 0  # runs that were read
    _made: int = 0  # runs that this session measured
    _open: int = 0  # runs of the last request that are not there yet
    _began_s: float = field(default=0.0)
    _now_s: float = field(default=0.0)

    def tell(self, line: Mapping[str, Any]) -> bool:
        """Take in a line of the journal; return whether it moved the step on."""
        self._now_s = float(line["after_s"])
        event = line["event"]
        if event in ("step", "step was there"):
            self.name, self.place, self.planned = line["name"], (line["number"], line["of"]), line.get("runs")
            self._there = self._made = self._open = 0
            self._began_s = self._now_s
        elif event == "call":
            self._there += line["runs"] - line["left"]
            self._open = line["left"]
        elif event == "shard":
            self._made += line["runs"]
            self._open = max(0, self._open - line["runs"])
        else:
            return False
        return True

    @property
    def done(self) -> int:
        """Runs that are there."""
        return self._there + self._made

    @property
    def total(self) -> int:
        """Runs in all, as far as they are known."""
        return max(self.planned or 0, self.done + self._open)

    @property
    def left_s(self) -> float | None:
        """Seconds that are left at the pace so far; None where nothing was measured yet, or the end is not known."""
        if not self._made or self._now_s <= self._began_s:
            return None
        if self.planned is None and not self._open:
            return None
        return (self.total - self.done) * (self._now_s - self._began_s) / self._made

    def __str__(self) -> str:
        number, of = self.place
        left = self.left_s
        time_left = "" if left is None else f", {duration(left)} left"
        more = "" if self.planned is not None else " so far known"
        return f"step {number} of {of}, {self.name}: {self.done:,} of {self.total:,} runs{more}{time_left}"


def duration(seconds: float) -> str:
    """Say seconds in a unit that a reader can take in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
