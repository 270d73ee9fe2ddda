"""How memory is shared out: what the plan says is what the engine does, and it stays within the budget."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.engine import Cost, Gauge, fit_values, plan_job, wavefront as engine
from causalpatch.engine.gauge import Gauge as Measuring
from causalpatch.engine.planning import numbers_of
from causalpatch.engine.shares import CAPTURED, CHUNK, Kept, logits_bytes
from causalpatch.engine.shelf import Shelf
from causalpatch.engine.wave import Wave
from causalpatch.pairs import Pair, Pairs
from tiers import assert_agree, quickly, run_model
from worlds import tiny_world

EVEN, UNEVEN = [8] * 12, [3, 9, 5, 5, 7, 4, 9, 6, 3, 8]
SWEEP = [f"{name}@{token}" for name in ("resid_pre.0", "resid_pre.2", "mlp_out.1", "z.1.2") for token in (0, 1, -1)]
WHOLE = cp.metric(lambda outputs, pairs: outputs.logits[..., 3].mean(1), name="whole")
METRICS = {
    "answers": [cp.logit_difference],
    "vocabulary": [cp.kl_divergence],
    "everything": [WHOLE],
    "spelt": [cp.log_probability_difference],
}


def pairs_of(lengths, n_tokens=1, n_answers=1):
    """Return pairs whose prompts have no token in common, so that no effect is known beforehand."""
    rng = np.random.default_rng(0)

    def answers():
        return tuple(tuple(rng.integers(3, 40, n_tokens).tolist()) for _ in range(n_answers))

    prompts = [(rng.integers(3, 20, n), rng.integers(20, 40, n)) for n in lengths]
    return Pairs([Pair(*both, answers(), answers(), id=str(i)) for i, both in enumerate(prompts)], name="apart")


@dataclass
class Seen:
    """What the engine did."""

    runs: list[int] = field(default_factory=list)  # bytes that are kept of the runs of each batch of pairs
    logits: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # rows of each wave
    called: list[int] = field(default_factory=list)  # rows of its calls, at most
    measured: list[int] = field(default_factory=list)  # bytes of logits that are measured together, and their runs
    rows: list[int] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch):
    found = Seen()
    real = {"open": engine.open_sweep, "keep": Shelf.keep, "stream": Wave.stream, "values": Measuring.values}

    def opened(job, gauge, *more):
        found.runs.append(0)
        sweep, blocks = real["open"](job, gauge, *more)
        found.batches.append(len(sweep.scenes[0].indices))
        found.logits.append(sum(t.numel() * t.element_size() for s in sweep.scenes for t in s._logits.values()))
        return sweep, blocks

    def keep(self, tensor, **more):
        found.runs[-1] += tensor.numel() * tensor.element_size()
        return real["keep"](self, tensor, **more)

    def stream(self):
        found.held.append(len(self.all))
        found.called.append(min(len(self.all), self.chunk_rows))
        return real["stream"](self)

    def values(self, run, *more):
        found.measured.append(run.logits.numel() * run.logits.element_size() * (1 + self.n_copies))
        found.rows.append(len(run.pair))
        return real["values"](self, run, *more)

    monkeypatch.setattr(engine, "open_sweep", opened)
    monkeypatch.setattr(Shelf, "keep", keep)
    monkeypatch.setattr(Wave, "stream", stream)
    monkeypatch.setattr(Measuring, "values", values)
    return found


def both(seen, requests, pairs, metrics, *, family="llama", **settings):
    """Return the plan of the wavefront, and let it run."""
    model, _ = tiny_world(family, (3, 4, 2, 0))
    experiment = cp.Experiment(model, pairs, metric=metrics, **settings)
    job = experiment.job([cp.Intervention.of(each) for each in requests])
    gauge = Gauge(metrics, pairs, model)
    plan = plan_job(job, len(gauge.forks), gauge=gauge, tier="wavefront")
    fitted = fit_values(job)
    for attribute in vars(seen).values():
        attribute.clear()
    blocks = list(engine.measure(fitted.job, gauge, fitted.means, Cost()))
    assert sum(len(block.pairs) for block in blocks) == (2 + len(job.interventions)) * len(pairs)
    return plan


@pytest.mark.parametrize(
    ("kind", "budget_gib"),
    [
        *[(kind, budget_gib) for kind in ("answers", "everything") for budget_gib in (None, 0.002)],
        ("spelt", None),
        pytest.param("spelt", 0.002, marks=pytest.mark.slow),
        ("answers", 0.0004),
        ("answers", 1e-9),
        pytest.param("spelt", 0.0004, marks=pytest.mark.slow),
        pytest.param("spelt", 1e-9, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("lengths", [EVEN, UNEVEN])
def test_a_plan_says_what_the_engine_does(seen, kind, lengths, budget_gib):
    family = {"answers": "gpt2", "everything": "gpt_neox", "spelt": "llama"}[kind]
    pairs = pairs_of(lengths, n_tokens=3 if kind == "spelt" else 1, n_answers=2 if kind == "spelt" else 1)
    wave = both(seen, SWEEP, pairs, METRICS[kind], family=family, budget_gib=budget_gib).wave
    assert wave.passes == len(seen.held)
    assert wave.chunk_rows == max(seen.called)
    assert wave.held_bytes == max(seen.held) * 32 * 8
    assert wave.logits_bytes == max(seen.logits)
    assert max(seen.runs) <= wave.base_bytes <= 1.5 * max(seen.runs)


@pytest.mark.parametrize("max_rows", [1, 3])
def test_a_plan_knows_the_most_rows_that_may_stand_together(seen, max_rows):
    wave = both(seen, SWEEP, pairs_of(EVEN), METRICS["answers"], max_rows=max_rows).wave
    assert wave.chunk_rows == max(seen.called) == max_rows * 8


def test_a_plan_counts_the_portions_in_which_runs_are_laid_out(seen, monkeypatch):
    monkeypatch.setattr("causalpatch.engine.shares.PORTION", 50)
    wave = both(seen, SWEEP, pairs_of(UNEVEN), METRICS["answers"]).wave
    assert wave.passes == len(seen.held) == 3


@pytest.mark.parametrize("kind", quickly(list(METRICS), "answers", "vocabulary", "everything"))
@pytest.mark.parametrize("budget_gib", [0.002, 0.0007])
def test_untouched_runs_and_logits_stay_within_their_shares(seen, kind, budget_gib):
    answers = (3, 3) if kind == "spelt" else (1, 1)
    both(seen, SWEEP[::2], pairs_of(EVEN, *answers), METRICS[kind], budget_gib=budget_gib)
    budget = budget_gib * 2**30
    batches = zip(seen.batches, seen.runs, seen.logits, strict=True)
    assert all(runs + logits <= CAPTURED * budget or n_pairs == 1 for n_pairs, runs, logits in batches)
    measured = zip(seen.rows, seen.measured, strict=True)
    assert all(n_bytes <= CHUNK * budget or n_rows == 1 for n_rows, n_bytes in measured)
    assert max(seen.rows) > 1


def test_smaller_pieces_give_the_same_numbers():
    pairs, metrics = pairs_of(UNEVEN[:4], 3, 2), [cp.log_probability, cp.kl_divergence, WHOLE]
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    requests = [*SWEEP, cp.Patch("resid_pre.1@-1", cp.Resample(0))]
    wanted = run_model("reference", model, pairs, requests, metric=metrics)
    for budget_gib in (0.002, 1e-9):
        assert_agree(run_model("wavefront", model, pairs, requests, metric=metrics, budget_gib=budget_gib), wanted)


def test_prompts_that_are_resampled_from_are_counted(seen):
    requests = [cp.Patch("resid_pre.1@-1", cp.Resample(draw)) for draw in range(3)]
    wave = both(seen, requests, pairs_of(EVEN), METRICS["answers"], budget_gib=0.001).wave
    assert len(seen.runs) > 1
    assert max(seen.runs) <= wave.base_bytes <= CAPTURED * 0.001 * 2**30
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    experiment = cp.Experiment(model, pairs_of(EVEN))
    jobs = [experiment.job([cp.Intervention.of(one) for one in some]) for some in (requests, ["resid_pre.1@-1"])]
    counted = [Kept.of(job, Gauge(METRICS["answers"], job.pairs, model), numbers_of(model)) for job in jobs]
    # Base, source and three donors, instead of base and source.
    assert 2 * counted[0].token_bytes == 5 * counted[1].token_bytes


def test_batches_hold_prompts_as_wide_as_their_longest():
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    pairs = pairs_of([3] * 30 + [60])
    job = cp.Experiment(model, pairs, budget_gib=0.002).job([cp.Intervention.of("resid_pre.0")])
    counted = Kept.of(job, Gauge(METRICS["answers"], pairs, model), numbers_of(model))
    batches = list(counted.batches())
    assert sorted(np.concatenate(batches).tolist()) == list(range(31))
    assert batches[-1].tolist() == [30]
    for batch in batches[:-1]:
        assert sum(counted.n_bytes(batch)) <= counted.allowed
    together = replace(counted, allowed=10**9)
    assert [len(batch) for batch in together.batches()] == [31]
    assert together.n_bytes(np.arange(31))[0] == 31 * 60 * counted.token_bytes


def test_metrics_that_compare_or_are_ones_own_take_more_room_for_logits():
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    job = cp.Experiment(model, pairs_of(EVEN)).job([cp.Intervention.of("resid_pre.0")])
    plain, compared, own = (
        logits_bytes(job, Gauge(metrics, job.pairs, model), 5, 40)
        for metrics in ([cp.log_probability], [cp.kl_divergence], [WHOLE])
    )
    assert plain == 5 * 40 * 8 * 2
    assert compared == own == 4 * plain
