"""The graph engine: what it measures equals full forwards, what it cannot run is refused before it measures."""

import gc
import importlib.util
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine import Cost, Gauge, Job, graph, targets_of
from causalpatch.engine.export import export
from causalpatch.engine.fit import fit_all_means
from causalpatch.engine.reference import measure_rows
from causalpatch.engine.subgraph import Subgraph, gather
from causalpatch.models import Port
from causalpatch.patches import Constant, Function, Identity, Intervention, Mean
from causalpatch.results.status import Status
from toys import (
    Both,
    ByKeyword,
    Chain,
    InPlace,
    Narrow,
    Pictures,
    Pipe,
    Pooled,
    Twice,
    hooks_of,
    opened,
    prompts,
    vectors,
)
from worlds import random_pairs, tiny_world

FIRST, SECOND = "module(first).output", "module(second).output"
CONV1 = "module(conv1).output axes=(channel,height,column)"
CONV2 = "module(conv2).output axes=(channel,height,column)"
PROMPTS = prompts(
    ([1, 2, 3, 4], [1, 5, 3, 9]),
    ([1, 2, 3], [4, 2, 3]),
    ([7, 2, 3, 8, 9, 2], [7, 2, 4, 8, 9, 1]),
    ([7, 2, 3, 8], [7, 2, 4, 8]),
    answer=1,
    wrong=2,
)
EVEN = prompts(([1, 2, 3, 4], [1, 5, 3, 9]), ([1, 2, 3, 3], [4, 2, 3, 3]), answer=1, wrong=2)


def job_of(model, pairs, asked, metrics=("logit_difference",), **settings):
    targets = [targets_of(model, Intervention.of(each)) for each in asked]
    named = [cp.metrics.METRICS[name] if isinstance(name, str) else name for name in metrics]
    return Job(model, pairs, targets, "corrupt", **settings), Gauge(named, pairs, model)


def tabulate(measure, job, gauge):
    """Return values, status and cost; the last two interventions are the source and the base run."""
    shape = (len(job.interventions) + 2, len(job.pairs))
    values, status, cost = np.full((len(gauge.metrics), *shape), np.nan), np.full(shape, 255), Cost()
    for block in measure(job, gauge, fit_all_means(job), cost):
        assert (status[block.interventions, block.pairs] == 255).all()
        values[:, block.interventions, block.pairs] = block.values
        status[block.interventions, block.pairs] = block.status
    assert (status != 255).all()
    return values, status, cost


def check(model, pairs, asked, tolerance=1e-10, **settings):
    """Compare the graph engine with full forwards; return its status."""
    job, gauge = job_of(model, pairs, asked, **settings)
    assert graph.why_not(job, gauge) is None
    got, status, _ = tabulate(graph.measure, job, gauge)
    wanted, known, _ = tabulate(measure_rows, job, gauge)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)
    measured = status != Status.DERIVED
    assert (status[measured] == known[measured]).all()
    patched = wanted[:, : len(asked)]
    assert np.nanmax(np.abs(patched - wanted[:, -1:])) > 1e-3
    return status


def refused(model, pairs, asked, match):
    """The engine refuses, and has not measured anything until then."""
    job, gauge = job_of(model, pairs, asked)
    # The first thing asked of it is a block: none comes.
    with pytest.raises(ModelUnsupported, match=match) as caught:
        next(graph.measure(job, gauge, fit_all_means(job), Cost()))
    assert len(str(caught.value).splitlines()) <= 8
    return str(caught.value)


class Mlp(nn.Module):
    """Three linear layers with a dropout and an identity between them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.3), nn.Identity(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x)


class Block(nn.Module):
    """A residual block whose activations work in place."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.short = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.after = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.after(y)


class ResNet(nn.Module):
    """A residual network with batch norm on pictures of 6 x 6."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.three = nn.Conv2d(1, 3, 3, padding=1), Block(3, 3), Block(3, 4), Block(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.three(self.two(self.one(self.stem(x)))).mean((2, 3)))


def resnet():
    model = opened(ResNet())
    for number, part in enumerate(model.module.modules()):
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.fill_(0.1 * number)
            part.running_var.fill_(1 + 0.1 * number)
    return model


class Attends(nn.Module):
    """Attention written with rows and heads in one axis, learnt positions, and tokens first at the end."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(40, 8), nn.Embedding(16, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids):
        n_rows, n_tokens = input_ids.shape
        x = self.embed(input_ids) + self.place(torch.arange(n_tokens)).expand(n_rows, -1, -1)
        q, k, v = (
            part(x).view(n_rows, n_tokens, 2, 4).transpose(1, 2).reshape(n_rows * 2, n_tokens, 4)
            for part in (self.q, self.k, self.v)
        )
        z = torch.bmm((q @ k.transpose(1, 2)).softmax(-1), v)
        z = z.view(n_rows, 2, n_tokens, 4).transpose(1, 2).reshape(n_rows, n_tokens, 8)
        return self.head((x + self.o(z)).transpose(0, 1)[-1])


