import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import AnswerError, MetricError
from causalpatch.metrics import METRICS, AnswerTable, Outputs, named_metric
from causalpatch.pairs import Pair, Pairs
from toys import Chain, opened, vectors
from worlds import tiny_world, unchecked


def some_pairs(*answers, wrong=((3,),)):
    return Pairs([Pair([1, 2], [3, 2], answer, wrong, id=f"pair {n}") for n, answer in enumerate(answers)], name="some")


def outputs_of(logits, pairs, column=None, **more):
    rows = torch.arange(len(pairs))
    return Outputs(torch.as_tensor(logits), AnswerTable.of(pairs, torch.device("cpu")), rows, column, **more)


LOGITS = np.array([[2.0, 1.0, 0.5, -1.0, 3.0], [0.0, 4.0, 1.0, 1.0, -2.0]])


def test_a_metric_gives_one_number_per_row():
    pairs = some_pairs(((0,),), ((1,),))
    assert cp.logit_difference(outputs_of(LOGITS, pairs), pairs).tolist() == pytest.approx([3.0, 3.0])
    assert cp.answer_logit(outputs_of(LOGITS, pairs), pairs).tolist() == pytest.approx([2.0, 4.0])


def test_an_answer_set_counts_with_the_sum_of_its_members():
    pairs = some_pairs(((0,), (4,)), ((1,),))
    right = np.logaddexp(2.0, 3.0)
    assert cp.logit_difference(outputs_of(LOGITS, pairs), pairs).tolist() == pytest.approx([right + 1.0, 3.0])
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    assert cp.probability(outputs_of(LOGITS, pairs), pairs).tolist() == pytest.approx([p[0, 0] + p[0, 4], p[1, 1]])
    assert cp.log_probability(outputs_of(LOGITS, pairs), pairs)[0] == pytest.approx(np.log(p[0, 0] + p[0, 4]))


def test_rank_counts_what_is_above_and_ties_are_for_the_answer():
    pairs = some_pairs(((0,),), ((2,), (3,)))
    assert cp.rank(outputs_of(LOGITS, pairs), pairs).tolist() == [1.0, 1.0]
    assert cp.top1(outputs_of(LOGITS, pairs), pairs).tolist() == [0.0, 0.0]
    tied = np.array([[2.0, 2.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0]])
    assert cp.rank(outputs_of(tied, pairs), pairs).tolist() == [0.0, 0.0]
    assert cp.top1(outputs_of(tied, pairs), pairs).tolist() == [1.0, 1.0]


def test_divergences_are_zero_at_the_run_they_compare_with_and_not_symmetric():
    pairs = some_pairs(((0,),), ((1,),))
    other = torch.as_tensor(LOGITS[::-1].copy())
    same = outputs_of(LOGITS, pairs, references={"source": torch.as_tensor(LOGITS), "base": other})
    assert cp.kl_divergence(same, pairs).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (LOGITS, LOGITS[::-1]))
    # KL(base || patched): the untouched run comes first.
    assert cp.kl_from_base(same, pairs).tolist() == pytest.approx((q * np.log(q / p)).sum(1).tolist())
    assert abs((q * np.log(q / p)).sum() - (p * np.log(p / q)).sum(1)[0]) > 0.1


def test_a_token_that_the_untouched_run_excludes_adds_nothing_to_a_divergence():
    pairs = some_pairs(((0,),))
    source = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, 0.0]], dtype=torch.float64)
    patched = np.zeros((1, 5))
    value = cp.kl_divergence(outputs_of(patched, pairs, references={"source": source}), pairs)
    assert value.tolist() == pytest.approx([np.log(5 / 4)])


def test_cosine_reads_any_output_whole():
    pairs = vectors(2)
    got, source = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    value = cp.cosine(outputs_of(got, pairs, references={"source": source}), pairs)
    a, b = got.flatten(1).numpy(), source.flatten(1).numpy()
    wanted = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert value.tolist() == pytest.approx(wanted.tolist())


