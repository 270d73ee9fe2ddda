"""What is measured, and what it should reach."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal

import causalpatch as cp
from benchmarks.peers import LENS, NNSIGHT_BATCHED
from benchmarks.shapes import SHAPES, Shape, tiny
from benchmarks.tasks import Kind, Task, random_pairs


@dataclass(frozen=True)
class Workload:
    """One sweep, with what it should reach.

    Args:
        name: One word for the command line.
        shape: Name of the model's shape.
        kind: What is patched.
        n_pairs: Pairs.
        n_tokens: Tokens of each prompt.
        shared: Part of the prompt, from its start, that the two sides have in common.
        metric: What is read.
        first_layer: The first layer that is patched; all later ones are too.
        settings: Further arguments of the experiment.
        share: Share of the machine's sgemm rate to reach, on the cone's FLOPs.
        ratios: How many times as fast as a peer to be, by peer.
        n_cells: Cells that peers are measured on, a random part of all; as many more as full batches of 8 need.
        most_repeats: Repeats at most, where one takes long.
        only_ours: Whether it is measured in a process of its own, hooks by hand only checking a few numbers.
        is_profiled: Whether it is run once more under the profiler, which takes as long again and whose
            records of a long sweep fill the memory.
    """

    name: str
    shape: str = "gpt2"
    kind: Kind = "resid_pre"
    n_pairs: int = 4
    n_tokens: int = 16
    shared: float = 0.0
    metric: Literal["logit_difference", "log_probability"] = "logit_difference"
    first_layer: int = 0
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    share: float | None = None
    ratios: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    n_cells: int = 24
    most_repeats: int = 99
    only_ours: bool = False
    is_profiled: bool = True

    @property
    def title(self) -> str:
        """How tables call it."""
        what = {"resid_pre": "resid_pre", "mlp_out": "mlp_out", "z": "z, all positions", "neuron": "all neurons, last"}
        words = [what[self.kind], f"{self.n_pairs} x {self.n_tokens:,}"]
        if self.shape != "gpt2":
            words.insert(0, self.shape)
        if self.first_layer:
            words.insert(-1, f"layers {self.first_layer}-{SHAPES[self.shape].layers - 1}")
        if self.shared:
            words.append("alike up to a third")
        if self.metric == "log_probability":
            words.append("log-probability")
        return ", ".join([*words, *(f"{name}={value!r}" for name, value in self.settings.items())])

    def why_not(self) -> str | None:
        """Say why this version of the library cannot be asked for it, if it cannot."""
        known = inspect.signature(cp.Experiment).parameters
        missing = [name for name in self.settings if name not in known]
        return f"Experiment has no argument {missing[0]}" if missing else None

    def sizes(self, *, is_tiny: bool) -> Shape:
        """Return the model's sizes."""
        return tiny(SHAPES[self.shape]) if is_tiny else SHAPES[self.shape]

    def task(self, *, is_tiny: bool) -> Task:
        """Return the task that every contender is given."""
        shape = self.sizes(is_tiny=is_tiny)
        n_tokens = min(self.n_tokens, 24) if is_tiny else self.n_tokens
        pairs = random_pairs(self.n_pairs, n_tokens, shape.vocab, int(self.shared * n_tokens))
        layers = range(min(self.first_layer, shape.layers - 1), shape.layers)
        return Task(shape, pairs, self.kind, self.metric, layers)


def _against(lens: float, nnsight: float | None = None) -> Mapping[str, float]:
    return MappingProxyType({LENS: lens} | ({NNSIGHT_BATCHED: nnsight} if nnsight else {}))


_SHORT = (
    Workload("resid_pre", share=0.75, ratios=_against(10, 6)),
    Workload("mlp_out", kind="mlp_out", share=0.75, ratios=_against(10, 6)),
    Workload("resid_pre-third", shared=1 / 3, share=0.75, ratios=_against(20, 12)),
    Workload("mlp_out-third", kind="mlp_out", shared=1 / 3, share=0.75, ratios=_against(20, 12)),
    Workload("z", kind="z", share=0.85, ratios=_against(5.5, 3.3)),
    Workload("screen", settings=MappingProxyType({"precision": "screen"}), ratios=_against(20)),
    Workload("neurons", kind="neuron", share=0.75, ratios=_against(80, 50), most_repeats=3),
    Workload(
        "neurons-logprob",
        kind="neuron",
        metric="log_probability",
        share=0.65,
        ratios=_against(40),
        most_repeats=3,
        is_profiled=False,
    ),
)
_LONG = (
    Workload(
        "neurons-128",
        kind="neuron",
        n_pairs=1,
        n_tokens=128,
        share=0.70,
        ratios=_against(450),
        n_cells=16,
        most_repeats=3,
    ),
    Workload("resid_pre-128", n_pairs=1, n_tokens=128, share=0.75, ratios=_against(8, 6.5), n_cells=16, most_repeats=3),
    Workload("z-128", kind="z", n_pairs=1, n_tokens=128, n_cells=16),
    Workload(
        "resid_pre-1024",
        n_pairs=1,
        n_tokens=1_024,
        first_layer=9,
        settings=MappingProxyType({"budget_gib": 4.0}),
        share=0.65,
        n_cells=8,
        most_repeats=2,
        only_ours=True,
        is_profiled=False,
    ),
)
_FAMILIES = tuple(
    Workload(f"{shape}-{kind}", shape=shape, kind=kind)
    for shape in ("llama", "gemma2", "neox")
    for kind in ("resid_pre", "z")
)
WORKLOADS: Final = {each.name: each for each in (*_SHORT, *_LONG, *_FAMILIES)}
QUICK: Final = ("resid_pre", "resid_pre-third", "z")


def shorter(workload: Workload) -> Workload:
    """Return the workload with peers measured on eight cells."""
    return replace(workload, n_cells=8)
