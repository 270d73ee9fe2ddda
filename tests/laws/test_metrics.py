"""Metrics, against their formulas on the logits of plain runs."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from causalpatch.metrics import METRICS
from causalpatch.pairs import Pairs
from worlds import CAUSAL, VOCAB, World, assert_same, law, numbers, plain_edits, some_patch

SPELLING = ("log_probability", "log_probability_difference", "probability", "probability_difference", "cross_entropy")


def with_answers(pairs: Pairs, seed: int, longest: int) -> Pairs:
    """Return the pairs with sets of one to three answers on either side, each of one to ``longest`` tokens."""
    rng = np.random.default_rng(seed)

    def some() -> tuple[tuple[int, ...], ...]:
        sizes = rng.integers(1, longest + 1, size=rng.integers(1, 4))
        firsts = rng.choice(VOCAB, len(sizes), replace=False).tolist()
        return tuple((first, *rng.integers(3, VOCAB, n - 1).tolist()) for first, n in zip(firsts, sizes, strict=True))

    made = [replace(pair, answer=some(), wrong_answer=some()) for pair in pairs]
    return Pairs(made, name="answers", alignment=pairs.alignment)


def first_tokens(answers: tuple[tuple[int, ...], ...]) -> list[int]:
    return [answer[0] for answer in answers]


def formulas(pair, patched: np.ndarray, base: np.ndarray, source: np.ndarray) -> dict[str, float]:
    """Return every built-in metric by its formula, from the logits (vocab,) of three runs."""
    right, wrong = patched[first_tokens(pair.answer)], patched[first_tokens(pair.wrong_answer)]
    p = np.exp(log_softmax(patched))
    p_right, p_wrong = p[first_tokens(pair.answer)].sum(), p[first_tokens(pair.wrong_answer)].sum()

    def kl(other: np.ndarray) -> float:
        q = np.exp(log_softmax(other))
        return float((q * np.log(q / p)).sum())

    return {
        "logit_difference": np.log(np.exp(right).sum()) - np.log(np.exp(wrong).sum()),
        "answer_logit": np.log(np.exp(right).sum()),
        "log_probability": np.log(p_right),
        "log_probability_difference": np.log(p_right) - np.log(p_wrong),
        "probability": p_right,
        "probability_difference": p_right - p_wrong,
        "cross_entropy": -np.log(p_right),
        "rank": float((patched > right.max()).sum()),
        "top1": float(patched.argmax() in first_tokens(pair.answer)),
        "kl_divergence": kl(source),
        "kl_from_base": kl(base),
        "cosine": patched @ source / np.linalg.norm(patched) / np.linalg.norm(source),
    }


@law
def test_every_metric_equals_its_formula_on_the_logits_of_plain_runs(world, draw):
    world = replace(world, pairs=with_answers(world.pairs, draw(st.integers(0, 999)), longest=1))
    direction = draw(st.sampled_from(["denoise", "noise"]))
    base, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    laid = some_patch(
        world, draw, world.some_site(draw, draw(st.sampled_from(world.among("z", "resid_post")))), base=base
    )
    names = [name for name, metric in METRICS.items() if metric.generates is None]
    experiment = world.experiment(metric=names, direction=direction)
    effects = experiment.run([laid.patch])
    got = dict(zip(names, numbers(effects)[:, 0], strict=True))
    kept = {side: effects.to_xarray()[f"baseline_{side}"].values for side in ("base", "source")}
    for number, pair in enumerate(world.pairs):
        runs = {side: world.plain.logits(pair.input(side))[-1].numpy() for side in ("clean", "corrupt")}
        edits = plain_edits(world, [laid], number, base)
        if edits is not None:
            patched = world.plain.logits(pair.input(base), edits)[-1].numpy()
            wanted = formulas(pair, patched, runs[base], runs[source])
            assert set(wanted) == set(got)
            for name, value in wanted.items():
                assert_same(got[name][number], value)
        for side, run in (("base", runs[base]), ("source", runs[source])):
            wanted = formulas(pair, run, runs[base], runs[source])
            assert_same(kept[side][:, number], np.array([wanted[name] for name in names]))


def teacher_forced(world: World, pair, prompt, answer: tuple[int, ...], edits) -> float:
    """Return the log-probability of an answer by one run over the prompt and the answer."""
    logits = world.plain.logits([*prompt, *answer[:-1]], edits)[len(prompt) - 1 :].numpy()
    return float(sum(log_softmax(row)[token] for row, token in zip(logits, answer, strict=True)))


@law(only=CAUSAL)
def test_answers_of_several_tokens_equal_log_probabilities_of_teacher_forced_runs(world, draw):
    world = replace(world, pairs=with_answers(world.pairs, draw(st.integers(0, 999)), longest=3))
    direction = draw(st.sampled_from(["denoise", "noise"]))
    base = "corrupt" if direction == "denoise" else "clean"
    laid = some_patch(
        world, draw, world.some_site(draw, draw(st.sampled_from(world.among("v", "resid_pre", "mlp_out")))), base=base
    )
    effects = world.experiment(metric=list(SPELLING), direction=direction).run([laid.patch])
    got, untouched = numbers(effects)[:, 0], effects.to_xarray()
    for number, pair in enumerate(world.pairs):
        for values, side, edits in (
            (got, base, plain_edits(world, [laid], number, base)),
            (untouched["baseline_clean"].values, "clean", []),
            (untouched["baseline_corrupt"].values, "corrupt", []),
        ):
            if edits is None:
                assert np.isnan(values[:, number]).all()
                continue
            right, wrong = (
                logsumexp([teacher_forced(world, pair, pair.input(side), answer, edits) for answer in answers])
                for answers in (pair.answer, pair.wrong_answer)
            )
            wanted = [right, right - wrong, np.exp(right), np.exp(right) - np.exp(wrong), -right]
            assert_same(values[:, number], np.array(wanted))
