"""Refusals of patches and interventions."""

import numpy as np

import causalpatch as cp
from causalpatch.base.errors import PatchError


def test_one_run_cannot_write_a_site_twice(refuses, experiment):
    with refuses(
        PatchError,
        """
        intervention 'z.0.1@-1 + z.0.*@-1 <- zero' writes 'z.0.1' twice
          patches  2
          fix: name every site once per intervention
        """,
    ):
        experiment.run([["z.0.1@-1", cp.Patch("z.0@-1", "zero")]])


def test_an_unknown_value_is_answered_with_those_known(refuses):
    with refuses(
        PatchError,
        """
        'zeros' is not a value to patch in
          known  source, identity, zero, mean, a number, Constant(array), Mean(…), Function(…)
          fix: write for example Patch("z.9.6", "zero")
        """,
    ):
        cp.Patch("z.0.1", "zeros")


def test_a_constant_of_another_shape_does_not_fit(refuses, experiment):
    with refuses(
        PatchError,
        """
        the constant for 'z.0.1' does not fit
          constant  shape (5,)
          site      shape (8,) per token
          fix: give a number, or an array over the site's value axes
        """,
    ):
        experiment.run([cp.Patch("z.0.1@-1", cp.Constant(np.zeros(5)))])


def test_a_constant_must_be_finite(refuses):
    with refuses(
        PatchError,
        """
        a constant patch holds NaN or infinity
          fix: give finite numbers
        """,
    ):
        cp.Constant(float("nan"))


def test_a_function_must_return_the_shape_it_was_given(refuses, llama, pairs):
    with refuses(
        PatchError,
        """
        function total for 'z.0.1' did not return the shape it was given
          given     shape (2, 8)
          returned  shape ()
          fix: return the new value of every element, such as current * 0.5
        """,
    ):
        total = cp.Function(lambda current, source: current.sum(), name="total")
        cp.Experiment(llama, pairs, max_rows=1).run([cp.Patch("z.0.1@-1", total)])


def test_nothing_to_run_is_refused(refuses, experiment):
    with refuses(
        PatchError,
        """
        there is nothing to run
          fix: name at least one site, such as 'resid_pre.0'
        """,
    ):
        experiment.run([])
