"""The prototypes of the design, run as they are where they lie beside the project, and skipped elsewhere.

Peers' own seconds were measured once, in the same runs as a prototype of ours. So a prototype that runs today, in turn
with what is measured, says how fast the machine is at just this work: peers are scaled by its seconds now over its
seconds then. Each prototype runs in a process of its own and tells its seconds itself, as it did then.
"""

import re
import subprocess
import sys
from typing import Final

from benchmarks.machine import ROOT

FOLDER: Final = ROOT.parent / "shared" / "prototypes"
SCORES: Final = "eap_analytic.py"
EDGES: Final = "edge_exact.py"
# Seconds that they took when peers were timed: EAP and EAP-IG in 5 steps of 8 pairs x 16 tokens; one edge of 4 x 16.
THEN: Final = {"eap": 0.44, "eap-ig": 1.60, "edge": 0.011}
_SAID: Final = {"EAP": "eap", "EAP-IG": "eap-ig"}
LONGEST_S: Final = 300


def why_not(name: str, *, is_tiny: bool) -> str | None:
    """Say why a prototype cannot be run, or None."""
    if is_tiny:
        return "the prototype has one size, that of GPT-2 small"
    return None if (FOLDER / name).is_file() else f"there is no {name} in {FOLDER}"


def scores(n_pairs: int, n_tokens: int, steps: int) -> dict[str, float]:
    """Run the prototype of scores of edges, and return the least seconds of each kind."""
    return said_of_scores(_run(SCORES, str(n_pairs), str(n_tokens), str(steps)))


def one_edge() -> float:
    """Run the prototype of single edges, and return the seconds of one edge, as they follow for all of them."""
    return said_of_edges(_run(EDGES))


def said_of_scores(said: str) -> dict[str, float]:
    """Read the least seconds of each kind of score from what the prototype prints."""
    found: dict[str, list[float]] = {}
    for kind, seconds in re.findall(r"^(EAP(?:-IG)?) \(.*\) ([\d.]+) s$", said, re.MULTILINE):
        found.setdefault(_SAID[kind], []).append(float(seconds))
    return {name: min(each) for name, each in found.items()}


def said_of_edges(said: str) -> float:
    """Read the seconds of one edge from what the prototype prints: all of them over their number."""
    number, seconds = re.findall(r"all (\d+) qkv edges extrapolated (\d+)s", said)[-1]
    return int(seconds) / int(number)


def _run(name: str, *words: str) -> str:
    command = [sys.executable, "-B", name, *words]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True, timeout=LONGEST_S)
    return done.stdout
