"""Small networks with weights set by hand, whose mechanism is therefore known, and algorithms that they may follow."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import causalpatch as cp

DIGITS = 4
INPUTS = {name: range(DIGITS) for name in "abc"}
SUM = cp.CausalModel({"ab": lambda a, b: a + b, "total": lambda ab, c: ab + c}, INPUTS, name="sum")
OTHER_SUM = cp.CausalModel({"bc": lambda b, c: b + c, "total": lambda bc, a: bc + a}, INPUTS, name="other sum")
FIRST = "module(first).output axes=(neuron)"
AB, C, SPARE = f"{FIRST}#0", f"{FIRST}#1", f"{FIRST}#2"
TOTAL = "module(second).output axes=(neuron)#0"


class Adder(nn.Module):
    """Adds a and b in neuron 0 of ``first``, copies c into neuron 1, adds both in ``second``.

    Neurons 2 and 3 of ``first`` hold a and b, and nothing reads them. The logits of the sums are ``2 k t - k ** 2`` of
    the total ``t``: highest at ``k = t``.
    """

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        n_sums = 3 * DIGITS - 2
        self.first, self.second, self.head = nn.Linear(3 * DIGITS, 4), nn.Linear(4, 2), nn.Linear(2, n_sums)
        digits, sums = torch.arange(DIGITS).double(), torch.arange(n_sums).double()
        with torch.no_grad():
            for layer in (self.double().first, self.second, self.head):
                layer.weight.zero_()
                layer.bias.zero_()
            self.first.weight[0, :DIGITS] = self.first.weight[0, DIGITS : 2 * DIGITS] = digits
            self.first.weight[1, 2 * DIGITS :] = digits
            self.first.weight[2, :DIGITS] = self.first.weight[3, DIGITS : 2 * DIGITS] = digits
            self.second.weight[0, :2] = 1.0
            self.second.weight[0, 2] = leak
            self.head.weight[:, 0] = 2 * sums
            self.head.bias[:] = -(sums**2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def encode(a: int, b: int, c: int) -> np.ndarray:
    """Write three digits, one-hot."""
    x = np.zeros(3 * DIGITS)
    x[[a, DIGITS + b, 2 * DIGITS + c]] = 1.0
    return x


def adder(leak: float = 0.0) -> Any:
    """Open the network; with a leak a is added twice, the second time through a neuron of its own."""
    return cp.open_model(Adder(leak))


def random_adder(seed: int = 0) -> Any:
    """Open a network of the same shape with random weights."""
    module = Adder()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return cp.open_model(module)


def claim(mapping: dict[str, Any], algorithm: cp.CausalModel = SUM, **more: Any) -> cp.Hypothesis:
    return cp.Hypothesis(algorithm, mapping, encode=encode, **more)


class Comparer(nn.Module):
    """Reads four tokens w x y z and answers whether w < x and y < z, at its last token.

    The stream has one-hot digits of its own token, then those of the token before; at tokens 1 and 3 the comparison is
    written into a number; at token 3 the number of token 1 is read again, and both make the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS, DIGITS).double()
        self.less = nn.Linear(2 * DIGITS, 1).double()
        self.both = nn.Linear(2, 1).double()
        self.flag, self.answer = nn.Identity(), nn.Linear(1, 2).double()
        digits = torch.arange(DIGITS).double()
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(DIGITS))
            self.less.weight[0] = torch.cat([digits, -digits])
            self.less.bias.fill_(-0.5)
            self.both.weight.fill_(1.0)
            self.both.bias.fill_(-1.5)
            self.answer.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.answer.bias.zero_()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        own = self.embed(input_ids)
        before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
        flags = self.flag((self.less(torch.cat([own, before], -1)) > 0).double())
        earlier = torch.cat([torch.zeros_like(flags[:, :2]), flags[:, :-2]], dim=1)
        return self.answer(self.both(torch.cat([flags, earlier], -1)))


FOUR = {name: range(DIGITS) for name in "wxyz"}
AND = cp.CausalModel(
    {"left": lambda w, x: w < x, "right": lambda y, z: y < z, "answer": lambda left, right: left and right},
    FOUR,
    name="and",
)
LEFT, RIGHT = "module(flag).output@1", "module(flag).output@3"


def comparer(**mapping: Any) -> tuple[Any, cp.Hypothesis]:
    """Open the network that compares, with a hypothesis about it."""
    write = {"encode": lambda w, x, y, z: [w, x, y, z], "answers": {False: 0, True: 1}}
    return cp.open_model(Comparer()), cp.Hypothesis(AND, mapping, **write)
