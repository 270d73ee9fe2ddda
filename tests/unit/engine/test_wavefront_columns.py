"""Metrics that read a few columns of the vocabulary, on models of which no column may stand alone."""

import pytest

import causalpatch as cp
from doctored import ODD, REFUSED, doctored
from tiers import assert_agree, run_model, run_unless_refused
from worlds import random_pairs

PAIRS = random_pairs(11, 3, "equal").take([0])
SITES = ("z.1.1@-1", "k.0.0@1", "mlp_out.2@-1")


@pytest.mark.parametrize("metric", [cp.answer_logit, cp.logit_difference, cp.answer_logit.at(1)], ids=lambda m: m.name)
@pytest.mark.parametrize("name", [*ODD, *REFUSED])
def test_the_columns_of_the_answers_are_what_they_are_among_all_columns(name, metric):
    model = cp.open_model(doctored(name))
    wanted = run_model("reference", model, PAIRS, SITES, metric=metric)
    assert_agree(run_model("auto", model, PAIRS, SITES, metric=metric), wanted)
    for engine in ("wavefront", "restart"):
        got = run_unless_refused(engine, model, PAIRS, SITES, metric=metric)
        if got is not None:
            assert_agree(got, wanted)
