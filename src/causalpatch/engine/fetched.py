"""Weights that are fetched when they are needed, held while an engine calls one part of the model many times."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from causalpatch.engine.stack import Stack


def holding_layer(stack: Stack, layer: int) -> AbstractContextManager[None]:
    """Hold a layer's weights; those of the next are read meanwhile, if memory allows.

    Args:
        stack: The layers.
        layer: Which of them.
    """
    if stack.weights is None:
        return nullcontext()
    after = stack.blocks[layer + 1].path if layer + 1 < stack.n_layers else None
    return stack.weights.holding(stack.blocks[layer].path, ahead=after)


def holding_part(stack: Stack, part: nn.Module | None) -> AbstractContextManager[None]:
    """Hold the weights of a module that stands outside of the layers.

    Args:
        stack: The layers.
        part: The module, or None.
    """
    path = None if stack.weights is None or part is None else stack.weights.path_of(part)
    return nullcontext() if stack.weights is None or path is None else stack.weights.holding(path)
