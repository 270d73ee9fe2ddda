"""An engine that is wrong is not trusted."""

from dataclasses import replace

import numpy as np

import causalpatch as cp
from causalpatch.engine import reference, restart, wavefront
from causalpatch.engine.selfcheck import why_drifts
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import tiny_model


def job_of(family: str = "gemma2"):
    model = cp.open_model(tiny_model(family, layers=3))
    pairs = Pairs([Pair(np.arange(3, 3 + n), np.arange(4, 4 + n), ((5,),), ((6,),)) for n in (5, 9)])
    return cp.Experiment(model, pairs, show_progress=False)._job([])


def test_engines_that_are_right_pass():
    job = job_of()
    for module in (wavefront, restart):
        assert why_drifts(module.__name__, module.measure, job) is None


def test_an_engine_that_is_off_by_a_little_somewhere_is_refused_and_the_run_is_named():
    def off(job, gauge, means, cost):
        for block in reference.measure_rows(job, gauge, means, cost):
            is_here = block.interventions == 2
            yield replace(block, values=np.where(is_here, block.values + 1e-6, block.values))

    assert "a check run (resid_pre.0) is off by" in why_drifts("off", off, job_of())


def test_an_engine_whose_untouched_run_is_off_is_refused():
    def off(job, gauge, means, cost):
        for block in reference.measure_rows(job, gauge, means, cost):
            yield replace(block, values=block.values * (1 + 1e-6)) if block.interventions[0] < 0 else block

    assert "the untouched run" in why_drifts("untouched", off, job_of())


def test_a_check_is_made_once_for_a_model():
    job, calls = job_of(), []

    def counted(*given):
        calls.append(1)
        return reference.measure_rows(*given)

    assert why_drifts("counted", counted, job) is None
    assert why_drifts("counted", counted, job) is None
    assert len(calls) == 1
