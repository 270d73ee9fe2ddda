"""Functions of one's own get many elements at once, and must treat each by itself."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PatchError
from causalpatch.engine.apart import depends_on_others
from tiers import TIERS, assert_agree, run_on, world_of
from worlds import numbers, random_pairs

ENGINES = ["reference", *TIERS, "auto"]
WORLD = world_of("llama", random_pairs(1))


def centred(current, source):
    return current - current.mean(0)


def turned(current, source):
    return current.flip(0)


def seeded(current, source):
    return current + torch.randn(current.shape, generator=torch.Generator().manual_seed(0)).to(current)


def noisy(current, source):
    return current + torch.randn_like(current)


def projected(current, source):
    return current @ torch.ones(current.shape[-1], current.shape[-1]).to(current) / 50 + 0.3 * source


def scaled(current, source):
    return current / current.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("function", [centred, turned, seeded])
@pytest.mark.parametrize("site", ["resid_pre.1", "z.0.1@1:3", "mlp_post.1.3"])
def test_a_function_that_mixes_tokens_is_an_error_in_every_engine(engine, function, site):
    patch = cp.Patch(site, cp.Function(function, needs_source=False))
    with pytest.raises(PatchError, match=f"function {function.__name__} for .* another value beside others than alone"):
        run_on(engine, WORLD, [[patch]])


@pytest.mark.parametrize("engine", ENGINES)
def test_where_a_run_holds_one_token_the_number_is_the_same_or_an_error(engine):
    asked = [[cp.Patch("resid_pre.1@1", cp.Function(centred, needs_source=False))]]
    try:
        got = run_on(engine, WORLD, asked)
    except PatchError:
        return
    assert_agree(got, run_on("reference", WORLD, asked))


@pytest.mark.parametrize("engine", ENGINES)
def test_functions_of_one_element_are_used_and_random_ones_let_pass(engine):
    asked = [[cp.Patch("resid_pre.1", cp.Function(one))] for one in (projected, scaled)]
    assert_agree(run_on(engine, WORLD, asked), run_on("reference", WORLD, asked))
    assert np.isfinite(numbers(run_on(engine, WORLD, [[cp.Patch("z.1.0", cp.Function(noisy))]]))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_mixing(dtype):
    draw = torch.Generator().manual_seed(1)
    current, weight = (torch.randn(shape, generator=draw).to(dtype) for shape in ((9, 300), (300, 300)))
    assert depends_on_others(lambda x, _: x @ weight, current, current) is False
    assert depends_on_others(lambda x, _: x - x.mean(0), current, current) is True
    assert depends_on_others(lambda x, _: x - x.mean(0), current[:1].expand(9, -1), current) is None
    assert depends_on_others(lambda x, _: x + torch.rand_like(x), current, current) is False
