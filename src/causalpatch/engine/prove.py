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
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import CausalPatchError, MemoryExhausted, NotFinite, SiteUnsupported
from causalpatch.engine.algebra import Algebra, off
from causalpatch.engine.capture import capture, in_batch, inputs_of
from causalpatch.engine.hooks import Write, run_with_hooks
from causalpatch.engine.memory import is_out_of_memory
from causalpatch.engine.samples import N_ROWS, N_TOKENS, tiny_inputs
from causalpatch.engine.structure import Findings, Structure, structure_of
from causalpatch.models import Model
from causalpatch.sites import Site, SiteSet, parse
from causalpatch.sites.names import ATTENTION_SITES, FEATURE_SITES
from causalpatch.sites.select import part_of

# Everything that reaches the logits passes through these at every position.
WHOLE = ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm", "logits")


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


def prove(model: Model, name: str, now: Structure | None = None) -> Proof:
    """Try one kind of site in a model; known proofs are not repeated.

    Args:
        model: The model.
        name: A site's name, such as ``"resid_pre"``; of a dictionary ``"feature(NAME)"`` or ``"feature(NAME).3"``.
        now: What the model is made of, where that was looked at already.

    Returns:
        What passed, and what failed.

    Raises:
        NotFinite: The model gives NaN or infinite logits, so that nothing can be proven.
        MemoryExhausted: Not even the tiny prompts of the proof fit into memory.
    """
    if name in FEATURE_SITES and name in model.shape.refused:
        return Proof(name, (), model.shape.refused[name])
    key = (name, *(one for one in model.dictionaries if f"({one.name})" in name))
    return _KNOWN.of(model, key, partial(_try, model, name), lambda proof: proof.is_verdict, now=now)


def _try(model: Model, name: str) -> Proof:
    try:
        with torch.no_grad():
            return _Trial(model, parse(name).stream).of(name)
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
    asked = sorted(set(names) - {"module"})
    now = structure_of(model) if asked else None
    for name in asked:
        proof = prove(model, name, now)
        if proof.failure is not None:
            raise SiteUnsupported(
                f"site '{name}' failed its proof in '{model.name}'",
                facts=[("failed", proof.failure), ("passed", ", ".join(proof.passed) or "nothing")],
                fix=f"see all sites with: {model.shape.listing}",
            )


