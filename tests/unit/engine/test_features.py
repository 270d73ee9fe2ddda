"""Features of dictionaries as sites: every engine measures what raw hooks with the formulas written out measure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import prove
from causalpatch.testing.tiny import tiny_model
from dictionaries import Coder, decoded, encoded, weights, write_saelens
from oracle import Edit, Plain, on_input
from worlds import assert_same, random_pairs, run_all, unchecked

FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "gpt_neox_sequential")
ENGINES = ("reference", "rows", "restart", "wavefront")
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "mlp_post": "mlp.hook_post",
}
ARCHITECTURES = ("standard", "topk", "gated", "jumprelu", "standard", "topk", "jumprelu")
projection = cp.metric(
    lambda outputs, pairs: outputs.distribution.double() @ torch.as_tensor(np.random.default_rng(7).normal(size=40)),
    name="projection",
    position=-1,
)


@dataclass(frozen=True)
class At:
    """One patch: of a feature or, without one, of what is not explained; tokens counted in the base prompt."""

    unit: int | None
    tokens: tuple[int, ...]
    value: Any = None  # from the source run; else a function of current values


class Known:
    """A tiny model with dictionaries at all of its sites, and the same by raw hooks."""

    def __init__(self, family, folder, transcoder="jumprelu_skip_transcoder"):
        module = tiny_model(family, layers=2)
        self.model, self.plain, self.w = cp.open_model(module), Plain(module, family), {}
        refused = self.model.shape.refused
        for number, (name, hook) in enumerate(HOOKS.items()):
            if name in refused:
                continue
            width = {"mlp_post": self.model.shape.units["neuron"], "z": self.model.n_heads * self.model.head_width}
            for layer in (0, 1):
                w = weights(ARCHITECTURES[number], width=width.get(name, self.model.width), seed=10 * number + layer)
                where = folder / f"{name}{layer}"
                write_saelens(where, ARCHITECTURES[number], w, f"blocks.{layer}.{hook}")
                self.model.add_dictionary(name, where)
                self.w[name, layer] = (ARCHITECTURES[number], w)
        for layer in (0, 1):
            w = weights(transcoder, width=self.model.width, seed=90 + layer)
            hooks = (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
            self.model.add_dictionary("trans", write_saelens(folder / f"t{layer}", transcoder, w, *hooks))
            self.w["trans", layer] = (transcoder, w)

    def seen(self, name, layer, ids):
        """Return what a dictionary encodes in an untouched run, and what it describes."""
        kept = []
        self._run(name, layer, ids, lambda x, y: (kept.append((x.clone(), y.clone())), y)[1])
        return kept[0]

    def features(self, name, layer, ids):
        architecture, w = self.w[name, layer]
        x, _ = self.seen(name, layer, ids)
        return encoded(architecture, w, x, bias="transcoder" not in architecture)

    def errors(self, name, layer, ids):
        _, w = self.w[name, layer]
        x, y = self.seen(name, layer, ids)
        return y - decoded(w, self.features(name, layer, ids), x)

    def patched(self, name, layer, base, source, patches):
        """Return the logits of a run with patches of one dictionary, all read before any is written."""
        architecture, w = self.w[name, layer]
        there_f, there_e = self.features(name, layer, source), self.errors(name, layer, source)

        def change(x, y):
            f = encoded(architecture, w, x, bias="transcoder" not in architecture)
            e = y - decoded(w, f, x)
            new_f, new_e = f.clone(), e.clone()
            for patch in patches:
                t = list(patch.tokens)
                now, there = (e, there_e) if patch.unit is None else (f[:, patch.unit], there_f[:, patch.unit])
                into = new_e if patch.unit is None else new_f[:, patch.unit]
                into[t] = there[t] if patch.value is None else patch.value(now[t])
            return y + (new_f - f) @ w["W_dec"] + (new_e - e)

        return self._run(name, layer, base, change)

    def _run(self, name, layer, ids, change):
        """Run one prompt with (encoded, described) -> described put in; raw hooks."""
        plain, block, kept = self.plain, self.plain.layers[layer], []
        handles = []
        if name == "trans":
            handles.append(block.mlp.register_forward_pre_hook(lambda module, args: kept.append(args[0][0].clone())))
        if name in ("z", "mlp_post"):
            module = block.get_submodule(plain.parts.heads if name == "z" else plain.parts.down)
            handles.append(on_input(module, lambda y: change(y, y)))
            edits = []
        else:
            site = ("mlp_out" if name == "trans" else name, layer, None)
            edits = [Edit(site, range(len(ids)), lambda y: change(kept[-1] if kept else y, y))]
        try:
            return plain.logits(ids, edits)
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="module", params=FAMILIES)
def known(request, tmp_path_factory):
    with unchecked():
        return Known(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(3, n_pairs=3)


def experiment(known, pairs, engine="auto", **settings):
    metrics = [cp.logit_difference, projection]
    return cp.Experiment(known.model, pairs, metric=metrics, engine=engine, show_progress=False, **settings)


def telling(known, name, layer, pair):
    """Return features in the order of how much they differ between the runs of a pair, the most first."""
    base, source = (known.features(name, layer, ids) for ids in (pair.corrupt, pair.clean))
    return (base - source).abs().sum(0).argsort(descending=True).tolist()


def requests(known, name, layer, pairs):
    """Return patches as the library takes them, and for each pair as the raw hooks do."""
    first, second, third, *_ = telling(known, name, layer, pairs[0])
    f, error = f"feature({name}).{layer}", f"feature_error({name}).{layer}"
    double = cp.Function(lambda now, source: 2 * now + 0.5, "doubled", needs_source=False)
    lengths = [len(pair.corrupt) for pair in pairs]
    return [
        ([f"{f}.{first}@-1"], [[At(first, (n - 1,))] for n in lengths]),
        ([f"{f}.{first}"], [[At(first, tuple(range(n)))] for n in lengths]),
        ([f"{f}.{first}@1", f"{f}.{second}@1", f"{f}.{third}@-1"],
         [[At(first, (1,)), At(second, (1,)), At(third, (n - 1,))] for n in lengths]),
        ([cp.Patch(f"{f}.{first}@0:2", "zero")], [[At(first, (0, 1), torch.zeros_like)] for _ in lengths]),
        ([cp.Patch(f"{f}.{second}@1", double)], [[At(second, (1,), lambda now: 2 * now + 0.5)] for _ in lengths]),
        ([f"{error}@1"], [[At(None, (1,))] for _ in lengths]),
        ([f"{error}@1", f"{f}.{first}@1", cp.Patch(f"{f}.{second}@1", "zero")],
         [[At(None, (1,)), At(first, (1,)), At(second, (1,), torch.zeros_like)] for _ in lengths]),
    ]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*HOOKS, "trans"])
def test_every_engine_measures_what_raw_hooks_measure(known, pairs, engine, name):
    if name in known.model.shape.refused:
        pytest.skip("parallel blocks have no such stream")
    for layer in (0, 1):
        asked = requests(known, name, layer, pairs)
        with unchecked():
            got = run_all(experiment(known, pairs, engine), [patches for patches, _ in asked])
        for number, (_, of_pairs) in enumerate(asked):
            for n, (pair, patches) in enumerate(zip(pairs, of_pairs, strict=True)):
                logits = known.patched(name, layer, pair.corrupt, pair.clean, patches)
                assert_same(got[:, number, n], numbers(logits, pair))


def numbers(logits, pair):
    last = logits[-1].numpy()
    difference = last[pair.answer[0][0]] - last[pair.wrong_answer[0][0]]
    return np.array([difference, last @ np.random.default_rng(7).normal(size=40)])


@pytest.mark.parametrize("name", ["resid_pre", "mlp_out", "trans", "z"])
def test_what_a_dictionary_does_not_explain_is_kept(known, pairs, name):
    """Without the error term, a patch would put the reconstruction in: that is another number."""
    unit = telling(known, name, 1, pairs[0])[0]
    architecture, w = known.w[name, 1]
    pair, last = pairs[0], len(pairs[0].corrupt) - 1
    there = known.features(name, 1, pair.clean)[last, unit]

    def without_error(x, y):
        f = encoded(architecture, w, x, bias="transcoder" not in architecture)
        f[last, unit] = there
        return torch.cat([y[:-1], decoded(w, f, x)[-1:]])

    got = run_all(experiment(known, pairs.take([0]), "reference"), [f"feature({name}).1.{unit}@-1"])[:, 0, 0]
    wrong = numbers(known._run(name, 1, pair.corrupt, without_error), pair)
    right = numbers(known.patched(name, 1, pair.corrupt, pair.clean, [At(unit, (last,))]), pair)
    assert_same(got, right)
    assert np.abs(got - wrong).min() > 1e-3


@pytest.mark.parametrize("name", [*HOOKS, "trans"])
def test_writing_features_and_errors_back_changes_nothing_bit_for_bit(known, pairs, name):
    if name in known.model.shape.refused:
        pytest.skip("parallel blocks have no such stream")
    units = telling(known, name, 1, pairs[0])[:3]
    sites = [*(f"feature({name}).1.{unit}" for unit in units), f"feature_error({name}).1"]
    patches = [cp.Patch(site, "identity") for site in sites]
    effects = experiment(known, pairs, "reference").run([*patches, patches[:-1]])
    assert np.abs(effects.effect().values).max() == 0.0


@pytest.mark.parametrize("name", ["resid_pre", "mlp_out", "resid_mid"])
def test_all_features_and_the_error_together_are_the_whole_tensor(known, pairs, name):
    if name in known.model.shape.refused:
        pytest.skip("parallel blocks have no such stream")
    both = [f"feature({name}).1@-1", f"feature_error({name}).1@-1"]
    got = run_all(experiment(known, pairs), [both, f"{name}.1@-1"])
    assert_same(got[:, 0], got[:, 1])


@pytest.mark.parametrize("engine", ENGINES)
def test_features_see_what_was_written_into_their_tensor_and_it_does_not_see_them(known, pairs, engine):
    """The whole tensor first, whatever was named first; then its features, as they are in what was put in."""
    first = telling(known, "resid_post", 0, pairs[0])[0]
    feature = cp.Patch(f"feature(resid_post).0.{first}@-1", "zero")
    runs = [["resid_post.0@-1", feature], [feature, "resid_post.0@-1"]]
    got = run_all(experiment(known, pairs, engine), runs)
    architecture, w = known.w["resid_post", 0]
    for n, pair in enumerate(pairs):
        _, there = known.seen("resid_post", 0, pair.clean)

        def change(x, y, there=there):
            new = there[-1:]
            f = encoded(architecture, w, new)[:, first]
            return torch.cat([y[:-1], new - f[:, None] * w["W_dec"][first]])

        wanted = numbers(known._run("resid_post", 0, pair.corrupt, change), pair)
        assert_same(got[:, 0, n], wanted)
        assert_same(got[:, 1, n], wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_feature_that_is_written_twice_goes_on_from_what_it_was_given(known, pairs, engine):
    unit = telling(known, "resid_pre", 1, pairs[0])[0]
    more = cp.Function(lambda now, source: now + 1.0, "more", needs_source=False)
    f = f"feature(resid_pre).1.{unit}"
    runs = [[cp.Patch(f, "zero"), cp.Patch(f"{f}@-1", more)], [cp.Patch(f, "zero"), f"{f}@-1"]]
    got = run_all(experiment(known, pairs, engine), runs)
    for n, pair in enumerate(pairs):
        end = (len(pair.corrupt) - 1,)
        before = At(unit, tuple(range(end[0])), torch.zeros_like)
        for number, last in enumerate((At(unit, end, torch.ones_like), At(unit, end))):
            logits = known.patched("resid_pre", 1, pair.corrupt, pair.clean, [before, last])
            assert_same(got[:, number, n], numbers(logits, pair))


def test_two_dictionaries_of_one_tensor_are_both_read_before_either_is_written(known, pairs):
    """The second dictionary is the first one by another name: two halves of a change make the whole."""
    name, unit = "attn_out", telling(known, "attn_out", 1, pairs[0])[0]
    _, w = known.w[name, 1]
    if not any(one.name == "again" for one in known.model.dictionaries):
        known.model.add_dictionary("again", Gated(w), site="attn_out.1")
    half = cp.Function(lambda now, source: now / 2, "half", needs_source=False)
    patches = [cp.Patch(f"feature({of}).1.{unit}@-1", half) for of in (name, "again")]
    zero = cp.Patch(f"feature({name}).1.{unit}@-1", "zero")
    got = run_all(experiment(known, pairs), [patches, zero])
    assert_same(got[:, 0], got[:, 1])


class Gated(Coder):
    def encode(self, x):
        return encoded("jumprelu", self.w, x) if "threshold" in self.w else encoded("standard", self.w, x)


def test_a_silent_feature_has_no_effect_and_is_not_run(known, pairs):
    one = pairs.take([0])
    ends = torch.stack([known.features("resid_pre", 1, one[0].input(side))[-1] for side in ("corrupt", "clean")])
    silent = int((ends.abs().sum(0) == 0).nonzero()[0, 0])
    effects = experiment(known, one).run([f"feature(resid_pre).1.{silent}@-1"])
    assert (effects.effect().values == 0).all()
    assert set(effects.to_dataframe()["status"]) == {"derived"}


def test_every_layer_of_a_dictionary_is_proven(known):
    for name in (*HOOKS, "trans"):
        if name in known.model.shape.refused:
            continue
        for kind in ("feature", "feature_error"):
            for layer in (0, 1):
                proof = prove(known.model, f"{kind}({name}).{layer}")
                assert (proof.failure, proof.passed) == (None, ("identity", "edit", "algebra"))


class Crooked(Coder):
    """Its decoder does not add up."""

    def decode(self, features):
        return torch.tanh(super().decode(features))


def test_a_decoder_that_does_not_add_up_fails_its_proof(pairs):
    model = cp.open_model(tiny_model("llama"))
    model.add_dictionary("crooked", Crooked(weights()), site="resid_pre.1")
    with pytest.raises(cp.UnsupportedError, match="failed its proof"):
        cp.Experiment(model, pairs, show_progress=False).run(["feature(crooked).1.3@-1"])


def test_the_record_names_the_dictionary_and_its_file(known, pairs):
    effects = experiment(known, pairs).run(["feature(resid_pre).1.3@-1"])
    (told,) = effects.provenance["dictionaries"]
    assert (told["name"], told["layer"], told["architecture"]) == ("resid_pre", 1, "standard (SAELens)")
    assert len(told["hash"]) == 64
    assert effects.provenance["facts"]["granularity"] == "feature"


def test_patches_of_features_are_saved_and_loaded(tmp_path):
    both = cp.together(["feature(res-jb).3", "feature_error(res-jb).3@subject"])
    asked = [cp.Patch("feature(res-jb).3.17@-1", "zero"), both]
    path = cp.save_interventions(tmp_path / "found.json", asked)
    assert cp.load_interventions(path) == [cp.Intervention.of(one) for one in asked]


def test_the_graph_leaves_features_to_other_engines(known, pairs):
    with pytest.raises(cp.RequestError, match="no part of the graph"):
        experiment(known, pairs, "graph").run(["feature(resid_pre).1.3@-1"])
