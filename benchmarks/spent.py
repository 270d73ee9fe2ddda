"""What a sweep of ours is spent on: one run under torch's profiler, its operators in groups.

The large matrix products are then made once more by themselves, in the same shapes, from warm memory: what of the
machine's rate is reached if all else took no time.
"""

import time
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ours import Sweep

PRODUCTS: Final = frozenset({"aten::addmm", "aten::mm", "mkldnn::_linear_pointwise"})
GROUPS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "products": PRODUCTS,
        "activation": frozenset({f"aten::{name}" for name in ("gelu", "silu", "tanh", "tanh_", "addcmul", "pow")}),
        "attention": frozenset(
            {
                *(f"aten::{name}" for name in ("bmm", "baddbmm", "_softmax", "masked_fill_")),
                "aten::_scaled_dot_product_flash_attention_for_cpu",
            }
        ),
        "copies": frozenset(
            {
                f"aten::{name}"
                for name in ("copy_", "index", "index_select", "_index_put_impl_", "cat", "index_add_", "fill_")
            }
        ),
        "norms and sums": frozenset(
            {f"aten::{name}" for name in ("native_layer_norm", "add", "add_", "mul", "mul_", "mean", "rsqrt", "sum")}
            | {f"aten::{name}" for name in ("addcmul_", "sub", "neg")}
        ),
    }
)
SOME = 3  # times that each shape of product is made by itself


def measure(sweep: Sweep) -> dict[str, Any]:
    """Profile one run: seconds by group, operations of the large products, and their seconds alone."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiled:
        started = time.perf_counter()
        sweep.run()
        seconds = time.perf_counter() - started
    table = profiled.key_averages(group_by_input_shape=True)
    found = dict.fromkeys((*GROUPS, "other operators"), 0.0)
    shapes: Counter[tuple[int, int, int]] = Counter()
    for event in table:
        group = next((name for name, keys in GROUPS.items() if event.key in keys), "other operators")
        found[group] += event.self_cpu_time_total / 1e6
        sizes = [size for size in event.input_shapes if len(size) == 2]
        if event.key in PRODUCTS and len(sizes) >= 2:
            (rows, inner), (_, outer) = sizes[-2:] if event.key != "mkldnn::_linear_pointwise" else sizes[:2]
            shapes[rows, inner, outer] += event.count
    return {
        "seconds": seconds,
        "groups": found | {"Python": max(0.0, seconds - sum(found.values()))},
        "gflop": sum(2e-9 * rows * inner * outer * count for (rows, inner, outer), count in shapes.items()),
        "alone": sum(_alone(*shape) * count for shape, count in shapes.items()),
    }


def _alone(rows: int, inner: int, outer: int) -> float:
    left, right, bias = torch.randn(rows, inner), torch.randn(inner, outer), torch.randn(outer)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(SOME):
            started = time.perf_counter()
            torch.addmm(bias, left, right)
            best = min(best, time.perf_counter() - started)
    return best
