"""What stands in front of and behind the layers, by the model's own forward with its layers passed by.

Rows go through the model as prompts of one token each. Behind the layers that gives the final norm, the unembedding,
logit scales and soft-caps as the model has them; where only answers are read, the unembedding is cut down to their
columns for that call. In front of them it gives the stream into the first layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalpatch.base.errors import EnoughError
from causalpatch.engine.bypass import bypassed
from causalpatch.engine.fetched import holding_part
from causalpatch.engine.hooks import Write, hooked
from causalpatch.engine.stack import Stack
from causalpatch.engine.unembedding import cut_down, unembedding_of


class Head:
    """Runs what is not in the layers.

    Args:
        stack: The layers.
        returns_tuple: Whether the layer at a path returns a tuple.
    """

    def __init__(self, stack: Stack, returns_tuple: dict[str, bool]) -> None:
        self.stack = stack
        self.returns_tuple = returns_tuple
        self.unembedding = unembedding_of(stack.model.module)
        self._room: Tensor | None = None

    def logits(
        self,
        stream: Float[Tensor, "row width"],
        tokens: tuple[np.ndarray, np.ndarray],
        writes: Sequence[Write] = (),
        vocab: Int[Tensor, " column"] | None = None,
        *,
        in_passing: bool = False,
    ) -> Float[Tensor, "row column"]:
        """Return the logits that follow from the stream behind the last layer.

        Args:
            stream: The stream.
            tokens: Id and position of each row's token.
            writes: What is patched behind the layers, at index ``(row, 0)``.
            vocab: The vocabulary entries wanted, or None for all.
            in_passing: Nothing of the logits is needed any more when the next are asked for, which may then take their
                room: a whole vocabulary is so large that the system takes as long to find it new memory as for a
                fifth of the product.
        """
        model = self.stack.model
        with ExitStack() as more:
            more.enter_context(passing_layers(self.stack, self.returns_tuple, lambda hidden: stream[:, None]))
            more.enter_context(holding_part(self.stack, self.unembedding))
            if vocab is not None and self.unembedding is not None:
                more.enter_context(cut_down(self.unembedding, vocab))
            elif in_passing and self._has_room:
                more.enter_context(bypassed(cast(nn.Linear, self.unembedding), self._unembed_in_room))
            more.enter_context(hooked(model, writes))
            logits = model.logits(model.module(**_inputs(self.stack, tokens)))[:, 0]
        if vocab is not None and logits.shape[-1] != len(vocab):
            return logits[:, vocab]
        return logits

    def stand_alone(
        self, vocab: Int[Tensor, " column"], stream: Float[Tensor, "row width"], tokens: tuple[np.ndarray, np.ndarray]
    ) -> bool:
        """Say whether some columns have the same logits when the rest of the vocabulary is left out.

        Args:
            vocab: The vocabulary entries.
            stream: Rows to try; each is tried turned around too, since untouched streams may be alike.
            tokens: Id and position of each row's token.
        """
        if self.unembedding is None:
            return True
        rows = torch.cat([stream, stream.flip(-1)])
        twice = (np.tile(tokens[0], 2), np.tile(tokens[1], 2))
        wanted, got = self.logits(rows, twice), self.logits(rows, twice, vocab=vocab)
        tolerance = (32 if wanted.dtype in (torch.float32, torch.float64) else 4) * torch.finfo(wanted.dtype).eps
        size = wanted.abs().amax(-1, keepdim=True)
        return bool(((got - wanted[:, vocab]).abs() <= tolerance * size).all())

    def embed(self, tokens: tuple[np.ndarray, np.ndarray], writes: Sequence[Write] = ()) -> Float[Tensor, "row width"]:
        """Return the stream into the first layer.

        Args:
            tokens: Id and position of each row's token.
            writes: What is patched before the layers, at index ``(row, 0)``.
        """
        found: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise EnoughError

        model = self.stack.model
        with hooked(model, writes), bypassed(self.stack.blocks[0].module, stop), suppress(EnoughError):
            model.module(**_inputs(self.stack, tokens))
        return found[0][:, 0]

    @property
    def _has_room(self) -> bool:
        """Whether the unembedding is one product on a CPU; elsewhere memory is kept for the next product anyway."""
        found = self.unembedding
        is_there = found is not None and found.bias is None and found.weight.device.type == "cpu"
        return is_there and not torch.is_autocast_enabled("cpu")

    def _unembed_in_room(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocab"]:
        weight, flat = cast(nn.Linear, self.unembedding).weight, x.reshape(-1, x.shape[-1])
        if self._room is None or len(self._room) < len(flat):
            self._room = flat.new_empty(len(flat), len(weight))
        return torch.mm(flat, weight.t(), out=self._room[: len(flat)]).reshape(*x.shape[:-1], -1)


@contextmanager
def passing_layers(stack: Stack, returns_tuple: Mapping[str, bool], last: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let every layer return its input, and the last one something else.

    Args:
        stack: The layers.
        returns_tuple: Whether the layer at a path returns a tuple.
        last: From the stream into the last layer to what it returns.
    """

    def passing(path: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = change(args[0] if args else kwargs["hidden_states"])
            return (hidden,) if returns_tuple[path] else hidden

        return forward

    with ExitStack() as layers:
        for number, block in enumerate(stack.blocks):
            change = last if number == stack.n_layers - 1 else _same
            layers.enter_context(bypassed(block.module, passing(block.path, change)))
        yield


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _inputs(stack: Stack, tokens: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    ids, positions = tokens
    return stack.model.inputs(ids[:, None], None, positions[:, None])
