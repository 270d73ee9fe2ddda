"""What a patch can change and what is read: the cone between the two, in arithmetic and in memory.

1. A number has to be computed anew where something that it is computed from has changed, and where something that is
   read depends on it. Both are followed token by token, layer by layer: changes upwards from what is written, needs
   downwards from what is read. Everything else is known from the base run.
2. Under causal attention the changed tokens of a layer are the written ones where the change has not met attention
   yet, and behind it all tokens from the first written one on, up to a window's reach. So few integers per run stand
   for its whole cone, and all runs go through the layers together as arrays.
3. A token whose attention is computed anew meets every key that it sees. In the last layer unread tokens give keys and
   values only. Norms, activations and softmax are not counted: they are no matrix products.

Tokens are counted in real tokens of a prompt, from 0. The counts are exact; but where attention has windows, tokens
written (or read) further apart than a window are taken for one stretch.

Cost: a few array operations per layer, whatever the number of runs.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Float, Int

_EVERYWHERE = 2**30  # reach of attention without a window, in tokens


class Point(IntEnum):
    """Where in its layer a patch writes, in the order of computation."""

    STREAM = 0
    """The layer's input: ``resid_pre``; behind the last layer, ``resid_post`` and ``final_norm``."""
    QUERY = 1
    KEY_VALUE = 2
    ATTENDED = 3
    """What attention gives to its output projection: ``z``."""
    MIDDLE = 4
    """Behind the output projection: ``head_out``, ``attn_out``, ``resid_mid``."""
    ACTIVATED = 5
    """What the MLP gives to its down projection: ``mlp_post``."""
    ADDED = 6
    """Behind the down projection: ``mlp_out``."""
    LOGITS = 7
    """The model's output: nothing is left to compute."""


@dataclass(frozen=True)
class ModelNumbers:
    """The numbers of a causal decoder that its arithmetic and memory follow from.

    Args:
        n_layers: Number of layers.
        width: Width of the stream.
        n_heads: Query heads in a layer.
        n_kv_heads: Key and value heads in a layer.
        head_width: Width of a head.
        n_neurons: Width of the MLP.
        up: Multiply-adds of a token in the MLP up to its activation, a gate included.
        vocab: Columns of the unembedding.
        is_parallel: Whether attention and MLP of a layer read the same stream.
        number_bytes: Bytes of a number.
        windows: For each layer how many tokens a token sees, itself included; None for all before it. Empty for a
            model without windows.
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    n_neurons: int
    up: int
    vocab: int
    is_parallel: bool = False
    number_bytes: int = 4
    windows: tuple[int | None, ...] = ()

    @property
    def query(self) -> int:
        """Multiply-adds of a token in the query projection."""
        return self.width * self.n_heads * self.head_width

    @property
    def key_value(self) -> int:
        """Multiply-adds of a token in the key and value projections."""
        return 2 * self.width * self.n_kv_heads * self.head_width

    @property
    def projection(self) -> int:
        """Multiply-adds of a token in attention's output projection."""
        return self.n_heads * self.head_width * self.width

    @property
    def down(self) -> int:
        """Multiply-adds of a token in the MLP's down projection."""
        return self.n_neurons * self.width

    @property
    def layer(self) -> int:
        """Multiply-adds of a token in all projections of a layer."""
        return self.query + self.key_value + self.projection + self.up + self.down

    def reach(self, layer: int) -> int:
        """Return how many tokens a token of a layer sees, itself included."""
        window = self.windows[layer] if self.windows else None
        return _EVERYWHERE if window is None else window