@pytest.mark.parametrize("toy", [Chain, InPlace, ByKeyword])
def test_chains_equal_full_forwards(toy):
    asked = [FIRST, "module(second).input", SECOND, [FIRST, SECOND], "module(head).input", "module().input"]
    check(opened(toy()), vectors(5), asked)


@pytest.mark.parametrize("max_rows", [None, 1, 3])
def test_every_kind_of_value_equals_full_forwards(max_rows):
    values = ["zero", Constant(2.0), Mean(), Function(lambda now, new: now * 0.5 + new), Identity(), "source"]
    sites = ("module(layers.0).output", "module(layers.4).input")
    asked = [cp.Patch(site, value) for site in sites for value in values]
    # The later patch sees what the earlier one did.
    later = cp.Patch("module(layers.4).output", Function(lambda now, _: now**2, needs_source=False))
    asked.append([cp.Patch("module(layers.1).output", "source"), later])
    check(opened(Mlp()), vectors(5), asked, metrics=("logit_difference", "kl_divergence"), max_rows=max_rows)


def test_a_dropout_and_an_identity_have_ports_of_their_own():
    """One tensor stands at five ports; which of them is written does not matter here, but each is found."""
    model, pairs = opened(Mlp()), vectors(4)
    sites = ["module(layers.1).output", "module(layers.2).input", "module(layers.3).input", "module(layers.3).output"]
    check(model, pairs, [*sites, "module(layers.4).input"])


def test_an_input_that_others_read_too_is_changed_for_its_module_alone():
    model, pairs = opened(Chain()), vectors(3)
    check(model, pairs, ["module(second).input", FIRST])
    job, gauge = job_of(model, pairs, ["module(second).input", "module(drop).output"])
    (values,) = tabulate(graph.measure, job, gauge)[0]
    assert np.abs(values[0] - values[1]).min() > 1e-3


@pytest.mark.parametrize(
    ("wrap", "unwrap", "second"),
    [
        (lambda a, b: (a, b), lambda both: both, "[1]"),
        (lambda a, b: {"a": a, "b": b}, lambda both: (both["a"], both["b"]), '["b"]'),
        (Both, lambda both: (both.left, both.right), "[1]"),
    ],
)
def test_items_of_containers_are_ports(wrap, unwrap, second):
    whole = [f"module(split).output{second}", f"module(join).input[0]{second}"]
    check(opened(Pipe(wrap, unwrap)), vectors(4), whole)


def test_units_and_pictures_equal_full_forwards():
    asked = [CONV1, f"{CONV1}#1", [f"{CONV1}#0", f"{CONV1}#2"], [f"{CONV1}#1", f"{CONV2}#3"], f"{CONV2}#4"]
    check(opened(Pictures()), vectors(4, shape=(1, 6, 6), n_classes=4), asked)


def test_a_residual_network_with_batch_norm_equals_full_forwards():
    sites = ["stem", "one.conv1", "one.bn2", "two", "two.conv2", "two.short", "three.relu", "three.after", "three"]
    asked = [f"module({path}).{side}" for path in sites for side in ("input", "output")]
    asked += [f"module(three.conv1).output axes=(channel,height,column)#{n}" for n in range(4)]
    check(resnet(), vectors(4, shape=(1, 6, 6), n_classes=4), asked)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_classifier_of_prompts_of_unequal_length(padding_side):
    model = opened(Pooled())
    asked = ["module(mix).output@-1", "module(mix).output@1", "module(embed).output", "module(pool).input axes=(width)"]
    check(model, PROMPTS, [*asked, [asked[1], asked[3]]], padding_side=padding_side)
    check(model, PROMPTS, asked, padding_side=padding_side, max_rows=2)
    assert len(graph._EXPORTS[model.module]) == 1  # one export holds for all lengths


def test_rows_that_share_an_axis_with_heads_are_computed_again():
    sites = ["module(embed).output@1", "module(v).output@2", "module(q).output@-1", "module(k).output@1"]
    check(opened(Attends()), EVEN, [*sites, [sites[1], "module(o).output@-1"], [sites[0], sites[2]]])