class _Trial:
    """Tiny runs of one model."""

    def __init__(self, model: Model, stream: str | None) -> None:
        self.model = model
        self.base, self.source = tiny_inputs(model, stream)
        self.has_positions = self._require_finite().ndim > 2
        eps = torch.finfo(model.dtype).eps
        # Relative to the largest value: room for a hundred sums in float32, for a few in half precision.
        self.tolerance = 64 * eps if eps < 1e-4 else 8 * eps
        self.algebra = Algebra(model, self.base, self.tolerance)

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
        kind = parse(name)
        why = part_of(kind, self.model.shape).refused.get(kind.name)
        if why is not None:
            return Proof(name, (), why)
        if name == "logits" and not self.has_positions:
            return Proof(name, (), "the model gives one answer for a whole prompt, not one for each token")
        samples = self._samples(kind)
        trials: list[tuple[str, Callable[[Site], str | None]]] = [("identity", self._identity), ("edit", self._edit)]
        if kind.name in WHOLE and not self._is_passed_by(kind.name):
            trials.append(("whole", self._whole))
        algebra = self.algebra.of(samples[0])
        if algebra is not None:
            trials.append(("algebra", algebra))
        if kind.name in ATTENTION_SITES:
            trials.append(("kernel", self._kernel))
        passed: list[str] = []
        for trial, check in trials:
            try:
                failures = [failure for site in samples if (failure := check(site))]
            except CausalPatchError as error:
                return Proof(name, tuple(passed), f"{trial}: {error.what}", is_verdict=False)
            if failures:
                return Proof(name, tuple(passed), f"{trial}: {failures[0]}")
            passed.append(trial)
        return Proof(name, tuple(passed))

    def _samples(self, kind: Site | SiteSet) -> list[Site]:
        """Return the site in the first and last layer, of the first and last unit; of some the most active unit."""
        if kind.dictionary is not None:
            return self._features(kind)
        info, shape = kind.info, part_of(kind, self.model.shape)
        every = shape.layers_with(kind.name)
        layers = sorted({every[0], every[-1]}) if info.has_layer else [None]
        units = sorted({0, shape.units[info.unit_axis] - 1}) if info.unit_axis else [None]
        family = self.model.family
        places: list[tuple[int | None, int | None]] = list(itertools.product(layers, units))
        if info.unit_axis == "neuron" and family is not None and family.thins_gates:
            places = [(layer, self._loudest(layer or 0)) for layer in layers]
        return [Site(kind.name, layer, unit, stream=kind.stream) for layer, unit in places]

    def _loudest(self, layer: int) -> int:
        """Return the neuron that does most in a layer: behind a gate that is thinned out many do nothing."""
        port = self.model.tap(Site("mlp_post", layer, 0)).port
        _, tensors = run_with_hooks(self.model, inputs_of(self.model, self.base), keep=[port])
        return int(tensors[port].abs().flatten(0, -2).amax(0).argmax())

    def _identity(self, site: Site) -> str | None:
        run = capture(self.model, self.base, [site])
        written = self._write((site, run.value(site)))
        if not torch.equal(written, self._logits(run.output)):
            return f"writing {site} back changes the logits"
        return None

    def _edit(self, site: Site) -> str | None:
        run = capture(self.model, self.base, [site])
        value = run.value(site)
        # Scores of hidden keys are no numbers, and stay hidden.
        # A feature that is silent here would hardly move.
        step = value[value.isfinite()].std().clamp_min(1e-3 if site.dictionary is None else 1.0)
        # Another step at each token, and in each column: a bias of all keys alike would change nothing, nor would what
        # a norm takes out of a value that is the same in all columns.
        ramp = torch.linspace(1, 2, value.shape[1]).to(value).view(-1, *[1] * (value.ndim - 2))
        ramp = ramp * torch.linspace(1, 1.5, value.shape[-1]).to(value) if value.ndim > 2 else ramp
        moved = value + step * ramp * torch.sign(value + 1e-6)
        # Activation functions and thresholds may let no small value through, or none below 0.
        changed = (self._write((site, factor * moved)) for factor in (1.0, -1.0, 16.0, -16.0))
        if all(torch.equal(logits, self._logits(run.output)) for logits in changed):
            return f"changing {site} does not change the logits"
        return None

    def _whole(self, site: Site) -> str | None:
        sites = [*self._beside(site), site]
        source = capture(self.model, self.source, sites)
        written = self._write(*((each, source.value(each)) for each in sites))
        also = "".join(f" and {each}" for each in sites[:-1])
        return self._compare(written, self._logits(source.output), f"{site}{also} from the source")

    def _beside(self, site: Site) -> list[Site]:
        """Return through what everything else flows that does not flow through a site, in a model of two streams."""
        if not self.model.streams or (site.name in ("final_norm", "logits") and site.stream != "encoder"):
            return []
        if site.stream == "encoder":
            return [Site("resid_pre", 0, stream="decoder")]
        encoder = self.model.shape.parts["encoder"]
        last = Site("resid_post", encoder.n_layers - 1, stream="encoder")
        return [last if "final_norm" in encoder.refused else Site("final_norm", stream="encoder")]

    def _is_passed_by(self, name: str) -> bool:
        """Say whether something reaches the layers behind a site in another way."""
        family = self.model.family
        return family is not None and family.reads_ids and name not in ("final_norm", "logits")

    def _features(self, asked: Site | SiteSet) -> list[Site]:
        """Return the most active feature of each layer of a dictionary that is asked for, or what is not explained."""
        sizes = self.model.shape.dictionaries[asked.dictionary or ""]
        layers = [asked.layer] if isinstance(asked.layer, int) else sorted({min(sizes), max(sizes)})
        errors = [Site("feature_error", layer, dictionary=asked.dictionary) for layer in layers]
        if asked.name == "feature_error":
            return errors
        units = [int(self.algebra.coded(site)[1].amax(0).argmax()) for site in errors]
        return [Site("feature", s.layer, unit, dictionary=s.dictionary) for s, unit in zip(errors, units, strict=True)]

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

    def _write(self, *given: tuple[Site, Tensor]) -> Float[Tensor, "row *axes"]:
        """Return the logits with other values at all tokens of some sites."""
        writes = []
        for site, value in given:
            tap = in_batch(self.model, self.model.tap(site), self.base)
            rows, columns = np.nonzero(self.base.of(self.model.stream_of(site)).mask)
            index = (torch.as_tensor(rows, device=value.device), torch.as_tensor(columns, device=value.device))
            writes.append(Write(tap, index, value[index]))
        output, _ = run_with_hooks(self.model, inputs_of(self.model, self.base), writes)
        return self._logits(output)

    def _logits(self, output: Any) -> Tensor:
        return self.model.logits(output)

    def _compare(self, got: Tensor, wanted: Tensor, what: str, tolerance: float | None = None) -> str | None:
        return off(got, wanted, what, self.tolerance if tolerance is None else tolerance)