@dataclass(frozen=True)
class Runs:
    """Patched runs, one entry per run.

    Args:
        layer: Layer in which the patch writes; the number of layers for what stands behind the last.
        point: Where in that layer, of ``Point``.
        written: Tokens that are written, each once, in any order; -1 fills up.
        reads: Tokens that are read, each once, in any order; -1 fills up.
        columns: How many columns of the written tensor are replaced, such as a head's width; for keys and values
            those of the query heads that see them; 0 for all.
    """

    layer: Int[np.ndarray, " run"]
    point: Int[np.ndarray, " run"]
    written: Int[np.ndarray, "run token"]
    reads: Int[np.ndarray, "run read"]
    columns: Int[np.ndarray, " run"]

    @classmethod
    def at(
        cls,
        layer: int | np.ndarray,
        point: int | np.ndarray,
        token: int | np.ndarray,
        read: int | np.ndarray,
        columns: int | np.ndarray = 0,
    ) -> "Runs":
        """Return runs that write one token and read one token; arguments are broadcast."""
        given = np.broadcast_arrays(*(np.atleast_1d(x) for x in (layer, point, token, read, columns)))
        layers, points, tokens, reads, widths = (x.ravel().astype(np.int64) for x in given)
        return cls(layers, points, tokens[:, None], reads[:, None], widths)

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True)
class Cone:
    """The cones of runs, one entry per run; all are zero where nothing that is read can change.

    Args:
        linear: Floating-point operations in the projections of the layers, two per multiply-add.
        attention: Those in scores and weighted sums.
        head: Those in the unembedding.
        rows: Tokens that are computed in a layer, summed over layers.
        start: First token that is written and can matter.
        held: Tokens whose stream is held between layers: from that one to the last that is read.
        reads: Tokens that are read and can change.
    """

    linear: Float[np.ndarray, " run"]
    attention: Float[np.ndarray, " run"]
    head: Float[np.ndarray, " run"]
    rows: Int[np.ndarray, " run"]
    start: Int[np.ndarray, " run"]
    held: Int[np.ndarray, " run"]
    reads: Int[np.ndarray, " run"]

    @property
    def flops(self) -> Float[np.ndarray, " run"]:
        """Floating-point operations in all."""
        found: np.ndarray = self.linear + self.attention + self.head
        return found

    @property
    def is_derived(self) -> Bool[np.ndarray, " run"]:
        """Whether no path leads to anything that is read, so that the effect is exactly 0 and is not run."""
        found: np.ndarray = self.reads == 0
        return found


def cone(
    numbers: ModelNumbers, runs: Runs, n_columns: int | Int[np.ndarray, " run"], *, low_rank: bool = False
) -> Cone:
    """Count what has to be computed for patched runs.

    Args:
        numbers: The model.
        runs: The runs.
        n_columns: Columns of the vocabulary that are read: those of the answers, or all.
        low_rank: Whether a head's or neuron's difference goes alone through the projection behind it, rather than the
            whole row.

    Returns:
        The cones.
    """
    walk = _Walk(numbers, runs, low_rank=low_rank)
    for layer in range(numbers.n_layers):
        walk.enter(layer)
        walk.pass_layer(layer)
    return walk.finish(n_columns)


def full_flops(
    numbers: ModelNumbers, lengths: Int[np.ndarray, " run"], *, from_layer: int | np.ndarray = 0
) -> np.ndarray:
    """Count whole forwards from a layer on, with the unembedding of every token.

    Args:
        numbers: The model.
        lengths: Tokens of each run.
        from_layer: First layer that is run.

    Returns:
        Floating-point operations of each run, float64.
    """
    layers = np.arange(numbers.n_layers)
    per_key = 2 * numbers.n_heads * numbers.head_width
    keys = np.stack([_keys(lengths, numbers.reach(layer)) for layer in layers.tolist()])
    is_run = layers[:, None] >= np.broadcast_to(from_layer, lengths.shape)
    inside = (is_run * (keys * per_key + lengths * numbers.layer)).sum(0)
    found: np.ndarray = 2.0 * (inside + lengths * (numbers.width * numbers.vocab))
    return found


