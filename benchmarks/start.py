"""How long it takes to begin: each time in a new process, the smallest of several."""

import subprocess
import sys
import time
from typing import Any

from benchmarks.machine import ROOT

MOST = 2.0  # seconds until the library stands ready, torch being loaded
READY = "causalpatch's first page, torch loaded"
READY_BESIDE = "causalpatch's first page, torch and transformers' models loaded"
OPENED = "the same, and a model opened, pairs made"

_PAGE = """
import time
{loaded}
started = time.perf_counter()
import causalpatch as cp
cp.open_model, cp.load_pairs, cp.Experiment, cp.sweep, cp.logit_difference
ready = time.perf_counter()
model = cp.open_model("zoo:stories")
experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
print(ready - started, time.perf_counter() - started)
"""
_TORCH = "import torch"
_BOTH = "import torch; from transformers import AutoModelForCausalLM, PreTrainedModel"
_OUTSIDE = {
    "python alone": "pass",
    "import causalpatch": "import causalpatch",
    "causalpatch --help": "from causalpatch.cli.main import main; main(['--help'])",
    "import torch": _TORCH,
    "import torch, transformers' models": _BOTH,
}


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return records of what was started and the seconds of each repeat."""
    found = []
    for name, program in _OUTSIDE.items():
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            _run(program)
            times.append(time.perf_counter() - started)
        found.append({"what": name, "seconds": times})
    for loaded, names in ((_TORCH, (READY, OPENED)), (_BOTH, (READY_BESIDE,))):
        inside = [_run(_PAGE.format(loaded=loaded)).split()[-2:] for _ in range(repeats)]
        for name, column in zip(names, zip(*inside, strict=True), strict=False):
            found.append({"what": name, "seconds": [float(number) for number in column]})
    return found


def _run(program: str) -> str:
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return done.stdout
