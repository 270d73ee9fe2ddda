"""Models of which it is known in which direction they hold a variable, and the hidden layer of Makelov et al."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import causalpatch as cp
from causalpatch.models import Model
from causalpatch.pairs import Pairs

WIDTH, VALUES = 16, 7
SITE = "module(turn).output axes=(width)"


class Planted(nn.Module):
    """Two variables a and b, each a number from 0 to 6, in two directions of a stream that holds noise otherwise.

    The input (a, b, noise) is turned by a random rotation, and the answer is the class 7 a + b, read linearly:
    -(x - k)^2 is largest for the k nearest to x, and linear in x but for a term that all classes share.
    """

    def __init__(self, seed: int = 0, *, is_random: bool = False) -> None:
        super().__init__()
        self.turn, self.classes = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, VALUES * VALUES)
        rng = np.random.default_rng(seed)
        self.rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
        read, bias = np.zeros((VALUES * VALUES, WIDTH)), np.zeros(VALUES * VALUES)
        for a in range(VALUES):
            for b in range(VALUES):
                read[VALUES * a + b, :2] = 2 * a, 2 * b
                bias[VALUES * a + b] = -(a**2) - b**2
        turned = 2 * read @ self.rotation.T
        if is_random:
            turned, bias = rng.normal(size=turned.shape), rng.normal(size=bias.shape)
        with torch.no_grad():
            self.turn.weight.copy_(torch.as_tensor(self.rotation))
            self.classes.weight.copy_(torch.as_tensor(turned))
            self.classes.bias.copy_(torch.as_tensor(2 * bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.turn(x))


def planted_pairs(n_pairs: int, seed: int, values: Sequence[int] = range(VALUES), name: str = "planted") -> Pairs:
    """Return pairs of which the column ``swapped`` holds the class with a of the clean and b of the corrupted input.

    Args:
        n_pairs: How many.
        seed: Seed of all that is drawn.
        values: Values that a takes in the clean inputs.
        name: Their name.
    """
    rng = np.random.default_rng(seed)
    clean, corrupt = (rng.normal(size=(n_pairs, WIDTH)) for _ in range(2))
    clean[:, 0] = rng.choice(np.array(values), n_pairs)
    clean[:, 1], corrupt[:, 0], corrupt[:, 1] = (rng.integers(0, VALUES, n_pairs) for _ in range(3))
    answer, wrong, swapped = (
        (VALUES * a + b).astype(int).tolist()
        for a, b in (
            (clean[:, 0], clean[:, 1]),
            (corrupt[:, 0], corrupt[:, 1]),
            (clean[:, 0], corrupt[:, 1]),
        )
    )
    made = Pairs.from_arrays(clean, corrupt, answer, wrong, name=name)
    rows = [replace(pair, extra={"swapped": each}) for pair, each in zip(made, swapped, strict=True)]
    return Pairs(rows, name=name, kind="arrays")


class Hidden(nn.Module):
    """One number in, hidden numbers, outputs, and their sum: the linear network of Makelov et al., section 3.

    Args:
        into: What each hidden number takes of the input.
        out: What each output takes of the hidden numbers.
    """

    def __init__(self, into: Sequence[float], out: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(1, len(into), bias=False), nn.Linear(len(into), len(out), bias=False)
        with torch.no_grad():
            self.into.weight.copy_(torch.tensor(into)[:, None])
            self.out.weight.copy_(torch.tensor(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x)).sum(-1, keepdim=True)


def hidden_experiment(into: Sequence[float], out: Sequence[Sequence[float]], n_pairs: int = 40) -> cp.Experiment:
    """Return an experiment on such a network whose metric is its output."""
    rng = np.random.default_rng(0)
    clean, corrupt = rng.normal(2.0, 1.0, size=(n_pairs, 1)), rng.normal(-2.0, 1.0, size=(n_pairs, 1))
    model: Model = cp.open_model(Hidden(into, out))
    metric = cp.metric(lambda outputs, pairs: outputs.logits[:, 0], name="output")
    return cp.Experiment(model, Pairs.from_arrays(clean, corrupt, name="numbers"), metric=metric, show_progress=False)
