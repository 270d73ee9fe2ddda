"""Studies of one kind of step each, killed (SIGKILL) in the middle, and what their next session measures again.

    python tests/killed_steps.py FOLDER KIND...

Each is run three times in a fork of this process, which has loaded everything beforehand: undisturbed; until about half
of its pieces are stored, when it kills itself; and again, to its end. Prints a JSON object: by kind how many pieces
(shards, or states of what is no shard) each session stored.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

import causalpatch as cp
from small_studies import study_of, the_run

SCORES = "{kind: attribute, name: scores, method: eap}"
STEPS = {
    "sweep": "{kind: sweep, site: z@-1}",
    "localize": "{kind: localize, budget: 600, units: heads, positions: all}",
    "nodes": "{kind: attribute, site: z, method: ig, steps: 3}",
    "edges": "{kind: attribute, method: eap-ig, steps: 3}",
    "acdc": "{kind: discover, method: acdc, threshold: 4.0}",
    "learn": "{kind: discover, method: hard-concrete, n_edges: 40, steps: 12}",
    "evaluate": f"{SCORES}, {{kind: evaluate, from: scores, n_random: 2}}",
    "confirm": "{kind: confirm, components: [z.3.2@-1, z.3.1@-1]}",
    "tune": "{kind: tune, components: [mlp_out.3], target: agreement, retain: induction, side: corrupt, steps: 5,"
    " rates: [0.03], arms: [random, prefix], n_seeds: 1}",
}
SIZES = {"sweep": 64, "localize": 64, "nodes": 24, "edges": 24, "acdc": 64, "learn": 36, "evaluate": 64, "confirm": 64}


def study(kind):
    """Return the study of a kind of step."""
    split = {
        "confirm": ("split={discovery: 0.5}", "pairs={name: ioi, first: 24}"),
        "acdc": ("pairs={name: ioi, first: 2}",),
    }.get(kind, ())
    return study_of(f"steps=[{STEPS[kind]}]", f"shards={{runs: {SIZES.get(kind, 64)}}}", *split)


def main(folder, kinds):
    torch.set_num_threads(1)
    cp.open_model("zoo:stories", device="cpu")  # loads what opening loads
    told = {}
    for kind in kinds:
        quiet, killed = folder / kind / "quiet", folder / kind / "killed"
        run(kind, quiet)
        (whole,) = stored(quiet)
        run(kind, killed, (whole + 1) // 2)
        run(kind, killed)
        told[kind] = {"whole": whole, "sessions": stored(killed)}
    sys.stdout.write(json.dumps(told))


def run(kind, folder, n_pieces=None):
    """Run a study in a fork, until so many pieces are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        left = [n_pieces]

        def kill(line):
            if line["event"] in ("shard", "kept") and n_pieces is not None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            cp.run_study(study(kind), folder, listeners=(kill,))
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != (0 if n_pieces is None else -signal.SIGKILL):
        raise SystemExit(f"a session of '{kind}' ended with {code}")


def stored(folder):
    """Return how many pieces each session stored."""
    run = the_run(folder)
    logs = [run.objects.get(run.name("logs", name)).decode() for name in run.objects.names(run.name("logs"))]
    return [sum('"event": "shard"' in line or '"event": "kept"' in line for line in text.splitlines()) for text in logs]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
