"""Edges of GPT-2 small's shape: every single one exactly, and scores of all, beside how others go about it.

Single edges: of each layer, all its receivers hear a few senders, drawn at random (all where there are so few); a layer
is a *stratum*, since what an edge costs depends on where it ends. What all edges take follows from the seconds per edge
of each stratum, and what a call takes whatever it is asked for (one edge into the logits). In turn with each stratum
one of its edges by hand, in a forward. Least times in a stratum count, and are averaged over strata.

Growth: in a layer in the middle more and more senders, to see whether time grows as the number of edges does.

Scores: time and added memory of EAP and EAP-IG in 5 steps, beside a plain forward and backward of the same prompts, and
beside the same scores with an input for every head (``split``).

What is done by hand is leaner than the programs whose way it is. Their own seconds were measured once, on a machine of
this kind (``PUBLISHED``). They are scaled in two ways: by the rate of matrix products, then and in this run; and by the
seconds of a prototype that was timed beside them then and is timed in turn with ours now (``prototypes``).
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import causalpatch as cp
from benchmarks import prototypes, split
from benchmarks.machine import forget_peak, gemm_rate, peak_mib, release_freed, resident_mib
from benchmarks.shapes import SHAPES, build, tiny
from benchmarks.tasks import Task, random_pairs
from causalpatch.pairs import Pairs

OURS: Final = "causalpatch"
FIXED: Final = "one edge into the logits"  # what any call takes
SPLIT: Final = "all inputs split and put together"
HOOKED: Final = "hooks by hand"
PLAIN: Final = "a plain forward and backward"
SENDERS: Final = 2  # drawn in each stratum
STEPS: Final = 5
LEAST_EXACT: Final = 60.0
LEAST_SCORES: Final = 15.0
MOST_MEMORY: Final = 1.3
TOLERANCE: Final = 1e-4  # of the largest effect or score
GROWING: Final = (1, 2, 4, 8)  # senders
MOST_OFF: Final = 0.20  # deviation from proportionality that is allowed
# Seconds of EAP-IG's code for 8 pairs x 16 tokens (EAP; EAP-IG in 5 steps) and of auto-circuit for one edge of 4 x 16,
# GPT-2 small's shape on two cores: the least that was seen, all at this rate in GFLOP/s.
PUBLISHED: Final = {"eap": 7.6, "eap-ig": 25.0, "edge": 0.784}
PUBLISHED_RATE: Final = 335.0
BY_GEMM: Final = "measured once, scaled by sgemm"
BY_PROTOTYPE: Final = "measured once, scaled by the prototype"
PEERS: Final = {
    "EAP-IG": "not on PyPI, where 'eap' is another project's name (asset pricing); its way is done by hand",
    "auto-circuit": "asks for packages of its own (tracr, kaleido 0.2.1), not installed; its way is done by hand",
}


@dataclass
class _Timed:
    seconds: list[float] = field(default_factory=list)
    added_mib: list[float] = field(default_factory=list)

    def run(self, make: Callable[[], Any]) -> Any:
        """Run something and note its time, and by how much the process grew."""
        gc.collect()
        release_freed()
        forget_peak()
        before = resident_mib()
        started = time.perf_counter()
        made = make()
        self.seconds.append(time.perf_counter() - started)
        self.added_mib.append(peak_mib() - before)
        return made


class _World:
    """The model, pairs, and both sides' ids."""

    def __init__(self, n_pairs: int, *, is_tiny: bool) -> None:
        shape = tiny(SHAPES["gpt2"]) if is_tiny else SHAPES["gpt2"]
        self.module: nn.Module = build(shape)
        self.pairs: Pairs = random_pairs(n_pairs, 16, shape.vocab)
        self.task = Task(shape, self.pairs, "z", "logit_difference", range(shape.layers))
        self.experiment = cp.Experiment(cp.open_model(self.module), self.pairs, show_progress=False)
        self.graph = cp.graph_of(self.experiment)
        self.split = split.Split(self.module)


