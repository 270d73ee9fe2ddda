"""Weights that are fetched layer by layer: breadth-first beside depth-first, which fetches them for every call.

    python -m benchmarks.streaming [--pairs N] [--tokens N] [--layers N] [--budget-gib X]

Writes ``STREAMING.md``. One sweep (resid_pre, all layers and positions) on GPT-2 small's shape with random weights,
each way in a process of its own: with all weights in memory; fetched from safetensors, as by
``open_model(…, weights="disk")``; and offloaded to disk by accelerate, whose hooks fetch the weights of a module
whenever it is called. Tensors that are read, and their bytes, are counted where they are read, and are exact. Seconds
are the process's own CPU time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from transformers import AutoModelForCausalLM

import causalpatch as cp
from benchmarks import machine
from benchmarks.shapes import SHAPES, build

OUT = Path(__file__).with_name("STREAMING.md")
WAYS = ("whole", "breadth-first", "depth-first")
_WORDS = {
    "whole": "all weights in memory",
    "breadth-first": '`weights="disk"`, breadth-first',
    "depth-first": "accelerate's disk offload, depth-first",
}


def measure(way: str, folder: Path, n_pairs: int, n_tokens: int, budget_gib: float) -> dict[str, Any]:
    """Sweep in one way, and count what that reads; proofs and checks are made before."""
    torch.set_num_threads(1)
    model, reads = _OPEN[way](folder)
    random = np.random.default_rng(0)
    clean, corrupt = random.integers(0, model.vocab_size, (2, n_pairs, n_tokens))
    rows = [cp.Pair(a, b, ((int(a[3]),),), ((int(b[3]),),)) for a, b in zip(clean, corrupt, strict=True)]
    pairs = cp.Pairs(rows, name="random")
    experiment = cp.Experiment(model, pairs, budget_gib=budget_gib, engine="wavefront", show_progress=False)
    experiment.run("resid_pre.0@0")
    reads.clear()
    started = time.process_time()
    effects = cp.sweep(experiment, "resid_pre")
    seconds = time.process_time() - started
    last = [n_bytes for name, n_bytes in reads if name.endswith(f"h.{model.shape.n_layers - 1}.mlp.c_proj.weight")]
    values = effects.to_xarray()["metric"].values
    return {
        "way": way,
        "seconds": seconds,
        "fetches": len(last),
        "gib": sum(n_bytes for _, n_bytes in reads) / 2**30,
        "passes": cp.plan_sweep(experiment, "resid_pre").wave.passes,
        "digest": float(np.nansum(np.abs(values))),
        "cells": effects.to_xarray()["status"].values.size,
    }


def _whole(folder: Path) -> tuple[cp.Model, list[tuple[str, int]]]:
    return cp.open_model(folder, device="cpu"), []


def _streamed(folder: Path) -> tuple[cp.Model, list[tuple[str, int]]]:
    model = cp.open_model(folder, device="cpu", weights="disk")
    reads: list[tuple[str, int]] = []
    store = model.weights.store
    read, rows = store.read, store.rows

    def noted(name: str, *given: int) -> torch.Tensor:
        tensor = rows(name, *given) if given else read(name)
        reads.append((name if not given else f"{name} rows", tensor.nbytes))
        return tensor

    store.read = store.rows = noted
    return model, reads


def _offloaded(folder: Path) -> tuple[cp.Model, list[tuple[str, int]]]:
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    places |= {"transformer.h": "disk"}
    reads: list[tuple[str, int]] = []
    get = OffloadedWeightsLoader.__getitem__

    def noted(loader: Any, name: str) -> torch.Tensor:
        tensor = get(loader, name)
        reads.append((name, tensor.nbytes))
        return tensor

    OffloadedWeightsLoader.__getitem__ = noted
    module = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=folder / "offloaded")
    return cp.open_model(module), reads


_OPEN = {"whole": _whole, "breadth-first": _streamed, "depth-first": _offloaded}


def report(found: Sequence[dict[str, Any]], arguments: argparse.Namespace, command: str) -> str:
    """Return the page of results."""
    where = machine.describe()
    lines = [
        "# Weights fetched layer by layer",
        "",
        f"Made by `{command}` on {', '.join(where.values())}; causalpatch {cp.__version__}, torch {torch.__version__}.",
        "",
        f"A sweep of resid_pre over all layers and positions, {arguments.pairs} pairs of {arguments.tokens} tokens: "
        f"{found[0]['cells']:,} cells and pairs. GPT-2 small's shape ({arguments.layers} layers of 27 MiB) with random "
        f"weights in float32, a budget of {arguments.budget_gib} GiB. Fetches of a layer and bytes are counted and "
        "exact; seconds are CPU time of one sweep.",
        "",
        "| weights | passes | fetches of each layer | GiB read | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        lines.append(
            f"| {_WORDS[one['way']]} | {one['passes']} | {one['fetches']} | {one['gib']:.2f} | {one['seconds']:.1f} |"
        )
    spread = max(one["digest"] for one in found) - min(one["digest"] for one in found)
    lines += [
        "",
        f"Sums of all absolute metrics differ by {spread / found[0]['digest']:.1e} of their size.",
        "",
        "Passes are those of the plan. Breadth-first a layer is fetched once per pass, once for the untouched runs "
        "and once for a plain forward that these are compared with. What accelerate reads around the layers stays in "
        "memory and is not counted; breadth-first reads the unembedding once per pass too.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each way in a process of its own, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--budget-gib", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.way:
        of = (arguments.folder, arguments.pairs, arguments.tokens, arguments.budget_gib)
        print(json.dumps(measure(arguments.way, *of)))
        return
    with tempfile.TemporaryDirectory() as folder:
        build(replace(SHAPES["gpt2"], layers=arguments.layers)).save_pretrained(folder)
        sizes = f"--pairs {arguments.pairs} --tokens {arguments.tokens} --budget-gib {arguments.budget_gib}".split()
        sizes += ["--folder", folder]
        found = []
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.streaming", "--way", way, *sizes]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    page = report(found, arguments, " ".join(["python -m benchmarks.streaming", *sys.argv[1:]]))
    arguments.out.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
