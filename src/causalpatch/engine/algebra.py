"""Sums and products that the definitions of sites claim, tried on a tiny batch: the fourth trial of a proof.

The stream is the sum that the family says; heads add up to the output projection, experts to the MLP, features to what
a dictionary explains; attention's weights times the values are what is handed on; and a neuron is its activation
function of what goes in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine.capture import capture, inputs_of
from causalpatch.engine.hooks import quiet, run_with_hooks
from causalpatch.engine.sums import Where, claims_about
from causalpatch.models import FeatureView, Model, Port
from causalpatch.models.attention import attending
from causalpatch.pairs import Batch
from causalpatch.sites import Site
from causalpatch.sites.names import CROSS_SITES
from causalpatch.sites.select import part_of

MOST_FEATURES = 256  # of a dictionary, that are tried

# What MLPs call their activation function.
_ACTIVATIONS = ("act", "act_fn", "activation_fn", "activation", "activation_func", "gelu_impl", "intermediate_act_fn")

Check = Callable[[Site], str | None]
"""Tries a site; says what does not hold, or None."""


def off(got: Tensor, wanted: Tensor, what: str, tolerance: float) -> str | None:
    """Say that a tensor is off by more than rounding, or None.

    Args:
        got: The tensor.
        wanted: What it should be.
        what: How the reader calls it.
        tolerance: What is allowed, relative to the largest value or to 1.
    """
    scale = wanted.abs().max().clamp_min(1.0)
    difference = float((got - wanted).abs().max() / scale)
    return None if difference <= tolerance else f"{what} is off by {difference:.1e}"


@dataclass(frozen=True)
class Algebra:
    """Claims of a model's sites.

    Args:
        model: The model.
        batch: Tiny prompts.
        tolerance: What is allowed, relative to the largest value.
    """

    model: Model
    batch: Batch
    tolerance: float

    def of(self, site: Site) -> Check | None:
        """Return what tries the claims of a site; None where its definition makes none."""
        name = site.name
        if name in ("resid_mid", "resid_post", "attn_out", "cross_attn_out", "mlp_out"):
            return self.stream if claims_about(self.model, site) else None
        return self._checks.get(name)

    @cached_property
    def _checks(self) -> dict[str, Check]:
        checks: dict[str, Check] = dict.fromkeys(("head_out", "cross_head_out"), self.heads)
        checks |= dict.fromkeys(("z", "v", "cross_z", "cross_v"), self.attention)
        checks |= dict.fromkeys(("scores", "pattern", "cross_scores", "cross_pattern"), self.weights)
        checks |= {"expert_out": self.experts} | dict.fromkeys(("mlp_pre", "mlp_gate"), self.neuron)
        return checks | dict.fromkeys(("feature", "feature_error"), self.dictionary)

    def _refused(self, site: Site) -> set[str]:
        return set(part_of(site, self.model.shape).refused)

    def _units(self, site: Site, axis: str) -> int:
        return part_of(site, self.model.shape).units[axis]

    def stream(self, site: Site) -> str | None:
        """The stream is the sum that the family says."""
        claims = claims_about(self.model, site)
        needed = dict.fromkeys(where for claim in claims for where in (*claim.parts, *claim.totals))
        run = capture(self.model, self.batch, [where for where in needed if isinstance(where, Site)])
        ports = [where for where in needed if isinstance(where, Port)]
        _, tensors = run_with_hooks(self.model, inputs_of(self.model, self.batch), keep=ports)

        def value(where: Where) -> Tensor:
            return run.value(where) if isinstance(where, Site) else tensors[where]

        for claim in claims:
            total = sum((value(part) for part in claim.parts[1:]), value(claim.parts[0]))
            what = f"{claim.words} in layer {site.layer}"
            failures = [self._off(total, value(each), what) for each in claim.totals]
            if None not in failures:
                return failures[0]
        return None

    def heads(self, site: Site) -> str | None:
        """The heads' outputs and the bias are the output projection's output."""
        heads = [replace(site, unit=head) for head in range(self._units(site, "head"))]
        run = capture(self.model, self.batch, heads)
        port = self.model.tap(site).port
        bias = getattr(self.model.module.get_submodule(port.path), "bias", None)
        total = sum((run.value(head) for head in heads), torch.zeros(()).to(run.tensors[port]))
        return self._off(
            total if bias is None else total + bias, run.tensors[port], f"the sum of {site.name}.{site.layer}"
        )

    def experts(self, site: Site) -> str | None:
        """What the experts add is their sum, and those that a token does not choose add nothing."""
        terms = [Site("expert_out", site.layer, expert) for expert in range(self.model.shape.units["expert"])]
        router = Site("router", site.layer)
        run = capture(self.model, self.batch, [*terms, router])
        port, weights = self.model.tap(site).port, run.value(router)
        values = [run.value(term) for term in terms]
        if any(bool(value[weights[..., number] == 0].any()) for number, value in enumerate(values)):
            return f"an expert that is not chosen adds something in layer {site.layer}"
        return self._off(sum(values[1:], values[0]), run.tensors[port], f"the sum of expert_out.{site.layer}")

    def attention(self, site: Site) -> str | None:
        """What attention is given as values are the values, and what it returns is handed to the projection."""
        refused = self._refused(site)
        named, axis = (("cross_v", "cross_z"), "head") if site.name in CROSS_SITES else (("v", "z"), "kv_head")
        of_v, of_z = (replace(site, name=name) for name in named)
        values = [replace(of_v, unit=head) for head in range(self._units(site, axis)) if of_v.name not in refused]
        heads = [replace(of_z, unit=head) for head in range(self._units(site, "head"))]
        seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
        ) -> Tensor:
            # Any output will do that differs by head and position; the model's own arithmetic is not asked here.
            shared = value.mean(2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)
            mixed = shared + query.mean(-1, keepdim=True)
            seen.setdefault(module, []).append((value, mixed))
            return mixed.transpose(1, 2).contiguous()

        # Quiet first: no other thread may run the model while its kernel is another.
        with quiet(self.model), attending(self.model.module, attend):
            run = capture(self.model, self.batch, [*values, *heads])
        if not seen and values:
            return self._mixture(values, heads)
        inside = replace(of_z, name=of_z.name.replace("z", "pattern"), unit=0)
        around = None if inside.name in refused else self.model.module.get_submodule(self.model.tap(inside).port.path)
        if around is None or len(seen.get(around, ())) != 1:
            return None
        given, returned = seen[around][0]
        pairs = [(part, given[:, number]) for number, part in enumerate(values)]
        pairs += [(part, returned[:, number]) for number, part in enumerate(heads)]
        failures = (self._off(run.value(part), wanted, f"{part} against attention") for part, wanted in pairs)
        return next((failure for failure in failures if failure), None)

    def _mixture(self, values: list[Site], heads: list[Site]) -> str | None:
        """Where attention is spelt out, its weights times the values are handed to the projection."""
        patterns = [replace(head, name=head.name.replace("z", "pattern")) for head in heads]
        try:
            run = capture(self.model, self.batch, [*values, *heads, *patterns])
        except SiteUnsupported:
            return None  # nothing of this attention is met: it may as well be fused
        n_group = len(heads) // len(values)
        for number, (head, pattern) in enumerate(zip(heads, patterns, strict=True)):
            value = run.value(values[number // n_group])
            failure = self._off(run.value(head), run.value(pattern).to(value) @ value, f"{head} against attention")
            if failure:
                return failure
        return None

    def weights(self, site: Site) -> str | None:
        """Values weighted by the pattern are z, and without sinks the pattern is the softmax of the scores."""
        prefix, axis = ("cross_", "head") if site.name in CROSS_SITES else ("", "kv_head")
        head, layer = site.unit or 0, site.layer
        if {f"{prefix}v", f"{prefix}z"} & self._refused(site):
            return None
        kv_head = head * self._units(site, axis) // self._units(site, "head")
        of_v, of_z = replace(site, name=f"{prefix}v", unit=kv_head), replace(site, name=f"{prefix}z")
        parts = [replace(site, name=f"{prefix}scores"), replace(site, name=f"{prefix}pattern"), of_v]
        run = capture(self.model, self.batch, [*parts, of_z])
        scores, pattern, values = (run.value(part) for part in parts)
        mixed = pattern.to(values) @ values
        failure = self._off(mixed, run.value(of_z), f"pattern @ v in layer {layer}")
        softened = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        totals = pattern.sum(-1, keepdim=True)  # below 1 where a sink has its share
        return failure or self._off(pattern, (softened * totals).to(pattern), f"the softmax of scores.{layer}")

    def neuron(self, site: Site) -> str | None:
        """The activation function of one projection, times the other in gated MLPs, is what goes into the next."""
        names = [name for name in ("mlp_gate", "mlp_pre", "mlp_post") if name not in self._refused(site)]
        parts = [replace(site, name=name) for name in names]
        run = capture(self.model, self.batch, parts)
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
            activated = run_with_hooks(self.model, inputs_of(self.model, self.batch), keep=[port])[1][port]
            activated = activated[..., site.unit]
        else:
            activated = act(given[0])
        made = activated * given[1] if len(given) > 1 else activated
        return self._off(made, post, f"{parts[-1]} from {' and '.join(names[:-1])}")

    def dictionary(self, site: Site) -> str | None:
        """Features add up to what is explained, each along its direction; the rest is what is not."""
        coder = cast(FeatureView, self.model.tap(site).view).coded.coder
        given, features, described = self.coded(site)
        tokens, units = (index[:MOST_FEATURES] for index in features.nonzero(as_tuple=True))
        few = torch.zeros_like(features).index_put((tokens, units), features[tokens, units])
        steps = features[tokens, units][:, None] * coder.directions(given, tokens, units)
        nothing = coder.decode(torch.zeros_like(features), given)
        added = nothing.index_add(0, tokens, steps.to(nothing))
        error = replace(site, name="feature_error", unit=None)
        rest = capture(self.model, self.batch, [error]).value(error).flatten(0, -2)
        explained = coder.decode(features, given)
        name = f"{site.dictionary}.{site.layer}"
        return (
            self._off(coder.at(given, tokens, units), features[tokens, units], f"single features of {name}")
            or self._off(added, coder.decode(few, given), f"the sum of the features of {name}")
            or self._off(explained.to(described) + rest, described, f"{name} with what it does not explain")
        )

    def coded(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a dictionary is given at all tokens, its features, and what it describes."""
        tap = self.model.tap(site)
        run, coded = capture(self.model, self.batch, [site]), cast(FeatureView, tap.view).coded
        companions = tuple(run.tensors[port] for port in tap.companions)
        given, described = (
            read(run.tensors[tap.port], companions).flatten(0, -2) for read in (coded.encoded, coded.described)
        )
        return given, coded.coder.encode(given), described

    def _off(self, got: Tensor, wanted: Tensor, what: str) -> str | None:
        return off(got, wanted, what, self.tolerance)
