"""Runs of the small study that are killed at random moments, in a process that has loaded everything beforehand.

    python tests/killed_studies.py FOLDER N_KILLS SEED [KIND]   # -1 kills: two runs on one store at once instead

Each run is a fork of this process, so that it begins at once; it is killed (SIGKILL) after a random time, and begun
again. A study that has come to its end is left as it is, and another one is begun, until there were so many kills.
Prints a JSON object: the kills, the folders that were finished, and the shards measured in each.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import causalpatch as cp
from causalpatch.studies.journal import Journal
from small_studies import study_of, the_run

LONGEST = 1.2  # before a run is killed, times what an undisturbed one takes on this machine just now
KINDS = {
    "heads": ("shards.pairs=1",),
    "circuit": (
        "steps=[{kind: attribute, name: scores, method: eap}, {kind: discover, method: acdc, threshold: 4.0},"
        " {kind: evaluate, from: scores, n_random: 1}]",
        "shards={runs: 60}",
        "pairs={name: ioi, first: 2}",
    ),
}


def main(folder, n_kills, seed, kind="heads"):
    changes = KINDS[kind]
    torch.set_num_threads(1)
    cp.open_model("zoo:stories", device="cpu")  # loads what opening loads
    assert Journal
    if n_kills < 0:
        children = [begin(folder, changes) for _ in range(2)]
        if any(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children):
            raise SystemExit("a run ended with an error")
        sys.stdout.write(json.dumps({"measured": [n_measured(folder)]}))
        return
    draw, kills, finished = random.Random(seed), 0, [folder / "0"]
    started = time.monotonic()
    if not is_finished_before_it_is_killed(finished[0], changes, 3600.0):
        raise SystemExit("an undisturbed run does not end")
    longest = LONGEST * (time.monotonic() - started)
    while kills < n_kills:
        place = folder / str(len(finished))
        if is_finished_before_it_is_killed(place, changes, draw.uniform(0.02, longest)):
            finished.append(place)
        else:
            kills += 1
    while not is_finished_before_it_is_killed(place := folder / str(len(finished)), changes, 3600.0):
        continue
    finished.append(place)
    sys.stdout.write(json.dumps({"kills": kills, "measured": [n_measured(place) for place in finished]}))


def begin(folder, changes):
    """Begin a run, and return its process."""
    child = os.fork()
    if child == 0:
        try:
            cp.run_study(study_of(*changes), folder)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(3)
    return child


def is_finished_before_it_is_killed(folder, changes, seconds):
    folder.mkdir(exist_ok=True)
    child = begin(folder, changes)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit("a run ended with an error")
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def n_measured(folder):
    """Return how many shards all sessions of a study measured, those among them that were lost."""
    run = the_run(folder)
    text = "".join(
        (run.objects.get(run.name("logs", name)) or b"").decode() for name in run.objects.names(run.name("logs"))
    )
    return sum('"event": "shard"' in line and '"this run"' in line for line in text.splitlines())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
