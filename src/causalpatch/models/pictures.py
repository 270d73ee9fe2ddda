"""Pictures as tokens: how many a model makes of one, what they are called, and the positions that it adds to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from causalpatch.base.errors import SiteUnsupported
from causalpatch.models.families import Pictures
from causalpatch.models.views import Companions, Index


@dataclass(frozen=True)
class Grid:
    """The tokens that a model makes of pictures.

    Args:
        names: What the tokens in front of the patches are called.
        patch: Height and width of a patch.
        picture: Channels, height and width of the pictures that the model was made for.
        n_registers: How many of the names are registers', which stand behind the first.
    """

    names: tuple[str, ...]
    patch: tuple[int, int]
    picture: tuple[int, int, int]
    n_registers: int = 0

    @classmethod
    def of(cls, pictures: Pictures, config: object) -> "Grid | None":
        """Read the sizes from a model's configuration; None where it does not say them.

        Args:
            pictures: The family's facts.
            config: The configuration.
        """
        image, patch = (_both(getattr(config, name, None)) for name in ("image_size", "patch_size"))
        if image is None or patch is None:
            return None
        n_registers = int(getattr(config, pictures.registers, 0)) if pictures.registers else 0
        registers = [f"register {number}" for number in range(n_registers)]
        names = (*pictures.specials[:1], *registers, *pictures.specials[1:])
        return cls(names, patch, (int(getattr(config, "num_channels", 3)), *image), n_registers)

    def labels(self, shape: Sequence[int] | None = None) -> tuple[str, ...]:
        """Return what a person calls each token of a picture: special ones, then ``patch row,column``.

        Args:
            shape: Shape of the picture, its last two axes being height and width; by default that of the model.
        """
        height, width = (self.picture if shape is None else tuple(shape))[-2:]
        rows, columns = height // self.patch[0], width // self.patch[1]
        return (*self.names, *(f"patch {row},{column}" for row in range(rows) for column in range(columns)))


def _both(size: object) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) and len(size) == 2 else None


@dataclass(frozen=True, eq=False)
class PositionTerm:
    """What a module adds to each token for its position, or its output without that; written by its difference.

    The tensor is the module's output.

    Args:
        module: The module.
        parameter: Name of the parameter below it, axes (…, token, width).
        n_without: How many tokens behind the first have no position.
        is_rest: The value is the output without the term.
    """

    module: nn.Module
    parameter: str
    n_without: int = 0
    is_rest: bool = False

    def read(
        self, x: Float[Tensor, "row position width"], companions: Companions
    ) -> Float[Tensor, "row position width"]:
        """Return the term of each token, or the rest."""
        del companions
        term = self._term(x).expand_as(x)
        return x - term if self.is_rest else term

    def write(
        self,
        x: Float[Tensor, "row position width"],
        companions: Companions,
        index: Index,
        value: Shaped[Tensor, " n *value"],
    ) -> None:
        """Change the output by what the new value differs from the value at the index."""
        x[index] = x[index] + (value - self.read(x, companions)[index])

    def _term(self, x: Float[Tensor, "row position width"]) -> Float[Tensor, "position width"]:
        held = self.module.get_parameter(self.parameter).detach().to(x)
        term = held.reshape(held.shape[-2:])
        if self.n_without:
            term = torch.cat([term[:1], term.new_zeros(self.n_without, term.shape[1]), term[1:]])
        if len(term) != x.shape[1]:
            raise SiteUnsupported(
                f"the positions of {x.shape[1]} tokens are not the {len(term)} that the model holds",
                facts=[("why", "it computes others for pictures of another size than it was made for")],
                fix="use resid_pre.0, or pictures of the size that the model was made for",
            )
        return term
