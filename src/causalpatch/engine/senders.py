"""What each sender of a decoder's graph adds to the stream more in the source run than in the base run.

Of a head that is its difference of z times its rows of the output projection. Behind a post-norm the sum of all heads
is scaled together: to first order, the base run's Jacobian times each head's term.

Symbols: B pairs, T tokens, D width.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.engine.slopes import Meeting
from causalpatch.engine.untouched import Untouched
from causalpatch.engine.wiring import Wired, Wiring
from causalpatch.models import Port, plain_rows
from causalpatch.models.views import Scaled


class Senders:
    """The senders of a model.

    Args:
        wiring: How the model is wired.
        dtype: In which differences are computed, float32 at least.
    """

    def __init__(self, wiring: Wiring, dtype: torch.dtype) -> None:
        self.wiring, self.dtype = wiring, dtype

    def embedded(self, batch: Untouched, meeting: Meeting) -> Float[Tensor, "B T D"]:
        """Return what the embedding would add more, at the base's tokens."""
        first = self.wiring.layers[0].stream
        return meeting.difference(batch.known.base.tensors[first], batch.known.source.tensors[first])

    def deltas(self, batch: Untouched, meeting: Meeting) -> Float[Tensor, "sender B T D"]:
        """Return what every sender would add more, at the base's tokens."""
        wiring, graph = self.wiring, self.wiring.graph
        embedded = self.embedded(batch, meeting)
        found = embedded.new_empty(graph.n_senders, *embedded.shape, dtype=self.dtype)
        found[0] = embedded
        for layer, wired in enumerate(wiring.layers):
            self._heads(layer, batch, meeting, found[graph.heads_from(layer)])
            tap = wired.mlp_out
            here, there = (tap.view.read(run.tensors[tap.port], ()) for run in (batch.known.base, batch.known.source))
            found[graph.mlp_from(layer)] = meeting.difference(here, there)
        return found

    def moves(
        self, batch: Untouched, meeting: Meeting, deltas: Float[Tensor, "sender B T D"]
    ) -> Iterator[tuple[Port, Tensor]]:
        """Yield for each sender where its output stands, and what moves it from the base's to the source's."""
        yield self.wiring.layers[0].stream, deltas[0]
        for layer, wired in enumerate(self.wiring.layers):
            dz = self._of_heads(wired, batch, meeting)
            for start in wired.starts:
                moved = torch.zeros_like(dz)
                columns = slice(start, start + self.wiring.model.head_width)
                moved[..., columns] = dz[..., columns]
                yield wired.z, moved
            view = wired.mlp_out.view
            factor = view.factor if isinstance(view, Scaled) else 1.0
            yield wired.mlp_out.port, deltas[self.wiring.graph.mlp_from(layer)] / factor

    def _of_heads(self, wired: Wired, batch: Untouched, meeting: Meeting) -> Float[Tensor, "B T C"]:
        """Return by how much differs what the heads of a layer hand on."""
        return meeting.difference(batch.known.base.tensors[wired.z], batch.known.source.tensors[wired.z])

    def _heads(self, layer: int, batch: Untouched, meeting: Meeting, out: Float[Tensor, "head B T D"]) -> None:
        """Fill in what the heads of a layer would add more."""
        wired, width = self.wiring.layers[layer], self.wiring.model.head_width
        base, dz = batch.known.base.tensors[wired.z], self._of_heads(wired, batch, meeting).to(self.dtype)
        weight = plain_rows(wired.project)
        for head, start in enumerate(wired.starts):
            columns = slice(start, start + width)
            if weight is not None:
                torch.matmul(dz[..., columns], weight.detach()[columns].to(self.dtype), out=out[head])
            else:
                out[head] = _term(wired.project, base, columns, dz[..., columns])
        if wired.after is not None:
            given = wired.project.forward(base)
            for head in range(len(wired.starts)):
                out[head] = _pushed(wired.after, given, out[head].to(given.dtype))
        if wired.times != 1.0:
            out *= wired.times


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
