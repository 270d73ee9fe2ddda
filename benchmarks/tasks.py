"""One patching task, as every contender is given it: ids, what to patch, and what to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import Shape
from causalpatch.pairs import Pair, Pairs

Kind: TypeAlias = Literal["resid_pre", "mlp_out", "z", "neuron"]
Cell: TypeAlias = tuple[int, int]
"""Layer, and position, head or neuron."""

SITES = {"resid_pre": "resid_pre", "mlp_out": "mlp_out", "z": "z", "neuron": "mlp_post{}@-1"}


@dataclass(frozen=True)
class Task:
    """Patch each cell of a grid from the clean run into the corrupted one, alone.

    Args:
        shape: Sizes of the model.
        pairs: Random prompts of one length.
        kind: What is patched: the stream or an MLP's output at one position, a head's z at all positions, or a neuron
            at the last position.
        metric: What is read at the last position.
        layers: Layers that are patched.
    """

    shape: Shape
    pairs: Pairs
    kind: Kind
    metric: Literal["logit_difference", "log_probability"]
    layers: range

    @cached_property
    def clean(self) -> Tensor:
        """Ids ``(pair, position)``."""
        return torch.tensor(np.stack([pair.clean for pair in self.pairs]))

    @cached_property
    def corrupt(self) -> Tensor:
        """Ids ``(pair, position)``."""
        return torch.tensor(np.stack([pair.corrupt for pair in self.pairs]))

    @property
    def site(self) -> str:
        """The grid in our words."""
        name = SITES[self.kind]
        layers = "" if len(self.layers) == self.shape.layers else f".{self.layers.start}:{self.layers.stop}"
        return name.format(layers) if "{}" in name else name + layers

    @property
    def n_tokens(self) -> int:
        """Tokens of each prompt."""
        return self.clean.shape[1]

    @property
    def n_along(self) -> int:
        """Cells of one layer."""
        return {"z": self.shape.heads, "neuron": self.shape.hidden}.get(self.kind, self.n_tokens)

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order of our results."""
        return [(layer, number) for layer in self.layers for number in range(self.n_along)]

    def some_cells(self, n_cells: int, seed: int = 0) -> list[Cell]:
        """Return a random part of the cells, the same whenever it is asked for."""
        cells = self.cells
        chosen = np.random.default_rng(seed).permutation(len(cells))[:n_cells]
        return [cells[index] for index in chosen]

    def read(self, logits: Tensor) -> Tensor:
        """Measure rows of logits of the last position, ``(row, vocab)``, whose pairs repeat in their order."""
        rows = torch.arange(len(logits))
        right = self._answers[0].repeat(len(logits) // len(self.pairs))
        if self.metric == "log_probability":
            return logits.log_softmax(-1)[rows, right]
        wrong = self._answers[1].repeat(len(logits) // len(self.pairs))
        return logits[rows, right] - logits[rows, wrong]

    @cached_property
    def _answers(self) -> tuple[Tensor, Tensor]:
        right, wrong = ([getattr(pair, side)[0][0] for pair in self.pairs] for side in ("answer", "wrong_answer"))
        return torch.tensor(right), torch.tensor(wrong)


def random_pairs(n_pairs: int, n_tokens: int, vocab: int, first: int = 0, seed: int = 1) -> Pairs:
    """Return random prompts whose two sides differ in every token from the ``first`` on, and random answers."""
    draw = np.random.default_rng(seed)
    pairs = []
    for number in range(n_pairs):
        clean = draw.integers(0, vocab, n_tokens)
        corrupt = clean.copy()
        corrupt[first:] = (clean[first:] + draw.integers(1, vocab, n_tokens - first)) % vocab
        right, wrong = draw.choice(vocab, 2, replace=False).tolist()
        pairs.append(Pair(clean, corrupt, ((right,),), ((wrong,),), id=str(number)))
    return Pairs(pairs, name=f"random {n_pairs} x {n_tokens}")


def first_difference(pairs: Pairs) -> Sequence[int]:
    """Return the first position at which each pair's prompts differ, ``(pair,)``."""
    return [int(np.flatnonzero(pair.clean != pair.corrupt)[0]) for pair in pairs]