def test_half_precision_is_measured_in_float32_and_float64_stays():
    pairs = some_pairs(((0,),), ((1,),))
    assert cp.logit_difference(outputs_of(torch.as_tensor(LOGITS).bfloat16(), pairs), pairs).dtype == torch.float32
    assert cp.logit_difference(outputs_of(LOGITS, pairs), pairs).dtype == torch.float64
    # In bfloat16 a probability of 1/40000 next to 1 would be lost in the sum.
    many = torch.zeros(1, 40000, dtype=torch.bfloat16)
    assert cp.probability(outputs_of(many, some_pairs(((0,),))), some_pairs(((0,),)))[0] == pytest.approx(1 / 40000)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda o, p: o.logits, "shape (2, 5)"),
        (lambda o, p: o.logits.mean(), "shape ()"),
        (lambda o, p: o.logits[:1, 0], "shape (1,)"),
        (lambda o, p: 3.0, "float"),
        (lambda o, p: [1.0, 2.0], "list"),
    ],
)
def test_a_metric_of_the_wrong_shape_is_refused_with_both_shapes(returned, said):
    pairs = some_pairs(((0,),), ((1,),))
    with pytest.raises(MetricError, match="metric 'mine' did not return one number per row") as caught:
        cp.metric(returned, name="mine")(outputs_of(LOGITS, pairs), pairs)
    assert dict(caught.value.facts) == {"returned": said, "needed": "shape (2,)"}


def test_complex_numbers_are_refused_and_whole_ones_taken():
    pairs = some_pairs(((0,),), ((1,),))
    with pytest.raises(MetricError, match="complex"):
        cp.metric(lambda o, p: torch.ones(2) * 1j, name="mine")(outputs_of(LOGITS, pairs), pairs)
    counted = cp.metric(lambda o, p: (o.logits > 0).sum(1), name="count")(outputs_of(LOGITS, pairs), pairs)
    assert counted.tolist() == [4.0, 3.0]
    assert counted.dtype == torch.float32


@pytest.mark.parametrize("side", ["answer", "wrong_answer"])
def test_a_missing_answer_is_refused_before_any_run(side):
    pair = {"answer": ((4,),), "wrong_answer": ((5,),)} | {side: ()}
    pairs = Pairs([Pair([1, 2], [3, 2], ((1,),), ((2,),)), Pair([1, 2], [3, 2], id="b", **pair)], name="some")
    with pytest.raises(AnswerError, match=f"pair 1 of 'some' has no {side}, which logit_difference needs"):
        cp.logit_difference.check(pairs)
    cp.kl_divergence.check(pairs)
    if side == "wrong_answer":
        cp.log_probability.check(pairs)


def test_an_answer_of_several_tokens_needs_a_metric_that_spells_it_and_the_last_position():
    pairs = some_pairs(((0, 1),))
    with pytest.raises(AnswerError, match="answer of pair 0 of 'some' has 2 tokens; logit_difference reads one"):
        cp.logit_difference.check(pairs)
    cp.log_probability.check(pairs)
    with pytest.raises(AnswerError, match="read at -2"):
        cp.log_probability.at(-2).check(pairs)


def test_which_way_is_better_follows_the_direction_for_metrics_that_compare():
    assert cp.logit_difference.is_higher_when_clean("denoise")
    assert cp.logit_difference.is_higher_when_clean("noise")
    assert not cp.cross_entropy.is_higher_when_clean("denoise")
    # Close to the source: the clean run when denoising, the corrupted one when noising.
    assert not cp.kl_divergence.is_higher_when_clean("denoise")
    assert cp.kl_divergence.is_higher_when_clean("noise")
    assert cp.kl_from_base.is_higher_when_clean("denoise")
    assert cp.cosine.is_higher_when_clean("denoise")


@pytest.mark.parametrize("name", METRICS)
def test_every_built_in_metric_goes_by_its_name_and_says_what_it_reads(name):
    found = named_metric(name)
    assert found is METRICS[name]
    assert found.name == name
    assert found.columns in ("answers", "all")
    elsewhere = named_metric(f"{name}@-2")
    assert elsewhere.position == -2
    assert elsewhere.name == f"{name}@-2"
    assert elsewhere.function is found.function


