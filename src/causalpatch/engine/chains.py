"""What goes from the stream to an input, and back: values, differences and gradients through a chain of modules.

Of a receiver v that reads columns of a projection W behind a norm, the gradient at the stream is

    G_v = J^T (W_v g_v),    J the norm's Jacobian at the stream x.

For a norm y = gamma (x - c mean(x)) / sigma + beta, c being 1 or 0 and sigma^2 = mean((x - c mean(x))^2) + eps, that
is, with Wc = (gamma W) less c times its mean over the width, xhat = (x - c mean(x)) / sigma, and g' = g / sigma,

    G_v = g' Wc_v^T - xhat (g' . (xhat Wc)_v) / width,

one product for all units. Which c and gamma (the weight, or one and the weight) a module has is found by comparing with
its own vector-Jacobian products; a module of another kind goes through autograd, and so does a projection that is not
plain, such as a quantised one.

Symbols: N tokens, U units, D width, W columns of a unit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalpatch.engine.wiring import Input
from causalpatch.models import plain_rows

_AT_ONCE = 2**24
"""Numbers that go through a module together, about, where each unit has a row of its own."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm whose formula is known.

    Args:
        module: The module.
        is_centred: Whether the mean is taken away.
        scale: What each column is multiplied by in the end.
        eps: What is added to the mean square.
    """

    module: nn.Module
    is_centred: bool
    scale: Float[Tensor, " D"]
    eps: float

    def parts(self, x: Float[Tensor, "*lead D"]) -> tuple[Float[Tensor, "*lead D"], Float[Tensor, "*lead 1"]]:
        """Return what each token is scaled to, and 1 / sigma."""
        centred = x - x.mean(-1, keepdim=True) if self.is_centred else x
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return centred * inverse, inverse

    def pull(self, x: Float[Tensor, "N D"], g: Float[Tensor, "*lead N D"]) -> Float[Tensor, "*lead N D"]:
        """Return the gradient at what the norm reads, given that at what it gives."""
        xhat, inverse = self.parts(x)
        g = g * self.scale.to(g)
        back = g - xhat * (g * xhat).mean(-1, keepdim=True)
        if self.is_centred:
            back = back - g.mean(-1, keepdim=True)
        return back * inverse

    def fixed(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead D"]:
        """Return the norm of x with its scale as a constant, its shift left out."""
        centred = x - x.mean(-1, keepdim=True) if self.is_centred else x
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps).detach()
        return centred * inverse * self.scale.to(x)


def norm_of(module: nn.Module, width: int) -> Norm | None:
    """Return the formula of a norm; None where it is another one, or the module no norm over the width."""
    eps = next(
        (float(held) for name in ("eps", "variance_epsilon", "epsilon") if (held := getattr(module, name, None))), None
    )
    given = getattr(module, "weight", None)
    if eps is None or not (isinstance(given, Tensor) and given.shape == (width,) and given.is_floating_point()):
        return None
    wide = torch.promote_types(given.dtype, torch.float32)
    weight = given.detach().to(wide)
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, width, generator=draw).to(weight) for _ in range(2))
    x[1] += 3.0
    truth = _back(module, x.to(given.dtype), g.to(given.dtype)).to(wide)
    x, g = x.to(given.dtype).to(wide), g.to(given.dtype).to(wide)
    for is_centred in (True, False):
        for scale in (weight, 1 + weight):
            norm = Norm(module, is_centred, scale, eps)
            # What modules round in few bits is no other formula.
            tolerance = 64 * max(torch.finfo(given.dtype).eps, 2**-24) * float(truth.abs().amax())
            if bool(((norm.pull(x, g) - truth).abs() <= tolerance).all()):
                return norm
    return None


def _back(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Return a vector-Jacobian product of a module, by autograd."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        # The module's own forward: no hooks, neither ours nor a reader's, are to see what is in no run.
        (found,) = torch.autograd.grad(module.forward(x), x, g)
    return found


@dataclass(frozen=True, eq=False)
class Chain:
    """What a group of receivers reads the stream through.

    Args:
        way: The port, the modules, and the columns of units.
        width: Width of the stream.
        dtype: In which contractions are computed, float32 at least.
        owners: For each receiver the unit of the port that it reads; heads may share one.
        norms: What is known of norms; chains that share some may share it.
    """

    way: Input
    width: int
    dtype: torch.dtype
    owners: Sequence[int] = ()
    norms: dict[nn.Module, Norm | None] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules, from the port back to the stream."""
        return self.way.chain

    def columns(self, tensor: Float[Tensor, "*lead C"]) -> Float[Tensor, "*lead U W"]:
        """Return the columns of each receiver's unit; without a copy where units lie side by side in order."""
        starts, n_units, width = self.way.starts or (), len(self.owners), self.way.width
        first = starts[self.owners[0]]
        if [starts[owner] for owner in self.owners] == [first + number * width for number in range(n_units)]:
            return tensor[..., first : first + n_units * width].reshape(*tensor.shape[:-1], n_units, width)
        return tensor[..., self.places.to(tensor.device)]

    def forward(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead C"]:
        """Return what the chain makes of the stream."""
        for module in reversed(self.modules):
            x = module.forward(x)
        return x

    def of_unit(self, x: Float[Tensor, "*lead D"], number: int) -> Float[Tensor, "*lead W"]:
        """Return what the chain makes of the stream in the columns of one receiver."""
        start = (self.way.starts or ())[self.owners[number]]
        columns = slice(start, start + self.way.width)
        if self.plain is None:
            return self.forward(x)[..., columns]
        for module in reversed(self._rest):
            x = module.forward(x)
        made = x @ self.plain[:, number].to(x.dtype)
        bias = getattr(self.modules[0], "bias", None)
        return made if bias is None else made + bias.detach()[columns]

    def of_units(self, x: Float[Tensor, "R U T D"], numbers: slice) -> Float[Tensor, "R T U W"]:
        """Return what the chain makes of streams, one for each of some receivers, in the columns of each.

        Args:
            x: The streams; gradients go through.
            numbers: The receivers.
        """
        for module in reversed(self._rest):
            x = module.forward(x)
        if self.plain is None:
            at = self.places[numbers].to(x.device)[None, :, None].expand(len(x), -1, x.shape[2], -1)
            return x.gather(-1, at).transpose(1, 2)
        made = torch.einsum("rutd,duw->rtuw", x, self.plain[:, numbers].to(x.dtype))
        bias = getattr(self.modules[0], "bias", None)
        return made if bias is None else made + bias.detach()[self.places[numbers]]

    @cached_property
    def places(self) -> Int[Tensor, "U W"]:
        """The columns of each receiver's unit at the port."""
        starts = torch.tensor(self.way.starts)[torch.tensor(self.owners)]
        return starts[:, None] + torch.arange(self.way.width)

    @cached_property
    def plain(self) -> Float[Tensor, "D U W"] | None:
        """The projection's weight by receivers, where it is a plain linear map; kept, as large as that is."""
        return self._plain()

    def _plain(self) -> Float[Tensor, "D U W"] | None:
        if self.way.starts is None:
            return None
        weight = plain_rows(self.modules[0])
        return None if weight is None else self.columns(weight.detach().to(self.dtype))

    @cached_property
    def is_folded(self) -> bool:
        """Whether there are the norm and the weight of ``folds``."""
        return self.folds is not None

    @cached_property
    def _rest(self) -> tuple[nn.Module, ...]:
        is_plain = self.way.starts is not None and plain_rows(self.modules[0]) is not None
        return self.modules[1:] if is_plain else self.modules

    @property
    def _norm(self) -> Norm | None:
        """The one norm in front, where its formula is known."""
        if len(self._rest) != 1:
            return None
        if self._rest[0] not in self.norms:
            self.norms[self._rest[0]] = norm_of(self._rest[0], self.width)
        return self.norms[self._rest[0]]

    @property
    def folds(self) -> tuple[Norm, Float[Tensor, "D U W"]] | None:
        """The norm and the projection's weight by receivers, where there is nothing else; a copy is not kept."""
        norm = self._norm
        plain = None if norm is None else self._plain()
        return None if norm is None or plain is None else (norm, plain)

    def pull(self, x: Float[Tensor, "N D"], g: Float[Tensor, "..."]) -> Float[Tensor, "U N D"]:
        """Return the gradients at the stream.

        Args:
            x: The stream.
            g: Gradients at the port: of heads ``[N, U, W]``, of an MLP ``[N, D]``.
        """
        if self.way.starts is None:
            rows = g.to(self.dtype)[None]
        elif (plain := self._plain()) is not None:
            rows = torch.einsum("nuw,duw->und", g.to(self.dtype), plain)
        else:
            rows = self._spread(g)
        if self._norm is not None:
            return self._norm.pull(x.to(self.dtype), rows)
        if not self._rest:
            return rows
        size = max(1, _AT_ONCE // max(1, rows[0].numel()))
        parts = [self._through(x, rows[begin : begin + size]) for begin in range(0, len(rows), size)]
        return torch.cat(parts).to(self.dtype)

    def push(self, x: Float[Tensor, "N D"], delta: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Return to first order by how much the port changes where the stream does."""
        if not self.modules:
            return delta
        # The Jacobian times a vector is the derivative of the transposed product, which is linear in its own vector.
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            made = self.forward(x)
            dual = torch.zeros_like(made, requires_grad=True)
            (back,) = torch.autograd.grad(made, x, dual, create_graph=True)
            (pushed,) = torch.autograd.grad(back, dual, delta.to(back))
        return pushed.detach()

    def _spread(self, g: Float[Tensor, "N U W"]) -> Float[Tensor, "U N C"]:
        """Return each unit's gradient among zeros for all others."""
        n_columns = self._n_columns(g)
        rows = g.new_zeros(g.shape[1], g.shape[0], n_columns)
        for number, owner in enumerate(self.owners):
            start = (self.way.starts or ())[owner]
            rows[number, :, start : start + self.way.width] = g[:, number]
        return rows

    def _n_columns(self, g: Tensor) -> int:
        with torch.no_grad():
            like = next(self._tensors(), g)
            return int(self.forward(torch.zeros(1, self.width, dtype=like.dtype, device=g.device)).shape[-1])

    def _tensors(self) -> Iterator[Tensor]:
        for module in reversed(self.modules):
            yield from (held for held in [*module.parameters(), *module.buffers()] if held.is_floating_point())

    def _through(self, x: Float[Tensor, "N D"], rows: Float[Tensor, "U N C"]) -> Float[Tensor, "U N D"]:
        """Take gradients back through modules by autograd."""
        with torch.enable_grad():
            start = x.detach().expand(len(rows), *x.shape).clone().requires_grad_()
            made = start
            for module in reversed(self._rest):
                made = module.forward(made)
            (found,) = torch.autograd.grad(made, start, rows.to(made))
        return found
