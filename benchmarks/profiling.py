"""Where the time of one workload goes, ours only: operators of torch, and functions of Python."""

import cProfile
import io
import pstats
import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cone import work_of
from benchmarks.machine import gemm_rate
from benchmarks.ours import Sweep
from benchmarks.shapes import build
from benchmarks.workloads import WORKLOADS

MATRIX = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


def show(name: str, *, is_tiny: bool, n_rows: int = 20) -> None:
    """Print operators and functions by the time that each takes itself."""
    workload = WORKLOADS[name]
    task = workload.task(is_tiny=is_tiny)
    sweep = Sweep(workload, task, build(workload.sizes(is_tiny=is_tiny)))
    sweep.run()
    rate, started = gemm_rate(), time.perf_counter()
    sweep.run()
    seconds = time.perf_counter() - started
    floor = work_of(task).flops / rate / 1e9
    print(f"{workload.title}: {seconds:.3f} s; the cone's arithmetic at {rate:.0f} GFLOP/s {floor:.3f} s")

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        sweep.run()
        seconds = time.perf_counter() - started
    table = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in table) / 1e6
    matrix = sum(event.self_cpu_time_total for event in table if event.key in MATRIX) / 1e6
    print(f"\noperators take {total:.3f} s of {seconds:.3f} s, profiled; Python {seconds - total:.3f} s")
    print(f"of operators, matrix products and attention {matrix:.3f} s, all others {total - matrix:.3f} s")
    for event in table[:n_rows]:
        print(f"{event.self_cpu_time_total / 1e6:9.3f} s  {event.count:8,} calls  {event.key}")

    profiler = cProfile.Profile()
    with torch.no_grad():
        profiler.runcall(sweep.run)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(n_rows)
    print("\nfunctions, with the profiler's own cost")
    print("\n".join(line for line in text.getvalue().splitlines() if line.strip()))