def test_a_tensor_whose_rows_share_memory_is_written_row_by_row():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.weight.expand(x.shape[0], -1)

    class Spreads(Chain):
        def __init__(self):
            super().__init__()
            self.spread = Spread()

        def forward(self, x):
            return self.head(torch.tanh(self.first(x)) * self.spread(x))

    unit = "module(spread).output axes=(column)"
    model, pairs = opened(Spreads()), vectors(3)
    for _ in range(2):  # nor is the base run's own value spoilt
        check(model, pairs, [cp.Patch(f"{unit}#{n}", Constant(n)) for n in range(4)] + [FIRST])


def test_two_patches_of_which_one_is_the_others_ancestor():
    asked = [[FIRST, SECOND], [cp.Patch(FIRST, "zero"), SECOND], [SECOND, cp.Patch("module(head).output", "zero")]]
    check(opened(Chain()), vectors(5), asked)


def test_sites_of_a_family_equal_full_forwards():
    model, _ = tiny_world("gpt2", (2, 4, 4, 0))
    at_end = ["z.0.1@-1", "resid_mid.0@-1", "head_out.1.2@-1", "k.1.0@1", "resid_pre.1@-1"]
    pairs = random_pairs(3, 3, "equal")
    check(model, pairs, [*at_end, ["mlp_out.0@-1", "q.1.2@-1"], cp.Patch("mlp_post.1.3@-1", "zero")])


def test_float32_agrees_to_rounding():
    model = cp.open_model(resnet().module.float())
    check(model, vectors(4, shape=(1, 6, 6), n_classes=4), ["module(two).output", "module(three.conv1).output"], 1e-4)


def test_only_what_lies_behind_the_patch_runs_again():
    model = resnet()
    ports = [Port("three.conv2", "output"), Port("stem", "output")]
    exported = export(model, {"x": torch.zeros(3, 1, 6, 6).double()}, ports)

    def count(port):
        names = [str(node.target) for node in Subgraph(exported, [(port, ())])._steps]
        return sum("conv2d" in name for name in names)

    assert [count(port) for port in ports] == [0, 7]
    # Behind the last convolution only the sum with the shortcut is read from outside.
    assert len(Subgraph(exported, [(ports[0], ())]).reads) == 2


def test_nothing_is_left_on_the_module():
    model = resnet()
    module = model.module
    module.train()
    module.one.eval()
    module.stem.weight.requires_grad_(False)
    modes = [part.training for part in module.modules()]
    before = (model.content_hash, hooks_of(module), set(vars(module)), torch.get_float32_matmul_precision())
    check(model, vectors(3, shape=(1, 6, 6), n_classes=4), ["module(two).output"])
    assert [part.training for part in module.modules()] == modes
    assert (model.content_hash, hooks_of(module), set(vars(module)), torch.get_float32_matmul_precision()) == before
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen == ["stem.weight"]
    assert all(p.grad is None and type(p) is nn.Parameter for p in module.parameters())


def test_a_weight_changed_after_the_export_counts():
    model, pairs = opened(Mlp()), vectors(4)
    job, gauge = job_of(model, pairs, ["module(layers.1).output"])
    before = tabulate(graph.measure, job, gauge)[0]
    (exported,) = graph._EXPORTS[model.module]
    with torch.no_grad():
        model.module.layers[4].weight.mul_(-1.5)
    model.module.layers[6].bias = nn.Parameter(torch.ones(3).double())
    check(model, pairs, ["module(layers.1).output"])
    assert np.abs(tabulate(graph.measure, job, gauge)[0] - before).min() > 1e-6
    assert graph._EXPORTS[model.module] == [exported]


@pytest.mark.parametrize(("scale", "changed"), [(2.0, 3.0), (torch.tensor(2.0), torch.tensor(3.0))])
def test_what_the_forward_reads_off_the_module_counts_as_it_is_now(scale, changed):
    class Scaled(Mlp):
        def forward(self, x):
            return self.layers[4:](self.layers[:4](x) * self.scale)

    model, pairs = opened(Scaled()), vectors(4)
    model.module.scale = scale
    check(model, pairs, ["module(layers.1).output"])
    model.module.scale = changed
    check(model, pairs, ["module(layers.1).output"])


def test_a_module_that_was_rebuilt_is_exported_again():
    model, pairs = opened(Mlp()), vectors(4)
    check(model, pairs, ["module(layers.1).output"])
    model.module.layers[4], model.module.layers[6] = nn.Linear(8, 6).double(), nn.Linear(6, 3).double()
    check(model, pairs, ["module(layers.1).output"])
    model.module.layers[1] = nn.ReLU()
    check(model, pairs, ["module(layers.1).output"])
    model.module.float()
    check(cp.open_model(model.module), pairs, ["module(layers.1).output"], 1e-5)
    del model.module.layers[2:4]
    check(cp.open_model(model.module.double()), pairs, ["module(layers.0).output"])


