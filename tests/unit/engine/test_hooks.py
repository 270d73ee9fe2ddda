import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, PatchDidNotFire, PatchError, SiteUnsupported
from causalpatch.engine.hooks import Write, quiet, run_with_hooks
from causalpatch.models import Port, Tap, Whole
from causalpatch.sites import Site, parse
from toys import ByKeyword, Chain, InPlace, Pictures, Twice, hooks_of, opened, prompts, vectors
from worlds import tiny_world, unchecked

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = (torch.arange(3),)


def write(model, text, value, index=ROWS):
    return Write(model.tap(parse(text)), index, value)


def test_a_written_output_goes_on_through_the_rest_of_the_model():
    model = opened(Chain())
    new = torch.ones(3, 4, dtype=torch.float64)
    output, kept = run_with_hooks(model, {"x": X}, [write(model, "module(first).output", new)])
    module = model.module
    assert torch.equal(output, module.head(new + torch.tanh(module.second(new))))
    assert kept == {}


def test_a_written_input_leaves_other_readers_of_the_same_tensor_alone():
    model = opened(Chain())
    new = torch.ones(3, 4, dtype=torch.float64)
    output, _ = run_with_hooks(model, {"x": X}, [write(model, "module(second).input", new)])
    module = model.module
    assert torch.equal(output, module.head(module.first(X) + torch.tanh(module.second(new))))


def test_only_the_rows_of_the_index_are_written():
    model = opened(Chain())
    untouched, _ = run_with_hooks(model, {"x": X})
    one = write(model, "module(first).output", torch.zeros(1, 4, dtype=torch.float64), (torch.tensor([1]),))
    output, _ = run_with_hooks(model, {"x": X}, [one])
    assert torch.equal(output[[0, 2]], untouched[[0, 2]])
    assert (output[1] - untouched[1]).abs().min() > 1e-6


def test_writes_at_one_place_are_made_in_order_and_later_ones_win():
    model = opened(Chain())
    ones = torch.ones(3, 4, dtype=torch.float64)
    place = "module(first).output"
    twice, _ = run_with_hooks(model, {"x": X}, [write(model, place, 5 * ones), write(model, place, ones)])
    doubled, _ = run_with_hooks(model, {"x": X}, [write(model, place, ones / 2), write(model, place, lambda x: 2 * x)])
    once, _ = run_with_hooks(model, {"x": X}, [write(model, place, ones)])
    assert torch.equal(twice, once)
    assert torch.equal(doubled, once)


def test_kept_tensors_are_what_the_rest_of_the_model_saw_after_the_writes():
    model = opened(Chain())
    ones = torch.ones(3, 4, dtype=torch.float64)
    port = Port("first", "output")
    _, kept = run_with_hooks(model, {"x": X}, [write(model, "module(first).output", ones)], keep=[port])
    assert torch.equal(kept[port], ones)


def test_kept_tensors_are_copies_that_the_model_does_not_change_afterwards():
    model = opened(InPlace())
    port = Port("second", "output")
    _, kept = run_with_hooks(model, {"x": X}, keep=[port])
    assert torch.equal(kept[port], model.module.second(model.module.first(X)))


def test_a_users_hooks_stay_and_run_and_come_before_ours():
    model = opened(Chain())
    calls = []
    model.module.first.register_forward_hook(lambda module, args, output: calls.append(1) or output + 1)
    model.module.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    before = hooks_of(model.module)
    port = Port("first", "output")
    output, kept = run_with_hooks(model, {"x": X}, keep=[port])
    assert len(calls) == 1
    module = model.module
    stream = nn.functional.linear(X, module.first.weight, module.first.bias) + 1
    assert torch.equal(kept[port], stream)
    wanted = nn.functional.linear(
        2 * (stream + torch.tanh(module.second(stream))), module.head.weight, module.head.bias
    )
    assert torch.allclose(output, wanted)
    assert hooks_of(model.module) == before == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError, ValueError])
def test_our_hooks_are_gone_after_an_exception_and_the_users_are_not(error):
    model = opened(Chain())

    def fail(module, args, output):
        raise error("stop")

    model.module.second.register_forward_hook(fail)
    with pytest.raises(ModelUnsupported if error is ValueError else error):
        run_with_hooks(
            model, {"x": X}, [write(model, "module(first).output", lambda x: x)], keep=[Port("head", "input")]
        )
    assert hooks_of(model.module) == 1


