"""Values that are drawn, made ready to be written: donors for resampling, widths and draws for noise.

A draw depends on its seed and number, the site and the prompt alone, never on the batch, the engine or the cell. Before
anything runs each ``Resample`` and ``Noise`` of a job is replaced by what is written here:

1. ``Donated``: for each pair another one, its donor. Donors whose prompt has as many tokens as the base prompt come
   first, in an order drawn for each pair; others stand in only where there is none.
2. ``Scattered``: noise with its standard deviation, and the name that its draws go by. Pairs with one base prompt,
   which are one independent component, share their noise.
"""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import PairError
from causalpatch.base.seeds import generator
from causalpatch.engine.capture import Captured
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.role import ROLES, Role
from causalpatch.patches import Noise, Resample


@dataclass(frozen=True, eq=False)
class Donated:
    """The values of other pairs, with the pair that each is taken from.

    Args:
        value: What was asked for.
        pool: All pairs that were drawn from.
        donors: For each pair, by the hash of its content, the number of its donor in the pool.
    """

    value: Resample
    pool: Pairs
    donors: Mapping[str, int]

    def donor(self, pair: Pair) -> int:
        """Return the number of a pair's donor in the pool."""
        return self.donors[pair.content_hash]

    def columns(self, pair: Pair, stream: str | None = None) -> np.ndarray | None:
        """Return the token of a donor's prompt in each aligned column, -1 where none; None without columns.

        Args:
            pair: The pair that is given the donor's value.
            stream: The stream whose prompts are meant, where there are several.
        """
        alignment = self.pool.of(stream).alignment
        if alignment is None:
            return None
        found: np.ndarray = alignment.columns[self.donor(pair), :, ROLES.index(self.value.side)]
        return found

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, eq=False)
class Computed:
    """Values that are known before a patched run of some pairs: what would stand at a port.

    Args:
        run: The tensor at the port, for each pair of a batch.
    """

    run: Captured

    def __str__(self) -> str:
        return "computed values"


@dataclass(frozen=True)
class Scattered:
    """Gaussian noise whose width is known.

    Args:
        value: What was asked for.
        sigma: Its standard deviation, in the unit of the site.
        key: The name that its draws go by, the same whatever the site is called where it is written.
        stream: The stream whose tokens get it, of a model with an encoder and a decoder.
    """

    value: Noise
    sigma: float
    key: str
    stream: str | None = None

    def __str__(self) -> str:
        return str(self.value)


def draw_donors(pairs: Pairs, base: Role, value: Resample) -> Donated:
    """Draw another pair for each pair.

    Args:
        pairs: The pairs.
        base: Which side the base run is.
        value: The seed, the draw and the side.

    Raises:
        PairError: A pair has no other whose prompt is not its own.
    """
    prompts = [_inputs(pair, value.side) for pair in pairs]
    hashes = [_name(pair, value.side) for pair in pairs]
    sizes = np.array([list(map(_size, of_pair)) for of_pair in prompts])
    names = np.array(hashes)
    donors: dict[str, int] = {}
    for pair in pairs:
        own = _inputs(pair, base)
        others = np.flatnonzero(names != _name(pair, base))
        alike = others[(sizes[others] == list(map(_size, own))).all(1)]
        found = alike if len(alike) else others
        if not len(found):
            raise PairError(
                f"pair '{pair.id}' of '{pairs.name}' has no other pair to resample from",
                facts=[("pairs", len(pairs)), ("needed", "one with another prompt")],
                fix='give more pairs, or another value, such as "mean"',
            )
        # One prompt may stand in several pairs: it is drawn once, whichever pairs hold it.
        kinds = sorted({hashes[i] for i in found.tolist()})
        stream = generator(value.seed, "resample", value.side, _name(pair, base))
        chosen = kinds[stream.permutation(len(kinds))[value.draw % len(kinds)]]
        donors[pair.content_hash] = hashes.index(chosen)
    return Donated(value, pairs, donors)


class Draws:
    """Standard normal numbers for the tokens of a batch of base prompts; each is drawn once.

    Args:
        base: The base runs of the batch, for their prompts.
    """

    def __init__(self, base: Captured) -> None:
        self._base = base
        self._known: dict[Hashable, Float[Tensor, "pair position *axes"]] = {}

    def at(self, noise: Scattered, local: np.ndarray, tokens: np.ndarray | None, like: Tensor) -> Tensor:
        """Return the noise of elements.

        Args:
            noise: The noise.
            local: The pair of each element in the batch.
            tokens: The real token of each element; None for sites without positions.
            like: Current values, ``[element, *value_axes]``.
        """
        shape = tuple(like.shape[1:])
        value = noise.value
        key = (value.seed, value.draw, noise.key, shape, tokens is None)
        if key not in self._known:
            self._known[key] = self._draw(noise, shape, has_position=tokens is not None).to(like)
        places = (local,) if tokens is None else (local, tokens)
        return noise.sigma * self._known[key][tuple(torch.as_tensor(place, device=like.device) for place in places)]

    def _draw(self, noise: Scattered, shape: Sequence[int], *, has_position: bool) -> Tensor:
        value, key, inputs, batch = noise.value, noise.key, self._prompts(), self._base.batch
        rows = range(len(batch.start)) if self._base.slots is None else self._base.slots.tolist()
        besides = [[values[row] for values in batch.beside.values()] for row in rows]
        lengths = batch.of(noise.stream).lengths[list(rows)]
        longest = int(lengths.max(initial=1)) if has_position else 1
        made: dict[str, np.ndarray] = {}
        found = np.zeros((len(inputs), longest, *shape))
        for number, given in enumerate(inputs):
            name = "".join(map(_digest, [*given, *besides[number]]))
            if name not in made:
                n_tokens = int(lengths[number]) if has_position else 1
                stream = generator(value.seed, "noise", value.draw, key, name)
                made[name] = stream.standard_normal((n_tokens, *shape))
            found[number, : len(made[name])] = made[name]
        return torch.as_tensor(found if has_position else found[:, 0])

    def _prompts(self) -> list[list[np.ndarray]]:
        """Return the prompts of the pairs in the batch, without answers that are spelt out behind them."""
        batch, slots = self._base.batch, self._base.slots
        rows = range(len(batch.start)) if slots is None else slots.tolist()
        if batch.values is not None:
            return [[batch.values[row]] for row in rows]
        streams = [each for each in (batch.encoder, batch) if each is not None]
        return [[of.ids[row, of.start[row] : of.start[row] + of.lengths[row]] for of in streams] for row in rows]


def _inputs(pair: Pair, role: Role) -> list[np.ndarray]:
    """Return all that a run of a pair is given: the encoder's prompt, where there is one, and the prompt."""
    return [each.input(role) for each in (pair.encoder, pair) if each is not None]


def _size(prompt: np.ndarray) -> int:
    """Return the number of tokens; inputs that are no prompts are alike."""
    return len(prompt) if prompt.ndim == 1 and prompt.dtype.kind in "iu" else 1


def _name(pair: Pair, role: Role) -> str:
    """Return the hash of an input, with what stands beside it."""
    is_alone = pair.encoder is None and not pair.beside
    return _digest(pair.input(role)) if is_alone else pair.digests[ROLES.index(role)]


def _digest(prompt: np.ndarray) -> str:
    dtype = np.int64 if prompt.dtype.kind in "iu" else np.float64
    return hashlib.sha256(np.ascontiguousarray(prompt, dtype=dtype).tobytes()).hexdigest()
