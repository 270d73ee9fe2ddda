"""States of recurrent modules at each step, held against loops over torch's cells that are written out here."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import causalpatch as cp
from causalpatch.base.errors import SiteUnsupported
from causalpatch.pairs import Pair, Pairs
from toys import opened

WIDTH, VOCAB = 6, 12


class Reader(nn.Module):
    """A language model of one recurrent module, which runs all steps in one call."""

    def __init__(self, kind: type[nn.RNNBase], **settings) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 5)
        self.rnn = kind(5, WIDTH, **settings)
        self.head = nn.Linear(WIDTH * (2 if self.rnn.bidirectional else 1), VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.rnn.batch_first:
            return self.head(self.rnn(x)[0])
        return self.head(self.rnn(x.transpose(0, 1))[0].transpose(0, 1))


class Looped(nn.Module):
    """The same by a cell in a loop."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(VOCAB, 5), kind(5, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, held, made = self.embed(input_ids), None, []
        for step in range(x.shape[1]):
            held = self.cell(x[:, step], held)
            made.append(held[0] if isinstance(held, tuple) else held)
        return self.head(torch.stack(made, 1))


def by_loop(model, ids, edit=None):
    """Run one prompt by cells; edit: (side, layer, step, new). Return the last logits and all states by side, layer."""
    module = model.module
    rnn = module.rnn if hasattr(module, "rnn") else module.cell
    n_layers = getattr(rnn, "num_layers", 1)
    is_lstm = isinstance(rnn, nn.LSTM | nn.LSTMCell)
    end = [f"_l{layer}" for layer in range(n_layers)] if hasattr(rnn, "num_layers") else [""]
    hidden = [torch.zeros(WIDTH, dtype=torch.float64) for _ in end]
    cells = [h.clone() for h in hidden]
    kept = {}
    for step, number in enumerate(ids):
        x = module.embed.weight[int(number)]
        for layer, tail in enumerate(end):
            a, b = (getattr(rnn, f"weight_{name}{tail}") for name in ("ih", "hh"))
            c, d = (getattr(rnn, f"bias_{name}{tail}") for name in ("ih", "hh"))
            given, fed = a @ x + c, b @ hidden[layer] + d
            if is_lstm:
                i, f, g, o = (given + fed).chunk(4)
                cells[layer] = f.sigmoid() * cells[layer] + i.sigmoid() * g.tanh()
                hidden[layer] = o.sigmoid() * cells[layer].tanh()
            elif isinstance(rnn, nn.GRU | nn.GRUCell):
                (r, z, n), (r2, z2, n2) = given.chunk(3), fed.chunk(3)
                z = (z + z2).sigmoid()
                hidden[layer] = (1 - z) * (n + (r + r2).sigmoid() * n2).tanh() + z * hidden[layer]
            else:
                hidden[layer] = (given + fed).relu() if rnn.nonlinearity == "relu" else (given + fed).tanh()
            for side, held in (("state", hidden), ("cell", cells)):
                if edit is not None and edit[:3] == (side, layer, step):
                    new = edit[3]
                    held[layer] = new(held[layer]) if callable(new) else new
                kept.setdefault((side, layer), []).append(held[layer])
            x = hidden[layer]
    logits = module.head(hidden[-1])
    return logits, kept


def pairs_of_prompts():
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, VOCAB, (2, n)) for n in (5, 5, 5)]
    return Pairs([Pair(a, b, ((3,),), ((4,),), id=str(n)) for n, (a, b) in enumerate(rows)], name="made")


MODELS = {
    "rnn": lambda: Reader(nn.RNN, batch_first=True),
    "relu, steps first": lambda: Reader(nn.RNN, nonlinearity="relu"),
    "gru of two layers": lambda: Reader(nn.GRU, num_layers=2, batch_first=True),
    "lstm of two layers": lambda: Reader(nn.LSTM, num_layers=2),
    "rnn cell": lambda: Looped(nn.RNNCell),
    "gru cell": lambda: Looped(nn.GRUCell),
    "lstm cell": lambda: Looped(nn.LSTMCell),
}