def test_exports_are_kept_per_module_and_go_with_it():
    model, pairs = opened(Chain()), vectors(3)
    check(model, pairs, [FIRST])
    check(model, pairs, [SECOND])
    (exported,) = graph._EXPORTS[model.module]  # the second holds the ports of both
    check(model, pairs, [FIRST])
    assert graph._EXPORTS[model.module] == [exported]
    gone = weakref.ref(model.module)
    del model, exported
    gc.collect()
    assert gone() is None


def test_cells_whose_source_is_the_base_are_derived():
    pairs = prompts(([1, 2, 3], [1, 5, 3]), ([4, 2, 3], [4, 2, 9]), answer=1, wrong=2)
    site = "module(embed).output"
    asked = [f"{site}@0", f"{site}@1", [f"{site}@0", f"{site}@2"], cp.Patch(f"{site}@0", Identity()), f"{site}@0"]
    status = check(opened(Attends()), pairs, asked, n_controls=1)
    is_derived = [[True, True], [False, True], [True, False], [False, False], [False, False]]
    assert (status[:5] == np.where(is_derived, Status.DERIVED, Status.MEASURED)).all()


def test_a_pair_that_lacks_a_position_is_lost_there():
    model, pairs = opened(Pooled()), prompts(([1, 2, 3], [1, 5, 4]), ([4, 2], [4, 3]), answer=1, wrong=2)
    targets = [targets_of(model, Intervention.of(cp.Patch("module(mix).output", column=2)))]
    job, gauge = Job(model, pairs, targets, "corrupt"), Gauge([cp.logit_difference], pairs, model)
    got, status, _ = tabulate(graph.measure, job, gauge)
    assert status[0].tolist() == [Status.MEASURED, Status.UNALIGNED]
    np.testing.assert_allclose(got, tabulate(measure_rows, job, gauge)[0], rtol=0, atol=1e-10)


def test_a_patched_run_that_gives_nan_has_failed():
    broken = cp.Patch(FIRST, Function(lambda now, _: now * torch.nan, needs_source=False))
    job, gauge = job_of(opened(Chain()), vectors(3), [broken, FIRST])
    status = tabulate(graph.measure, job, gauge)[1]
    assert (status[0] == Status.FAILED).all()
    assert (status[1] == Status.MEASURED).all()


def test_rows_are_halved_when_memory_runs_out(monkeypatch):
    sizes, run = [], Subgraph.run

    def narrow(self, base, local, writes):
        sizes.append(len(local))
        if len(local) > 3:
            raise torch.OutOfMemoryError(f"{len(local)} rows")
        return run(self, base, local, writes)

    monkeypatch.setattr(Subgraph, "run", narrow)
    check(opened(Chain()), vectors(5), [FIRST, cp.Patch(FIRST, "zero")])
    assert max(sizes) == 10
    assert min(sizes) <= 3


def test_a_model_that_does_not_fit_beside_its_graph_is_refused(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(graph, "run_base", fail)
    refused(opened(Chain()), vectors(3), [FIRST], "memory runs out while its graph is compared with it")


def test_untouched_runs_alone_need_no_graph():
    job, gauge = job_of(opened(Twice()), vectors(3), [])
    np.testing.assert_array_equal(tabulate(graph.measure, job, gauge)[0], tabulate(measure_rows, job, gauge)[0])


def test_gathered_values_lie_in_memory_as_before():
    index = torch.tensor([2, 0, 1, 1, 2])
    whole = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    for value, axis in (
        (whole, 0),
        (whole.transpose(1, 2), 0),
        (whole.permute(1, 0, 2), 1),
        (whole[:, :1].expand(3, 4, 5), 0),
        (whole[:1].expand(3, 4, 5), 0),
        (whole[..., 1:3], 0),
    ):
        got = gather(value, axis, index)
        assert torch.equal(got, value.index_select(axis, index))
        order = [np.argsort([-n for n in x.stride()], kind="stable").tolist() for x in (got, value)]
        assert order[0] == order[1] or 0 in value.stride()
    assert gather(whole[:1].expand(3, 4, 5), 0, index).stride(0) == 0


class Decides(Chain):
    """Takes another way by the values of its tensors."""

    def forward(self, x):
        stream = self.first(x)
        return self.head(stream if stream.sum() > 0 else self.second(stream))


class BySize(Chain):
    """Takes another way by the number of rows."""

    def forward(self, x):
        stream = self.first(x)
        return self.head(stream if len(x) > 1 else self.second(stream))


class Mixes(Chain):
    """Rows see one another."""

    def forward(self, x):
        stream = self.first(x)
        return self.head(stream - stream.mean(0))


class Counts(Chain):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.first(x))