def test_our_hooks_are_gone_after_success_and_after_a_refusal():
    model = opened(Chain())
    run_with_hooks(model, {"x": X}, [write(model, "module(first).output", lambda x: x)], keep=[Port("", "output")])
    assert hooks_of(model.module) == 0
    with pytest.raises(SiteUnsupported):
        run_with_hooks(model, {"x": X}, keep=[Port("first", "output", ("nothing",))])
    assert hooks_of(model.module) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_eval_mode_is_forced_and_every_modules_own_mode_comes_back(fails):
    model = opened(Chain())
    model.module.train()
    model.module.second.eval()
    modes = {name: part.training for name, part in model.module.named_modules()}
    if fails:
        with pytest.raises(ModelUnsupported):
            run_with_hooks(model, {"x": X[:, :2]})
    else:
        first, second = (run_with_hooks(model, {"x": X})[0] for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(first, model.module.eval()(X))
        for name, part in model.module.named_modules():
            part.training = modes[name]
        run_with_hooks(model, {"x": X})
    assert {name: part.training for name, part in model.module.named_modules()} == modes


def test_identical_inputs_have_no_effect_though_the_model_was_left_in_training():
    model = opened(Chain())
    model.module.train()
    same = vectors()
    pairs = type(same).from_arrays([p.clean for p in same], [p.clean for p in same], [0] * 5, [1] * 5)
    effects = cp.Experiment(model, pairs).run(["module(first).output", "module(second).output"])
    assert (effects.effect(per_pair=True).values == 0).all()
    assert model.module.training


def test_gradients_and_their_settings_are_left_alone():
    model = opened(Chain())
    x = X.clone().requires_grad_()
    output, kept = run_with_hooks(model, {"x": x}, keep=[Port("first", "output")])
    assert not output.requires_grad
    assert not kept[Port("first", "output")].requires_grad
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.module.parameters())
    model.module(x).sum().backward()
    assert x.grad is not None


def test_float32_is_multiplied_in_full_and_the_setting_put_back_by_whoever_leaves_last():
    one, two = opened(Chain()), opened(Chain(), seed=1)
    torch.set_float32_matmul_precision("medium")
    try:
        entered, may_leave = threading.Event(), threading.Event()

        def hold():
            with quiet(one):
                entered.set()
                may_leave.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        assert entered.wait(10)
        with quiet(two):
            may_leave.set()
            thread.join()
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_module_that_does_not_run_raises_instead_of_showing_no_effect():
    model = opened(Twice())
    with pytest.raises(PatchDidNotFire, match=r"nothing was written at 'module\(second\).output'") as caught:
        run_with_hooks(model, {"x": X}, [write(model, "module(second).output", lambda x: x)])
    assert ("ran", "0 times in this forward") in caught.value.facts
    with pytest.raises(PatchDidNotFire, match=r"nothing was read at 'module\(drop\).input'"):
        run_with_hooks(model, {"x": X}, keep=[Port("drop", "input")])
    with pytest.raises(PatchDidNotFire):
        cp.Experiment(model, vectors()).run(["module(second).output"])


def test_a_module_that_runs_twice_is_ambiguous():
    model = opened(Twice())
    with pytest.raises(SiteUnsupported, match="is ambiguous: its module runs 2 times"):
        run_with_hooks(model, {"x": X}, [write(model, "module(first).output", lambda x: x)])
    with pytest.raises(SiteUnsupported, match="is ambiguous"):
        cp.Experiment(model, vectors()).run(["module(first).output"])


@pytest.mark.parametrize("place", ["module(second).input", 'module(second).input["input"]'])
def test_inputs_given_by_keyword_alone_are_found_and_written(place):
    model = opened(ByKeyword())
    new = torch.ones(3, 4, dtype=torch.float64)
    tap = model.tap(parse(place))
    output, kept = run_with_hooks(model, {"x": X}, [write(model, place, new)], keep=[tap.port])
    assert torch.equal(output, model.module.head(model.module.second(new)))
    assert torch.equal(kept[tap.port], new)


def test_a_companion_that_comes_too_late_is_refused():
    model = opened(Chain())
    late = Tap(Site.parse("resid_mid.0"), Port("first", "output"), Whole(), (Port("head", "output"),))
    with pytest.raises(PatchDidNotFire, match="needs a tensor that was not there in time"):
        run_with_hooks(model, {"x": X}, [Write(late, ROWS, X)])


def test_a_tensor_without_a_row_per_run_is_refused():
    model, _ = tiny_world("gpt2", (1, 2, 2, 2))
    # The positions' embeddings are looked up once for all rows.
    wpe = parse("module(transformer.wpe).output")
    pairs = prompts(([3, 4, 5], [6, 4, 5]), ([7, 8, 9], [7, 3, 9]))
    batch = pairs.batch("clean")
    ids = torch.as_tensor(batch.ids)
    inputs = {"input_ids": ids, "use_cache": False}
    index = (torch.tensor([0, 1]), torch.tensor([0, 0]))
    with pytest.raises(SiteUnsupported, match="has no row for each run"):
        run_with_hooks(model, inputs, [Write(model.tap(wpe), index, lambda x: x)])


def test_the_models_own_failure_says_what_it_was_given():
    model = opened(Chain())
    with pytest.raises(ModelUnsupported) as caught:
        run_with_hooks(model, {"x": X[:, :3]})
    assert caught.value.what == "the forward of 'Chain' failed"
    assert ("inputs", "x (3, 3) torch.float64") in caught.value.facts


def test_memory_that_runs_out_is_passed_on_as_it_is():
    model = opened(Chain())

    def exhaust(module, args):
        raise torch.OutOfMemoryError("no more")

    model.module.register_forward_pre_hook(exhaust)
    with pytest.raises(torch.OutOfMemoryError):
        run_with_hooks(model, {"x": X})


