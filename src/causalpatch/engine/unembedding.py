"""The last linear map of a model, and how it is cut down to the answers' columns of a vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from causalpatch.engine.bypass import bypassed
from causalpatch.models import runs_own_forward


def unembedding_of(module: nn.Module) -> nn.Linear | None:
    """Return the model's last linear map, where it has a plain one."""
    get = getattr(module, "get_output_embeddings", None)
    found = get() if callable(get) else None
    is_plain = type(found) is nn.Linear and type(found.weight) is nn.Parameter and runs_own_forward(found)
    return cast(nn.Linear, found) if is_plain else None


@contextmanager
def cut_down(unembedding: nn.Linear, vocab: Int[Tensor, " column"]) -> Iterator[None]:
    """Compute only some of the vocabulary while it is open."""
    weight = unembedding.weight[vocab]
    bias = None if unembedding.bias is None else unembedding.bias[vocab]
    with bypassed(unembedding, lambda x: functional.linear(x, weight, bias)):
        yield
