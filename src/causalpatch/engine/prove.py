"""Proofs that the names of a model's activations mean what they say, made when a model is first used.

Families are tables of facts, and facts can be wrong for a model that calls itself a llama. So each kind of site is
tried on tiny random prompts (two rows of five tokens, base and source), in the first and the last layer:

1. *identity*: writing its own value back leaves the logits as they are, bit for bit;
2. *edit*: another value changes the logits;
3. *whole*: at sites through which everything flows, the source's value at all positions gives the source's logits;
4. *algebra*: sums and products that the site's definition claims hold in this model;
5. *kernel*: for sites inside attention, attention computed step by step gives the logits of the model's own kernel.

A site that fails is refused with the reason. Proofs are kept until the model is made of other things; a trial that
could not be made proves nothing, and is made again when it is asked for again.
"""

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.base.errors import CausalPatchError, MemoryExhausted, NotFinite, SiteUnsupported
from causalpatch.engine.capture import capture, inputs_of
from causalpatch.engine.hooks import Write, quiet, run_with_hooks
from causalpatch.engine.memory import is_out_of_memory
from causalpatch.engine.samples import N_ROWS, N_TOKENS, tiny_inputs
from causalpatch.engine.structure import Findings
from causalpatch.engine.sums import Where, claims_about
from causalpatch.models import FeatureView, Model, Port
from causalpatch.models.attention import attending
from causalpatch.models.views import bound
from causalpatch.sites import NAMES, Site, SiteSet, parse
from causalpatch.sites.names import ATTENTION_SITES

MOST_FEATURES = 256  # of a dictionary, that are tried
# Everything that reaches the logits passes through these at every position.
WHOLE = ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm", "logits")

# What MLPs call their activation function.
_ACTIVATIONS = ("act", "act_fn", "activation_fn", "activation", "activation_func", "gelu_impl", "intermediate_act_fn")


@dataclass(frozen=True)
class Proof:
    """What was tried for one kind of site.

    Args:
        name: The site's name.
        passed: Names of the trials that it passed.
        failure: Why it is refused, or None.
        is_verdict: Whether the trials were made, so that they would end in the same way again.
    """

    name: str
    passed: tuple[str, ...]
    failure: str | None = None
    is_verdict: bool = True


_KNOWN: Findings[Proof] = Findings()


def prove(model: Model, name: str) -> Proof:
    """Try one kind of site in a model; known proofs are not repeated.

    Args:
        model: The model.
        name: A site's name, such as ``"resid_pre"``; of a dictionary ``"feature(NAME)"`` or ``"feature(NAME).3"``.

    Returns:
        What passed, and what failed.

    Raises:
        NotFinite: The model gives NaN or infinite logits, so that nothing can be proven.
        MemoryExhausted: Not even the tiny prompts of the proof fit into memory.
    """
    key = (name, *(one for one in model.dictionaries if f"({one.name})" in name))
    return _KNOWN.of(model, key, partial(_try, model, name), lambda proof: proof.is_verdict)


def _try(model: Model, name: str) -> Proof:
    try:
        with torch.no_grad():
            return _Trial(model).of(name)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhausted(
            f"the proof of site '{name}' in '{model.name}' does not fit into memory",
            facts=[("runs", f"{N_ROWS} prompts of {N_TOKENS} tokens"), ("device", model.device)],
            fix="free the device, or open the model in bfloat16",
        ) from error


def require_proofs(model: Model, names: Collection[str]) -> None:
    """Make sure that kinds of sites mean in this model what they say.

    Raises:
        SiteUnsupported: One of them failed its proof.
    """
    for name in sorted(names):
        if name == "module":
            continue
        proof = prove(model, name)
        if proof.failure is not None:
            raise SiteUnsupported(
                f"site '{name}' failed its proof in '{model.name}'",
                facts=[("failed", proof.failure), ("passed", ", ".join(proof.passed) or "nothing")],
                fix=f"see all sites with: {model.shape.listing}",
            )