def test_a_patchs_own_function_that_fails_is_named():
    experiment = cp.Experiment(opened(Pictures()), vectors(shape=(1, 6, 6), n_classes=4))
    bad = cp.Function(lambda current, source: current @ torch.ones(7, 7), "mine")
    with unchecked(), pytest.raises(PatchError, match=r"function mine for 'module\(conv1\).output' failed") as caught:
        experiment.run([cp.Patch("module(conv1).output", bad)])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert hooks_of(experiment.model.module) == 0


def test_two_threads_on_one_model_give_the_numbers_of_one():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    pairs = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([8, 9, 10], [8, 11, 10]))
    sites = [["z.0.1@-1", "resid_pre.1@0"], ["mlp_out.0@1", "z.1.3@2"]]
    alone = [cp.Experiment(model, pairs).run(some).effect(per_pair=True).values for some in sites]
    before = hooks_of(model.module)  # transformers keeps some of its own since attentions were first asked for
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def work(number):
        for _ in range(4):
            effects = cp.Experiment(model, pairs, max_rows=1).run(sites[number])
            found[number].append(effects.effect(per_pair=True).values)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert len(found[number]) == 4
        for values in found[number]:
            np.testing.assert_allclose(values, alone[number], atol=1e-12)
    assert hooks_of(model.module) == before


def in_threads(stop, *works):
    """Run the works over and over in threads of their own until one of them stops all, or fails."""

    def go(work):
        try:
            while not stop.is_set():
                work()
        finally:
            stop.set()

    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(go, work) for work in works]:
            future.result()


def test_calls_of_the_model_in_another_thread_pass_our_hooks_by():
    model = opened(Chain())
    model.module.eval()
    wanted = model.module(X)
    ones = torch.ones(3, 4, dtype=torch.float64)
    patch = write(model, "module(first).output", ones)
    port = Port("second", "input")
    stop, n_runs = threading.Event(), [0]
    alone, _ = run_with_hooks(model, {"x": X}, [patch], keep=[port])

    def experiment():
        output, kept = run_with_hooks(model, {"x": X}, [patch], keep=[port])
        torch.testing.assert_close(output, alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(kept[port], ones, rtol=0, atol=0)
        n_runs[0] += 1
        if n_runs[0] == 300:
            stop.set()

    def own():
        torch.testing.assert_close(model.module(X), wanted, rtol=0, atol=1e-12)

    in_threads(stop, experiment, own)


@pytest.mark.parametrize("engine", ["restart", "rows", "reference"])
def test_an_experiment_and_the_users_own_forwards_do_not_meet(engine):
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    pairs = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([8, 9, 10], [8, 11, 10]))
    sites, ids = ["z.0.1@-1", "resid_pre.1@0"], torch.tensor([[3, 4, 5]])

    def measured():
        return cp.Experiment(model, pairs, engine=engine, show_progress=False).run(sites).effect(per_pair=True).values

    alone = measured()
    with torch.no_grad():
        wanted = model.module(ids).logits
    stop, n_runs = threading.Event(), [0]

    def experiment():
        np.testing.assert_allclose(measured(), alone, atol=1e-12)
        n_runs[0] += 1
        if n_runs[0] == 12:
            stop.set()

    def own():
        with torch.no_grad():
            torch.testing.assert_close(model.module(ids).logits, wanted, rtol=0, atol=1e-12)

    in_threads(stop, experiment, own)


class Folding(nn.Module):
    """Puts rows and positions into one axis for a map in its middle."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x):
        x = self.first(x)
        return self.second(x.reshape(-1, 4)).view(x.shape)


@pytest.mark.parametrize("side", ["input", "output"])
def test_where_rows_and_positions_are_one_axis_they_are_read_and_written_apart(side):
    module = Folding()
    model = opened(module)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    port = Port("second", side, like=Port("first", "input"))
    index = (torch.tensor([0, 2]), torch.tensor([4, 1]))
    with torch.no_grad():
        between = module.first(x)
        wanted = (between if side == "input" else module.second(between)).clone()
        wanted[index] = 1.0
        answer = module.second(wanted) if side == "input" else wanted
    tap = Tap(Site("resid_pre", 0), port, Whole())
    output, kept = run_with_hooks(
        model, {"x": x}, [Write(tap, index, torch.ones(2, 4, dtype=torch.float64))], keep=[port]
    )
    assert kept[port].shape == (3, 5, 4)
    torch.testing.assert_close(kept[port], wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(output, answer, rtol=0, atol=1e-14)


def test_a_port_whose_axes_are_shown_too_late_is_an_error():
    model = opened(Folding())
    port = Port("first", "output", like=Port("second", "input"))
    with pytest.raises(PatchDidNotFire, match="needs a tensor that was not there in time"):
        run_with_hooks(model, {"x": torch.zeros(1, 2, 4, dtype=torch.float64)}, keep=[port])
