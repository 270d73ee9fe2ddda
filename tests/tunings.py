"""Tiny models and data to tune on: random weights, random prompts, one answer wanted in place of another."""

import numpy as np
import torch

from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import VOCAB, tiny_model
from causalpatch.tuning.data import TuningData


def tiny(family, *, dtype=torch.float32, **how):
    """Return a tiny model, opened."""
    return Model(tiny_model(family, dtype=dtype, layers=2, **how), name=f"tiny-{family}")


def prompts(n, seed, length=5):
    """Return random prompts."""
    return np.random.default_rng(seed).integers(5, VOCAB, size=(n, length))


def tiny_data(n=20, *, wanted=((4,),), unwanted=((3,),), **more):
    """Return target pairs that want one token after every prompt, and a retain set of other prompts."""
    target = [Pair(row, row, wanted, unwanted, id=f"t{k}") for k, row in enumerate(prompts(n, 0))]
    retain = [Pair(row, row, id=f"r{k}", group=f"r{k}") for k, row in enumerate(prompts(n, 1, 8))]

    def divided(pairs, name):
        part = len(pairs) // 4
        return {
            "train": Pairs(pairs[: 2 * part], name=name),
            "validation": Pairs(pairs[2 * part : 3 * part], name=name),
            "test": Pairs(pairs[3 * part :], name=name),
        }

    return TuningData(divided(target, "target"), divided(retain, "retain"), **more)


def stirred(way, seed=0, size=0.1):
    """Give what a way trains random values, and return the way."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in way.trained().values():
            each.copy_(each + size * torch.randn(each.shape, generator=draw, dtype=each.dtype))
    return way
