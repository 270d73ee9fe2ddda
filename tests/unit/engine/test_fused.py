"""GELU by its tanh formula, and models that compute it so."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

import causalpatch as cp
from causalpatch.engine import fused as room
from causalpatch.engine.fused import BLOCK, fused, gelu_tanh
from causalpatch.testing.tiny import tiny_model


@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 30.0])
def test_it_is_as_exact_as_the_kernel(size, scale):
    x = scale * torch.randn(size, generator=torch.Generator().manual_seed(size))
    before, wanted = x.clone(), functional.gelu(x.double(), approximate="tanh")
    got = gelu_tanh(x)
    assert torch.equal(x, before)
    worst = (functional.gelu(x, approximate="tanh").double() - wanted).abs().amax() if size else 0.0
    assert ((got.double() - wanted).abs() <= 2 * worst + 1e-37).all()


def test_what_overflows_or_is_no_number_comes_out_as_of_the_kernel():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 0.0, -0.0, 1e-40])
    torch.testing.assert_close(gelu_tanh(x), functional.gelu(x, approximate="tanh"), equal_nan=True, atol=1e-37, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_shape_layout_and_dtype(dtype):
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    for each in (x, x.transpose(0, 2), x[:, ::2], x[0, 0, 0]):
        got = gelu_tanh(each)
        assert got.dtype == dtype
        assert got.shape == each.shape
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got, functional.gelu(each, approximate="tanh"), rtol=0, atol=4 * eps)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh"])
def test_both_spellings_of_the_library_are_replaced_and_put_back(name):
    model = cp.open_model(tiny_model("gpt2"))
    for part in model.module.modules():
        if hasattr(part, "act") and isinstance(part.act, nn.Module):
            part.act = ACT2FN[name]
    replaced = [part for part in model.module.modules() if type(part) is type(ACT2FN[name])]
    assert replaced
    with fused(model):
        assert all("forward" in vars(part) for part in replaced)
    assert not any("forward" in vars(part) for part in replaced)


def test_a_function_that_only_bears_the_name_is_left_alone(monkeypatch):
    class NewGELUActivation(nn.Module):
        def forward(self, x):
            return torch.relu(x)

    monkeypatch.setattr(room, "_ALIKE", type(room._ALIKE)())
    model = cp.open_model(tiny_model("gpt2"))
    for block in model.module.transformer.h:
        block.mlp.act = NewGELUActivation()
    with fused(model):
        assert not any("forward" in vars(block.mlp.act) for block in model.module.transformer.h)


@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK + 3])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 30.0])
def test_its_slope_is_as_exact_as_the_kernels(size, scale):
    draw = torch.Generator().manual_seed(size)
    x, g = scale * torch.randn(size, generator=draw), torch.randn(size, generator=draw)
    found = []
    for compute, dtype in ((gelu_tanh, torch.float32), (kernel, torch.float32), (kernel, torch.float64)):
        given = x.to(dtype).requires_grad_()
        found += torch.autograd.grad(compute(given), given, g.to(dtype))
    got, other, wanted = (each.double() for each in found)
    worst = (other - wanted).abs().amax() if size else 0.0
    assert ((got - wanted).abs() <= 2 * worst + 1e-6).all()


def kernel(x):
    return functional.gelu(x, approximate="tanh")


def test_a_backward_keeps_one_tensor():
    x, kept = torch.randn(50, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        gelu_tanh(x)
    assert [each.data_ptr() for each in kept] == [x.data_ptr()]


def test_a_function_with_a_slope_of_its_own_is_left_alone():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return kernel(x)

        @staticmethod
        def backward(ctx, g):
            return g

    class NewGELUActivation(nn.Module):
        def forward(self, x):
            return Straight.apply(x)

    model = cp.open_model(tiny_model("gpt2"))
    for layer in model.module.transformer.h:
        layer.mlp.act = NewGELUActivation()
    with fused(model):
        assert all("forward" not in vars(layer.mlp.act) for layer in model.module.transformer.h)
