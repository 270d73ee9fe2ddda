import itertools
import threading

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import causalpatch as cp
from causalpatch.base.errors import NotFinite, SiteUnsupported
from causalpatch.engine import prove, require_proofs
from causalpatch.sites import NAMES
from causalpatch.testing.tiny import FAMILY_NAMES, tiny_model
from toys import hooks_of, prompts
from worlds import FIRST, LACKS

PAIRS = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([8, 9, 10], [8, 11, 10]))
ALL = [name for name in NAMES if name != "module"]


class HalfLayer(LlamaDecoderLayer):
    """Adds half of what its sublayers return, as Granite does, which Llama's table does not know."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + 0.5 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)


class Gated(torch.nn.Linear):
    """An output projection that scales what it is given first, so that its input is not what it projects."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.mean()


def doctored(change):
    module = tiny_model("llama", seed=11)
    change(module)
    return cp.open_model(module)


def halve(module):
    module.model.layers[1].__class__ = HalfLayer


def gate(module):
    module.model.layers[0].self_attn.o_proj.__class__ = Gated


def rescale(module):
    module.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda part, args: (args[0] * 1.5,))


def cut(module):
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight.zero_()


def shake(module):
    module.model.layers[0].mlp.register_forward_hook(lambda part, args, out: out + 1e-9 * torch.rand_like(out))


def in_every_precision():
    """Return every family in every precision; laws try all in float64, and the page of families all in float32."""
    quick = {(family, torch.bfloat16) for family in (*FIRST, "opt_post_norm", "deepseek_v3", "bloom", "granite")}
    quick |= {("gpt2", torch.float64), ("gpt2", torch.float32), ("llama", torch.float64), ("llama", torch.float32)}
    for case in itertools.product(FAMILY_NAMES, (torch.float64, torch.float32, torch.bfloat16)):
        yield pytest.param(*case, marks=() if case in quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "dtype"), in_every_precision())
def test_every_site_of_every_family_passes_in_every_precision(family, dtype):
    model = cp.open_model(tiny_model(family, dtype=dtype))
    for name in ALL:
        proof = prove(model, name)
        if name in model.shape.refused:
            assert proof.passed == ()
            assert proof.failure == model.shape.refused[name]
        else:
            assert proof.failure is None, proof
            assert proof.passed[:2] == ("identity", "edit")
    if not {"resid_post", "attn_out"} & LACKS[family]:
        assert prove(model, "resid_post").passed == ("identity", "edit", "whole", "algebra")
        assert prove(model, "attn_out").passed == ("identity", "edit", "algebra")
    if "z" not in LACKS[family]:
        assert prove(model, "z").passed == ("identity", "edit", "algebra")
        for name in ("scores", "pattern"):
            assert prove(model, name).passed == ("identity", "edit", "algebra", "kernel")
    for name in {"q_rot", "k_rot"} - LACKS[family]:
        assert prove(model, name).passed == ("identity", "edit", "kernel")
    for name in {"mlp_pre", "mlp_gate"} - LACKS[family]:
        assert prove(model, name).passed == ("identity", "edit", "algebra")


def test_falcon_with_slopes_has_no_patterns_under_the_fused_kernel_which_adds_them_otherwise():
    module = tiny_model("falcon_sequential", dtype=torch.float32)
    assert prove(cp.open_model(module), "pattern").failure is None
    module = tiny_model("falcon_sequential", dtype=torch.float32)
    module.config._attn_implementation = "sdpa"
    model = cp.open_model(module)
    assert prove(model, "z").failure is None
    assert prove(model, "pattern").failure.startswith(
        "kernel: attention step by step against the model's own kernel (sdpa) is off by"
    )


def residual_added_twice(module):
    """Let what attention returns be added to the stream inside and outside of it, as no BLOOM does."""
    module.transformer.h[1].self_attention.register_forward_hook(lambda _, args, out: (out[0] + args[1], *out[1:]))


def multiplied_again(module):
    """Let a layer multiply what it adds once more than its attribute says."""
    module.model.layers[0].register_forward_hook(lambda _, args, out: args[0] + 0.9 * (out - args[0]))


def other_heads(module):
    """Let attention's output projection be given the heads in another order."""
    module.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0].roll(1, -1),))


def other_weights(module):
    """Let attention hand on something else than its weights times the values."""
    module.transformer.h[0].attn.out_proj.register_forward_pre_hook(lambda _, args: (args[0] * 1.01,))


def norm_moved(module):
    """Let the stream between the sublayers be something else than the first norm's output."""
    module.model.decoder.layers[0].final_layer_norm.register_forward_pre_hook(lambda _, args: (args[0] * 0.9,))


