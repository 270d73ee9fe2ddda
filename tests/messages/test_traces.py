"""Refusals of windows, sets, traces and interventions on disk."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PairError, PatchError, ResultsNotFound, SettingError, StoreCorrupt
from worlds import unchecked


def test_a_span_to_trace_from_must_be_there(refuses, llama, uneven):
    with refuses(
        PairError,
        """
        pair 0 of 'uneven.jsonl' has no span 'subject' to trace from
          its spans  who
          clean      '<s>' 'Mary' ' met' ' John' ' again'
          fix: trace(experiment, span="who")
        """,
    ):
        cp.trace(cp.Experiment(llama, uneven))


def test_without_spans_a_trace_says_how_to_name_one(refuses, experiment):
    with refuses(
        PairError,
        """
        pair 0 of 'two.jsonl' has no span 'subject' to trace from
          its spans  none
          clean      '<s>' 'Mary' ' met' ' John'
          fix: name it in the column spans: {'subject': [1, 3]}
        """,
    ):
        cp.trace(experiment)


def test_a_protocol_that_is_not_known_is_answered_with_those_that_are(refuses, experiment):
    with (
        unchecked(),
        refuses(
            SettingError,
            """
        a trace cannot have by='gauss'
          known  noise, pairs
          fix: by="noise"
        """,
        ),
    ):
        cp.trace(experiment, by=["gauss"])


def test_a_metric_of_the_source_run_does_not_go_with_noise(refuses, llama, pairs):
    rows = [{"clean": [1, 2, 4], "corrupt": [1, 2, 5], "answer_id": 12, "spans": {"subject": [1, 2]}}]
    with refuses(
        SettingError,
        """
        a trace by noise has no source run, with which 'kl_divergence' compares
          by noise  clean states go into the noised clean prompt
          fix: by="pairs", or a metric of the answer, such as metric="probability"
        """,
    ):
        cp.trace(cp.Experiment(llama, cp.load_pairs(rows, llama), metric="kl_divergence"))


def test_a_window_slides_over_layers(refuses, experiment):
    with refuses(
        SettingError,
        """
        windows of 'embed' need the axis 'layer'
          axes  position
          fix: name a site of every layer, such as "mlp_out", and over="layer"
        """,
    ):
        cp.sweep(experiment, "embed", window=3)


def test_a_window_without_layers_holds_nothing(refuses, experiment):
    with refuses(
        SettingError,
        """
        a window of 0 layers holds nothing
          fix: give 1 or more, such as 10
        """,
    ):
        cp.sweep(experiment, "mlp_out", window=0)


def test_a_window_stands_around_a_layer_that_there_is(refuses, llama):
    with refuses(
        SettingError,
        """
        there is no window around layer 9 of 'mlp_out.*'
          layers  0 to 1
          fix: name one of these
        """,
    ):
        cp.window(llama, "mlp_out", 9, 3)


def test_everything_but_everything_is_nothing(refuses, llama):
    with refuses(
        SettingError,
        """
        everything but all 8 sites is nothing
          of  z
          fix: name fewer, or say of what: of=["z", "mlp_out"]
        """,
    ):
        cp.everything_but(llama, ["z"])


def test_a_complement_stands_at_one_position(refuses, llama):
    with refuses(
        SettingError,
        """
        the complement of sites at 2 positions is not one set
          positions  -1, 0
          fix: name sites at one position, or at none for all positions
        """,
    ):
        cp.everything_but(llama, ["z.0.1@-1", "z.0.2@0"])


def test_effects_of_one_draw_have_no_spread(refuses):
    effects = cp.Effects.build(
        axes={"layer": [0]},
        pair_ids=["a"],
        groups=np.zeros(1),
        metrics=["m"],
        values=np.ones((1, 1, 1)),
        status=np.zeros((1, 1)),
        baselines={"clean": np.ones((1, 1)), "corrupt": np.zeros((1, 1))},
    )
    with refuses(
        SettingError,
        """
        these effects are of one draw, or nothing was drawn
          axes  layer
          fix: measure several: sweep(…, value=Noise(), draws=5)
        """,
    ):
        effects.spread()


def test_a_function_is_not_saved(refuses, tmp_path):
    with refuses(
        PatchError,
        """
        function half cannot be saved
          why  it is code, not data
          fix: save the array that it computes: Constant(array), Steer(array) or ProjectOut(array)
        """,
    ):
        half = cp.Function(lambda current, source: current / 2, "half")
        cp.save_interventions(tmp_path / "set.json", [cp.Patch("z.0.1", half)])


def test_saved_interventions_must_be_there(refuses, tmp_path):
    with refuses(
        ResultsNotFound,
        """
        no saved interventions in 'TMP/set.json'
          fix: name the file that save_interventions wrote
        """,
    ):
        cp.load_interventions(tmp_path / "set.json")


def test_saved_interventions_must_be_as_they_were(refuses, tmp_path):
    path = cp.save_interventions(tmp_path / "set.json", [cp.Patch("z.0.1", cp.Steer(np.arange(8.0)))])
    path.with_suffix(".npz").unlink()
    with refuses(
        StoreCorrupt,
        """
        the interventions in 'TMP/set.json' cannot be read
          why  'set.npz' beside it cannot be read: FileNotFoundError
          fix: write them again: save_interventions
        """,
    ):
        cp.load_interventions(path)


@pytest.mark.parametrize("objective", ["top1", "rank"])
def test_constants_are_learnt_by_what_has_a_gradient(refuses, llama, pairs, objective):
    with refuses(
        SettingError,
        f"""
        constants cannot be learnt by '{objective}', which has no gradient
          fix: Optimal(objective="kl_from_base")
        """,
    ):
        experiment = cp.Experiment(llama, pairs, direction="noise", show_progress=False)
        experiment.run([cp.Patch("z.0.1", cp.Optimal(objective))])


def test_nothing_is_learnt_in_no_steps(refuses):
    with refuses(
        PatchError,
        """
        nothing is learnt in 0 steps of 0.1
          needed  one step or more, of more than 0
          fix: Optimal(steps=100, rate=0.1)
        """,
    ):
        cp.Optimal(steps=0)
