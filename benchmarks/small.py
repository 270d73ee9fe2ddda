"""A trained model of five layers and 64 columns: there the overhead of a sweep shows, not its arithmetic."""

import time
from typing import Any

import torch

import causalpatch as cp
from benchmarks.machine import ROOT
from causalpatch.pairs import Pairs
from causalpatch.results.status import Status

STORIES = ROOT.parent / "shared" / "models" / "stories260k"
SITES = ("resid_pre", "z", "mlp_out", "mlp_post@-1")
MOST = 3.0  # a sweep takes at most so many times what one forward over the same rows takes


def why_not() -> str | None:
    """Say why it cannot be measured here, if it cannot."""
    return None if STORIES.is_dir() else f"the folder with trained models is not there: {STORIES}"


def measure(repeats: int, *, is_tiny: bool) -> list[dict[str, Any]]:
    """Time sweeps and, in turn with them, one batched forward over as many rows: a record for each site."""
    model = cp.open_model(STORIES)
    pairs = _of_one_length(cp.load_pairs(STORIES / "pairs.jsonl", model).where(behaviour="name_copy"))
    experiment = cp.Experiment(model, pairs.take([0, 1]) if is_tiny else pairs, show_progress=False)
    return [_measure(experiment, site, repeats) for site in (SITES[:2] if is_tiny else SITES)]


def _measure(experiment: cp.Experiment, site: str, repeats: int) -> dict[str, Any]:
    status = cp.sweep(experiment, site).to_xarray()["status"].values
    n_run = int((status == Status.MEASURED).sum())
    pairs = experiment.pairs
    ids = torch.stack([torch.tensor(pair.corrupt) for pair in pairs])
    rows = ids.repeat(-(-n_run // len(ids)), 1)[:n_run]
    sweeps, forwards = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        cp.sweep(experiment, site)
        swept = time.perf_counter()
        with torch.inference_mode():
            experiment.model.module(rows, use_cache=False, logits_to_keep=1)
        sweeps.append(swept - started)
        forwards.append(time.perf_counter() - swept)
    return {
        "site": site,
        "cells": int(status[..., 0].size),
        "pairs": len(pairs),
        "tokens": int(ids.shape[1]),
        "rows": n_run,
        "sweep": sweeps,
        "forward": forwards,
    }


def _of_one_length(pairs: Pairs) -> Pairs:
    lengths = pairs.lengths("clean").tolist()
    usual = max(sorted(set(lengths)), key=lengths.count)
    return pairs.take([number for number, length in enumerate(lengths) if length == usual])
