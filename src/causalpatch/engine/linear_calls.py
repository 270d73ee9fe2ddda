"""Linear calls as torch functions make them: which function was called with what, read without running it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from causalpatch.engine.products import stamp


@dataclass(frozen=True)
class Call:
    """One call of a linear map: ``scale * x @ weight.T + bias``, weight ``[n_in, n_out]`` where it is transposed."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    is_transposed: bool = False
    scale: float = 1.0
    bias_scale: float = 1.0

    @property
    def constants(self) -> tuple[object, ...]:
        """What must be the same at record and replay."""
        bias = None if self.bias is None else stamp(self.bias)
        return stamp(self.weight), bias, self.is_transposed, self.scale, self.bias_scale


def read_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Return the linear call that a torch function makes, or None where it is none of those that are seen."""
    reader = _READERS.get(func)
    if reader is None:
        return None
    try:
        return reader(*args, **kwargs)
    except TypeError:  # out=, or the order of arguments that addmm had once: rare, and right as they are
        return None


def _read_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call(input, weight, bias)


def _read_addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Call:
    return Call(mat1, mat2, input, is_transposed=True, scale=alpha, bias_scale=beta)


_READERS: Mapping[Callable[..., Any], Callable[..., Call]] = {
    linear: _read_linear,
    torch.addmm: _read_addmm,
    Tensor.addmm: _read_addmm,
}


def why_left(call: Call) -> str:
    """Say why a call is none of a plain float32 map, or return an empty text."""
    if type(call.weight) is not nn.Parameter or call.weight.layout is not torch.strided or call.weight.ndim != 2:
        return "weight is not a plain parameter"
    if call.weight.dtype != torch.float32 or call.weight.is_inference():
        return "weight is not float32"
    if call.bias is not None and (type(call.bias) is not nn.Parameter or call.bias.ndim != 1):
        return "bias is not a plain parameter"
    if not isinstance(call.x, Tensor) or type(call.x) not in (Tensor, nn.Parameter) or call.x.dtype != torch.float32:
        return "input is not float32"
    return ""
