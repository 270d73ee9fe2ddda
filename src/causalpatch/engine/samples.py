"""Tiny random inputs of a model, on which proofs are made: prompts, or pictures of the size that it was made for."""

from dataclasses import replace

import numpy as np

from causalpatch.base.seeds import generator
from causalpatch.models import PIXELS, Model
from causalpatch.pairs import Batch
from causalpatch.pairs.batch import stack

N_ROWS, N_TOKENS = 2, 5
N_READ = 7  # tokens that the encoder is given, of a model that has one
N_COMPARED = 3  # texts or pictures that each row is compared with


def tiny_inputs(model: Model, stream: str | None = None) -> tuple[Batch, Batch]:
    """Return the inputs of a base run and of a source run, of two rows each.

    Args:
        model: The model.
        stream: The stream that is tried: ``"vision"`` takes prompts that are the same, beside other pictures.
    """
    draw = generator(0, "prove")
    if model.kind == "arrays" and model.picture is not None:
        base, source = draw.normal(size=(2, N_ROWS, *model.picture))
        common = {"input_ids": _ids(model, draw, N_COMPARED)} if model.compares else {}
        both = (stack(list(rows), "pictures", len(model.places())) for rows in (base, source))
        first, second = (replace(batch, common=common) for batch in both)
        return first, second
    if stream == "vision" and model.picture is not None:
        return _beside_prompts(model, draw)
    ids, vocab = _ids(model, draw, N_ROWS), model.vocab_size or 2
    others = _ended(model, (ids + 1) % vocab)
    common = {PIXELS: draw.normal(size=(N_COMPARED, *(model.picture or ())))} if model.compares else {}
    base, source = replace(of_ids(ids), common=common), replace(of_ids(others), common=common)
    if model.streams:
        read = generator(0, "prove", "encoder").integers(0, vocab, size=(N_ROWS, N_READ))
        base, source = replace(base, encoder=of_ids(read)), replace(source, encoder=of_ids((read + 1) % vocab))
    if model.sound is not None:
        numbers = generator(0, "prove", "sound").normal(size=(2, N_ROWS, *model.sound.shape))
        frames = of_ids(np.tile(np.arange(model.sound.n_frames), (N_ROWS, 1)))
        base, source = (
            replace(batch, encoder=frames, beside={model.sound.argument: values})
            for batch, values in zip((base, source), numbers, strict=True)
        )
    return base, source


def _ids(model: Model, draw: np.random.Generator, n_rows: int) -> np.ndarray:
    texts = model.reading("tokens")
    return _ended(texts, draw.integers(0, texts.vocab_size or 2, size=(n_rows, N_TOKENS)))


def _beside_prompts(model: Model, draw: np.random.Generator) -> tuple[Batch, Batch]:
    """Return prompts that hold the tokens which pictures stand in for, beside two pictures for each."""
    token, n_seen = model.picture_token or (0, 0)
    read = _ids(model, draw, N_ROWS)
    read = np.where(read == token, (read + 1) % model.vocab_size, read)
    ids = np.concatenate([np.full((N_ROWS, n_seen), token), read], axis=1)
    places = stack([np.zeros(0)] * N_ROWS, "pictures", len(model.places()))
    base, source = draw.normal(size=(2, N_ROWS, *(model.picture or ())))
    first, second = (replace(of_ids(ids), beside={PIXELS: rows}, seen=places) for rows in (base, source))
    return first, second


def _ended(model: Model, ids: np.ndarray) -> np.ndarray:
    """Return texts that end where their one vector is read, in models that read one."""
    if model.end_id is None or model.end_id >= model.vocab_size:
        return ids
    ended = np.where(ids == model.end_id, (ids + 1) % (model.vocab_size or 2), ids)
    ended[:, -1] = model.end_id
    return ended


def of_ids(ids: np.ndarray) -> Batch:
    """Return prompts of one length.

    Args:
        ids: Token ids, ``(row, position)``.
    """
    n_rows, n_tokens = ids.shape
    positions = np.tile(np.arange(n_tokens), (n_rows, 1))
    ones = np.ones(ids.shape, dtype=bool)
    return Batch(ids, ones, positions, np.zeros(n_rows, dtype=np.int64), np.full(n_rows, n_tokens))
