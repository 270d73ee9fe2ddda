"""A kernel that is switched for a while: for one thread, for models that share a configuration, and back again."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.models import attention
from causalpatch.models.attention import OURS, attending
from causalpatch.testing.tiny import tiny_model

IDS = torch.tensor([[3, 4, 5, 6]])


def nothing(module, query, key, value, mask, more):
    return torch.zeros_like(query).transpose(1, 2)


def logits(module, ids=IDS):
    with torch.no_grad():
        return module(ids).logits


def elsewhere(function):
    """Return what a function returns, or raises, in another thread."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function)
        return future.exception() or future.result()


@pytest.mark.parametrize(
    ("family", "kernel"),
    [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager"), ("gemma2", "eager")],
)
def test_calls_in_other_threads_get_the_kernel_from_before(family, kernel):
    module = tiny_model(family, layers=2)
    module.config._attn_implementation = kernel
    wanted = logits(module)
    with attending(module, nothing) as is_switched:
        assert is_switched
        assert module.config._attn_implementation == OURS
        assert not torch.allclose(logits(module), wanted)
        torch.testing.assert_close(elsewhere(lambda: logits(module)), wanted, rtol=0, atol=0)
    assert module.config._attn_implementation == kernel
    assert torch.equal(logits(module), wanted)


def test_the_last_of_two_models_with_one_configuration_puts_the_kernel_back():
    one = tiny_model("llama", layers=2)
    two = type(one)(one.config).double().eval()
    assert one.config is two.config
    first, second = attending(one, nothing), attending(two, nothing)
    with ThreadPoolExecutor(1) as here, ThreadPoolExecutor(1) as there:
        here.submit(first.__enter__).result()
        there.submit(second.__enter__).result()
        here.submit(first.__exit__, None, None, None).result()
        assert one.config._attn_implementation == OURS
        there.submit(second.__exit__, None, None, None).result()
    assert one.config._attn_implementation == "sdpa"


def test_configurations_within_others_keep_their_own_kernels():
    inner = SimpleNamespace(_attn_implementation="eager")
    outer = SimpleNamespace(_attn_implementation="sdpa", sub_configs={"inside": SimpleNamespace}, inside=inner)
    module = nn.Module()
    module.config = outer
    part = nn.Module()
    part.config = inner
    with attending(module, nothing):
        assert (outer._attn_implementation, inner._attn_implementation) == (OURS, OURS)
        with attending(part, nothing):
            pass
        assert (outer._attn_implementation, inner._attn_implementation) == (OURS, OURS)
    assert (outer._attn_implementation, inner._attn_implementation) == ("sdpa", "eager")


def test_our_kernel_by_name_alone_is_refused_also_while_the_model_runs():
    module = tiny_model("llama", layers=1)
    module.config = copy.deepcopy(module.config)
    for part in module.modules():
        if hasattr(part, "config"):
            part.config = module.config
    module.config._attn_implementation = OURS
    with pytest.raises(ModelUnsupported, match="ran outside of an engine"):
        logits(module)
    with attending(module, nothing):
        assert isinstance(elsewhere(lambda: logits(module)), ModelUnsupported)
    assert module.config._attn_implementation == OURS


def test_configurations_that_are_gone_are_forgotten():
    module = nn.Module()
    for kind in (SimpleNamespace, type("Followed", (SimpleNamespace,), {})):  # the first knows no weak references
        module.config = kind(_attn_implementation="sdpa")
        with attending(module, nothing):
            place = id(module.config)
            assert place in attention._SWITCHED
        assert module.config._attn_implementation == "sdpa"
        del module.config
        gc.collect()
        assert place not in attention._SWITCHED
