"""Located parts tuned against all else, on planted faults and on children's stories: ``python -m benchmarks.tuning``.

``tuning_faults`` tunes the faults, ``tuning_stories`` the pronoun of stories260k, ``tuning_memory`` the GPT-2-small
shape. What was measured is kept in ``tuning.json``: faults that stand there, made by the same rules, are not made anew.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.tuning_faults import COMPARISON, tuned
from benchmarks.tuning_memory import memory
from benchmarks.tuning_page import page
from benchmarks.tuning_stories import stories
from causalpatch.base.spec import finite, to_plain
from causalpatch.testing.faults import FAULTS, Fault

OUT: Final = Path(__file__).parent / "TUNING.md"


class Kept:
    """What was measured, on disk, and the page made of it.

    Args:
        page: The page; the numbers stand beside it in ``tuning.json``.
        command: What makes them now.
    """

    def __init__(self, page: Path, command: str) -> None:
        self.page, self.command = page, command
        self.numbers = page.with_name("tuning.json")

    def read(self) -> dict[str, Any]:
        """Return what was measured so far."""
        return dict(json.loads(self.numbers.read_text(encoding="utf-8"))) if self.numbers.exists() else {}

    def write(self, **more: Any) -> None:
        """Put parts in place of what was there, and make the page."""
        held = finite(to_plain({**self.read(), **more}))
        self.numbers.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        self.page.write_text(page(held, self.command), encoding="utf-8")

    def cases(self) -> list[dict[str, Any]]:
        """Return the faults that were made."""
        return list(self.read().get("cases", []))

    def add(self, case: Mapping[str, Any]) -> None:
        """Put a fault in its place."""
        order = [each.name for each in FAULTS]
        cases = [*(one for one in self.cases() if one["fault"] != case["fault"]), case]
        self.write(cases=sorted(cases, key=lambda one: order.index(one["fault"])))


def lacking(kept: Kept, only: str, *, again: bool) -> list[Fault]:
    """Return the faults that are to be made."""
    rules = json.loads(json.dumps(finite(to_plain(asdict(COMPARISON)))))
    made = {one["fault"] for one in kept.cases() if one["rules"] == rules}
    return [fault for fault in FAULTS if only in fault.name and (again or fault.name not in made)]


def made(faults: Sequence[Fault], jobs: int) -> Iterator[dict[str, Any]]:
    """Tune faults, in some processes of one thread each."""
    if jobs == 1:
        yield from (vars(tuned(fault)) for fault in faults)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(tuned, fault) for fault in faults]):
            yield vars(done.result())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="faults whose name holds this, such as trigger or ioi-head")
    parser.add_argument("--again", action="store_true", help="also those that were made")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--stories", action="store_true", help="stories260k alone")
    parser.add_argument("--memory", action="store_true", help="memory and time alone")
    parser.add_argument("--page", action="store_true", help="the page alone, of what was measured")
    parser.add_argument("--out", type=Path, default=OUT, help="page to write (default: %(default)s)")
    chosen: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = list(map(str, sys.argv[1:] if arguments is None else arguments))
    kept = Kept(chosen.out, " ".join(["python -m benchmarks.tuning", *words]))
    everything = not (chosen.stories or chosen.memory or chosen.page)
    if not any(chosen.only in fault.name for fault in FAULTS):
        parser.error(f"no fault is called like {chosen.only!r}")
    parts = {"memory": (chosen.memory, memory), "stories": (chosen.stories, stories)}
    for name, (is_asked, make) in parts.items():
        if is_asked or (everything and not chosen.only and (chosen.again or name not in kept.read())):
            kept.write(**{name: make()})
    if everything:
        for case in made(lacking(kept, chosen.only, again=chosen.again), chosen.jobs):
            kept.add(case)
            print(f"{case['fault']}: {case['seconds']:.0f} s", flush=True)
    kept.write()
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
