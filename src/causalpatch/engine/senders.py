"""What each sender of a decoder's graph adds to the stream more in the source run than in the base run.

Of a head that is its difference of z times its rows of the output projection. Behind a post-norm the sum of all heads
is scaled together: each head's term is multiplied by the norm's Jacobian, a mean over the same shares of the way from
the base's z to the source's at which slopes are taken. So shares that are alike from both ends give both directions the
same terms but for their sign, and with many of them the terms sum to what the norm adds more.

A head that is moved by itself adds what the norm's Jacobian makes of its term just there.

Symbols: B pairs, T tokens, N = B T, D width, C columns at a port.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.engine.meeting import Meeting
from causalpatch.engine.untouched import Untouched
from causalpatch.engine.wiring import Wired, Wiring
from causalpatch.models import Port, plain_rows
from causalpatch.models.views import Scaled


@dataclass(frozen=True, eq=False)
class Move:
    """How a sender is moved by itself, all else as in the base run.

    Args:
        port: Where its output stands.
        by: What moves it from the base's to the source's.
        delta: From a share of that way to what it adds to the stream more, to first order there.
    """

    port: Port
    by: Float[Tensor, "B T C"]
    delta: Callable[[float], Float[Tensor, "N D"]]


class Senders:
    """What the senders of a model add more, on some pairs.

    Args:
        wiring: How the model is wired.
        dtype: In which differences are computed, float32 at least.
        batch: The pairs with their untouched runs, in which the ports of senders are kept.
        meeting: Which tokens meet.
        shares: Of the way from base to source: where a post-norm's Jacobian is taken.
    """

    def __init__(
        self, wiring: Wiring, dtype: torch.dtype, batch: Untouched, meeting: Meeting, shares: Sequence[float]
    ) -> None:
        self.wiring, self.dtype, self.shares = wiring, dtype, shares
        base, source = batch.known.base.tensors, batch.known.source.tensors
        first = wiring.layers[0].stream
        self.embedded = meeting.difference(base[first], source[first]).to(dtype)
        """What the embedding adds more, at the base's tokens."""
        self._dz = [meeting.difference(base[wired.z], source[wired.z]).to(dtype) for wired in wiring.layers]
        # Where heads are not simply multiplied and added, a head's share depends on what all of them hand on.
        self._z = [None if _is_plain(wired) else base[wired.z] for wired in wiring.layers]
        self._mlps = [
            meeting.difference(*(wired.mlp_out.view.read(run[wired.mlp_out.port], ()) for run in (base, source)))
            for wired in wiring.layers
        ]

    @property
    def n_tokens(self) -> int:
        """Tokens of all pairs, pads included."""
        return self.embedded.shape[0] * self.embedded.shape[1]

    def deltas(self, tokens: slice) -> Float[Tensor, "sender N D"]:
        """Return what every sender adds more.

        Args:
            tokens: At which tokens, counted pair by pair.
        """
        graph, embedded = self.wiring.graph, self.embedded.flatten(0, 1)[tokens]
        found = embedded.new_empty(graph.n_senders, *embedded.shape)
        found[0] = embedded
        for layer, mlp in enumerate(self._mlps):
            self._heads(layer, tokens, found[graph.heads_from(layer)])
            found[graph.mlp_from(layer)] = mlp.flatten(0, 1)[tokens]
        return found

    def moves(self, deltas: Float[Tensor, "sender N D"]) -> Iterator[Move]:
        """Yield for each sender how it is moved by itself.

        Args:
            deltas: What every sender adds more, at all tokens.
        """
        yield Move(self.wiring.layers[0].stream, self.embedded, partial(_always, deltas[0]))
        for layer, wired in enumerate(self.wiring.layers):
            dz, first = self._dz[layer], self.wiring.graph.heads_from(layer).start
            for head, start in enumerate(wired.starts):
                moved = torch.zeros_like(dz)
                columns = slice(start, start + self.wiring.model.head_width)
                moved[..., columns] = dz[..., columns]
                yield Move(wired.z, moved, partial(self._alone, layer, moved, columns, deltas[first + head]))
            view = wired.mlp_out.view
            factor = view.factor if isinstance(view, Scaled) else 1.0
            delta = deltas[self.wiring.graph.mlp_from(layer)]
            yield Move(wired.mlp_out.port, delta.reshape_as(self.embedded) / factor, partial(_always, delta))

    def _alone(
        self, layer: int, moved: Float[Tensor, "B T C"], columns: slice, delta: Float[Tensor, "N D"], share: float
    ) -> Float[Tensor, "N D"]:
        """Return what a head adds more, to first order where it alone is a share of the way."""
        wired, z = self.wiring.layers[layer], self._z[layer]
        if wired.after is None or z is None:
            return delta
        flat, base = moved.flatten(0, 1), z.flatten(0, 1)
        with torch.no_grad():
            given = wired.project.forward(base + share * flat.to(base))
        term = _term(wired.project, base, columns, flat[:, columns])
        return _pushed(wired.after, given, term.to(given.dtype)).to(self.dtype) * wired.times

    def _heads(self, layer: int, tokens: slice, out: Float[Tensor, "head N D"]) -> None:
        """Fill in what the heads of a layer add more."""
        wired, width = self.wiring.layers[layer], self.wiring.model.head_width
        dz, z = self._dz[layer].flatten(0, 1)[tokens], self._z[layer]
        weight, base = plain_rows(wired.project), None if z is None else z.flatten(0, 1)[tokens]
        places = [slice(start, start + width) for start in wired.starts]
        if weight is not None and [place.start for place in places] == list(range(0, dz.shape[-1], width)):
            rows = weight.detach().to(self.dtype).reshape(len(places), width, -1)
            torch.bmm(dz.reshape(len(dz), len(places), width).transpose(0, 1), rows, out=out)
        else:
            for head, columns in enumerate(places):
                if weight is not None:
                    torch.matmul(dz[:, columns], weight.detach()[columns].to(self.dtype), out=out[head])
                elif base is not None:
                    out[head] = _term(wired.project, base, columns, dz[:, columns])
        if wired.after is not None and base is not None:
            with torch.no_grad():
                given = [wired.project.forward(base + share * dz.to(base)) for share in self.shares]
            for head in range(len(places)):
                pushed = (_pushed(wired.after, x, out[head].to(x.dtype)) for x in given)
                out[head] = sum(pushed, torch.zeros_like(out[head])) / len(given)
        if wired.times != 1.0:
            out *= wired.times


