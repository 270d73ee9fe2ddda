"""Gradients of receivers that read one stream, gathered over points, and their products with what senders add.

Behind a norm of known kind the gradient at the stream is a projection's product and multiples of two vectors for each
token (see ``chains``):

    G_v = gamma (W_v g'_v) - m_v 1 - c_v xhat,    m_v = mean(gamma (W_v g'_v)),    c_v = g'_v . made_v / width

where made_v is what the norm and the projection make of the stream, without what they add to nothing. The weights are
those of all points, so that only g' is summed, which is as wide as a head; c and xhat are kept point by point. What a
sender adds times m_v 1 is m_v times the sum of its columns.

G is made for some tokens at a time, so that it, and what senders add at these tokens, stay in the cache, and neither
takes room while activations are held.

Symbols: N tokens, S senders, U receivers, P points, D width, W columns of a unit.
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
        parts: c and xhat of some points, ``[P, N, U]`` and ``[P, N, D]``.
        raw: Streams and gradients of each point, where they go through modules by autograd.
    """

    total: Tensor | None = None
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    raw: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, part: Float[Tensor, "P N ..."]) -> None:
        if self.total is None:
            self.total = part.sum(0) if len(part) > 1 else part[0]
            return
        for one in part:
            self.total.add_(one)


class Gathered(Generic[Key]):
    """Gradients of a group of receivers.

    Args:
        chains: What the group reads the stream through, by key.
        dtype: In which contractions are computed.
    """

    def __init__(self, chains: Mapping[Key, Chain], dtype: torch.dtype) -> None:
        self.chains, self.dtype = chains, dtype
        self._of = {key: _Of() for key in chains}
        self._last: tuple[Norm, Tensor, tuple[Tensor, Tensor]] | None = None  # of what xhat was made last

    def add(
        self,
        key: Key,
        x: Float[Tensor, "P N D"],
        g: Float[Tensor, "P N ..."],
        made: Float[Tensor, "P N U W"] | None = None,
    ) -> None:
        """Add the gradients of one key at some points.

        Args:
            key: The key.
            x: The stream.
            g: Gradients at the port: of heads ``[P, N, U, W]``, else ``[P, N, D]``; not needed any more by others.
            made: What the norm and the projection make of the stream, without what they add to nothing, where known.
        """
        chain, of = self.chains[key], self._of[key]
        if chain.way.starts is None:
            of.add(torch.stack([chain.pull(*both)[0][:, None] for both in zip(x, g, strict=True)]))
        elif (folds := chain.folds) is None:
            of.raw += zip(x, g, strict=True)
        else:
            norm, plain = folds
            xhat, inverse = self._normed(norm, x)
            g = g.to(self.dtype) * inverse[..., None]
            if made is None:
                made = ((xhat * norm.scale.to(xhat)) @ plain.flatten(1).to(xhat)).reshape(g.shape)
            of.parts.append(((g * made).sum(-1) / chain.width, xhat))
            of.add(g)

    @property
    def met(self) -> list[Key]:
        """The keys that were met."""
        return [key for key, of in self._of.items() if of.total is not None or of.raw]

    def products(
        self, deltas: Float[Tensor, "S N D"], sums: Float[Tensor, "S N"], tokens: slice, *, by_token: bool
    ) -> dict[Key, Float[Tensor, "... S U"]]:
        """Return products with what senders add, summed over points; of keys that were met.

        Args:
            deltas: What senders add at some tokens.
            sums: Its sums over the width.
            tokens: Which tokens.
            by_token: Whether tokens are told apart, ``[N, S, U]``, or summed, ``[S, U]``.
        """
        if not self.met:
            return {}
        sizes = [len(self.chains[key].owners) or 1 for key in self.met]
        rows = deltas.new_empty(sum(sizes), *deltas.shape[1:])
        shifts = [self._fill(key, tokens, out) for key, out in zip(self.met, torch.split(rows, sizes), strict=True)]
        if by_token:
            every = torch.bmm(deltas.transpose(0, 1), rows.permute(1, 2, 0))
        else:
            # The receivers of a group are few and odd in number: as rows they are multiplied faster than as columns.
            every = (rows.flatten(1) @ deltas.flatten(1).T).T
        found = dict(zip(self.met, torch.split(every, sizes, -1), strict=True))
        for key, shift in zip(self.met, shifts, strict=True):
            if shift is not None:
                found[key] = found[key] - (sums.T[..., None] * shift.T[:, None] if by_token else sums @ shift.T)
        return found

    def _normed(self, norm: Norm, x: Float[Tensor, "P N D"]) -> tuple[Tensor, Tensor]:
        """Return xhat and 1 / sigma of a stream; keys of a layer share them."""
        # The stream is held, so that no other can lie where it does.
        if self._last is None or self._last[0].module is not norm.module or self._last[1].data_ptr() != x.data_ptr():
            self._last = (norm, x, norm.parts(x.to(self.dtype)))
        return self._last[2]

    def _fill(self, key: Key, tokens: slice, out: Float[Tensor, "U N D"]) -> Float[Tensor, "U N"] | None:
        """Fill in gradients at the stream at some tokens, without m 1; return m, or None where there is none."""
        chain, of = self.chains[key], self._of[key]
        if of.total is None:
            out.zero_()
            for x, g in of.raw:
                out += chain.pull(x[tokens], g[tokens])
            return None
        total = of.total[tokens]
        folds = chain.folds
        if folds is None:
            out.copy_(total.transpose(0, 1))
            return None
        norm, plain = folds
        torch.bmm(total.transpose(0, 1), plain.permute(1, 2, 0), out=out)
        out *= norm.scale.to(self.dtype)
        shift = out.mean(-1) if norm.is_centred else None
        for shares, xhat in of.parts:
            for share, one in zip(shares, xhat, strict=True):
                out.addcmul_(share[tokens].T[..., None].to(out), one[tokens], value=-1)
        return shift