def measure_exact(repeats: int, *, is_tiny: bool) -> dict[str, Any]:
    """Time a sample of single edges, and edges by hand."""
    world = _World(4, is_tiny=is_tiny)
    graph, experiment = world.graph, world.experiment
    strata, by_hand = _strata(world), {SPLIT: _assembled, HOOKED: _hooked}
    source, now = (_outputs(world, ids) for ids in (world.task.clean, world.task.corrupt))
    base, one = float(experiment.baseline.corrupt[0].mean()), [graph.label(0, graph.logits)]
    times = [{name: _Timed() for name in (FIXED, OURS, *by_hand)} for _ in strata]
    growing = [(len(names), names, _Timed()) for names in _growing(world)]
    first, rates, difference, largest = _Timed(), [], 0.0, 0.0
    why, prototype = prototypes.why_not(prototypes.EDGES, is_tiny=is_tiny), []
    first.run(lambda: cp.patch_edges(experiment, one))
    for _ in range(repeats):
        rates.append(gemm_rate())
        prototype += [] if why else [prototypes.one_edge()]
        for edges, timed in zip(strata, times, strict=True):
            names = list(graph.names(edges))
            timed[FIXED].run(lambda: cp.patch_edges(experiment, one))
            effects = timed[OURS].run(lambda names=names: cp.patch_edges(experiment, names)).effect().values
            largest = max(largest, float(np.abs(effects).max()))
            sender, receiver = edges[len(edges) // 2].tolist()
            for name, make in by_hand.items():
                value = timed[name].run(lambda make=make, u=sender, v=receiver: make(world, source, now, u, v))
                difference = max(difference, abs(value - base - float(effects[len(edges) // 2])))
        for _, names, timed in growing:
            timed.run(lambda names=names: cp.patch_edges(experiment, names))
    layers = graph.receiver_layers()
    return {
        "pairs": len(world.pairs),
        "tokens": world.task.n_tokens,
        "edges": graph.n_edges,
        "gemm": rates,
        "first": first.seconds[0],
        "strata": [
            {
                "layer": layer,
                "sampled": len(edges),
                "all": int(graph.exists[:, layers == layer].sum()),
                "seconds": {name: each.seconds for name, each in timed.items()},
            }
            for layer, (edges, timed) in enumerate(zip(strata, times, strict=True))
        ],
        "growth": [{"edges": size, "seconds": timed.seconds} for size, _, timed in growing],
        "prototype": {"skipped": why} if why else {"edge": prototype},
        "added_mib": max(max(timed[OURS].added_mib) for timed in times),
        "difference": difference,
        "largest": largest,
    }


def measure_scores(repeats: int, *, is_tiny: bool) -> dict[str, Any]:
    """Time EAP and EAP-IG, by hand too, and a plain forward and backward."""
    world = _World(8, is_tiny=is_tiny)
    experiment, task, exists = world.experiment, world.task, world.graph.exists
    points = {"eap": [0.0], "eap-ig": [k / STEPS for k in range(STEPS)]}
    asked: dict[str, Callable[[], np.ndarray]] = {
        "eap": lambda: cp.attribute_edges(experiment, "eap").score().values[exists],
        "eap-ig": lambda: cp.attribute_edges(experiment, "eap-ig", steps=STEPS, rule="eap-ig").score().values[exists],
    }
    times = {name: {OURS: _Timed(), SPLIT: _Timed()} for name in asked} | {"plain": {PLAIN: _Timed()}}
    differences = dict.fromkeys(asked, 0.0)
    first, rates = {name: _Timed() for name in asked}, []
    why, prototype = prototypes.why_not(prototypes.SCORES, is_tiny=is_tiny), {name: [] for name in asked}
    for name, timed in first.items():
        timed.run(asked[name])  # what a first call does once
    for _ in range(repeats):
        rates.append(gemm_rate())
        for name, seconds in ({} if why else prototypes.scores(len(world.pairs), task.n_tokens, STEPS)).items():
            prototype[name].append(seconds)
        times["plain"][PLAIN].run(lambda: _forward_and_backward(world))
        for name, make in asked.items():
            ours = times[name][OURS].run(make)
            by_hand = times[name][SPLIT].run(
                lambda name=name: split.scores(world.split, task.corrupt, task.clean, task.read, points[name])
            )
            difference = np.abs(ours - by_hand.detach().numpy()[exists]).max() / np.abs(ours).max()
            differences[name] = max(differences[name], float(difference))
    return {
        "pairs": len(world.pairs),
        "tokens": task.n_tokens,
        "edges": world.graph.n_edges,
        "gemm": rates,
        "first": {name: timed.seconds[0] for name, timed in first.items()},
        "differences": differences,
        "prototype": {"skipped": why} if why else prototype,
        "times": {
            name: {who: {"seconds": t.seconds, "added_mib": t.added_mib} for who, t in some.items()}
            for name, some in times.items()
        },
    }


def _strata(world: _World) -> list[np.ndarray]:
    """Return the sampled edges, ``(edge, 2)``, by the layer that they end in; those into the logits last."""
    graph, draw, found = world.graph, np.random.default_rng(0), []
    for layer in range(graph.n_layers + 1):
        receivers = np.flatnonzero(graph.receiver_layers() == layer)
        senders = draw.permutation(int(graph.heard[receivers[0]]))[:SENDERS]
        found.append(np.array([(sender, receiver) for sender in senders.tolist() for receiver in receivers.tolist()]))
    return found


def _growing(world: _World) -> list[list[str]]:
    """Return edges into a layer in the middle, of more and more senders."""
    graph = world.graph
    layer = graph.n_layers // 2
    receivers = np.flatnonzero(graph.receiver_layers() == layer)
    senders = np.random.default_rng(1).permutation(int(graph.heard[receivers[0]]))
    return [
        list(graph.names(np.array([(u, v) for u in senders[:size].tolist() for v in receivers.tolist()])))
        for size in GROWING
        if size <= len(senders)
    ]


@torch.no_grad()
def _outputs(world: _World, ids: Tensor) -> Tensor:
    """Return what every sender gives in a run, ``(sender, pair, position, width)``."""
    sent = split.Sent()
    world.split.run(world.split.embed(ids), sent=sent)
    return sent.stacked()


def _assembled(world: _World, source: Tensor, now: Tensor, sender: int, receiver: int) -> float:
    """Patch one edge in a forward that puts all inputs together."""
    del now
    mask = torch.zeros(world.graph.shape)
    mask[sender, receiver] = 1
    return float(world.task.read(split.patched(world.split, world.task.corrupt, source, mask)).mean())


@torch.no_grad()
def _hooked(world: _World, source: Tensor, now: Tensor, sender: int, receiver: int) -> float:
    """Patch one edge by hooks on one module: what its receiver reads is moved, in a whole forward."""
    graph, body, moved = world.graph, world.module.transformer, source[sender] - now[sender]
    layer, handles, streams = int(graph.receiver_layers()[receiver]), [], []

    def project(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        width = out.shape[-1] // (3 * graph.n_heads)
        start = (receiver - graph.heads_to("q", layer).start) * width  # queries of all heads, keys, values
        given, out = body.h[layer].ln_1.forward(streams[0] + moved), out.clone()
        out[..., start : start + width] = module.forward(given)[..., start : start + width]
        return out

    if receiver == graph.logits:
        handles.append(body.ln_f.register_forward_pre_hook(lambda _, args: (args[0] + moved,)))
    elif receiver == graph.mlp_to(layer):
        handles.append(body.h[layer].ln_2.register_forward_pre_hook(lambda _, args: (args[0] + moved,)))
    else:
        handles.append(body.h[layer].ln_1.register_forward_pre_hook(lambda _, args: streams.append(args[0])))
        handles.append(body.h[layer].attn.c_attn.register_forward_hook(project))
    logits = world.module(world.task.corrupt, use_cache=False, logits_to_keep=1).logits[:, -1]
    for handle in handles:
        handle.remove()
    return float(world.task.read(logits).mean())


def _forward_and_backward(world: _World) -> Tensor:
    """Run the base prompts and take the gradient of the metric at the embedding."""
    embedded = world.module.transformer.wte(world.task.corrupt).detach().requires_grad_()
    logits = world.module(inputs_embeds=embedded, use_cache=False).logits[:, -1]
    (found,) = torch.autograd.grad(world.task.read(logits).sum(), embedded)
    return found


def per_edge(part: Mapping[str, Any]) -> list[float]:
    """Return seconds of one edge in each stratum."""
    spent = [(each["seconds"], each["sampled"]) for each in part["strata"]]
    return [max(0.0, min(seconds[OURS]) - min(seconds[FIXED])) / sampled for seconds, sampled in spent]


def implied(part: Mapping[str, Any]) -> float:
    """Return the seconds that all edges would take in one call."""
    found = sum(one * each["all"] for one, each in zip(per_edge(part), part["strata"], strict=True))
    return _mean_of_minima(part, FIXED) + float(found)


def times_as_fast(part: Mapping[str, Any], name: str) -> float:
    """Return how many times as long a forward for each edge takes."""
    return _mean_of_minima(part, name) * part["edges"] / implied(part)


def by_gemm(part: Mapping[str, Any], name: str) -> float:
    """Return the seconds of a program's own code, scaled by the rate of matrix products."""
    return PUBLISHED[name] * PUBLISHED_RATE / max(part["gemm"])


def by_prototype(part: Mapping[str, Any], name: str) -> float | None:
    """Return the seconds of a program's own code, scaled by a prototype's; None where that was not run."""
    seconds = part.get("prototype", {}).get(name)
    return PUBLISHED[name] * min(seconds) / prototypes.THEN[name] if seconds else None


def off_proportion(part: Mapping[str, Any]) -> float:
    """Return by how much the seconds of one edge differ from their median at most, the more edges are asked for."""
    fixed = _mean_of_minima(part, FIXED)
    each = [(min(point["seconds"]) - fixed) / point["edges"] for point in part["growth"]]
    return max(abs(value / statistics.median(each) - 1) for value in each)


def _mean_of_minima(part: Mapping[str, Any], name: str) -> float:
    """Return the least time in each stratum, averaged over strata: what is timed there costs the same in all."""
    return statistics.mean(min(each["seconds"][name]) for each in part["strata"])


def lines_exact(part: Mapping[str, Any]) -> list[str]:
    """Return the section on single edges."""
    if "strata" not in part:
        return ["Not run."]
    sampled, total = sum(each["sampled"] for each in part["strata"]), implied(part)
    lines = [
        f"`patch_edges`, {part['pairs']} pairs x {part['tokens']} tokens, GPT-2 small's shape with {part['edges']:,} "
        f"edges ({part['date']}). Measured: {sampled:,} edges, all receivers of every layer hearing {SENDERS} senders "
        "drawn at random (1 where there is but one), and the logits; one layer is a stratum. Of each layer seconds per "
        "edge, what any call takes "
        f"({_mean_of_minima(part, FIXED):.2f} s: untouched runs, wiring, checks) taken away, times all of its edges: "
        f"**{total:,.0f} s for all edges**, {total / part['edges'] * 1e3:.1f} ms each; products at "
        f"{max(part['gemm']):.0f} GFLOP/s in the same run. A call adds {part['added_mib']:,.0f} MiB at most. "
        f"Largest |effect| {part['largest']:.2g}; edges by hand differ by {part['difference']:.0e} at most.",
        "",
        "| into layer | edges | measured | ms per edge |",
        "|---|---|---|---|",
    ]
    for each, one in zip(part["strata"], per_edge(part), strict=True):
        name = "logits" if each is part["strata"][-1] else each["layer"]
        lines.append(f"| {name} | {each['all']:,} | {each['sampled']} | {one * 1e3:.1f} |")
    sizes = ", ".join(f"{point['edges']} edges {min(point['seconds']):.2f} s" for point in part.get("growth", ()))
    lines += [
        "",
        f"More senders into one layer: {sizes}.",
        "",
        "| one forward for each edge | ms per edge | all edges, s | times ours |",
        "|---|---|---|---|",
    ]
    for name in (SPLIT, HOOKED):
        one = _mean_of_minima(part, name)
        lines.append(f"| {name} | {one * 1e3:.0f} | {one * part['edges']:,.0f} | {times_as_fast(part, name):.1f} |")
    scaled = {BY_GEMM: by_gemm(part, "edge"), BY_PROTOTYPE: by_prototype(part, "edge")}
    for how, one in scaled.items():
        if one is not None:
            lines.append(
                f"| auto-circuit's own code, {how} | {one * 1e3:.0f} | {one * part['edges']:,.0f} "
                f"| {one * part['edges'] / total:.1f} |"
            )
    return [*lines, *_on_prototype(part, {"edge": ("one edge", total / part["edges"])})]


def lines_scores(part: Mapping[str, Any]) -> list[str]:
    """Return the section on scores of edges."""
    if "times" not in part:
        return ["Not run."]
    lines = [
        f"All {part['edges']:,} edges, {part['pairs']} pairs x {part['tokens']} tokens ({part['date']}). EAP-IG takes "
        f"{STEPS} steps. *Added*: by how much the process grew at its peak. Scores by hand differ by "
        + ", ".join(f"{value:.0e} ({name})" for name, value in part["differences"].items())
        + " of the largest score.",
        "",
        "| what | seconds: minimum (median) | added, MiB |",
        "|---|---|---|",
    ]
    for name, some in part["times"].items():
        for who, each in some.items():
            low, middle, added = min(each["seconds"]), statistics.median(each["seconds"]), max(each["added_mib"])
            what = who if name == "plain" else f"{name}, {who}"
            lines.append(f"| {what} | {low:.2f} ({middle:.2f}) | {added:,.0f} |")
    if "gemm" in part:
        for name in ("eap", "eap-ig"):
            for how, seconds in {BY_GEMM: by_gemm(part, name), BY_PROTOTYPE: by_prototype(part, name)}.items():
                if seconds is not None:
                    lines.append(f"| {name}, EAP-IG's own code, {how} | {seconds:.2f} | |")
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in part["first"].items())
        lines += [
            "",
            "What a plain forward and backward took when EAP-IG's own code was timed is not on record, so that its "
            "seconds are scaled by what is: the rate of matrix products, and the prototype.",
        ]
        lines += ["", f"First calls, in this order: {told}; the first of all proves sites and hashes the weights."]
    ours = {name: (name, min(some[OURS]["seconds"])) for name, some in part["times"].items() if name != "plain"}
    return [*lines, *_on_prototype(part, ours)]


def _on_prototype(part: Mapping[str, Any], ours: Mapping[str, tuple[str, float]]) -> list[str]:
    """Return what is said of the prototype beside our own seconds."""
    known = part.get("prototype", {})
    if "skipped" in known:
        return ["", f"Skipped: the design's prototype: {known['skipped']}."]
    told = [
        f"{title} {min(known[name]):.3g} s now, {prototypes.THEN[name]:g} s when the others were timed, ours "
        f"{seconds / min(known[name]):.2f} x that"
        for name, (title, seconds) in ours.items()
        if known.get(name)
    ]
    return ["", f"The design's prototype, timed in turn with ours: {'; '.join(told)}."] if told else []
