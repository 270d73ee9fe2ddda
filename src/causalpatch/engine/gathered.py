"""Gradients of receivers that read one stream, gathered over points, and their products with what senders add.

Behind a norm of known kind the gradient at the stream is a projection's product and a multiple of one vector for each
token (see ``chains``):

    G_v = g'_v Wc_v^T - c_v xhat,    c_v = g'_v . (xhat Wc_v) / width

The weights are those of all points, so that only g' is summed, which is as wide as a head; and a sender's product with
c_v xhat is c_v times its product with xhat, one more column beside those of the receivers. So points cost no product
with the senders of their own, and G is made once.

Symbols: N tokens, S senders, U receivers, K points, D width, W columns of a unit.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.engine.chains import Chain, Norm

Key = TypeVar("Key", bound=Hashable)


@dataclass(eq=False)
class _Of:
    """What is gathered of one chain.

    Args:
        total: g' of all points, ``[N, U, W]``; without units the gradient at the stream, ``[N, 1, D]``.
        shares: c of each point, ``[N, U]``.
        columns: The xhat of each point, by its place among those of the group.
        raw: Streams and gradients, where they go through modules by autograd.
    """

    total: Tensor | None = None
    shares: list[Tensor] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    raw: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, part: Tensor) -> None:
        self.total = part if self.total is None else self.total.add_(part)


class Gathered(Generic[Key]):
    """Gradients of a group of receivers.

    Args:
        chains: What the group reads the stream through, by key.
        dtype: In which contractions are computed.
    """

    def __init__(self, chains: Mapping[Key, Chain], dtype: torch.dtype) -> None:
        self.chains, self.dtype = chains, dtype
        self._of = {key: _Of() for key in chains}
        self._streams: list[Tensor] = []  # xhat
        self._last: tuple[Norm, Tensor, Tensor] | None = None  # of what xhat was made last, and 1 / sigma

    def add(self, key: Key, x: Float[Tensor, "N D"], g: Float[Tensor, "..."]) -> None:
        """Add the gradients of one key at one point.

        Args:
            key: The key.
            x: The stream.
            g: Gradients at the port: of heads ``[N, U, W]``, else ``[N, D]``.
        """
        chain, of = self.chains[key], self._of[key]
        if chain.way.starts is None:
            pulled = chain.pull(x, g)[0][:, None]
            of.add(pulled if chain.modules else pulled.clone())
        elif chain.folds is None:
            of.raw.append((x, g))
        else:
            norm, plain = chain.folds
            inverse = self._normed(norm, x)
            xhat = self._streams[-1]
            g = g.to(self.dtype) * inverse[..., None]
            given = ((xhat * norm.scale.to(xhat)) @ plain.flatten(1).to(xhat)).reshape(g.shape)
            of.shares.append((g * given).sum(-1) / chain.width)
            of.columns.append(len(self._streams) - 1)
            of.add(g)

    def products(self, deltas: Float[Tensor, "S N D"]) -> dict[Key, Float[Tensor, "N S U"]]:
        """Return the products with what senders add, token by token, summed over points; of keys that were met."""
        met = [key for key, of in self._of.items() if of.total is not None or of.raw]
        if not met:
            return {}
        sizes = [len(self.chains[key].owners) or 1 for key in met]
        n_units = sum(sizes)
        rows = deltas.new_empty(n_units + len(self._streams), *deltas.shape[1:])
        for key, out in zip(met, torch.split(rows[:n_units], sizes), strict=True):
            self._fill(key, out)
        for out, xhat in zip(rows[n_units:], self._streams, strict=True):
            out.copy_(xhat)
        every = torch.bmm(deltas.transpose(0, 1), rows.permute(1, 2, 0))  # N S U+K
        found = dict(zip(met, torch.split(every[..., :n_units], sizes, -1), strict=True))
        for key in met:
            of = self._of[key]
            if of.shares:
                by_point = every[..., [n_units + column for column in of.columns]]
                shares = torch.stack(of.shares, 1).to(every)  # N K U
                found[key] = torch.baddbmm(found[key], by_point, shares, alpha=-1)
        return found

    def _normed(self, norm: Norm, x: Float[Tensor, "N D"]) -> Float[Tensor, "N 1"]:
        """Return 1 / sigma of a stream, whose xhat is then the last that is kept; keys of a layer share it."""
        # The stream is held, so that no other can lie where it does.
        if self._last is None or self._last[0].module is not norm.module or self._last[1].data_ptr() != x.data_ptr():
            xhat, inverse = norm.parts(x.to(self.dtype))
            self._streams.append(xhat)
            self._last = (norm, x, inverse)
        return self._last[2]

    def _fill(self, key: Key, out: Float[Tensor, "U N D"]) -> None:
        """Fill in gradients at the stream, without what the norm's scale adds where that is kept by itself."""
        chain, of = self.chains[key], self._of[key]
        if of.raw:
            out.zero_()
            for x, g in of.raw:
                out += chain.pull(x, g)
        elif of.total is not None and chain.folds is not None:
            torch.bmm(of.total.transpose(0, 1), chain.folded(), out=out)
        elif of.total is not None:
            out.copy_(of.total.transpose(0, 1))
