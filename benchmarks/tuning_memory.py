"""What training 1 % of the weights of the GPT-2-small shape takes, and what training all of them does."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import causalpatch as cp
from benchmarks.machine import MIB
from benchmarks.shapes import SHAPES, build
from causalpatch.sites import Site
from causalpatch.tuning.parts import parts_of
from causalpatch.tuning.ways import Slices


def train_once(which: str, rows: int = 2, length: int = 32, steps: int = 3) -> dict[str, float]:
    """Train for a few steps; return the peak of memory above what the model alone takes, and seconds a step.

    Args:
        which: ``located`` or ``full``.
        rows: Prompts in a step.
        length: Their tokens.
        steps: Steps after the first one.
    """
    libraries = _held("VmRSS")
    model = cp.Model(build(SHAPES["gpt2"]), name="gpt2-shape")
    module = model.module
    module.requires_grad_(requires_grad=which == "full")
    sites = [Site("z", layer, 3) for layer in range(0, 12, 2)]
    ids = torch.randint(0, 50_000, (rows, length), generator=torch.Generator().manual_seed(0))
    n_all = sum(each.numel() for each in module.parameters())
    if which == "located":
        way = Slices(model, parts_of(sites, model))
        held, n = list(way.trained().values()), way.n_trained
    else:
        way, held, n = None, list(module.parameters()), n_all
    optimizer = torch.optim.Adam(held, lr=1e-5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    seconds = []
    for _ in range(steps + 1):
        started = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        if way is None:
            logits = module(input_ids=ids, use_cache=False).logits
        else:
            with way.running() as running:
                logits = running(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        seconds.append(time.process_time() - started)
    weights = sum(each.numel() * each.element_size() for each in module.parameters()) / MIB
    return {
        "share": n / n_all,
        "peak": _held("VmHWM") - libraries,
        "weights": weights,
        "seconds": float(np.median(seconds[1:])),
    }


def _held(name: str) -> float:
    """Return the memory that this process holds (VmRSS), or the most that it has held (VmHWM), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def memory() -> dict[str, dict[str, float]]:
    """Train both ways, each in a process of its own."""
    found = {}
    for which in ("located", "full"):
        code = f"import json; from benchmarks.tuning_memory import train_once; print(json.dumps(train_once({which!r})))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[which] = json.loads(done.stdout.splitlines()[-1])
        print(which, found[which], flush=True)
    return found
