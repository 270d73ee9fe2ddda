"""Small modules of one's own, each with one trait that an engine must survive."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import causalpatch as cp
from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs


def opened(module: nn.Module, seed: int = 0) -> Model:
    """Open a toy in float64 with seeded weights."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return cp.open_model(module)


class Chain(nn.Module):
    """Four numbers to three classes, with a stream that two modules read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second, self.head = (
            nn.Linear(4, 4),
            nn.Dropout(0.5),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        stream = self.drop(self.first(x))
        return self.head(stream + torch.tanh(self.second(stream)))


class InPlace(Chain):
    """The same, but what a module returns is changed in place afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        return self.head(self.second(stream).mul_(2).add_(stream))


class Twice(Chain):
    """One module runs twice, another never."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self.first(x)))


class ByKeyword(Chain):
    """Modules are called with keyword arguments only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.second(input=self.first(input=x)))


class Both(NamedTuple):
    """Two tensors with names."""

    left: Tensor
    right: Tensor


class Split(nn.Module):
    """Returns two tensors in whatever ``wrap`` makes of them."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.wrap, self.weight = wrap, nn.Parameter(torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x * self.weight[0], x * self.weight[1])


class Join(nn.Module):
    """Reads two tensors out of whatever it is given."""

    def __init__(self, unwrap: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.unwrap, self.weight = unwrap, nn.Parameter(torch.zeros(4, 3))

    def forward(self, both: Any) -> Tensor:
        left, right = self.unwrap(both)
        return (left + torch.sin(right)) @ self.weight


class Pipe(nn.Module):
    """Passes two tensors from one module to the next in a container."""

    def __init__(self, wrap: Callable, unwrap: Callable) -> None:
        super().__init__()
        self.split, self.join = Split(wrap), Join(unwrap)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.split(x))


class Narrow(Chain):
    """Runs out of memory above a number of rows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        return super().forward(x)


class Pooled(nn.Module):
    """A classifier of prompts: past its pooling there is nothing left of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(40, 8), nn.Linear(8, 8)
        self.pool, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.mix(self.embed(input_ids))
        mask = attention_mask[..., None].to(x.dtype)
        return self.head(self.pool((x * mask).sum(1) / mask.sum(1)))


class Pictures(nn.Module):
    """A convolutional network on pictures of 6 x 6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 5, 3), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))


def vectors(n: int = 5, seed: int = 0, shape: tuple[int, ...] = (4,), n_classes: int = 3) -> Pairs:
    """Return pairs of random arrays with two different classes each."""
    rng = np.random.default_rng(seed)
    answer = rng.integers(0, n_classes, n)
    wrong = (answer + rng.integers(1, n_classes, n)) % n_classes
    return Pairs.from_arrays(rng.normal(size=(n, *shape)), rng.normal(size=(n, *shape)), answer, wrong)


def prompts(*pairs: tuple[list[int], list[int]], answer: int = 5, wrong: int = 6, **more: Any) -> Pairs:
    """Return pairs of prompts given by their ids."""
    made = [
        Pair(np.array(clean), np.array(corrupt), ((answer,),), ((wrong,),), id=f"pair {number}", **more)
        for number, (clean, corrupt) in enumerate(pairs)
    ]
    return Pairs(made, name="prompts")


def hooks_of(module: nn.Module) -> int:
    """Count the hooks on a module and everything in it."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
