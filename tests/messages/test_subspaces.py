"""Refusals of subspaces, and the warning of the illusion."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import (
    AnswerError,
    IllusionWarning,
    MemoryExhausted,
    NotFinite,
    PairError,
    PatchError,
    ResultsNotFound,
    SettingError,
    StoreCorrupt,
)
from planted import SITE, Planted, hidden_experiment, planted_pairs

LEARNING, HELD_OUT = planted_pairs(40, 0, name="some"), planted_pairs(20, 1, name="others")
SHORT = {"search": cp.RotationSearch(epochs=1), "controls": cp.SubspaceControls(0, is_shuffled=False)}


@pytest.fixture
def planted():
    return cp.Experiment(cp.open_model(Planted()), LEARNING, "answer_logit", show_progress=False)


def test_directions_that_are_not_independent_span_less(refuses):
    with refuses(
        PatchError,
        """
        3 directions span 2 dimensions
          basis   3 directions of 4 numbers
          needed  independent directions
          fix: leave out those that the others give, or take fewer: numpy.linalg.svd(basis)[2][:rank]
        """,
    ):
        cp.Subspace(np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [2, 3, 0, 0]]))


def test_no_direction_spans_nothing(refuses):
    with refuses(
        PatchError,
        """
        a direction of length 0 spans no subspace
          basis   1 directions of 4 numbers
          needed  independent directions
          fix: leave out those that the others give, or take fewer: numpy.linalg.svd(basis)[2][:rank]
        """,
    ):
        cp.Subspace(np.zeros(4))
    with refuses(
        PatchError,
        """
        a subspace needs a basis
          basis   shape (0, 4)
          needed  (dimension, the site's value axes)
          fix: Subspace(direction), or Subspace(numpy.stack([one, other]))
        """,
    ):
        cp.Subspace(np.zeros((0, 4)))


def test_a_basis_must_be_finite(refuses):
    with refuses(
        PatchError,
        """
        the basis of a subspace holds NaN or infinity
          fix: give finite numbers
        """,
    ):
        cp.Subspace(np.array([1.0, np.nan]))


def test_a_basis_of_another_width_does_not_fit(refuses, experiment):
    with refuses(
        PatchError,
        """
        the subspace for 'z.0.1' does not fit
          basis  shape (2, 5)
          site   shape (8,) per token
          fix: give directions over the site's value axes
        """,
    ):
        experiment.run([cp.Patch("z.0.1@-1", cp.Subspace(np.eye(5)[:2]))])


def test_one_number_has_no_subspace(refuses, experiment):
    with refuses(
        PatchError,
        """
        the subspace for 'mlp_post.0.3' does not fit
          basis  shape (1, 1)
          site   shape () per token
          fix: patch a single number whole
        """,
    ):
        experiment.run([cp.Patch("mlp_post.0.3@-1", cp.Subspace(np.ones(1)))])


def test_a_subspace_across_units_takes_all_of_a_layer(refuses, experiment):
    with refuses(
        PatchError,
        """
        'z.0.0,1@-1' is not all units of one layer
          members           2
          units in a layer  4
          fix: name one layer and no unit: z.0
        """,
    ):
        experiment.run([cp.Patch("z.0.0,1@-1", cp.Subspace(np.ones((1, 2, 8))))])
    with refuses(
        PatchError,
        """
        the subspace for 'z.0.*@-1' does not fit
          basis  shape (1, 3, 8)
          units  4, all of one layer
          fix: give a basis of shape (dimension, 4, …)
        """,
    ):
        experiment.run([cp.Patch("z.0@-1", cp.Subspace(np.ones((1, 3, 8))))])


def test_heads_that_share_their_tensor_with_others_have_no_subspace_of_their_own(refuses, pairs):
    model = cp.open_model(cp.testing.tiny.tiny_model("gpt2"))
    with refuses(
        PatchError,
        """
        the units of 'q.0.*@-1' do not fill a tensor of their own
          their tensor  output of transformer.h.0.attn.c_attn
          holds         other values too, or in another order
          fix: take the whole tensor: module(transformer.h.0.attn.c_attn).output axes=(position,width)
        """,
    ):
        cp.Experiment(model, pairs, show_progress=False).run([cp.Patch("q.0@-1", cp.Subspace(np.ones((1, 4, 8))))])


def test_rows_over_keys_have_no_subspace(refuses, experiment):
    with refuses(
        PatchError,
        """
        'pattern.0.1@-1' cannot be given the value 'source inside subspace c71aff1f of dimension 1'
          why not  its value is a row over keys, of which each query has another number
          known    Constant, Function, Identity, Interpolate, Mean, Resample, Source, Zero
          fix: take one of these, such as a Function of the current row
        """,
    ):
        experiment.run([cp.Patch("pattern.0.1@-1", cp.Subspace(np.ones(4)))])


def test_a_search_must_learn_something(refuses, planted):
    with refuses(
        SettingError,
        """
        no subspace can be searched for with batch=0
          needed  counts of 1 or more, rates above 0, a cost of 0 or more, all finite
          fix: RotationSearch(epochs=60, batch=32, rate=0.02)
        """,
    ):
        cp.RotationSearch(batch=0)
    with refuses(
        SettingError,
        """
        'module(turn).output axes=(width)' has no subspace of dimension 17
          site  16 numbers per token
          fix: dimension=1 to 16
        """,
    ):
        cp.learn_subspace(planted, SITE, HELD_OUT, dimension=17)
    with refuses(
        SettingError,
        """
        a subspace cannot have dimension -1
          fix: dimension=1, or dimension="boundless" to learn it
        """,
    ):
        cp.learn_subspace(planted, SITE, HELD_OUT, dimension=-1)


def test_one_neuron_has_no_subspace_to_learn(refuses, experiment):
    with refuses(
        SettingError,
        """
        'mlp_post.0.3' has no subspace of dimension 1
          site  one number per token
          fix: patch it whole, or take all units of its layer
        """,
    ):
        cp.learn_subspace(
            cp.Experiment(experiment.model, experiment.pairs.take([0])), "mlp_post.0.3@-1", experiment.pairs.take([1])
        )


def test_held_out_pairs_share_nothing_with_those_learnt_on(refuses, planted):
    with refuses(
        PairError,
        """
        pair 0 of 'some' shares a prompt, an entity or a group with the pairs of 'some'
          shared   2 of 2 pairs
          why not  the subspace was learnt on those
          fix: learn on one side and measure on the other: learning, held_out = pairs.split(0.5)
        """,
    ):
        cp.learn_subspace(planted, SITE, LEARNING.take([1, 2]))


def test_a_confirmation_keeps_to_its_direction_and_its_pairs(refuses, planted):
    found = cp.learn_subspace(planted, SITE, HELD_OUT, **SHORT)
    with refuses(
        PatchError,
        """
        the subspace of 'module(turn).output axes=(width)' was learnt to denoise, not to noise
          fix: experiment.turned("denoise")
        """,
    ):
        found.confirm(cp.Experiment(planted.model, HELD_OUT, "answer_logit", "noise"))
    with refuses(
        PairError,
        """
        pair 1 of 'some' shares a prompt, an entity or a group with the pairs of 'some'
          shared   1 of 2 pairs
          why not  the subspace was learnt on those
          fix: learn on one side and measure on the other: learning, held_out = pairs.split(0.5)
        """,
    ):
        both = cp.Pairs([HELD_OUT[0], LEARNING[0]], name="some", kind="arrays")
        found.confirm(cp.Experiment(planted.model, both, "answer_logit"))


def test_wanted_answers_must_be_there(refuses, planted):
    with refuses(
        PairError,
        """
        'some' has no column 'swap' of wanted answers
          columns  answer, swapped, wrong_answer
          fix: name one of these, or leave wanted= out for the source's own answers
        """,
    ):
        cp.patched_accuracy(planted, cp.Patch(SITE), "swap")
    without = cp.Pairs.from_arrays(np.zeros((2, 16)), np.ones((2, 16)), [1, 2], name="bare")
    with refuses(
        AnswerError,
        """
        pair 0 of 'bare' has no wanted answer of one token in 'wrong_answer'
          holds   ()
          needed  a token id or class, or a list of them
          fix: give ids, or read the pairs with first_token=True
        """,
    ):
        noising = cp.Experiment(planted.model, without, "answer_logit", "noise")
        cp.patched_accuracy(noising, cp.Patch(SITE))


def test_a_loss_that_is_no_number_stops_the_search(refuses, planted, monkeypatch):
    monkeypatch.setattr(cp.engine.rotate, "HARDEST", 0.0)  # a mask that is infinitely hard
    with refuses(
        NotFinite,
        """
        the loss of a subspace that is learnt is nan
          model  'Planted' in torch.float32
          fix: learn more slowly: RotationSearch(rate=0.002), or open the model in float32
        """,
    ):
        search = cp.RotationSearch(epochs=1, rate=1e30)
        cp.learn_subspace(planted, SITE, HELD_OUT, dimension="boundless", search=search)


def test_a_loss_without_a_gradient_teaches_nothing(refuses, planted):
    with refuses(
        SettingError,
        """
        a subspace cannot be learnt by 'top1', which has no gradient
          fix: take a site from which a gradient reaches the logits
        """,
    ):
        cp.engine.learn_rotation(planted.job([cp.Intervention.of(SITE)]), cp.top1, 1, cp.RotationSearch(epochs=1), 0)


def test_one_run_that_does_not_fit_is_said(refuses, planted, monkeypatch):
    forward = planted.model.module.forward

    def narrow(x):
        raise cp.engine.rotate.torch.OutOfMemoryError("no room") if cp.engine.rotate.torch.is_grad_enabled() else None

    def either(x):
        return narrow(x) if cp.engine.rotate.torch.is_grad_enabled() else forward(x)

    monkeypatch.setattr(planted.model.module, "forward", either)
    with refuses(
        MemoryExhausted,
        """
        one run of pair 0 of 'some' does not fit into memory
          tokens  1
          needs   about 3 KiB, 0 KiB of them for logits
          device  cpu
          fix: shorten the prompts, open the model in bfloat16, or use a device with more memory
        """,
    ):
        cp.learn_subspace(planted, SITE, HELD_OUT, **SHORT)


def test_a_reader_is_a_linear_map_of_the_sites_width(refuses, planted):
    with refuses(
        SettingError,
        """
        'head' is not a linear map of 'Planted' that reads 16 numbers
          module     none
          such maps  turn, classes
          fix: reader="turn"
        """,
    ):
        cp.subspace_parts(planted, SITE, cp.Subspace(np.ones(16)), reader="head")


def test_a_subspace_lies_in_one_site(refuses, experiment):
    with refuses(
        SettingError,
        """
        'resid_pre.*@-1' names 2 sites, and a subspace lies in one
          fix: name one layer, and one unit or a basis with an axis for all of its units
        """,
    ):
        cp.subspace_parts(experiment, "resid_pre@-1", cp.Subspace(np.ones(experiment.model.width)))


def test_an_illusion_is_warned_of():
    experiment = hidden_experiment([1.0, 0.0, 1.0], [[0.0, 2.0, 1.0]])
    with pytest.warns(IllusionWarning) as heard:
        cp.subspace_parts(experiment, "module(into).output axes=(width)", cp.Subspace(np.array([1.0, 1.0, 0.0])))
    assert [str(warning.message) for warning in heard] == [
        "the subspace of 'module(into).output axes=(width)' may be an illusion: without numbers that go nowhere has 0% "
        "of the effect; the effect needs the 50% of the subspace that nothing reads, which opens a dormant pathway"
    ]


def test_a_saved_subspace_is_safetensors_and_is_checked_when_it_is_read(refuses, planted, tmp_path):
    found = cp.learn_subspace(planted, SITE, HELD_OUT, **SHORT)
    with refuses(
        PatchError,
        """
        a subspace is saved as safetensors, not as 'found.pt'
          fix: found.safetensors
        """,
    ):
        found.save(tmp_path / "found.pt")
    with refuses(
        ResultsNotFound,
        """
        no saved subspace in 'TMP/none.safetensors'
          fix: name the file that Alignment.save wrote
        """,
    ):
        cp.load_subspace(tmp_path / "none.safetensors")
    path = found.save(tmp_path / "found.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with refuses(
        StoreCorrupt,
        """
        the subspace in 'TMP/found.safetensors' cannot be read
          why  it was changed after it was written
          fix: write it again: alignment.save(path)
        """,
    ):
        cp.load_subspace(path)
