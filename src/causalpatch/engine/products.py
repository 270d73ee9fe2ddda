"""Fast products ``difference @ weight.T`` in few bits, and the weights in their number formats.

========  ==============================================================  ===========================================
product   how                                                             error of each number at most
========  ==============================================================  ===========================================
bf16      both factors rounded to bfloat16                                (2^-7 + 2^-16) |d| |W|', and 2^-8 of the
                                                                          result where it comes in bfloat16 (CPU)
bf16x3    each factor in a high and a low part; high high + high low +    2^-14 |d| |W|'
          low high, summed in float32
int8      both factors in whole steps, 1/127 of the largest number of     half a step of each factor times the other,
          their row (one difference, one output); summed in whole numbers  and a quarter of both steps
========  ==============================================================  ===========================================

What they are worth was measured on effects of resid_pre in three trained models (``delta.py``). A CPU without tiles for
bfloat16 multiplies it at half the rate of float32, and bytes at three to four times that rate; with tiles, and on
tensor cores, bfloat16 is the better choice (``delta_gain.py`` measures it).

Nothing else is rounded beyond float32.
"""

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Product = Literal["bf16", "bf16x3", "int8"]
"""How differences are multiplied by weights."""

Parts = tuple[Shaped[Tensor, "..."], ...]
"""One factor of a product in its number format: its high and low part, or its whole steps and their size."""

CAST_BYTES: Mapping[Product, int] = MappingProxyType({"bf16": 2, "bf16x3": 4, "int8": 1})
"""Bytes of a weight in the number format of a product; the size of steps, one per output, is not counted."""

# The first version whose products of bfloat16 can return float32; below it they are rounded to bfloat16 again.
_WIDE_SINCE = (2, 8)


def prepare(factor: Float[Tensor, "row n_in"], product: Product) -> Parts:
    """Return one factor, a difference or a weight ``[n_out, n_in]``, in the number format of a product."""
    if product == "bf16":
        return (factor.bfloat16(),)
    if product == "bf16x3":
        high = factor.bfloat16()
        return high, (factor - high).bfloat16()
    # A row of nothing but zeros has steps of size 1: its quotients are 0, not NaN.
    largest = factor.abs().amax(1, keepdim=True)
    step = (largest / 127).where(largest > 0, 1.0)
    return (factor / step).round_().to(torch.int8), step


def add_product(
    y: Float[Tensor, "row n_out"], difference: Parts, weight: Parts, product: Product, scale: float = 1.0
) -> None:
    """Add ``scale * difference @ weight.T`` to y in place."""
    if product == "bf16":
        y.add_(_narrow(difference[0], weight[0]), alpha=scale)
    elif product == "bf16x3":
        (high, low), (weight_high, weight_low) = difference, weight
        total = _wide(high, weight_low)
        total += _wide(low, weight_high)
        total += _wide(high, weight_high)
        y.add_(total, alpha=scale)
    else:
        (steps, size), (weight_steps, weight_size) = difference, weight
        total = torch._int_mm(steps, weight_steps.t()).to(y.dtype)
        total *= weight_size.t()
        y.addcmul_(total, size, value=scale)


@cache
def is_possible(product: Product, device: torch.device, n_in: int, n_out: int) -> bool:
    """Say whether a device can make a product of such a shape, and gets it right."""
    if product != "int8":
        return True
    # Accelerators multiply bfloat16 fast enough, and their products of bytes want other shapes.
    if device.type != "cpu":
        return False
    # Processors without the right instructions saturate sums of two products of bytes, so the largest are tried; torch
    # 2.13 leaves products over an axis of 1 unwritten.
    steps = torch.full((32, n_in), 127, dtype=torch.int8)
    signs = torch.where(torch.arange(n_out) % 2 == 0, 127, -127).to(torch.int8)
    try:
        found = torch._int_mm(steps, signs[:, None].expand(n_out, n_in).contiguous().t())
    except RuntimeError:
        return False
    return bool((found == 127 * n_in * signs.to(torch.int32)).all())


@dataclass(frozen=True)
class _Cast:
    """A weight in another number format, and what it was made from."""

    weight: weakref.ref[Tensor]
    stamp: tuple[int, int]
    parts: Parts


class Casts:
    """Weights in the number formats of products, each made once and dropped with its weight.

    Keep one for the length of a sweep: it holds half as much memory as the weights of the layers for ``bf16``, as much
    again for ``bf16x3`` and a quarter for ``int8``. Threads may share it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool, Product], _Cast] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._made)

    def of(self, weight: Tensor, product: Product, *, is_transposed: bool = False) -> Parts:
        """Return a weight in the format of a product.

        Args:
            weight: The weight, ``[n_out, n_in]``.
            product: Which product.
            is_transposed: The weight is ``[n_in, n_out]``, as in GPT-2.
        """
        key = (id(weight), is_transposed, product)
        with self._lock:
            known = self._made.get(key)
            if known is not None and known.weight() is weight and known.stamp == stamp(weight):
                return known.parts
            made = self._made

            def forget(reference: weakref.ref[Tensor]) -> None:
                # Another tensor may live under the same id by now.
                if key in made and made[key].weight is reference:
                    del made[key]

            rows = weight.detach().t().contiguous() if is_transposed else weight.detach()
            made[key] = _Cast(weakref.ref(weight, forget), stamp(weight), prepare(rows, product))
            return made[key].parts


def stamp(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when a tensor's memory or, by an operation that autograd sees, its numbers change."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _narrow(left: Tensor, right: Tensor) -> Tensor:
    """Multiply bfloat16 matrices on the device's units for them, in float32 where it can return that."""
    if left.is_cuda and _returns_float32():
        return torch.mm(left, right.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(left, right)


def _wide(left: Tensor, right: Tensor) -> Tensor:
    """Multiply bfloat16 matrices to float32; where a device cannot, by its float32 units, which gives the same."""
    if left.is_cuda and _returns_float32():
        return torch.mm(left, right.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(left.float(), right.float())


@cache
def _returns_float32() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= _WIDE_SINCE
