"""Whether delta linears pay on this machine: measured, since processors differ by a factor of ten here.

On a CPU with AVX-512 and its bfloat16 instructions but no tiles, at GPT-2 small's shapes and 512 to 2,048 rows, one map
takes, in float32's time: ``bf16`` 1.8 to 2.2, ``bf16x3`` 3.3, ``int8`` .45 to .6. A whole layer, attention and
activation included: 1.8, 3 and .6 to .75. There only ``int8`` pays. Tiles and tensor cores are what ``bf16`` is for.
"""

import time
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from causalpatch.engine.delta import DeltaLinears
from causalpatch.engine.products import Casts, Product, is_possible

_CANDIDATES: tuple[Product, ...] = ("bf16", "int8")


def gain(product: Product, *, rows: int = 1024, n_in: int = 768, n_out: int = 3072, device: str = "cpu") -> float:
    """Measure how many times as fast as in float32 one delta linear is on this machine; below 1 it does not pay.

    Args:
        product: How differences are multiplied by weights.
        rows: Patched rows.
        n_in: Width of the input.
        n_out: Width of the output.
        device: Where.

    Returns:
        The ratio of the shortest times of interleaved runs; 0 where the device cannot make the product.

    Cost:
        Twelve such maps, about 0.1 s on two cores.
    """
    if not is_possible(product, torch.device(device), n_in, n_out):
        return 0.0
    draw = torch.Generator(device).manual_seed(0)
    base, x = (torch.randn(n, n_in, device=device, generator=draw) for n in (64, rows))
    weight = nn.Parameter(torch.randn(n_out, n_in, device=device, generator=draw))
    index = torch.arange(rows, device=device) % len(base)
    delta = DeltaLinears(Casts(), product, min_weights=0)
    plain, replayed = [], []
    with torch.no_grad():
        with delta.record(len(base)):
            linear(base, weight)
        for _ in range(6):
            plain.append(_seconds(x, weight))
            with delta.replay(index):
                replayed.append(_seconds(x, weight))
    return min(plain) / min(replayed)


def fastest_product(device: torch.device, width: int) -> tuple[Product | None, Mapping[str, float]]:
    """Return the product that is fastest on a device, None where float32 is, and how many times as fast each is.

    Measured once per device, number of threads and width, and remembered.

    Args:
        device: Where the model is.
        width: Width of the model's stream.

    Cost:
        About 0.2 s on two cores, once.
    """
    return _fastest(str(device), torch.get_num_threads(), width)


@cache
def _fastest(device: str, n_threads: int, width: int) -> tuple[Product | None, Mapping[str, float]]:
    gains: dict[Product, float] = {
        product: round(gain(product, n_in=width, n_out=4 * width, device=device), 2) for product in _CANDIDATES
    }
    best = max(_CANDIDATES, key=lambda product: gains[product])
    return (best if gains[best] > 1 else None), MappingProxyType({name: rate for name, rate in gains.items() if rate})


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Return how long a linear map takes, the device's queue emptied before and after it."""
    _wait(x.device)
    start = time.perf_counter()
    linear(x, weight)
    _wait(x.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