class _Walk:
    """All runs on their way up through the layers.

    Changed tokens of the stream are those written while ``depth`` is the layer at hand, and from then on all from
    ``start`` to ``high``.
    """

    def __init__(self, numbers: ModelNumbers, runs: Runs, *, low_rank: bool) -> None:
        self.numbers, self.runs, self.low_rank = numbers, runs, low_rank
        self.stop = runs.reads.max(1) + 1
        self.first_read = np.where(runs.reads < 0, _EVERYWHERE, runs.reads).min(1)
        # What is written behind the last read token never matters.
        self.written = np.where(runs.written < self.stop[:, None], runs.written, -1)
        self.start = np.where(self.written < 0, _EVERYWHERE, self.written).min(1)
        self.high = self.written.max(1) + 1
        self.depth = runs.layer + (runs.point != Point.STREAM)
        self.linear, self.attention = np.zeros(len(runs)), np.zeros(len(runs))
        self.rows = np.zeros(len(runs), dtype=np.int64)
        back = np.cumsum([0, *(numbers.reach(j) - 1 for j in reversed(range(numbers.n_layers)))])
        self.back = np.minimum(back[::-1], _EVERYWHERE)
        """For the stream into each layer, how far before the first read token it can matter."""

    def enter(self, layer: int) -> None:
        """Count what follows a write inside a layer, and let its run begin."""
        numbers, point = self.numbers, self.runs.point
        chosen = np.flatnonzero((self.runs.layer == layer) & (point != Point.STREAM) & (point != Point.LOGITS))
        point = point[chosen]
        tokens = self._out(layer, self.written[chosen], chosen)
        n_out, keys = (tokens >= 0).sum(1), self._keys_of(tokens, layer)
        spread = point == Point.KEY_VALUE
        self.high[chosen] = np.where(spread, self._next(layer, chosen), self.high[chosen])
        n_later, later_keys = self._stretch(layer, chosen)
        n_out, keys = np.where(spread, n_later, n_out), np.where(spread, later_keys, keys)

        full = numbers.n_heads * numbers.head_width
        columns = np.where(self.runs.columns[chosen] == 0, full, self.runs.columns[chosen])
        neurons = np.where(self.runs.columns[chosen] == 0, numbers.n_neurons, self.runs.columns[chosen])
        projection = numbers.width * columns if self.low_rank else numbers.projection
        down = np.where((point == Point.ACTIVATED) & self.low_rank, numbers.width * neurons, numbers.down)
        has_mlp = (point <= Point.MIDDLE) & (not numbers.is_parallel)
        per_row = projection * (point <= Point.ATTENDED) + (numbers.up + numbers.down) * has_mlp
        per_row = per_row + down * (point == Point.ACTIVATED)
        self.linear[chosen] += 2.0 * n_out * per_row
        self.attention[chosen] += 4.0 * keys * columns * (point <= Point.KEY_VALUE)
        self.rows[chosen] += n_out * (per_row > 0)

    def pass_layer(self, layer: int) -> None:
        """Count a layer for all runs whose stream into it has changed."""
        numbers = self.numbers
        spreads = (self.depth < layer) | ((self.depth == layer) & (self.runs.point == Point.KEY_VALUE))
        enters, spread = np.flatnonzero((self.depth == layer) & ~spreads), np.flatnonzero(spreads)
        chosen = np.concatenate([enters, spread])
        # Tokens whose stream has changed, and those of them at which what the layer gives matters.
        tokens, low = self.written[enters], self._low(layer)
        n_entering = ((tokens >= low[enters, None]) & (tokens >= 0)).sum(1)
        n_spread = _between(np.maximum(self.start, low)[spread], self.high[spread])
        n_changed = np.concatenate([n_entering, n_spread])
        n_both = np.concatenate([(self._out(layer, tokens, enters) >= 0).sum(1), self._stretch(layer, spread)[0]])

        self.high[chosen] = self._next(layer, chosen)
        n_out, keys = self._stretch(layer, chosen)
        n_mlp = n_both if numbers.is_parallel else n_out
        self.linear[chosen] += 2.0 * (
            n_changed * numbers.key_value
            + n_both * numbers.query
            + n_out * numbers.projection
            + n_mlp * (numbers.up + numbers.down)
        )
        self.attention[chosen] += 4.0 * keys * (numbers.n_heads * numbers.head_width)
        self.rows[chosen] += n_changed + n_out - n_both

    def finish(self, n_columns: int | np.ndarray) -> Cone:
        """Count the unembedding, and drop the runs that reach nothing that is read."""
        everything = np.arange(len(self.runs))
        reads = self._stretch(self.numbers.n_layers - 1, everything)[0]
        point_like = (self.depth >= self.numbers.n_layers) & (self.runs.point != Point.KEY_VALUE)
        chosen = np.flatnonzero(point_like)
        tokens = self._out(self.numbers.n_layers - 1, self.written[chosen], chosen)
        reads[chosen] = (tokens >= 0).sum(1)
        alive = reads > 0
        has_head = self.runs.point != Point.LOGITS
        start = self._first()
        head = 2.0 * reads * self.numbers.width * np.asarray(n_columns) * has_head
        return Cone(
            self.linear * alive,
            self.attention * alive,
            head,
            self.rows * alive,
            start,
            _between(start, self.stop),
            reads,
        )

    def _first(self) -> np.ndarray:
        """Return the first token that each run writes and that can matter to what is read."""
        depth = np.minimum(self.runs.layer + (self.runs.point >= Point.ATTENDED), self.numbers.n_layers)
        tokens = np.where(self.written >= self._low(depth)[:, None], self.written, -1)
        behind = np.flatnonzero(depth == self.numbers.n_layers)
        tokens[behind] = self._out(self.numbers.n_layers - 1, tokens[behind], behind)
        found: np.ndarray = np.where(tokens < 0, _EVERYWHERE, tokens).min(1)
        return found

    def _low(self, depth: int | np.ndarray) -> np.ndarray:
        """Return the first token at which the stream into a layer can matter."""
        found: np.ndarray = np.maximum(0, self.first_read - self.back[depth])
        return found

    def _next(self, layer: int, chosen: np.ndarray) -> np.ndarray:
        """Return where the changed tokens end once attention has spread them."""
        found: np.ndarray = np.minimum(self.stop[chosen], self.high[chosen] + (self.numbers.reach(layer) - 1))
        return found

    def _out(self, layer: int, tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return tokens with -1 for those at which what the layer gives does not matter."""
        if layer < self.numbers.n_layers - 1:
            return np.where(tokens >= self._low(layer + 1)[chosen, None], tokens, -1)
        reads = self.runs.reads[chosen]
        is_read = np.zeros(tokens.shape, dtype=bool)
        for column in range(reads.shape[1]):
            is_read |= tokens == reads[:, column, None]
        return np.where(is_read, tokens, -1)

    def _stretch(self, layer: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many tokens from start to high matter behind a layer, and the keys that they see."""
        start, high = self.start[chosen], self.high[chosen]
        if layer < self.numbers.n_layers - 1:
            low, reach = np.maximum(start, self._low(layer + 1)[chosen]), self.numbers.reach(layer)
            high = np.maximum(low, high)
            return high - low, _keys(high, reach) - _keys(low, reach)
        reads = self.runs.reads[chosen]
        tokens = np.where((reads >= start[:, None]) & (reads < high[:, None]), reads, -1)
        return (tokens >= 0).sum(1), self._keys_of(tokens, layer)

    def _keys_of(self, tokens: np.ndarray, layer: int) -> np.ndarray:
        """Return how many keys tokens see together; -1 sees none."""
        found: np.ndarray = np.minimum(tokens + 1, self.numbers.reach(layer)).sum(1)
        return found


def _between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.maximum(0, high - low)
    return found


def _keys(n_tokens: np.ndarray, reach: int) -> np.ndarray:
    """Return how many keys the first tokens of a prompt see together, each at most ``reach``."""
    n_tokens = n_tokens.astype(np.int64)
    growing = np.minimum(n_tokens, reach)
    found: np.ndarray = growing * (growing + 1) // 2 + (n_tokens - growing) * reach
    return found
