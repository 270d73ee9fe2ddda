"""The cases: a model whose circuit is known, pairs, a metric, a direction, an ablation, and the true edges.

An edge is true if replacing what is sent along it alone, by what any other prompt sends (resampling) or by zero, ever
changes the outputs that the metric reads. For resampling that is the same in both directions, since all prompts stand
on both sides. For the trained models see ``train``: there changes of their answers count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from causalpatch.base.seeds import generator
from causalpatch.circuits.ground_truth.build import build
from causalpatch.circuits.ground_truth.compiler import Ablation, compile_program
from causalpatch.circuits.ground_truth.gates import LINEAR_EDGES, all_gates, linear
from causalpatch.circuits.ground_truth.language import Program, Redundant
from causalpatch.circuits.ground_truth.programs import all_programs
from causalpatch.circuits.ground_truth.trained import TRAINED, load
from causalpatch.experiment import Experiment
from causalpatch.metrics import Metric, Outputs, logit_difference, metric as wrapped
from causalpatch.models import Model, open_model
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites.graph import Graph, ends_of

Form = Literal["plain", "hidden", "trained"]
Direction = Literal["denoise", "noise"]
FORMS: Final[tuple[Form, ...]] = ("plain", "hidden", "trained")

# The two directions of resampling, and zero put into clean runs.
SETTINGS: Final[tuple[tuple[Ablation, Direction], ...]] = (
    ("resample", "denoise"),
    ("resample", "noise"),
    ("zero", "noise"),
)
MOST_PAIRS: Final = 24


@dataclass(frozen=True, eq=False)
class Case:
    """A behaviour whose circuit is known.

    Args:
        name: Its name: the program, the form, and what is put in, such as ``"reverse, hidden, resample, denoise"``.
        about: What the program does.
        program: Name of the program.
        form: ``"plain"``; ``"hidden"`` by a rotation and idle weights; ``"trained"``.
        model: The model.
        pairs: Clean and corrupted prompts, with answers.
        metric: What is measured.
        direction: ``"denoise"`` or ``"noise"``.
        ablation: What is put in: ``"resample"`` values of the source run, or ``"zero"``.
        true_edges: Labels of the true edges.
        redundant: Why single patches cannot tell the true edges from others in these pairs: ``"or"`` or ``"and"``; or
            that two components undo each other: ``"cancelling"``. None where neither is so.
    """

    name: str
    about: str
    program: str
    form: Form
    model: Model
    pairs: Pairs
    metric: Metric
    direction: Direction
    ablation: Ablation
    true_edges: frozenset[str]
    redundant: Redundant | None

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self.model.shape.n_layers, self.model.n_heads)

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Labels of all edges of the model; scores stand in this order."""
        return tuple(self._graph.names(self._graph.edges))

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Labels of all components of the model: senders, and the logits."""
        return (*self._graph.sender_labels, "logits")

    @cached_property
    def true_nodes(self) -> frozenset[str]:
        """The components at the ends of true edges."""
        return frozenset(node for edge in self.true_edges for node in ends_of(edge))

    @cached_property
    def edge_is_true(self) -> NDArray[np.bool_]:
        """For each of ``edges`` whether it is true."""
        return np.array([edge in self.true_edges for edge in self.edges])

    @cached_property
    def node_is_true(self) -> NDArray[np.bool_]:
        """For each of ``nodes`` whether it is true."""
        return np.array([node in self.true_nodes for node in self.nodes])

    def experiment(self) -> Experiment:
        """Return the experiment of its model, pairs, metric and direction."""
        return Experiment(self.model, self.pairs, self.metric, self.direction, show_progress=False)


def cases(
    names: Sequence[str] | None = None,
    *,
    forms: Sequence[Form] = FORMS,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Case]:
    """Return the cases.

    Args:
        names: Programs; by default all.
        forms: Forms of their models.
        seed: Seed of the pairs that are drawn, and of what hides a circuit.
        dtype: The models' floating-point type.

    Returns:
        For each program and form, one case for each direction of resampling and one for zero ablation; of trained
        models those for resampling.

    Examples:
        >>> [case.name for case in cases(["reverse"], forms=["plain"])]
        ['reverse, plain, resample, denoise', 'reverse, plain, resample, noise', 'reverse, plain, zero, noise']
        >>> sorted(cases(["reverse"], forms=["plain"])[0].true_edges)
        ['a1.h0 -> logits', 'embed -> a1.h0<v>']
    """
    found: list[Case] = []
    for program in (*all_programs(), *all_gates()):
        if names is None or program.name in names:
            found += _of_program(program, forms, seed, dtype)
    if names is None or "linear" in names:
        found += _of_linear(forms, seed, dtype)
    return found


def case_names() -> tuple[str, ...]:
    """Return the programs that there are cases of."""
    return (*(program.name for program in (*all_programs(), *all_gates())), "linear")


def _of_program(program: Program, forms: Sequence[Form], seed: int, dtype: torch.dtype) -> list[Case]:
    compiled = compile_program(program)
    pairs, metric = _pairs(program, seed), _metric(program)
    truth = {ablation: compiled.true_edges(ablation) for ablation in ("resample", "zero")}
    found: list[Case] = []
    for form in forms:
        if form == "trained" and program.name not in TRAINED:
            continue
        hides = seed if form == "hidden" else None
        made = load(program, dtype) if form == "trained" else build(compiled.blueprint, seed=hides, dtype=dtype)
        model = open_model(made)
        for ablation, direction in SETTINGS:
            if form == "trained" and ablation == "zero":
                continue  # what zero does to it was not trained, and is not known
            name = ", ".join((program.name, form, ablation, direction))
            bites = _bites(program.redundant, ablation, direction)
            found.append(
                Case(
                    name,
                    program.about,
                    program.name,
                    form,
                    model,
                    pairs,
                    metric,
                    direction,
                    ablation,
                    truth[ablation],
                    program.redundant if bites else None,
                )
            )
    return found


def _of_linear(forms: Sequence[Form], seed: int, dtype: torch.dtype) -> list[Case]:
    pairs = Pairs([Pair(np.array([2]), np.array([1]), ((3,),), ((0,),), id="linear 0")], name="linear")
    about = "a linear model with hand numbers"
    found: list[Case] = []
    for form in ("plain", "hidden"):
        if form in forms:
            model = open_model(build(linear(), seed=seed if form == "hidden" else None, dtype=dtype))
            for ablation, direction in SETTINGS:
                name = ", ".join(("linear", form, ablation, direction))
                setting = (logit_difference, direction, ablation)
                found.append(Case(name, about, "linear", form, model, pairs, *setting, LINEAR_EDGES, None))
    return found


def _bites(redundant: Redundant | None, ablation: Ablation, direction: Direction) -> bool:
    """Say whether a redundancy shows: one of two suffices if both are on, one alone does nothing if both are off."""
    if redundant == "cancelling" or redundant is None:
        return redundant is not None
    return ablation == "resample" and direction == {"or": "noise", "and": "denoise"}[redundant]


def _pairs(program: Program, seed: int) -> Pairs:
    """Return pairs of prompts with different answers, drawn from all unless the program chooses them."""
    prompts = program.inputs()
    drawn = list(program.chosen) or [
        (prompts[a], prompts[b]) for a, b in _differing(program, [_asked(program, each) for each in prompts], seed)
    ]
    made = []
    for number, (clean, corrupt) in enumerate(drawn):
        both = _asked(program, clean), _asked(program, corrupt)
        last = [list(each.values())[-1] for each in both]
        answer, wrong = (program.tokens[0], 0) if program.is_number else map(int, last)
        extra = {name: list(each.items()) for name, each in zip(("answers", "wrong_answers"), both, strict=True)}
        made.append(
            Pair(
                np.array(clean),
                np.array(corrupt),
                ((answer,),),
                ((wrong,),),
                id=f"{program.name} {number}",
                extra=extra,
            )
        )
    return Pairs(made, name=program.name)


def _asked(program: Program, prompt: Sequence[int]) -> Mapping[int, float]:
    """Return the answers by which the behaviour is measured."""
    answers = program.answers(prompt)
    return answers if program.reads == "all" else {len(prompt) - 1: answers[len(prompt) - 1]}


def _differing(program: Program, asked: Sequence[Mapping[int, float]], seed: int) -> list[tuple[int, int]]:
    """Draw pairs of prompts whose answers differ, of numbers the one with the higher last number first."""
    told = [list(each.values())[-1:] if program.is_number else list(each.values()) for each in asked]
    is_free = not program.is_number
    every = [
        (a, b)
        for (a, first), (b, second) in product(enumerate(told), repeat=2)
        if first > second or (is_free and first < second)
    ]
    order = generator(seed, "pairs", program.name).permutation(len(every))
    return [every[k] for k in order[:MOST_PAIRS]]


def _metric(program: Program) -> Metric:
    return logit_difference if program.reads == "last" else SLOTS


def _slots(outputs: Outputs, pairs: Pairs) -> Float[Tensor, " row"]:
    logits = outputs.logits
    right, wrong = (
        torch.tensor([pair.extra[name] for pair in pairs]) for name in ("answers", "wrong_answers")
    )  # axes (pair, slot, position or token)
    rows = torch.arange(len(logits))[:, None]
    both = (logits[rows, each[..., 0], each[..., 1]] for each in (right, wrong))
    return torch.sub(*both).mean(-1)


SLOTS: Final = wrapped(_slots, name="logit_difference over slots")
"""logit(answer) - logit(wrong answer), the mean over all positions that have answers."""
