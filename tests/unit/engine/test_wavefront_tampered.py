"""A model that changes between two runs: what was found out about it before no longer counts."""

import numpy as np
import pytest

import causalpatch as cp
from doctored import ODD, REFUSED, llama
from tiers import assert_agree, run_model, tier_of
from worlds import numbers, projection, random_pairs

PAIRS = random_pairs(11, 3, "equal", prefix=1 / 3)
SITES = ("z.0.3@-2", "z.2.1@-1", "k.1.0@0", "mlp_out.1@1", "mlp_post.0.5@-1")


@pytest.mark.parametrize("name", [*REFUSED, *ODD])
def test_a_model_that_is_tampered_with_between_two_runs_is_looked_at_again(name):
    module, pairs = llama(), PAIRS.take([0]) if name == "an MLP that counts tokens" else PAIRS
    model = cp.open_model(module)
    first = run_model("auto", model, pairs, SITES, metric=projection)
    assert tier_of(first) == "wavefront"
    (REFUSED | ODD)[name](module)
    again = run_model("auto", model, pairs, SITES, metric=projection)
    assert_agree(again, run_model("reference", model, pairs, SITES, metric=projection))
    assert name == "a loop of its own" or not np.allclose(numbers(again), numbers(first))
