import copy
import gc
import threading

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear
from torch.overrides import _get_current_function_mode_stack

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine import delta as delta_module
from causalpatch.engine.delta import DeltaLinears, recording
from causalpatch.engine.delta_gain import gain
from causalpatch.engine.products import Casts, is_possible, prepare
from causalpatch.testing.tiny import tiny_model
from tiers import quickly
from worlds import FIRST

PRODUCTS = ["bf16", "bf16x3", "int8"]
EVERY = pytest.mark.parametrize("product", PRODUCTS)


def n_calls(delta):
    """Return how many linear calls were recorded and will be replayed by differences."""
    return sum(record.x is not None for each in delta._weights.values() for record in each.records)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield
    assert _get_current_function_mode_stack() == []


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, seed=0):
    stream = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=stream) / parameter.shape[-1] ** 0.5)
    return module


class Conv(nn.Module):
    """A linear map as GPT-2 writes it."""

    def __init__(self, n_in, n_out, *, beta=1, alpha=1, as_method=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.beta, self.alpha, self.as_method = beta, alpha, as_method

    def forward(self, x):
        rows = x.view(-1, x.shape[-1])
        if self.as_method:
            y = self.bias.addmm(rows, self.weight, beta=self.beta, alpha=self.alpha)
        else:
            y = torch.addmm(self.bias, rows, self.weight, beta=self.beta, alpha=self.alpha)
        return y.view(*x.shape[:-1], len(self.bias))


class Layer(nn.Module):
    """Queries, keys and values of one input, attention of a row to itself and all heads, and two further maps."""

    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(width, 4 * width), Conv(4 * width, width)

    def forward(self, x):
        norm = layer_norm(x, x.shape[-1:])
        q, k, v = (part(norm).view(*x.shape[:-1], 4, x.shape[-1] // 4) for part in (self.q, self.k, self.v))
        z = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + z.reshape(x.shape)
        return x + self.down(gelu(self.up(layer_norm(x, x.shape[-1:]))))


def recorded(module, base, product="bf16", **options):
    delta = DeltaLinears(Casts(), product, min_weights=0, **options)
    with delta.record(base.shape[:-1].numel()):
        output = module(base)
    return delta, output


def replayed(delta, module, x, index, **options):
    with delta.replay(torch.as_tensor(index), **options):
        return module(x)


def bound_of(product, difference, weight):
    """Return how far each number of ``difference @ weight.T`` may be off, by the formats' definitions."""
    d, w = difference.double().abs(), weight.double().abs()
    both = d @ w.T
    if product == "bf16":
        exact = (difference.double() @ weight.double().T).abs()
        off = (2**-7 + 2**-16) * both
        return off + 2**-8 * (exact + off)
    if product == "bf16x3":
        return 2**-14 * both
    d_step, w_step = d.amax(1, keepdim=True) / 127, w.amax(1, keepdim=True) / 127
    return (d_step * w.sum(1) + d.sum(1, keepdim=True) * w_step.T) / 2 + d.shape[1] * d_step * w_step.T / 4


@EVERY
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(2, 70), st.integers(1, 40)),
    distance=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    form=st.sampled_from(["linear", "unbiased", "conv", "scaled"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_errors_stay_within_what_the_number_format_allows(product, shape, distance, form, seed):
    n_rows, n_in, n_out = shape
    scale, bias_scale = (1.5, 0.5) if form == "scaled" else (1.0, 1.0)
    module = filled(
        nn.Linear(n_in, n_out, bias=form == "linear")
        if form in ("linear", "unbiased")
        else Conv(n_in, n_out, beta=bias_scale, alpha=scale, as_method=form == "scaled"),
        seed,
    )
    base = numbers(3, n_in, seed=seed)
    index = torch.arange(n_rows) % 3
    x = base[index] + distance * numbers(n_rows, n_in, seed=seed + 1)
    delta, _ = recorded(module, base, product)
    found = replayed(delta, module, x[None], index)
    assert n_calls(delta) == 1
    assert found.shape == (1, n_rows, n_out)
    weight = module.weight if form in ("linear", "unbiased") else module.weight.T
    exact = scale * x.double() @ weight.double().T
    exact += 0 if module.bias is None else bias_scale * module.bias.double()
    rounding = 2**-20 * (x.abs() + base[index].abs() + 1).double() @ weight.double().abs().T + 1e-5
    allowed = scale * bound_of(product, x - base[index], weight) + rounding
    assert ((found[0].double() - exact).abs() <= allowed).all()


@EVERY
@pytest.mark.parametrize("module", [nn.Linear(24, 40), Conv(24, 40), Layer(24)])
def test_rows_that_equal_their_base_rows_return_them_bit_for_bit(product, module):
    base = numbers(5, 24)
    delta, output = recorded(filled(module), base, product)
    index = torch.tensor([4, 0, 0, 3, 2, 1, 4])
    assert torch.equal(replayed(delta, module, base[index][None], index)[0], output[index])


@pytest.mark.parametrize(("product", "share"), [("bf16", 1e-2), ("bf16x3", 1e-4), ("int8", 5e-2)])
def test_through_a_layer_rounding_is_relative_to_the_difference(product, share):
    layer = filled(Layer(64))
    double, half = copy.deepcopy(layer).double(), copy.deepcopy(layer).bfloat16()
    base = numbers(1, 6, 64)
    index = torch.arange(30) % 6
    delta, output = recorded(layer, base, product)
    for distance in (1e-3, 1e-1):
        x = base[:, index] + distance * numbers(1, 30, 64, seed=1)
        exact = double(x.double()) - double(base.double())[:, index]
        off = (replayed(delta, layer, x, index) - output[:, index]).double() - exact
        plain = (half(x.bfloat16()) - half(base.bfloat16())[:, index]).double() - exact
        # The last term is float32's own rounding, which is relative to the activation.
        assert off.norm() < (share + 1e-6 / distance) * exact.norm()
        assert off.norm() < plain.norm() / (100 if distance == 1e-3 else 2)


def test_a_poor_base_row_costs_precision_and_not_truth():
    layer = filled(nn.Linear(64, 64))
    base, x = numbers(4, 64), numbers(3, 64, seed=1)
    delta, _ = recorded(layer, base, "bf16x3")
    for index in ([0, 1, 2], [3, 3, 3]):
        torch.testing.assert_close(replayed(delta, layer, x, index), layer(x), atol=1e-4, rtol=0)


@EVERY
def test_rows_in_blocks_and_no_rows_at_all(product, monkeypatch):
    layer = filled(Layer())
    base = numbers(4, 16)
    index = torch.arange(11) % 4
    x = base[index] + 0.1 * numbers(11, 16, seed=1)
    delta, _ = recorded(layer, base, product)
    whole = replayed(delta, layer, x, index)
    monkeypatch.setattr(delta_module, "_rows_at_once", lambda device: 4)
    torch.testing.assert_close(replayed(delta, layer, x, index), whole, atol=1e-3, rtol=0)
    assert replayed(delta, layer, x[:0], index[:0]).shape == (0, 16)


def test_maps_of_one_input_share_its_copy():
    layer = filled(Layer())
    delta, _ = recorded(layer, numbers(5, 16))
    assert n_calls(delta) == 5
    n_inputs, n_outputs = 16 + 16 + 64, 3 * 16 + 64 + 16
    assert delta.n_bytes == 4 * 5 * (n_inputs + n_outputs)


def test_an_input_changed_in_place_between_two_maps_is_read_anew():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone()
            one = self.one(x)
            return one + self.two(x.mul_(2))

    module = filled(Changing())
    base, x = numbers(2, 8), numbers(2, 8, seed=1)
    delta, _ = recorded(module, base, "bf16x3")
    torch.testing.assert_close(replayed(delta, module, x, [0, 1]), module(x), atol=1e-3, rtol=0)


def test_outputs_changed_in_place_afterwards_leave_the_record_alone():
    layer = filled(nn.Linear(8, 8))
    base = numbers(2, 8)
    delta, output = recorded(layer, base)
    kept = output.clone()
    output.zero_()
    base_before = base.clone()
    base.zero_()
    first = replayed(delta, layer, base_before, [0, 1])
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(replayed(delta, layer, base_before, [0, 1]), kept)


class Calls(nn.Module):
    """Runs its maps as often as it is told."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.order = [self.one, self.two]

    def forward(self, x):
        for part in self.order:
            x = part(x)
        return x


def test_a_weight_used_twice_has_two_records():
    module = filled(Calls())
    module.order = [module.one, module.one]
    base, x = numbers(2, 8), numbers(2, 8, seed=1)
    delta, _ = recorded(module, base, "bf16x3")
    assert n_calls(delta) == 2
    torch.testing.assert_close(replayed(delta, module, x, [0, 1]), module(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("order", "what"),
    [
        (("one",), "a layer called fewer linear maps on patched rows than on base rows"),
        (("one", "two", "one"), "a linear map ran more often on patched rows than on base rows"),
        (("one", "three"), "a linear map ran on patched rows and not on base rows"),
    ],
)
def test_other_calls_than_those_recorded_are_refused(order, what):
    module = filled(Calls())
    module.three = nn.Linear(8, 8)
    delta, _ = recorded(module, numbers(2, 8))
    module.order = [getattr(module, name) for name in order]
    with pytest.raises(ModelUnsupported, match=what):
        replayed(delta, module, numbers(2, 8), [0, 1])


def test_the_message_names_the_map_and_what_to_type():
    module = filled(nn.Linear(8, 4))
    delta, _ = recorded(module, numbers(2, 8))
    with pytest.raises(ModelUnsupported) as error:
        replayed(delta, module, numbers(3, 8), [0, 1])
    assert str(error.value) == (
        "a linear map got (3, 8) for 2 rows\n"
        "  weight    (4, 8)\n"
        "  input     (3, 8)\n"
        "  recorded  rows differ\n"
        '  fix: measure in float32: leave out precision="screen"'
    )


def test_only_some_modules_may_run_where_that_is_said():
    module = filled(Calls())
    base, x = numbers(2, 8), numbers(2, 8, seed=1)
    delta, _ = recorded(module, base, "bf16x3")
    found = replayed(delta, module.two, x, [0, 1], is_partial=True)
    torch.testing.assert_close(found, module.two(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_changed_since_the_record_are_refused(name):
    module = filled(nn.Linear(8, 8))
    delta, _ = recorded(module, numbers(2, 8))
    getattr(module, name).mul_(1.5)
    with pytest.raises(ModelUnsupported, match="a weight, bias or scale changed"):
        replayed(delta, module, numbers(2, 8), [0, 1])


def test_a_gradient_is_refused():
    module = filled(nn.Linear(8, 8))
    delta, _ = recorded(module, numbers(2, 8))
    with torch.enable_grad(), pytest.raises(ModelUnsupported, match="delta linears have no gradient"):
        replayed(delta, module, numbers(2, 8), [0, 1])


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 8, 8))

    def forward(self, x):
        return linear(x, self.weight[1])


class Odd(nn.Parameter):
    """A parameter of a class of its own, as quantised ones are."""


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Odd(torch.zeros(8, 8), requires_grad=False)

    def forward(self, x):
        return linear(x, self.weight)


class Matmul(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x):
        return x @ self.weight + torch.matmul(x, self.weight) + torch.einsum("ri,io->ro", x, self.weight)


class Residual(nn.Module):
    """Adds a product to a tensor that is no bias, and writes one to a place that it was given."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        there = torch.empty_like(x)
        torch.addmm(self.bias, x, self.weight, out=there)
        return torch.addmm(x, x, self.weight) + there


class Experts(nn.Module):
    """Sends the rows with a positive first number through one map."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, x):
        y = x.clone()
        y[x[:, 0] > 0] = self.gate(x[x[:, 0] > 0])
        return y


@pytest.mark.parametrize("module", [Sliced(), Quantised(), Matmul(), Residual(), Experts()])
def test_maps_that_are_not_plain_stay_as_they_are(module):
    filled(module)
    base, x = numbers(6, 8), numbers(6, 8, seed=1)
    delta, _ = recorded(module, base)
    assert n_calls(delta) == 0
    assert torch.equal(replayed(delta, module, x, torch.arange(6)), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_in_other_precisions_stay_as_they_are(dtype):
    module = filled(nn.Linear(8, 8)).to(dtype)
    base, x = numbers(3, 8).to(dtype), numbers(3, 8, seed=1).to(dtype)
    delta, _ = recorded(module, base)
    assert n_calls(delta) == 0
    assert torch.equal(replayed(delta, module, x, [0, 1, 2]), module(x))


def test_under_autocast_maps_stay_as_they_are():
    module = filled(nn.Linear(8, 8))
    base, x = numbers(3, 8), numbers(3, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta, _ = recorded(module, base)
        assert delta.left == {"output is not float32": 1}
        assert torch.equal(replayed(delta, module, x, [0, 1, 2]), module(x))


def test_small_maps_stay_as_they_are_and_are_counted():
    layer = filled(Layer(16))
    delta = DeltaLinears(Casts(), "bf16", min_weights=16 * 64)
    base, x = numbers(2, 16), numbers(2, 16, seed=1)
    with delta.record(2):
        layer(base)
    assert n_calls(delta) == 2
    assert delta.left == {"small": 3}
    torch.testing.assert_close(replayed(delta, layer, x, [0, 1]), layer(x), atol=0.1, rtol=0)


def test_an_exception_leaves_no_mode_and_the_former_record():
    module = filled(nn.Linear(8, 8))
    base = numbers(2, 8)
    delta, output = recorded(module, base)
    hook = module.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), delta.record(2):
        module(2 * base)
    hook.remove()
    assert _get_current_function_mode_stack() == []
    with pytest.raises(ZeroDivisionError), delta.replay(torch.tensor([0, 1])):
        raise ZeroDivisionError
    assert _get_current_function_mode_stack() == []
    assert torch.equal(replayed(delta, module, base, [0, 1]), output)


def test_other_threads_run_the_model_as_it_is():
    module = filled(nn.Linear(32, 32))
    base, x = numbers(2, 32), numbers(2, 32, seed=1)
    delta, _ = recorded(module, base, "int8")
    found = []
    with delta.replay(torch.tensor([0, 1])):
        thread = threading.Thread(target=lambda: found.append(module(x).detach()))
        thread.start()
        thread.join()
        here = module(x)
    assert torch.equal(found[0], module(x))
    assert not torch.equal(here, module(x))


def test_two_threads_replay_one_record_with_their_own_rows():
    layer = filled(Layer(32))
    base = numbers(8, 32)
    delta, output = recorded(layer, base)
    wrong = []

    def work(offset):
        index = (torch.arange(50) + offset) % 8
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(replayed(delta, layer, base[index], index), output[index]):
                    wrong.append(offset)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_are_cast_once_shared_and_dropped_with_the_weight():
    casts = Casts()
    layer = filled(nn.Linear(8, 8))
    first = casts.of(layer.weight, "int8")
    assert casts.of(layer.weight, "int8") is first
    assert casts.of(layer.weight, "int8", is_transposed=True) is not first
    assert casts.of(layer.weight, "bf16") is not first
    assert len(casts) == 3
    layer.weight.mul_(2)
    again = casts.of(layer.weight, "int8")
    assert again is not first
    assert torch.equal(again[1], 2 * first[1])
    layer.weight.data = layer.weight.data.clone()
    assert casts.of(layer.weight, "int8") is not again
    del layer
    gc.collect()
    assert len(casts) == 0


def test_rows_of_zeros_have_no_steps_of_zero():
    steps, size = prepare(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), "int8")
    assert steps.tolist() == [[0, 0], [64, -127]]
    torch.testing.assert_close(size, torch.tensor([[1.0], [2 / 127]]))


def test_high_and_low_parts_hold_sixteen_bits():
    x = numbers(100, 10)
    high, low = prepare(x, "bf16x3")
    assert ((high.double() + low.double() - x).abs() <= 2**-16 * x.abs()).all()


def test_bytes_are_multiplied_on_processors_only():
    assert is_possible("bf16", torch.device("cuda"), 8, 8)
    assert not is_possible("int8", torch.device("cuda"), 8, 8)
    assert is_possible("int8", torch.device("cpu"), 300, 7)


@EVERY
def test_the_gain_is_measured(product):
    assert 0 < gain(product, rows=8, n_in=16, n_out=16) < 100


def test_no_gain_is_claimed_where_the_product_is_not_possible():
    assert gain("int8", device="meta") == 0


@pytest.mark.parametrize("family", quickly([*FIRST, "qwen2", "gpt_neox_sequential"], *FIRST))
def test_layers_recorded_in_the_models_own_run_replay_in_every_family(family):
    net = tiny_model(family, dtype=torch.float32)
    layers = list(next(part for part in net.modules() if isinstance(part, nn.ModuleList)))
    deltas = {layer: DeltaLinears(Casts(), "bf16x3", min_weights=0) for layer in layers}
    calls = {}
    hooks = [
        layer.register_forward_pre_hook(lambda part, *call: calls.setdefault(part, call), with_kwargs=True)
        for layer in layers
    ]
    with recording(deltas, 2 * 5):
        net(torch.arange(10).view(2, 5) % 7 + 3, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, delta in deltas.items():
        assert "forward" not in layer.__dict__
        assert n_calls(delta) == sum(type(part).__name__ in ("Linear", "Conv1D") for part in layer.modules())
        args, kwargs = calls[layer]
        hidden = args[0] if args else kwargs["hidden_states"]
        change = 1e-2 * numbers(*hidden.shape)

        def stream(change, layer=layer, args=args, kwargs=kwargs, hidden=hidden):
            if args:
                output = layer(hidden + change, *args[1:], **kwargs)
            else:
                output = layer(**kwargs | {"hidden_states": hidden + change})
            return output[0] if isinstance(output, tuple) else output

        moved = stream(change) - stream(0 * change)
        with delta.replay(torch.arange(10)):
            found = stream(change)
        assert (found - stream(change)).norm() < 1e-3 * moved.norm()


def test_a_failed_base_run_leaves_layers_as_they_were_and_own_forwards_too():
    chain = filled(Calls())
    mine = chain.one.forward = chain.one.forward
    delta, failing = DeltaLinears(Casts(), min_weights=0), DeltaLinears(Casts(), min_weights=0)
    with pytest.raises(RuntimeError), recording({chain.one: delta, chain.two: failing}, 2):
        chain.two(chain.one(numbers(2, 8))[:, :3])
    assert chain.one.__dict__["forward"] is mine
    assert "forward" not in chain.two.__dict__
    assert (n_calls(delta), n_calls(failing)) == (1, 0)
