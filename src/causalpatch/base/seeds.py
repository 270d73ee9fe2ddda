"""Seeds: every random draw has a name, and its stream depends on the seed and that name alone."""

import hashlib

import numpy as np


def generator(seed: int, *name: str | int) -> np.random.Generator:
    """Return the random stream of the draw called ``name``.

    Two draws with different names are independent, and adding a draw somewhere else changes neither.

    Args:
        seed: The seed of the whole run.
        name: What is being drawn, such as ``("sign-flip", "z")``.
    """
    text = "/".join([str(seed), *map(str, name)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))