class Draws(Chain):
    """Adds noise."""

    def forward(self, x):
        stream = self.first(x)
        return self.head(stream + torch.randn_like(stream))


class NumPy(Chain):
    """Leaves torch in between."""

    def forward(self, x):
        return self.head(torch.as_tensor(self.first(x).detach().numpy()))


class Normed(Chain):
    """Normalises over the batch although it is not being trained."""

    def forward(self, x):
        stream = self.first(x)
        return self.head(nn.functional.batch_norm(stream, None, None, training=True))


@pytest.mark.parametrize(
    ("toy", "reason"),
    [
        (Decides, "decides by the values of tensors"),
        (BySize, r"fixes the number of rows, by len\(x\) or by a choice"),
        (Mixes, "a run by itself answers otherwise than in a batch"),
        (Normed, "fixes the number of rows|a run by itself answers otherwise than in a batch|the forward of"),
        (Counts, "changes its own buffers"),
        (Draws, "answers otherwise|another tensor"),
        (NumPy, "torch.export fails on it"),
        (Twice, "the output of 'first' passes 2 times in one forward"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(toy, reason, capfd):
    model = opened(toy())
    with torch.random.fork_rng():
        message = refused(model, vectors(4), [FIRST], reason)
    assert hooks_of(model.module) == 0
    assert 'fix: engine="rows" runs the model as it is' in message or "the forward of" in message
    assert capfd.readouterr() == ("", "")


def test_a_forward_that_depends_on_the_number_of_rows_is_refused():
    refused(opened(Narrow(3)), vectors(4), [FIRST], "cannot be run as a graph")


def test_ports_that_do_not_reach_the_answer_are_refused():
    refused(opened(Twice()), vectors(3), [SECOND], "the output of 'second' does not pass")

    class Beside(Chain):
        def forward(self, x):
            self.second(x)
            return self.head(self.first(x))

    refused(
        opened(Beside()), vectors(3), [SECOND], "the output of 'second' does not pass, or its answer does not depend"
    )


def test_a_tensor_without_rows_is_refused():
    class First(Attends):
        def forward(self, input_ids):
            x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
            return self.head(self.o(x)[:, -1])

    site = cp.Patch("module(place).output axes=(column,width)", "zero")
    refused(opened(First()), EVEN, [site], "the output of 'place' has no row for each run")


def test_jobs_that_cannot_run_on_a_graph_are_told_apart_without_running():
    def reason(module, pairs=None, asked=(FIRST,), **settings):
        model = opened(module)
        return graph.why_not(*job_of(model, pairs or vectors(3), asked, **settings))

    class Batched(Chain):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    assert reason(Chain()) is None
    assert reason(Batched()) == "'norm' normalises over the batch, so that runs are not independent"
    hooked = Chain()
    hooked.second.register_forward_pre_hook(lambda *_: None)
    assert reason(hooked) == "hooks are registered on 'second', which an export would lose"
    every = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert reason(Chain()) == "hooks are registered on all modules, which an export would lose"
    finally:
        every.remove()
    refused(cp.open_model(hooked), vectors(3), [FIRST], "hooks are registered on 'second'")
    folded = tiny_world("opt", (2, 4, 4, 0))[0]
    why = graph.why_not(*job_of(folded, random_pairs(1, 2), ["mlp_post.0.0@1"]))
    assert why == "the tensor of mlp_post.0.0 has its rows and positions elsewhere than on its first two axes"


@pytest.mark.parametrize(
    ("name", "shape", "paths"),
    [
        ("resnet20-cifar10", (3, 32, 32), ["layer1.0.bn1", "layer2.0", "layer3.2.conv1", "layer3.2"]),
        ("mnist-cnn-burn", (1, 28, 28), ["conv2", "norm1", "fc1"]),
    ],
)
def test_trained_networks_equal_full_forwards(shared: Path, name, shape, paths):
    folder = shared / "models" / name
    if not folder.is_dir():
        pytest.skip(f"the model is not there: {folder}")
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), folder / "model.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    model = cp.open_model(code.load(folder))
    asked = [f"module({path}).output" for path in paths]
    if "resnet" in name:
        asked += [f"module(layer3.2.conv1).output axes=(channel,height,column)#{n}" for n in (0, 17, 63)]
    check(model, vectors(3, shape=shape, n_classes=10), asked, 1e-4)
