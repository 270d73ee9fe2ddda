"""What an engine leaves behind: nothing. What the user put into the model works on, and is still there afterwards."""

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.testing.tiny import tiny_model
from tiers import METRICS, Watch, assert_agree, run_model, tier_of
from worlds import numbers, random_pairs, unchecked

PAIRS = random_pairs(21, 3, "equal", prefix=1 / 3)
PATCHES = [
    "resid_pre.0@1",
    "resid_pre.1@0",
    "k.0.1@0",
    "z.1.2@-1",
    cp.Patch("mlp_out.0", "zero"),
    ["q.1.0@-1", "z.1.0@-1"],
    "resid_post.1@-2",
]
ENGINES = ("wavefront", "restart", "rows")


def fresh(family="llama", **settings):
    return tiny_model(family, **({"layers": 2, "heads": 4, "seed": 8} | settings))


def digest_of(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def hashes(module):
    """Return a hash of every parameter and buffer."""
    return {name: digest_of(x) for name, x in module.state_dict().items()}


def state_of(module):
    """Return everything of a module, and of the process, that an engine might change and forget."""
    parts = dict(module.named_modules())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "hooks": {(path, kind): list(getattr(part, kind)) for path, part in parts.items() for kind in kinds},
        "own attributes": {path: sorted(vars(part)) for path, part in parts.items()},
        "classes": {path: type(part) for path, part in parts.items()},
        "kernels": {
            path: part.config._attn_implementation
            for path, part in parts.items()
            if hasattr(part, "config") and hasattr(part.config, "_attn_implementation")
        },
        "training": {path: part.training for path, part in parts.items()},
        "gradients": {name: (p.requires_grad, p.grad is None) for name, p in module.named_parameters()},
        "weights": hashes(module),
        "random": (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()),
        "process": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(),
            torch.get_num_threads(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
        ),
    }


def assert_unchanged(before, module):
    for name, value in state_of(module).items():
        assert value == before[name], name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_leaves_model_and_process_as_they_were(engine, family):
    module = fresh(family).train()
    module.model.layers[0].mlp.eval() if family != "gpt2" else module.transformer.h[0].mlp.eval()
    for parameter in list(module.parameters())[::2]:
        parameter.requires_grad_(False)
    model = cp.open_model(module)
    before = state_of(module)
    effects = run_model(engine, model, PAIRS, PATCHES, metric=list(METRICS))
    assert tier_of(effects) == engine
    assert_unchanged(before, module)


class Stop(Exception):
    """An exception that is not the library's."""


