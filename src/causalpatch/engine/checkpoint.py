"""Layers that keep what goes into them for a backward, and compute their insides once more when it comes by.

``torch.utils.checkpoint`` does that for a module's forward. Hooks inside are gone by then, so the second run stands
them up again, in whatever thread autograd calls it. Hooks at a layer's own doors lie outside: what they did is kept.

Memory: the inputs of all layers and the insides of one, instead of the insides of all. Cost: a further forward.

References:
    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", 1604.06174.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from causalpatch.engine.bypass import bypassed

Again = Callable[[], AbstractContextManager[Any]]
"""Makes the context in which insides are computed for the second time."""


def recompute(layers: Sequence[nn.Module], again: Again, undo: ExitStack) -> None:
    """Let layers compute their insides once more in the backward.

    Args:
        layers: The layers.
        again: Stands hooks up for the second time.
        undo: Puts the layers' own forwards back, after the forward.
    """
    for layer in layers:
        undo.enter_context(bypassed(layer, partial(_twice, layer.forward, again)))


def _twice(forward: Callable[..., Any], again: Again, *args: Any, **kwargs: Any) -> Any:
    contexts = partial(_contexts, again)
    # Nothing is drawn in eval mode.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)


def _contexts(again: Again) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), again()
