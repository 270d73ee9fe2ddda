"""From a program to weights, and to the edges that it uses.

1. Each variable has columns of its own in the stream: one for each category, or one for a number.
2. An ``Aggregate`` is a head, a ``Lookup`` or an ``Interpolate`` some neurons, each in the first layer in which all
   that it reads is there. Heads of one layer are numbered in the order in which the program mentions them. There are
   at least two layers of two heads; what a program leaves over is idle.
3. A head's score is the program's own: what is not selected stands 40 or more below what is, which leaves it a weight
   of at most exp(-40). A ``Lookup`` has a neuron for each combination of categories, which is above 0 for that
   combination alone; an ``Interpolate`` has a neuron for each point at which its slope changes. Both are exact.
4. Whatever reads a variable is written down as a ``Reading``: which component, at which input, and by which linear map.
   An edge is claimed to be true where what is read along it ever changes when it is replaced: by what another prompt
   sends (resampling), or by zero.

The claims are the compiler's. Whether they hold is found by trying every input, which the tests do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from causalpatch.circuits.ground_truth.blueprint import Blueprint, Head, Layer, Mlp
from causalpatch.circuits.ground_truth.language import (
    Aggregate,
    Interpolate,
    Is,
    Lookup,
    Positions,
    Program,
    Tokens,
    Variable,
    sources_of,
)
from causalpatch.circuits.ground_truth.meaning import evaluate, points_of, scores_of, table_of

Array = NDArray[np.float64]
Ablation = Literal["resample", "zero"]


@dataclass(frozen=True)
class Reading:
    """What a component reads of a variable.

    Args:
        edge: From the component that writes the variable to the input that reads it, such as ``"m0 -> a1.h0<v>"``.
        variable: The variable.
        matrix: The linear map by which it is read, axes (column of the variable, whatever).
    """

    edge: str
    variable: Variable
    matrix: Array


@dataclass(frozen=True)
class Compiled:
    """A program as weights, with what reads what.

    Args:
        program: The program.
        blueprint: Its weights.
        columns: The columns of each variable in the stream.
        node: The component that writes each variable.
        readings: All that is read.
    """

    program: Program
    blueprint: Blueprint
    columns: dict[Variable, slice]
    node: dict[Variable, str]
    readings: tuple[Reading, ...]

    def true_edges(self, ablation: Ablation, n_symbols: int | None = None) -> frozenset[str]:
        """Return the edges along which what is read ever changes, over all prompts of a size.

        Args:
            ablation: What replaces it: ``"resample"``: what another prompt sends at the same position; ``"zero"``: 0.
            n_symbols: The size of prompts; by default the program's own.
        """
        values = evaluate(self.program, list(self.program.prompts(n_symbols or self.program.n_symbols)))
        found = set()
        for reading in self.readings:
            read = values[reading.variable] @ reading.matrix
            if np.abs(read - (read[:1] if ablation == "resample" else 0.0)).max(initial=0.0) > 1e-9:
                found.add(reading.edge)
        return frozenset(found)


def compile_program(program: Program) -> Compiled:
    """Compile a program to weights."""
    return _Compiler(program).compiled()


class _Compiler:
    """Lays out one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        listed: tuple[Variable, ...] = tuple(each for each in program.variables() if not isinstance(each, Is))
        self.tokens = next(each for each in listed if isinstance(each, Tokens))
        # A head that looks for the latest position reads positions, whether the program names them or not.
        named = [each for each in listed if isinstance(each, Positions)]
        self.positions = named[0] if named else Positions(len(program.inputs()[0]))
        listed = listed if named else (self.positions, *listed)
        self.variables = listed
        ends = np.cumsum([0, *(each.size for each in listed)])
        self.columns = {each: slice(int(a), int(b)) for each, a, b in zip(listed, ends, ends[1:], strict=False)}
        self.n_columns = int(ends[-1])
        self.layer = self._layers()
        self.n_layers = max(2, max(self.layer.values()) + 1)
        self.node = self._nodes()
        self.readings: list[Reading] = []

    def compiled(self) -> Compiled:
        """Return the program as weights."""
        layers = tuple(self._layer(number) for number in range(self.n_layers))
        blueprint = Blueprint(
            token_embed=self._embedding(self.tokens),
            pos_embed=self._embedding(self.positions),
            layers=layers,
            unembed=self._unembed(),
        )
        return Compiled(self.program, blueprint, self.columns, self.node, tuple(self.readings))

    def _layers(self) -> dict[Variable, int]:
        """Return the layer in which each variable is computed; -1 for embeddings."""
        stage: dict[Variable, int] = {}  # 2 * layer for attention, 2 * layer + 1 for the MLP
        for each in self.variables:
            ready = max((stage[_stored(source)] for source in sources_of(each)), default=-1)
            is_embedded = isinstance(each, Tokens | Positions)
            parity = 0 if isinstance(each, Aggregate) else 1
            stage[each] = -1 if is_embedded else next(k for k in (ready + 1, ready + 2) if k % 2 == parity)
        return {each: number // 2 for each, number in stage.items()}

    def _nodes(self) -> dict[Variable, str]:
        """Return the label of the component that writes each variable."""
        node: dict[Variable, str] = {}
        n_heads = dict.fromkeys(range(self.n_layers), 0)
        for each in self.variables:
            layer = self.layer[each]
            if isinstance(each, Aggregate):
                node[each] = f"a{layer}.h{n_heads[layer]}"
                n_heads[layer] += 1
            else:
                node[each] = "embed" if layer < 0 else f"m{layer}"
        return node

    def _embedding(self, variable: Variable) -> Array:
        out = np.zeros((variable.size, self.n_columns))
        out[:, self.columns[variable]] = np.eye(variable.size)
        return out

    def _reads(self, receiver: str, variable: Variable, matrix: Array) -> Array:
        """Note that a receiver reads a variable, and return the map from the whole stream."""
        if isinstance(variable, Is):
            matrix = np.eye(variable.source.size)[:, [variable.category]] @ matrix
            variable = variable.source
        self.readings.append(Reading(f"{self.node[variable]} -> {receiver}", variable, matrix))
        out = np.zeros((self.n_columns, matrix.shape[1]))
        out[self.columns[variable]] = matrix
        return out

    def _writes(self, variable: Variable, matrix: Array) -> Array:
        """Return a map to the columns of a variable as one to the whole stream."""
        out = np.zeros((len(matrix), self.n_columns))
        out[:, self.columns[variable]] = matrix
        return out

    def _layer(self, number: int) -> Layer:
        here = [each for each in self.variables if self.layer[each] == number]
        heads = tuple(self._head(each) for each in here if isinstance(each, Aggregate))
        neurons = [
            self._table(each) if isinstance(each, Lookup) else self._pieces(each)
            for each in here
            if isinstance(each, Lookup | Interpolate)
        ]
        return Layer(heads, _joined(neurons) if neurons else Mlp.idle(self.n_columns))

    def _head(self, aggregate: Aggregate) -> Head:
        select, label = aggregate.select, self.node[aggregate]
        scores = scores_of(select, self.positions.size)
        n_shown = scores.table.shape[1] if select.keys is not None or select.queries is not None else 0
        has = [scores.begin != 0, scores.later != 0]
        width = n_shown + sum(has)
        q, k, q_bias = np.zeros((self.n_columns, width)), np.zeros((self.n_columns, width)), np.zeros(width)
        if select.queries is not None:
            q[:, :n_shown] += self._reads(f"{label}<q>", select.queries, scores.table)
        elif n_shown:
            q_bias[:n_shown] = scores.table[0]
        if select.keys is not None:
            k[:, :n_shown] += self._reads(f"{label}<k>", select.keys, np.eye(n_shown))
            # What the head tells apart are keys that some query takes differently.
            self.readings[-1] = replace(self.readings[-1], matrix=scores.table.T)
        place = n_shown
        if scores.begin:
            q_bias[place] = scores.begin
            k[:, place] = self._reads(f"{label}<k>", self.tokens, np.eye(self.tokens.size)[:, :1])[:, 0]
            place += 1
        if scores.later:
            q_bias[place] = scores.later
            steps = np.arange(self.positions.size, dtype=float)[:, None]
            k[:, place] = self._reads(f"{label}<k>", self.positions, steps)[:, 0]
        v = np.sum([self._reads(f"{label}<v>", each, np.eye(aggregate.size)) for each in aggregate.values], axis=0)
        return Head(q, q_bias, k, v, self._writes(aggregate, np.eye(aggregate.size)))

    def _table(self, lookup: Lookup) -> Mlp:
        table = table_of(lookup)
        into = np.zeros((self.n_columns, len(table)))
        for place, source in enumerate(lookup.sources):
            chosen = np.zeros((source.size, len(table)))
            for neuron, categories in enumerate(table):
                chosen[categories[place], neuron] = 1.0
            into += self._reads(self.node[lookup], source, chosen)
        bias = np.full(len(table), 1.0 - len(lookup.sources))
        out = self._writes(lookup, np.array(list(table.values())).reshape(len(table), lookup.size))
        return Mlp(into, bias, out, np.zeros(self.n_columns))

    def _pieces(self, variable: Interpolate) -> Mlp:
        at, to = points_of(variable)
        slopes = np.diff(to, axis=0) / np.diff(at)[:, None]
        none = np.zeros((1, variable.size))
        turns = np.diff(np.concatenate([none, slopes, none]), axis=0)
        into = np.sum(
            [self._reads(self.node[variable], each, np.ones((1, len(at)))) for each in variable.sources], axis=0
        )
        return Mlp(into, -at, self._writes(variable, turns), self._writes(variable, to[:1])[0])

    def _unembed(self) -> Array:
        program = self.program
        tokens = np.eye(len(program.vocabulary))[list(program.tokens)]
        out = np.zeros((self.n_columns, len(program.vocabulary)))
        for each, sign in zip(program.output, program.signs or [1.0] * len(program.output), strict=True):
            out += sign * self._reads("logits", each, tokens)
        return out


def _stored(variable: Variable) -> Variable:
    """Return the variable whose columns hold a variable."""
    return _stored(variable.source) if isinstance(variable, Is) else variable


def _joined(parts: Sequence[Mlp]) -> Mlp:
    return Mlp(
        np.concatenate([each.into for each in parts], axis=1),
        np.concatenate([each.bias for each in parts]),
        np.concatenate([each.out for each in parts], axis=0),
        np.sum([each.out_bias for each in parts], axis=0),
    )