@pytest.mark.parametrize(
    ("family", "change", "name", "reason"),
    [
        ("bloom", residual_added_twice, "resid_post", "algebra: resid_pre + attn_out + mlp_out in layer 1 is off by"),
        ("deepseek_v3", other_heads, "z", "algebra: z.0.0 against attention is off by"),
        ("gptj", other_weights, "z", "algebra: z.0.0 against attention is off by"),
        (
            "opt_post_norm",
            norm_moved,
            "mlp_out",
            "algebra: resid_mid + mlp_out in front of final_layer_norm in layer 0",
        ),
        ("granite", multiplied_again, "mlp_out", "algebra: resid_pre + attn_out + mlp_out in layer 0 is off by"),
    ],
)
def test_a_model_that_is_not_what_a_special_family_says_is_refused_with_the_reason(family, change, name, reason):
    module = tiny_model(family, seed=11)
    assert prove(cp.open_model(module), name).failure is None
    module = tiny_model(family, seed=11)
    change(module)
    assert prove(cp.open_model(module), name).failure.startswith(reason)


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (halve, "resid_post", "algebra: resid_pre + attn_out + mlp_out in layer 1 is off by"),
        (halve, "attn_out", "algebra: resid_pre + attn_out + mlp_out in layer 1 is off by"),
        (halve, "mlp_out", "algebra: resid_pre + attn_out + mlp_out in layer 1 is off by"),
        (gate, "head_out", "algebra: the sum of head_out.0 is off by"),
        (rescale, "z", "algebra: z.0.0 against attention is off by"),
        (cut, "mlp_post", "edit: changing mlp_post.0.0 does not change the logits"),
        (shake, "q", "identity: writing q.0.0 back changes the logits"),
    ],
)
def test_a_model_that_is_not_what_its_family_says_is_refused_with_the_reason(change, name, reason):
    model = doctored(change)
    assert prove(model, name).failure.startswith(reason)
    site = f"{name}.0.0" if NAMES[name].unit_axis else f"{name}.0"
    with pytest.raises(SiteUnsupported, match=f"site '{name}' failed its proof") as caught:
        cp.Experiment(model, PAIRS).run([site])
    assert dict(caught.value.facts)["failed"].startswith(reason)
    assert hooks_of(model.module) <= 1


def test_what_a_doctored_model_still_does_as_its_family_says_can_be_patched():
    model = doctored(halve)
    effects = cp.Experiment(model, PAIRS).run(["z.0.0", "resid_pre.1", "q.1.2"])
    assert (effects.effect().values != 0).all()


def test_proofs_are_made_once_for_a_module_however_often_it_is_opened():
    module = tiny_model("qwen2", seed=12)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    first = prove(cp.open_model(module), "resid_mid")
    n_first = len(calls)
    assert n_first > 3
    assert prove(cp.open_model(module), "resid_mid") is first
    assert len(calls) == n_first
    prove(cp.open_model(module), "resid_pre")
    assert len(calls) > n_first


def test_the_attention_kernel_is_put_back_whatever_happens():
    module = tiny_model("llama", dtype=torch.float32, seed=13)
    module.set_attn_implementation("sdpa")
    prove(cp.open_model(module), "z")
    assert module.config._attn_implementation == "sdpa"
    assert cp.open_model(module).attention == "sdpa"
    broken = tiny_model("llama", dtype=torch.float32, seed=14)
    before = broken.config._attn_implementation
    calls = []

    def fail(*_):
        calls.append(broken.config._attn_implementation)
        if calls[-1] != before:
            raise KeyboardInterrupt

    broken.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        prove(cp.open_model(broken), "z")
    assert calls[-1] != before
    assert broken.config._attn_implementation == before


def test_two_threads_may_prove_and_run_one_model_at_the_same_time():
    for seed in range(3):
        model = cp.open_model(tiny_model("llama", seed=20 + seed))
        done, start = [], threading.Barrier(2)

        def work(name, model=model, start=start, done=done):
            start.wait(10)
            require_proofs(model, [name])
            done.append(cp.Experiment(model, PAIRS).run([f"{name}.0.0", f"{name}.1.1"]))

        threads = [threading.Thread(target=work, args=(name,)) for name in ("z", "v")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == 2


def test_a_model_that_gives_nan_cannot_be_proven():
    def spoil(module):
        with torch.no_grad():
            module.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan

    with pytest.raises(NotFinite, match="NaN or infinite logits"):
        prove(doctored(spoil), "z")


def test_modules_need_no_proof():
    model = doctored(halve)
    calls = []
    model.module.register_forward_hook(lambda *_: calls.append(1))
    require_proofs(model, ["module"])
    assert calls == []


def test_a_trial_that_could_not_be_made_is_made_again():
    model = doctored(lambda module: None)
    is_disturbed = [True]

    class Late(LlamaDecoderLayer):
        """Runs its MLP twice for a while, as another thread's call would have it look."""

        def forward(self, hidden_states, *args, **kwargs):
            if is_disturbed[0]:
                self.mlp(hidden_states)
            return super().forward(hidden_states, *args, **kwargs)

    for layer in model.module.model.layers:
        layer.__class__ = Late
    assert "ambiguous" in prove(model, "mlp_out").failure
    is_disturbed[0] = False
    assert prove(model, "mlp_out").failure is None