def _always(delta: Tensor, share: float) -> Tensor:
    del share
    return delta


def _is_plain(wired: Wired) -> bool:
    """Say whether what a layer's heads hand on is multiplied by a matrix and added, and no more."""
    return wired.after is None and plain_rows(wired.project) is not None


def change_of_term(
    wired: Wired, z: Float[Tensor, "*lead C"], mixed: Float[Tensor, "*lead C"]
) -> Float[Tensor, "*lead D"]:
    """Return by how much what a layer's attention adds changes where its heads hand on something else.

    Args:
        wired: The layer.
        z: What its heads hand on.
        mixed: What they hand on then.
    """
    weight = plain_rows(wired.project) if wired.after is None else None
    if weight is None:
        return term_of(wired, mixed) - term_of(wired, z)
    # The difference of the products, without the rounding of either.
    return ((mixed - z) @ weight.detach()) * wired.times


def term_of(wired: Wired, z: Float[Tensor, "*lead C"]) -> Float[Tensor, "*lead D"]:
    """Return what a layer's attention adds to the stream, by what its heads hand to the output projection."""
    with torch.no_grad():
        given: Tensor = wired.project.forward(z)
        return (given if wired.after is None else wired.after.forward(given)) * wired.times


def _term(project: nn.Module, z: Tensor, columns: slice, dz: Tensor) -> Tensor:
    """Return by how much a projection's output changes where some columns of its input do."""
    with torch.no_grad():
        changed = z.clone()
        changed[..., columns] += dz.to(z)
        more: Tensor = project.forward(changed) - project.forward(z)
    return more


def _pushed(module: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """Return a module's Jacobian at x times a difference."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        made = module.forward(x)
        dual = torch.zeros_like(made, requires_grad=True)
        (back,) = torch.autograd.grad(made, x, dual, create_graph=True)
        (pushed,) = torch.autograd.grad(back, dual, delta)
    return pushed.detach()
