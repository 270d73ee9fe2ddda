"""Tiny random inputs of a model, on which proofs are made: prompts, or pictures of the size that it was made for."""

import numpy as np

from causalpatch.base.seeds import generator
from causalpatch.models import Model
from causalpatch.pairs import Batch
from causalpatch.pairs.batch import stack

N_ROWS, N_TOKENS = 2, 5


def tiny_inputs(model: Model) -> tuple[Batch, Batch]:
    """Return the inputs of a base run and of a source run, of two rows each.

    Args:
        model: The model.
    """
    draw = generator(0, "prove")
    if model.kind == "arrays" and model.picture is not None:
        n_tokens = len(model.places())
        base, source = draw.normal(size=(2, N_ROWS, *model.picture))
        return stack(list(base), "pictures", n_tokens), stack(list(source), "pictures", n_tokens)
    vocab = model.vocab_size or 2
    ids = draw.integers(0, vocab, size=(N_ROWS, N_TOKENS))
    return of_ids(ids), of_ids((ids + 1) % vocab)


def of_ids(ids: np.ndarray) -> Batch:
    """Return prompts of one length.

    Args:
        ids: Token ids, ``(row, position)``.
    """
    n_rows, n_tokens = ids.shape
    positions = np.tile(np.arange(n_tokens), (n_rows, 1))
    ones = np.ones(ids.shape, dtype=bool)
    return Batch(ids, ones, positions, np.zeros(n_rows, dtype=np.int64), np.full(n_rows, n_tokens))