@pytest.mark.parametrize("kind", [Stop, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_anywhere_leaves_model_and_process_as_they_were(engine, kind):
    module = fresh().train()
    model = cp.open_model(module)
    calls, limit = [0], [-1]

    def fail(name, args, result):
        if name == "_set_grad_enabled":
            return  # stopped half-way through its own entry, torch's no_grad does not come back
        calls[0] += 1
        if calls[0] == limit[0]:
            raise kind("in the middle")

    wanted = numbers(run_model(engine, model, PAIRS, PATCHES))
    with Watch(fail):
        run_model(engine, model, PAIRS, PATCHES)
    n_calls, before = calls[0], state_of(module)
    assert n_calls > 200
    for at in np.linspace(1, n_calls, 7).astype(int).tolist():
        calls[0], limit[0] = 0, at
        try:
            with Watch(fail):
                run_model(engine, model, PAIRS, PATCHES)
        except (Stop, KeyboardInterrupt, RuntimeError, cp.CausalPatchError, UserWarning):
            pass
        assert calls[0] >= at
        assert_unchanged(before, module)
    np.testing.assert_array_equal(numbers(run_model(engine, model, PAIRS, PATCHES)), wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_in_a_metric_or_in_a_function_leaves_model_and_process_as_they_were(engine):
    module = fresh("gemma2").train()
    model = cp.open_model(module)

    def failing(outputs, pairs):
        if (outputs.distribution[:, 0] != outputs.reference("base")[:, 0]).any():
            raise Stop("in a metric")
        return outputs.distribution[:, 0]

    def broken(current, source):
        raise Stop("in a function")

    metric = cp.metric(failing, position=-1, compares=("base",))
    patches = [*PATCHES, cp.Patch("z.1.1@-1", cp.Function(broken))]
    before = state_of(module)
    with pytest.raises(Stop, match="in a metric"):
        run_model(engine, model, PAIRS, PATCHES, metric=metric)
    assert_unchanged(before, module)
    with pytest.raises(Stop, match="in a function"):
        run_model(engine, model, PAIRS, patches)
    assert_unchanged(before, module)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_function_that_changes_its_arguments_in_place_spoils_nothing(engine):
    model = cp.open_model(fresh())

    def spoiling(current, source):
        new = current + source
        source.zero_()
        current.fill_(7.0)
        return new

    def adding(current, source):
        return current + source

    sites = ["resid_pre.1@0", "z.0.1@-1", "resid_post.0", "mlp_post.1.3@-1"]
    wild = [cp.Patch(site, cp.Function(spoiling)) for site in sites]
    tame = [cp.Patch(site, cp.Function(adding)) for site in sites]
    got = numbers(run_model(engine, model, PAIRS, [*wild, *sites, *wild]))
    wanted = numbers(run_model("reference", model, PAIRS, [*tame, *sites, *tame]))
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_model_made_in_its_untouched_runs_is_not_written_to(engine):
    module = fresh()
    model = cp.open_model(module)
    seen = []

    def keep(name, args, result):
        if name in ("linear", "add", "__add__", "mul", "__mul__") and result.ndim == 3 and len(result) > 1:
            seen.append((result, digest_of(result)))

    with Watch(keep):
        run_model(engine, model, PAIRS, PATCHES)
    assert len(seen) > 40
    for tensor, digest in seen:
        assert digest_of(tensor) == digest


def test_hooks_that_only_look_see_something_and_are_still_there_afterwards():
    module = fresh()
    model = cp.open_model(module)
    plain = run_model("auto", model, PAIRS, PATCHES, metric=list(METRICS))
    seen = {"before": 0, "after": 0}

    def before(part, args, kwargs):
        seen["before"] += 1

    def after(part, args, output):
        seen["after"] += 1

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in module.model.layers]
    handles += [layer.register_forward_hook(after) for layer in module.model.layers]
    handles += [module.model.layers[1].self_attn.o_proj.register_forward_hook(after)]
    state = state_of(module)
    hooked = run_model("auto", model, PAIRS, PATCHES, metric=list(METRICS))
    assert tier_of(plain) == "wavefront"
    # Hooks expect whole prompts of real runs: neither tokens side by side nor layers that are passed by.
    assert tier_of(hooked) == "rows"
    reason = hooked.provenance["engine"]["reason"]
    for layer, why in (("wavefront", "expect whole prompts"), ("restart", "would see streams that are in no run")):
        assert f"{layer}: hooks stand on 'model.layers.0', and they {why}" in reason
    assert_agree(hooked, plain)
    assert min(seen.values()) > 0
    assert_unchanged(state, module)
    for handle in handles:
        handle.remove()


def test_hooks_on_layers_see_the_streams_of_real_runs_alone():
    module = fresh()
    model, pairs, seen = cp.open_model(module), PAIRS.take([0]), []
    run_model("auto", model, pairs, ["resid_pre.1@1"])  # proofs are made before anyone looks

    def look(part, args, output):
        seen.extend(round(float(row.abs().sum()), 6) for row in output)

    def streams(engine, asked):
        seen.clear()
        handle = module.model.layers[0].register_forward_hook(look)
        run_model(engine, model, pairs, asked)
        handle.remove()
        return set(seen)

    asked = ["resid_pre.1@1", "resid_pre.1@0"]
    wanted = streams("reference", asked)
    assert streams("auto", asked) <= wanted
    assert not streams("restart", asked) <= wanted  # as its documentation says


def add_to_all(part, args, output):
    return output + 0.3


def add_to_the_last_token(part, args, output):
    return torch.cat([output[:, :-1], output[:, -1:] + 0.5], 1)


def centre_over_tokens(part, args, output):
    return output - 0.5 * output.mean(1, keepdim=True)


def scale_input(part, args):
    return (1.4 * args[0], *args[1:])


def shift_input(part, args):
    return (args[0] + 0.3, *args[1:])


def shift_positions(part, args):
    return (torch.roll(args[0], 1, 1), *args[1:])


def forbid_a_token(part, args, output):
    output = output.clone()
    output[..., 7] = -5.0
    output[..., 9] += output[..., 11]
    return output


def square_the_logits(part, args, output):
    output.logits = output.logits * output.logits.abs()
    return output


def shift_the_last_state(part, args, output):
    output.last_hidden_state = output.last_hidden_state + 0.2
    return output


def swap_tokens_of_the_last_state(part, args, output):
    output.last_hidden_state = output.last_hidden_state.roll(1, 1)
    return output


MODIFYING = {
    "a layer, all tokens": ("model.layers.1", add_to_all, False),
    "a layer, its last token": ("model.layers.0", add_to_the_last_token, False),
    "a layer, over its tokens": ("model.layers.0", centre_over_tokens, False),
    "the MLP": ("model.layers.0.mlp", add_to_all, False),
    "the MLP's last token": ("model.layers.1.mlp", add_to_the_last_token, False),
    "keys": ("model.layers.1.self_attn.k_proj", add_to_all, False),
    "keys, over tokens": ("model.layers.1.self_attn.k_proj", centre_over_tokens, False),
    "z": ("model.layers.1.self_attn.o_proj", scale_input, True),
    "the MLP's hidden layer, moved": ("model.layers.0.mlp.down_proj", shift_positions, True),
    "the input of a layer": ("model.layers.1", scale_input, True),
    "the embedding": ("model.embed_tokens", add_to_all, False),
    "the final norm": ("model.norm", add_to_all, False),
    "the final norm, over tokens": ("model.norm", centre_over_tokens, False),
    "the final norm's input": ("model.norm", shift_input, True),
    "the unembedding": ("lm_head", forbid_a_token, False),
    "the unembedding's input": ("lm_head", scale_input, True),
    "the body": ("model", shift_the_last_state, False),
    "the body, over tokens": ("model", swap_tokens_of_the_last_state, False),
    "the whole model": ("", square_the_logits, False),
}


@pytest.mark.parametrize("where", MODIFYING)
def test_hooks_that_change_something_are_obeyed_and_are_still_there_afterwards(where):
    module = fresh()
    model = cp.open_model(module)
    pairs = PAIRS.take([0])  # one length: where a last token is changed, padding would be
    before = numbers(run_model("auto", model, pairs, PATCHES, metric=list(METRICS)))
    path, hook, is_pre = MODIFYING[where]
    part = module.get_submodule(path)
    handle = part.register_forward_pre_hook(hook) if is_pre else part.register_forward_hook(hook)
    state = state_of(module)
    got = run_model("auto", model, pairs, PATCHES, metric=list(METRICS))
    assert_agree(got, run_model("reference", model, pairs, PATCHES, metric=list(METRICS)))
    assert not np.allclose(numbers(got), before)
    assert_unchanged(state, module)
    handle.remove()
    again = run_model("auto", model, pairs, PATCHES, metric=list(METRICS))
    assert tier_of(again) == "wavefront"
    np.testing.assert_allclose(numbers(again), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ["auto", "restart", "rows"])
def test_a_forward_of_ones_own_on_an_instance_is_obeyed(engine):
    module = fresh()
    model = cp.open_model(module)
    part = module.model.layers[1].mlp
    own = part.forward
    mine = part.forward = lambda x: 1.5 * own(x)
    got = run_model(engine, model, PAIRS, PATCHES)
    assert_agree(got, run_model("reference", model, PAIRS, PATCHES))
    assert vars(part)["forward"] is mine
    del part.forward
    without = numbers(run_model(engine, model, PAIRS, PATCHES))
    assert not np.allclose(without, numbers(got))
    np.testing.assert_allclose(without, numbers(run_model("reference", model, PAIRS, PATCHES)), rtol=1e-10)


def in_threads(*jobs):
    """Run functions in a thread each, all starting together; return their futures."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return [threads.submit(run, job) for job in jobs]


def test_experiments_in_threads_on_one_model_do_not_disturb_each_other_even_if_one_fails():
    module = fresh(layers=3).train()
    model = cp.open_model(module)
    others = random_pairs(22, 4, "equal")
    failing = cp.metric(lambda outputs, pairs: outputs.distribution[:, 99], name="failing", position=-1)
    jobs = [
        lambda: [run_model("wavefront", model, PAIRS, PATCHES, metric=list(METRICS)) for _ in range(3)],
        lambda: [run_model("wavefront", model, others, PATCHES[:3], direction="noise") for _ in range(3)],
        lambda: [run_model("rows", model, others, PATCHES[3:]) for _ in range(3)],
        lambda: run_model("wavefront", model, PAIRS, PATCHES, metric=failing),
    ]
    alone = [job() for job in jobs[:3]]
    before = state_of(module)
    with unchecked():  # a setting of the process, which threads must not put back one by one
        together = in_threads(*jobs)
    assert_unchanged(before, module)
    assert isinstance(together[3].exception(), IndexError)
    for got, wanted in zip(together[:3], alone, strict=True):
        for one, other in zip(got.result(), wanted, strict=True):
            np.testing.assert_array_equal(numbers(one), numbers(other))


def test_experiments_in_threads_on_two_models_run_side_by_side():
    models = [cp.open_model(fresh(seed=seed)) for seed in (1, 2)]
    jobs = [lambda model=model: numbers(run_model("wavefront", model, PAIRS, PATCHES)) for model in models]
    alone = [job() for job in jobs]
    with unchecked():
        together = in_threads(*jobs)
    for got, wanted in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got.result(), wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_reduced_precision_of_products_is_not_used_and_is_left_as_it_was(engine):
    model = cp.open_model(fresh(dtype=torch.float32, heads=8))
    pairs = random_pairs(23, 8, "equal")
    wanted = numbers(run_model(engine, model, pairs, PATCHES))
    seen = set()

    def see(name, args, result):
        if name in ("linear", "matmul", "addmm", "bmm", "baddbmm"):
            seen.add((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with Watch(see):
            got = numbers(run_model(engine, model, pairs, PATCHES))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(got, wanted)
    assert seen == {("highest", False)}