@pytest.mark.parametrize("name", ["logit_diference", "accuracy", "logit_difference@2nd", ""])
def test_a_name_that_no_metric_has_is_refused_with_those_that_exist(name):
    with pytest.raises(MetricError, match="there is no metric") as caught:
        named_metric(name)
    assert "logit_difference" in dict(caught.value.facts)["metrics"]


def test_the_closest_name_is_suggested():
    with pytest.raises(MetricError) as caught:
        named_metric("logit_diference")
    assert caught.value.fix == "did you mean logit_difference?"


def test_declared_bounds_hold():
    model, _ = tiny_world("gpt2", (2, 4, 2, 0))
    rng = np.random.default_rng(0)
    pairs = Pairs([Pair(rng.integers(3, 40, 5), rng.integers(3, 40, 5), ((5,),), ((6,),), id=str(n)) for n in range(6)])
    effects = cp.Experiment(model, pairs, metric=list(METRICS)).run(["resid_pre.1", "z.0.1"])
    for name, metric in METRICS.items():
        if metric.bounds:
            low, high = metric.bounds
            values = effects.metric(name).to_xarray()["metric"].values
            assert (values >= low - 1e-12).all(), name
            assert (values <= high + 1e-12).all(), name


def test_a_users_function_gets_its_name_and_its_defaults():
    def margin(outputs, pairs):
        return outputs.distribution.amax(-1)

    made = cp.metric(margin)
    assert (made.name, made.position, made.columns, made.higher_is_better) == ("margin", "all", "all", True)
    assert cp.metric(margin, name="other").name == "other"
    with unchecked(), pytest.raises(MetricError, match="is not a metric"):
        cp.metric("logit_difference")


def test_a_users_metric_may_compare_with_the_runs_that_it_declares():
    model, plain = tiny_world("llama", (2, 4, 2, 0))
    pairs = Pairs([Pair([3, 4, 5], [6, 4, 5], id="a"), Pair([7, 8], [9, 8], id="b")])
    distance = cp.metric(
        lambda o, p: (o.distribution - o.reference("base")).norm(dim=-1), name="far", position=-1, compares=("base",)
    )
    got = cp.Experiment(model, pairs, metric=distance).run(["resid_pre.0"]).to_xarray()
    for number, pair in enumerate(pairs):
        clean, corrupt = (plain.logits(pair.input(side))[-1] for side in ("clean", "corrupt"))
        assert got["metric"].values[0, number] == pytest.approx((clean - corrupt).norm().item())
    assert got["baseline_base"].values.tolist() == [0.0, 0.0]
    undeclared = cp.metric(lambda o, p: o.reference("source")[:, 0], name="wrong", position=-1)
    with pytest.raises(MetricError, match="the source run was not kept for this metric"):
        cp.Experiment(model, pairs, metric=undeclared).run(["resid_pre.0"])


def test_a_metric_sees_the_pair_of_each_row():
    def by_pair(outputs, pairs):
        return torch.tensor([float(pair.id.split()[1]) for pair in pairs], dtype=torch.float64)

    model = opened(Chain())
    named = vectors(5)
    pairs = Pairs([Pair(p.clean, p.corrupt, id=f"pair {7 * n}") for n, p in enumerate(named)], kind="arrays")
    got = cp.Experiment(model, pairs, metric=cp.metric(by_pair), max_rows=3).run(
        ["module(first).output", "module(second).output"]
    )
    assert got.to_xarray()["metric"].values.tolist() == [[0.0, 7.0, 14.0, 21.0, 28.0]] * 2


def test_class_logits_are_needed_where_a_distribution_is_read():
    pairs = vectors(2)
    with pytest.raises(MetricError, match="this metric needs class logits"):
        cp.logit_difference(outputs_of(torch.zeros(2, 3, 4), pairs), pairs)
