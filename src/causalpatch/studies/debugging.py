"""What became of an investigation: pairs, search and claim, where it stopped, what it took, and what to do next."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from causalpatch.base.errors import ResultsNotFound
from causalpatch.base.spec import to_plain
from causalpatch.pairs import Pairs
from causalpatch.pairs.made import MadePairs, reasons_as_lines
from causalpatch.results.arrays import replacing
from causalpatch.results.claim import Claim
from causalpatch.results.localization import Cell, Localization
from causalpatch.results.pictures import Picture
from causalpatch.results.words import counted, joined
from causalpatch.statistics.verdicts import ABSENT

STAGES: Final = ("pairs", "split", "search", "confirm")
_SHOWN: Final = 5


@dataclass(frozen=True)
class Stop:
    """Where an investigation ended before a claim.

    Args:
        stage: ``pairs``, ``split``, ``search`` or ``confirm``.
        why: What happened, in one line.
        facts: Names and values that let the reader see why.
        fix: What to do.
        exit_code: What the command ends with.
    """

    stage: str
    why: str
    facts: tuple[tuple[str, object], ...] = ()
    fix: str = ""
    exit_code: int = 1

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.facts), default=0)
        lines = [f"stopped at {self.stage}: {self.why}"]
        return "\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in self.facts)])


@dataclass(frozen=True)
class Debugging:
    """An investigation of failing prompts, as far as it went.

    Args:
        asked: What was asked for: model, budget, level, ….
        made: The pairs that were made, with the account of what was dropped.
        discovery: Pairs that the search saw.
        held_out: Pairs that it did not; None where there are too few.
        localization: What the search found.
        claim: What was confirmed.
        stop: Where it ended before a claim; None where it did not.
        seconds: What each stage took.
    """

    asked: Mapping[str, Any]
    made: MadePairs | None = field(default=None, repr=False)
    discovery: Pairs | None = field(default=None, repr=False)
    held_out: Pairs | None = field(default=None, repr=False)
    localization: Localization | None = field(default=None, repr=False)
    claim: Claim | None = None
    stop: Stop | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def supported(self) -> list[str]:
        """Components that are confirmed to restore the right answer by more than delta."""
        if self.claim is None or self.claim.reused:
            return []
        shares = {each.component: each.share for each in self.claim.findings}
        return [name for name in self.claim.supported if shares[name] > 0]

    @property
    def restoring(self) -> list[Cell]:
        """What the search found that restores the right answer, the most first; then members of sets that do.

        What stands against the right answer is left out, and members of a set come last, since they do little alone.
        """
        if self.localization is None:
            return []
        sets = self.localization.sets
        alone = [cell for cell in self.localization.found if cell.together < 0 and cell.effect > 0]
        members = [cell for cell in self.localization.found if cell.together >= 0 and sets[cell.together].effect > 0]
        return [*sorted(alone, key=lambda cell: -cell.effect), *members]

    @property
    def found(self) -> list[str]:
        """Names of what the search found that restores the right answer, the most first; exploratory."""
        return [cell.name for cell in self.restoring]

    @property
    def exit_code(self) -> int:
        """0 where a component is confirmed, else 1; where a stage could not be made, its error's own."""
        if self.stop is not None:
            return self.stop.exit_code
        return 0 if self.supported else 1

    @property
    def runs(self) -> dict[str, int]:
        """How many runs of the model each stage took: forwards of one prompt, a backward counting as two."""
        taken = {}
        if self.made is not None:
            taken["pairs"] = 2 * (self.made.n_given + sum(self.made.tried.values()))
        if self.localization is not None:
            taken["search"] = int(self.localization.spent["runs"])
        if self.claim is not None:
            taken["confirm"] = int(self.claim.record["n_runs"])
        return taken

    @property
    def outcome(self) -> str:
        """What came of it, in one line."""
        if self.stop is not None:
            return f"stopped at {self.stop.stage}: {self.stop.why}"
        if self.claim is None:
            return "not finished"
        if self.supported:
            return f"confirmed on pairs that the search never saw: {joined(self.supported)}"
        if self.claim.verdict == ABSENT:
            return f"not confirmed: on held-out pairs nothing is left beyond {self.claim.delta:g}"
        return "not confirmed: on held-out pairs the components that were found are inconclusive"

    @property
    def next_step(self) -> str:
        """What to do next, in one line."""
        if self.stop is None:
            if self.supported:
                return (
                    f"look at {self.supported[0]} first, since what lies behind a place may only pass on what comes "
                    "from there; when the model is mended, debug it on the same prompts: none should fail"
                )
            return self.claim.next_step if self.claim is not None else "run it to its end"
        if self.stop.stage == "pairs" and self.asked["against"] is None:
            return (
                f"{self.stop.fix}; or, where all prompts of this kind fail, compare with a checkpoint that "
                "worked: against= (at a terminal --against)"
            )
        return self.stop.fix

    def with_more(self, **more: Any) -> "Debugging":
        """Return it with what a further stage found."""
        return replace(self, **more)

    def plot(self) -> Picture:
        """Draw the search, from sublayers down; ``claim.plot()`` draws what was confirmed.

        Raises:
            ResultsNotFound: There was no search.
        """
        if self.localization is None:
            raise ResultsNotFound("there was no search to draw", facts=[("outcome", self.outcome)], fix="print(found)")
        return self.localization.plot()

    def save(self, folder: str | Path) -> Path:
        """Write all that there is into a folder.

        ``REPORT.md`` is for people; ``debugging.json`` for programs; ``pairs.jsonl`` is read by ``load_pairs``,
        ``dropped.jsonl`` holds what was not kept; ``localization.npz`` and ``claim.json`` are read by
        ``Localization.load`` and ``Claim.load``; pictures of both stand beside them.

        Args:
            folder: The folder; made where missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.made is not None:
            self.made.save(folder / "pairs.jsonl")
            lines = [json.dumps(to_plain(one), ensure_ascii=False) + "\n" for one in self.made.dropped]
            _write(folder / "dropped.jsonl", "".join(lines))
        if self.localization is not None:
            self.localization.save(folder / "localization.npz")
            self.localization.plot().save(folder / "localization.svg")
        if self.claim is not None:
            self.claim.save(folder / "claim.json")
            self.claim.plot().save(folder / "claim.svg")
        _write(folder / "debugging.json", json.dumps(self.to_plain(), indent=1, ensure_ascii=False) + "\n")
        _write(folder / "REPORT.md", self.report())
        return folder

    def to_plain(self) -> dict[str, Any]:
        """Return what came of it as plain data: what was asked, counts, names, seconds, runs, and what to do next."""
        made = self.made
        pairs = None
        if made is not None:
            counts = {"given": made.n_given, "failing": len(made.failing), "tried": made.tried, "kept": len(made.pairs)}
            pairs = {**counts, "components": made.n_components, "alone": made.alone, "dropped": made.reasons}
        sides = {"discovery": self.discovery, "held_out": self.held_out}
        stop = None if self.stop is None else {**vars(self.stop), "facts": {n: str(v) for n, v in self.stop.facts}}
        plain: dict[str, Any] = to_plain(
            {
                "asked": self.asked,
                "outcome": self.outcome,
                "exit_code": self.exit_code,
                "supported": self.supported,
                "pairs": pairs,
                "split": {name: None if side is None else list(side.ids) for name, side in sides.items()},
                "found": [] if self.localization is None else self.localization.summary().to_dict("records"),
                "verdict": None if self.claim is None else self.claim.verdict,
                "stop": stop,
                "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
                "runs": self.runs,
                "next": self.next_step,
            }
        )
        return plain

    def report(self) -> str:
        """Return the report: each stage in its own words."""
        name = self.made.pairs.name if self.made is not None else self.asked["failures"]
        lines = [f"# Debugging '{self.asked['model']}' on '{name}'", "", f"**{self.outcome}**", ""]
        lines += [f"Next: {self.next_step}", ""]
        settings = ", ".join(f"{key} {value}" for key, value in self.asked.items() if value is not None)
        lines += [f"Asked: {settings}.", ""]
        parts = [
            ("Pairs", self.made),
            ("Split", self._split_words),
            ("Search", self.localization),
            ("Claim", self.claim),
            ("Stopped", self.stop),
            ("Time and runs", self._cost_words),
        ]
        for title, part in parts:
            if part:
                lines += [f"## {title}", "", *_quoted(str(part)), ""]
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [self.outcome]
        if self.made is not None:
            made, kept = self.made, Counter(str(pair.extra["way"]) for pair in self.made.pairs)
            ways = ", ".join(f"{way} {n}" for way, n in kept.items())
            n_failing, n_alone = len(made.failing), len(made.alone)
            told = f"{made.n_given} prompts, {n_failing} fail, {n_failing - n_alone} have a partner"
            lines.append(f"pairs    {told}; {counted(len(made.pairs), 'pair')} ({ways})")
            lines += reasons_as_lines(made.reasons)
        if self._split_words:
            lines.append(f"split    {self._split_words}")
        if self.localization is not None:
            cells = self.restoring
            told = ", ".join(f"{cell.name} {cell.effect:+.3f}" for cell in cells[:_SHOWN])
            more = f" and {len(cells) - _SHOWN} more" if len(cells) > _SHOWN else ""
            lines.append(f"search   {told or 'nothing restores more than delta'}{more} (exploratory)")
        if self.claim is not None:
            lines += ["confirm  " + self.claim.statement.replace("\n", "\n         ")]
        if self.stop is not None:
            lines += str(self.stop).splitlines()[1:]
        lines += [f"took     {self._cost_words}" if self.seconds else "", f"next: {self.next_step}"]
        return "\n".join(filter(None, lines))

    @property
    def _split_words(self) -> str:
        if self.discovery is None:
            return ""
        sides = [("to search on", self.discovery), ("held out", self.held_out)]
        told = [
            f"{counted(len(side), 'pair')} ({counted(len(set(side.components.tolist())), 'component')}) {what}"
            for what, side in sides
            if side is not None
        ]
        return ", ".join(told) + ("" if self.held_out is not None else ", none held out")

    @property
    def _cost_words(self) -> str:
        runs = self.runs
        told = [
            f"{name} {self.seconds[name]:.1f} s" + (f", {runs[name]:,} runs" if name in runs else "")
            for name in STAGES
            if name in self.seconds
        ]
        return f"{sum(self.seconds.values()):.1f} s and {sum(runs.values()):,} runs: {'; '.join(told)}"


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _quoted(text: str) -> list[str]:
    return ["```", *text.splitlines(), "```"]
