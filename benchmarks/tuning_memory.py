"""What training 1 % of the weights of the GPT-2-small shape takes, and what training all of them does.

========  =============================================================================================================
row       trains
========  =============================================================================================================
located   slices of six heads, with ``train`` as ``tune`` calls it: target and retain prompts, looks at validation
full      every weight with the same ``train``, as the arm of a comparison does: beside a second set of weights
by hand   every weight where it stands, in a loop written here, without a retain set: the least that it can take
========  =============================================================================================================
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import causalpatch as cp
from benchmarks.machine import MIB
from benchmarks.shapes import SHAPES, build
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import Site
from causalpatch.tuning.data import Side, TuningData
from causalpatch.tuning.parts import parts_of
from causalpatch.tuning.train import train
from causalpatch.tuning.ways import Slices, Way
from causalpatch.tuning.whole import Full

WHICH: Final = ("located", "full", "by hand")
STEPS: Final = 6
_ROWS, _LENGTH = 2, 32  # prompts of either sort in a step, and their tokens


def train_once(which: str) -> dict[str, float]:
    """Train for a few steps; return the peak of memory, and seconds a step.

    Args:
        which: One of ``WHICH``.
    """
    torch.set_num_threads(1)
    libraries = _held("VmRSS")
    model = cp.Model(build(SHAPES["gpt2"]), name="gpt2-shape")
    n_all = sum(each.numel() for each in model.module.parameters())
    if which == "by hand":
        n_trained, seconds = n_all, _by_hand(model)
    else:
        sites = [Site("z", layer, 3) for layer in range(0, 12, 2)]
        way: Way = Slices(model, parts_of(sites, model)) if which == "located" else Full(model)
        n_trained, seconds = way.n_trained, _with_train(way, _data())
    weights = sum(each.numel() * each.element_size() for each in model.module.parameters()) / MIB
    return {
        "share": n_trained / n_all,
        "peak": _held("VmHWM") - libraries,
        "weights": weights,
        "seconds": float(np.median(seconds)),
    }


def _data() -> TuningData:
    """Return random prompts: of each side as many as a step takes, so that every step takes as long."""
    draw = np.random.default_rng(0)

    def pairs(name: str, **answers: Any) -> Pairs:
        rows = draw.integers(1, 50_000, (_ROWS, _LENGTH))
        return Pairs([Pair(row, row, id=f"{name}{k}", **answers) for k, row in enumerate(rows)], name=name)

    sides: tuple[Side, ...] = ("train", "validation")
    target = {side: pairs(f"target/{side}", answer=((7,),), wrong_answer=((8,),)) for side in sides}
    return TuningData(target, {side: pairs(f"retain/{side}") for side in sides})


def _with_train(way: Way, data: TuningData) -> list[float]:
    """Train, and return the seconds of each step but the first, in which memory is laid out."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    schedule = cp.Schedule(steps=STEPS, batch=_ROWS, retain_batch=_ROWS, every=STEPS)
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    train(way, data, schedule, rate=1e-4, seed=0)
    hook.remove()
    return list(np.diff(ends))


def _by_hand(model: cp.Model) -> list[float]:
    """Train all weights on as many tokens, in place, and return the seconds of each step but the first."""
    module = model.module
    module.requires_grad_(requires_grad=True)
    ids = torch.randint(1, 50_000, (2 * _ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-5, fused=True)
    Path("/proc/self/clear_refs").write_text("5")
    ends = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        logits = module(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        ends.append(time.process_time())
    return list(np.diff(ends))


def _held(name: str) -> float:
    """Return the memory that this process holds (VmRSS), or the most that it has held (VmHWM), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def memory() -> dict[str, dict[str, float]]:
    """Train each way, in a process of its own."""
    found = {}
    for which in WHICH:
        code = f"import json; from benchmarks.tuning_memory import train_once; print(json.dumps(train_once({which!r})))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[which] = json.loads(done.stdout.splitlines()[-1])
        print(which, found[which], flush=True)
    return found