@pytest.mark.parametrize("engine", ["auto", "rows", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_a_state_that_is_patched_at_a_step_is_what_later_steps_start_from(name, engine):
    model, pairs = opened(MODELS[name]()), pairs_of_prompts()
    path = "rnn" if hasattr(model.module, "rnn") else "cell"
    n_layers = getattr(getattr(model.module, path), "num_layers", 1)
    sides = ("state", "cell") if "lstm" in name else ("state",)
    asked, edits = [], []
    for side in sides:
        for layer in range(n_layers):
            item = f"[{layer}]" if path == "rnn" else ""
            for step in (0, 2):
                site = f"module({path}).{side}{item} axes=(position,width)@{step}"
                asked += [site, cp.Patch(site, cp.Function(lambda now, _: now**2 - 0.3, "bent", needs_source=False))]
                edits += [(side, layer, step, None), (side, layer, step, lambda now: now**2 - 0.3)]
    effects = cp.Experiment(model, pairs, engine=engine, show_progress=False).run(asked)
    got = effects.to_xarray()["metric"].values.reshape(len(asked), len(pairs))
    with torch.no_grad():
        for number, pair in enumerate(pairs):
            source = by_loop(model, pair.clean)[1]
            for place, (side, layer, step, new) in enumerate(edits):
                put = source[side, layer][step] if new is None else new
                logits, _ = by_loop(model, pair.corrupt, (side, layer, step, put))
                assert abs(got[place, number] - float(logits[3] - logits[4])) < 1e-10
    assert np.abs(effects.effect().values).min() > 0


@pytest.mark.parametrize("name", ["gru of two layers", "lstm cell"])
def test_writing_a_state_back_changes_nothing(name):
    model, pairs = opened(MODELS[name]()), pairs_of_prompts()
    path = "rnn" if hasattr(model.module, "rnn") else "cell"
    site = f"module({path}).state axes=(position,width)"
    effects = cp.Experiment(model, pairs, engine="reference").run([cp.Patch(site, "identity"), site])
    assert np.abs(effects.effect().values[0]).max() < 1e-12
    if name == "lstm cell":
        return
    # The states of the last layer are all that the head is given.
    whole = cp.Experiment(model, pairs, engine="reference").run(["module(rnn).output axes=(position,width)"])
    assert np.allclose(effects.to_xarray()["metric"].values[..., 1, :], whole.to_xarray()["metric"].values[..., 0, :])


def test_the_forward_of_a_module_is_its_own_again():
    model, pairs = opened(Reader(nn.GRU, batch_first=True, bias=False)), pairs_of_prompts()
    cp.Experiment(model, pairs).run(["module(rnn).state axes=(position,width)@1"])
    assert "forward" not in vars(model.module.rnn)


@pytest.mark.parametrize(
    ("made", "path", "problem"),
    [
        (lambda: Reader(nn.GRU, batch_first=True, bidirectional=True), "rnn", "it is bidirectional"),
        (lambda: Reader(nn.RNN, batch_first=True), "head", "it is a Linear, not an RNN, GRU or LSTM of torch"),
    ],
)
def test_modules_without_a_state_at_each_step_are_refused(made, path, problem):
    experiment = cp.Experiment(opened(made()), pairs_of_prompts())
    with pytest.raises(SiteUnsupported, match=problem):
        experiment.run([f"module({path}).state axes=(position,width)@1"])


def test_packed_sequences_are_refused():
    class Packed(Reader):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = nn.utils.rnn.pack_padded_sequence(self.embed(input_ids), [input_ids.shape[1]] * len(input_ids), True)
            return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(x)[0], True)[0])

    experiment = cp.Experiment(opened(Packed(nn.GRU, batch_first=True)), pairs_of_prompts())
    with pytest.raises(SiteUnsupported, match="it is given a PackedSequence"):
        experiment.run(["module(rnn).state axes=(position,width)@1"])


def test_a_module_that_computes_otherwise_is_refused():
    class Doubled(nn.GRU):
        def forward(self, input, hx=None):
            output, last = super().forward(input, hx)
            return 2 * output, last

    model = opened(Reader(Doubled, batch_first=True))
    with pytest.raises(SiteUnsupported, match="its steps one by one differ from its whole run"):
        cp.Experiment(model, pairs_of_prompts()).run(["module(rnn).state axes=(position,width)@1"])