class _Trial:
    """Tiny runs of one model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.base, self.source = tiny_inputs(model)
        self.has_positions = self._require_finite().ndim > 2
        eps = torch.finfo(model.dtype).eps
        # Relative to the largest value: room for a hundred sums in float32, for a few in half precision.
        self.tolerance = 64 * eps if eps < 1e-4 else 8 * eps

    def _require_finite(self) -> Tensor:
        """Return the logits of the base prompts, which are numbers."""
        logits = self._logits(run_with_hooks(self.model, inputs_of(self.model, self.base))[0])
        if not torch.isfinite(logits).all():
            raise NotFinite(
                f"'{self.model.name}' gives NaN or infinite logits on a short random prompt",
                facts=[("dtype", self.model.dtype)],
                fix="check the checkpoint for NaN weights, or open the model in float32",
            )
        return logits

    def of(self, name: str) -> Proof:
        if name in self.model.shape.refused:
            return Proof(name, (), self.model.shape.refused[name])
        if name == "logits" and not self.has_positions:
            return Proof(name, (), "the model gives one answer for a whole prompt, not one for each token")
        trials: list[tuple[str, Callable[[Site], str | None]]] = [("identity", self._identity), ("edit", self._edit)]
        if name in WHOLE and not self._is_passed_by(name):
            trials.append(("whole", self._whole))
        algebra = {"resid_mid": self._stream, "resid_post": self._stream, "attn_out": self._stream}
        algebra |= {"mlp_out": self._stream, "head_out": self._heads, "z": self._attention, "v": self._attention}
        algebra |= {"scores": self._weights, "pattern": self._weights}
        algebra |= {"expert_out": self._experts, "mlp_pre": self._neuron, "mlp_gate": self._neuron}
        algebra |= {"feature": self._dictionary, "feature_error": self._dictionary}
        kind = name.partition("(")[0]
        if kind in algebra and (algebra[kind] != self._stream or claims_about(self.model, Site(name, 0))):
            trials.append(("algebra", algebra[kind]))
        if name in ATTENTION_SITES:
            trials.append(("kernel", self._kernel))
        passed: list[str] = []
        for trial, check in trials:
            try:
                failures = [failure for site in self._samples(name) if (failure := check(site))]
            except CausalPatchError as error:
                return Proof(name, tuple(passed), f"{trial}: {error.what}", is_verdict=False)
            if failures:
                return Proof(name, tuple(passed), f"{trial}: {failures[0]}")
            passed.append(trial)
        return Proof(name, tuple(passed))

    def _samples(self, name: str) -> list[Site]:
        """Return the site in the first and last layer, of the first and last unit; of dictionaries the most active."""
        if "(" in name:
            return self._features(parse(name))
        info, shape = NAMES[name], self.model.shape
        every = shape.layers_with(name)
        layers = sorted({every[0], every[-1]}) if info.has_layer else [None]
        units = sorted({0, shape.units[info.unit_axis] - 1}) if info.unit_axis else [None]
        return [Site(name, layer, unit) for layer, unit in itertools.product(layers, units)]

    def _identity(self, site: Site) -> str | None:
        run = capture(self.model, self.base, [site])
        written = self._write(site, run.value(site))
        if not torch.equal(written, self._logits(run.output)):
            return f"writing {site} back changes the logits"
        return None

    def _edit(self, site: Site) -> str | None:
        run = capture(self.model, self.base, [site])
        value = run.value(site)
        # Scores of hidden keys are no numbers, and stay hidden.
        # A feature that is silent here would hardly move.
        step = value[value.isfinite()].std().clamp_min(1e-3 if site.dictionary is None else 1.0)
        # Another step at each token: a bias of all keys alike would change nothing.
        ramp = torch.linspace(1, 2, value.shape[1]).to(value).view(-1, *[1] * (value.ndim - 2))
        moved = value + step * ramp * torch.sign(value + 1e-6)
        # Activation functions and thresholds may let no small value through, or none below 0.
        changed = (self._write(site, factor * moved) for factor in (1.0, -1.0, 16.0, -16.0))
        if all(torch.equal(logits, self._logits(run.output)) for logits in changed):
            return f"changing {site} does not change the logits"
        return None

    def _whole(self, site: Site) -> str | None:
        source = capture(self.model, self.source, [site])
        return self._compare(
            self._write(site, source.value(site)), self._logits(source.output), f"{site} from the source"
        )

    def _is_passed_by(self, name: str) -> bool:
        """Say whether something reaches the layers behind a site in another way."""
        family = self.model.family
        return family is not None and family.reads_ids and name not in ("final_norm", "logits")

    def _stream(self, site: Site) -> str | None:
        """The stream is the sum that the family says."""
        claims = claims_about(self.model, site)
        needed = dict.fromkeys(where for claim in claims for where in (*claim.parts, *claim.totals))
        run = capture(self.model, self.base, [where for where in needed if isinstance(where, Site)])
        ports = [where for where in needed if isinstance(where, Port)]
        _, tensors = run_with_hooks(self.model, inputs_of(self.model, self.base), keep=ports)

        def value(where: Where) -> Tensor:
            return run.value(where) if isinstance(where, Site) else tensors[where]

        for claim in claims:
            total = sum((value(part) for part in claim.parts[1:]), value(claim.parts[0]))
            what = f"{claim.words} in layer {site.layer}"
            failures = [self._compare(total, value(each), what) for each in claim.totals]
            if None not in failures:
                return failures[0]
        return None

    def _heads(self, site: Site) -> str | None:
        """The heads' outputs and the bias are the output projection's output."""
        heads = [Site("head_out", site.layer, head) for head in range(self.model.shape.units["head"])]
        run = capture(self.model, self.base, heads)
        port = self.model.tap(site).port
        bias = getattr(self.model.module.get_submodule(port.path), "bias", None)
        total = sum((run.value(head) for head in heads), torch.zeros(()).to(run.tensors[port]))
        return self._compare(
            total if bias is None else total + bias, run.tensors[port], f"the sum of head_out.{site.layer}"
        )

    def _experts(self, site: Site) -> str | None:
        """What the experts add is their sum, and those that a token does not choose add nothing."""
        terms = [Site("expert_out", site.layer, expert) for expert in range(self.model.shape.units["expert"])]
        router = Site("router", site.layer)
        run = capture(self.model, self.base, [*terms, router])
        port, weights = self.model.tap(site).port, run.value(router)
        values = [run.value(term) for term in terms]
        if any(bool(value[weights[..., number] == 0].any()) for number, value in enumerate(values)):
            return f"an expert that is not chosen adds something in layer {site.layer}"
        return self._compare(sum(values[1:], values[0]), run.tensors[port], f"the sum of expert_out.{site.layer}")

    def _attention(self, site: Site) -> str | None:
        """What attention is given as values are the values, and what it returns is handed to the projection."""
        units, refused = self.model.shape.units, self.model.shape.refused
        values = [Site("v", site.layer, head) for head in range(units["kv_head"]) if "v" not in refused]
        heads = [Site("z", site.layer, head) for head in range(units["head"])]
        seen: list[tuple[Tensor, Tensor]] = []

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
        ) -> Tensor:
            # Any output will do that differs by head and position; the model's own arithmetic is not asked here.
            mixed = value.repeat_interleave(query.shape[1] // value.shape[1], 1) + query.mean(-1, keepdim=True)
            seen.append((value, mixed))
            return mixed.transpose(1, 2).contiguous()

        # Quiet first: no other thread may run the model while its kernel is another.
        with quiet(self.model), attending(self.model.module, attend):
            run = capture(self.model, self.base, [*values, *heads])
        if not seen and values:
            return self._mixture(values, heads)
        if len(seen) != self.model.shape.n_layers or site.layer is None:
            return None
        given, returned = seen[site.layer]
        pairs = [(part, given[:, number]) for number, part in enumerate(values)]
        pairs += [(part, returned[:, number]) for number, part in enumerate(heads)]
        failures = (self._compare(run.value(part), wanted, f"{part} against attention") for part, wanted in pairs)
        return next((failure for failure in failures if failure), None)

    def _mixture(self, values: list[Site], heads: list[Site]) -> str | None:
        """Where attention is spelt out, its weights times the values are handed to the projection."""
        patterns = [replace(head, name="pattern") for head in heads]
        try:
            run = capture(self.model, self.base, [*values, *heads, *patterns])
        except SiteUnsupported:
            return None  # nothing of this attention is met: it may as well be fused
        n_group = len(heads) // len(values)
        for number, (head, pattern) in enumerate(zip(heads, patterns, strict=True)):
            value = run.value(values[number // n_group])
            failure = self._compare(run.value(head), run.value(pattern).to(value) @ value, f"{head} against attention")
            if failure:
                return failure
        return None

    def _weights(self, site: Site) -> str | None:
        """Values weighted by the pattern are z, and without sinks the pattern is the softmax of the scores."""
        shape, layer, head = self.model.shape, site.layer, site.unit or 0
        if {"v", "z"} & shape.refused.keys():
            return None
        kv_head = head * shape.units["kv_head"] // shape.units["head"]
        parts = [Site("scores", layer, head), Site("pattern", layer, head), Site("v", layer, kv_head)]
        run = capture(self.model, self.base, [*parts, Site("z", layer, head)])
        scores, pattern, values = (run.value(part) for part in parts)
        mixed = pattern.to(values) @ values
        failure = self._compare(mixed, run.value(Site("z", layer, head)), f"pattern @ v in layer {layer}")
        softened = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        totals = pattern.sum(-1, keepdim=True)  # below 1 where a sink has its share
        return failure or self._compare(pattern, (softened * totals).to(pattern), f"the softmax of scores.{layer}")

    def _neuron(self, site: Site) -> str | None:
        """The activation function of one projection, times the other in gated MLPs, is what goes into the next."""
        names = [name for name in ("mlp_gate", "mlp_pre", "mlp_post") if name not in self.model.shape.refused]
        parts = [Site(name, site.layer, site.unit) for name in names]
        run = capture(self.model, self.base, parts)
        *given, post = (run.value(part) for part in parts)
        around = [self.model.tap(part).port.path.rpartition(".")[0] for part in reversed(parts)]
        acts = (
            (path, name, found)
            for path in dict.fromkeys(around)
            for name in _ACTIVATIONS
            if callable(found := getattr(self.model.module.get_submodule(path), name, None))
        )
        path, name, act = next(acts, ("", "", None))
        if act is None:
            return None
        if self.model.family is not None and self.model.family.thins_gates:
            port = Port(f"{path}.{name}", "output")
            activated = run_with_hooks(self.model, inputs_of(self.model, self.base), keep=[port])[1][port]
            activated = activated[..., site.unit]
        else:
            activated = act(given[0])
        made = activated * given[1] if len(given) > 1 else activated
        return self._compare(made, post, f"{parts[-1]} from {' and '.join(names[:-1])}")

    def _features(self, asked: Site | SiteSet) -> list[Site]:
        """Return the most active feature of each layer of a dictionary that is asked for, or what is not explained."""
        sizes = self.model.shape.dictionaries[asked.dictionary or ""]
        layers = [asked.layer] if isinstance(asked.layer, int) else sorted({min(sizes), max(sizes)})
        errors = [Site("feature_error", layer, dictionary=asked.dictionary) for layer in layers]
        if asked.name == "feature_error":
            return errors
        units = [int(self._coded(site)[1].amax(0).argmax()) for site in errors]
        return [Site("feature", s.layer, unit, dictionary=s.dictionary) for s, unit in zip(errors, units, strict=True)]

    def _coded(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a dictionary is given at all tokens, its features, and what it describes."""
        tap = self.model.tap(site)
        run, coded = capture(self.model, self.base, [site]), cast(FeatureView, tap.view).coded
        companions = tuple(run.tensors[port] for port in tap.companions)
        given, described = (
            read(run.tensors[tap.port], companions).flatten(0, -2) for read in (coded.encoded, coded.described)
        )
        return given, coded.coder.encode(given), described

    def _dictionary(self, site: Site) -> str | None:
        """Features add up to what is explained, each along its direction; the rest is what is not."""
        coder = cast(FeatureView, self.model.tap(site).view).coded.coder
        given, features, described = self._coded(site)
        tokens, units = (index[:MOST_FEATURES] for index in features.nonzero(as_tuple=True))
        few = torch.zeros_like(features).index_put((tokens, units), features[tokens, units])
        steps = features[tokens, units][:, None] * coder.directions(given, tokens, units)
        nothing = coder.decode(torch.zeros_like(features), given)
        added = nothing.index_add(0, tokens, steps.to(nothing))
        error = replace(site, name="feature_error", unit=None)
        rest = capture(self.model, self.base, [error]).value(error).flatten(0, -2)
        explained = coder.decode(features, given)
        name = f"{site.dictionary}.{site.layer}"
        return (
            self._compare(coder.at(given, tokens, units), features[tokens, units], f"single features of {name}")
            or self._compare(added, coder.decode(few, given), f"the sum of the features of {name}")
            or self._compare(explained.to(described) + rest, described, f"{name} with what it does not explain")
        )

    def _kernel(self, site: Site) -> str | None:
        """Attention computed step by step gives what the model's own kernel gives."""
        inputs = inputs_of(self.model, self.base)
        own, opened = (
            self._logits(run_with_hooks(self.model, inputs, opens_attention=is_open)[0]) for is_open in (False, True)
        )
        # In float64 a kernel may still compute its softmax in float32, as those of transformers do.
        least = 64 * torch.finfo(torch.float32).eps
        what = f"attention step by step against the model's own kernel ({self.model.attention})"
        return self._compare(opened, own, what, max(self.tolerance, least))

    def _write(self, site: Site, value: Tensor) -> Float[Tensor, "row *axes"]:
        n_tokens = self.base.ids.shape[1]
        rows, columns = np.divmod(np.arange(N_ROWS * n_tokens), n_tokens)
        index = (torch.as_tensor(rows, device=value.device), torch.as_tensor(columns, device=value.device))
        tap = self.model.tap(site)
        write = Write(replace(tap, view=bound(tap.view, self.base.start)), index, value[index])
        output, _ = run_with_hooks(self.model, inputs_of(self.model, self.base), [write])
        return self._logits(output)

    def _logits(self, output: Any) -> Tensor:
        return self.model.logits(output)

    def _compare(self, got: Tensor, wanted: Tensor, what: str, tolerance: float | None = None) -> str | None:
        scale = wanted.abs().max().clamp_min(1.0)
        difference = float((got - wanted).abs().max() / scale)
        if not difference <= (self.tolerance if tolerance is None else tolerance):
            return f"{what} is off by {difference:.1e}"
        return None
