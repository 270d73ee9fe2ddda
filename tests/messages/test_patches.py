"""Refusals of patches and interventions."""

import numpy as np

import causalpatch as cp
from causalpatch.base.errors import PairError, PatchError, SettingError


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
          known  source, identity, zero, mean, resample, noise, optimal, interpolate(0.5), a number,
                 Constant(array), Steer(array), ProjectOut(array), Subspace(basis),
                 From("resid_post.5@-1"), Function(…), Fitted(…), Given(…)
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


def test_an_interpolation_needs_a_finite_alpha(refuses):
    with refuses(
        PatchError,
        """
        the alpha of an interpolation is nan
          needed  a finite number
          fix: Interpolate(0.5)
        """,
    ):
        cp.Interpolate(float("nan"))


def test_noise_is_not_narrower_than_nothing(refuses):
    with refuses(
        PatchError,
        """
        the sigma of noise is -1
          needed  0 or more
          fix: leave it out to take 3 standard deviations of the data
        """,
    ):
        cp.Noise(-1.0)


def test_a_draw_is_counted_from_nought(refuses):
    with refuses(
        PatchError,
        """
        there is no draw -2
          draws  0, 1, 2, …
          fix: Resample(draw=0)
        """,
    ):
        cp.Resample(draw=-2)


def test_a_direction_must_point_somewhere(refuses):
    with refuses(
        PatchError,
        """
        a direction of length 0 points nowhere
          direction  shape (8,), all zero
          fix: give the direction itself, such as a difference of two means
        """,
    ):
        cp.ProjectOut(np.zeros(8))


def test_a_direction_has_the_shape_of_the_site(refuses, experiment):
    with refuses(
        PatchError,
        """
        the direction for 'z.0.1' does not fit
          direction  shape (5,)
          site       shape (8,) per token
          fix: give a direction over the site's value axes
        """,
    ):
        experiment.run([cp.Patch("z.0.1@-1", cp.ProjectOut(np.ones(5)))])


def test_a_single_number_has_no_direction(refuses, experiment):
    with refuses(
        PatchError,
        """
        the direction for 'mlp_post.0.3' does not fit
          direction  shape (1,)
          site       shape () per token
          fix: set a single number to zero instead
        """,
    ):
        experiment.run([cp.Patch("mlp_post.0.3@-1", cp.ProjectOut(np.ones(1)))])


def test_a_steering_vector_has_the_shape_of_the_site(refuses, experiment):
    with refuses(
        PatchError,
        """
        the steering vector for 'z.0.1' does not fit
          steering vector  shape (5,)
          site             shape (8,) per token
          fix: give a number, or an array over the site's value axes
        """,
    ):
        experiment.run([cp.Patch("z.0.1@-1", cp.Steer(np.zeros(5)))])


def test_one_pair_has_no_other_to_resample_from(refuses, llama, pairs):
    with refuses(
        PairError,
        """
        pair '0' of 'two.jsonl' has no other pair to resample from
          pairs   1
          needed  one with another prompt
          fix: give more pairs, or another value, such as "mean"
        """,
    ):
        experiment = cp.Experiment(llama, pairs.take([0]), show_progress=False)
        experiment.run([cp.Patch("z.0.1@-1", cp.Resample())])


def test_all_positions_are_not_resampled_from_a_prompt_of_another_length(refuses, experiment):
    with refuses(
        PairError,
        """
        pair 0 of 'two.jsonl' cannot be resampled at all positions: no other prompt is as long
          its prompt  4 tokens
          drawn       pair 1 of 5 tokens
          fix: name where, such as 'z.0.1@-1' or a span, or align the pairs: pairs.align("spans")
        """,
    ):
        experiment.run([cp.Patch("z.0.1", "resample")])


def test_a_mean_of_the_group_needs_groups(refuses, experiment):
    with refuses(
        PairError,
        """
        pair 0 of 'two.jsonl' has no group, so there is no mean of its group
          groups  none
          fix: fill the column group, or take the mean over all pairs: Mean()
        """,
    ):
        experiment.run([cp.Patch("z.0.1", cp.Mean(per_group=True))])


def test_a_fitted_value_has_the_shape_of_the_site(refuses, experiment):
    on = cp.FittedOn("others", "0" * 16, 3, "corrupt")
    with refuses(
        PatchError,
        """
        the optimal constant for 'z.0.1' does not fit
          fitted  shape (5,)
          site    shape (8,) per token
          fix: fit it on this site of this model
        """,
    ):
        experiment.run([cp.Patch("z.0.1@-1", cp.Fitted(np.zeros(5), "optimal constant", on))])


def test_a_fitted_value_says_at_which_token_it_is_missing(refuses, experiment):
    on = cp.FittedOn("others", "0" * 16, 3, "corrupt")
    with refuses(
        PatchError,
        """
        there is no mean of 'z.0.1' at token 3
          longest prompt  2 tokens where it was fitted
          fix: take one mean over all positions: Mean(over="positions")
        """,
    ):
        experiment.run([cp.Patch("z.0.1@3", cp.Fitted(np.zeros((2, 8)), "mean", on, by_position=True))])


def test_a_group_that_was_not_fitted_is_named(refuses, experiment):
    on = cp.FittedOn("others", "0" * 16, 3, "corrupt")
    with refuses(
        PairError,
        """
        there is no mean of 'z.0.1' for group None
          groups  easy, hard
          fix: fit it on pairs of the same groups, or leave out per_group
        """,
    ):
        experiment.run([cp.Patch("z.0.1@-1", cp.Fitted(np.zeros((2, 8)), "mean", on, groups=("easy", "hard")))])


def test_the_spelling_of_a_value_names_what_it_takes(refuses):
    with refuses(
        PatchError,
        """
        'noise(sigmas=3)' cannot be read as a value: 'noise' has no 'sigmas'
          noise  sigma, multiple, seed, draw, side
          fix: sigma=…
        """,
    ):
        cp.Patch("z.0.1", "noise(sigmas=3)")


def test_a_value_that_needs_an_argument_says_so(refuses):
    with refuses(
        PatchError,
        """
        'interpolate' says nothing of the value
          fix: write for example interpolate(0.5)
        """,
    ):
        cp.Patch("z.0.1", "interpolate")


def test_a_file_of_arrays_that_is_not_there_is_named(refuses):
    with refuses(
        PatchError,
        """
        'nowhere.npz' cannot be read as a file of arrays
          error  FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.npz'
          fix: write it with numpy.savez(path, name=array)
        """,
    ):
        cp.Patch("z.0.1", "steer(nowhere.npz:truth)")


def test_an_array_that_is_not_in_the_file_is_answered_with_those_that_are(refuses, tmp_path):
    np.savez(tmp_path / "vectors.npz", truth=np.ones(8))
    with refuses(
        PatchError,
        """
        'TMP/vectors.npz' holds no array 'lie'
          arrays  truth
          fix: TMP/vectors.npz:truth
        """,
    ):
        cp.Patch("z.0.1", f"steer({tmp_path}/vectors.npz:lie)")


def test_draws_are_of_values_that_are_drawn(refuses, experiment):
    with refuses(
        SettingError,
        """
        3 draws of the value zero cannot be made
          drawn   Noise(…), Resample(…)
          needed  one draw or more
          fix: sweep(…, value="noise", draws=5), or leave draws= out
        """,
    ):
        cp.sweep(experiment, "z", value="zero", draws=3)
