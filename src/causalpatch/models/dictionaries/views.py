"""Views of features: what a dictionary finds in a tensor, and what it leaves over.

With ``f = encode(x)`` and ``y`` the tensor that is described (``x`` itself for an autoencoder, the MLP's output for a
transcoder), a feature is written by its difference along its direction, ``y += (new - f) * direction``. What the
dictionary does not explain, ``y - decode(f)``, stays as it is; it is a site of its own and written likewise. Writing
back what was read adds an exact zero.

Values are read in the dtype of the tensor and computed in float32 at least.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.models.dictionaries.coder import NUMBERS_AT_ONCE, Coder
from causalpatch.models.views import Companions, ElementView, Index, View


@dataclass(frozen=True, eq=False)
class Coded:
    """A dictionary and the tensors of a tap that it reads and describes.

    Args:
        coder: The dictionary's arithmetic.
        written: How what is described lies in the tap's tensor: ``Whole`` or ``Sum``.
        n_written: How many of the companions, the first ones, ``written`` needs.
        given: How what is encoded lies in the further companions; None for what is described.
    """

    coder: Coder
    written: View
    n_written: int = 0
    given: View | None = None

    def described(self, x: Tensor, companions: Companions) -> Float[Tensor, "row *lead width"]:
        """Return what the dictionary describes."""
        return self.written.read(x, companions[: self.n_written])

    def encoded(self, x: Tensor, companions: Companions) -> Float[Tensor, "row *lead width"]:
        """Return what the dictionary encodes."""
        if self.given is None:
            return self.described(x, companions)
        first, *rest = companions[self.n_written :]
        return self.given.read(first, tuple(rest))


class FeatureView(ElementView):
    """A view that is read from the tensor as it is before any feature is written.

    Args:
        coded: The dictionary, and where its tensors are.
    """

    coded: Coded

    def read(self, x: Tensor, companions: Companions) -> Float[Tensor, "row *value"]:
        """Return the value at all tokens."""
        lead = self.coded.encoded(x, companions).shape[:-1]
        places = torch.arange(lead.numel(), device=x.device)
        index = tuple(torch.unravel_index(places, lead))
        value = self.at(x, companions, index)
        return value.reshape(*lead, *value.shape[1:])

    def write(self, x: Tensor, companions: Companions, index: Index, value: Float[Tensor, "n *value"]) -> None:
        """Change the tensor by what the value differs from the current one."""
        self.add(x, companions, index, difference(value, self.at(x, companions, index)), x)

    @abstractmethod
    def add(self, x: Tensor, companions: Companions, index: Index, change: Tensor, before: Tensor) -> None:
        """Change the tensor in place.

        Args:
            x: The tensor.
            companions: The tensors at the tap's other ports.
            index: The elements.
            change: What their values gain, in float32 at least; axes (n, value).
            before: The tensor as it was before any feature was written.
        """

    def units(self, n_elements: int) -> Int[Tensor, " n"]:
        """Return the feature of each element; zeros where the view is of none."""
        return torch.zeros(n_elements, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class EachFeature(FeatureView):
    """Features of one dictionary, another one for each element.

    Args:
        coded: The dictionary, and where its tensors are.
        numbers: The feature of each element, or one for all.
    """

    coded: Coded
    numbers: np.ndarray | int

    def at(self, x: Tensor, companions: Companions, index: Index) -> Float[Tensor, " n"]:
        """Return each element's feature."""
        vectors, which = _gathered(self.coded.encoded(x, companions), index)
        return self.coded.coder.at(vectors, which, self.units(len(which)).to(x.device)).to(x.dtype)

    def add(self, x: Tensor, companions: Companions, index: Index, change: Tensor, before: Tensor) -> None:
        """Move the tensor along each element's direction."""
        vectors, which = _gathered(self.coded.encoded(before, companions), index)
        units = self.units(len(which)).to(x.device)
        steps = change[:, None] * self.coded.coder.directions(vectors, which, units)
        # A token may be met more than once, by several of its features.
        total = steps.new_zeros(len(vectors), steps.shape[-1]).index_add(0, which, steps)
        first = torch.zeros(len(vectors), dtype=torch.long, device=which.device)
        first[which] = torch.arange(len(which), device=which.device)
        _add(x, tuple(place[first] for place in index), total)

    def units(self, n_elements: int) -> Int[Tensor, " n"]:
        """Return the feature of each element."""
        return torch.as_tensor(np.broadcast_to(self.numbers, (n_elements,)).copy())


@dataclass(frozen=True)
class Feature(EachFeature):
    """One feature of a dictionary.

    Args:
        coded: The dictionary, and where its tensors are.
        numbers: The feature.
    """

    numbers: int

    @property
    def place(self) -> int:
        """The feature."""
        return self.numbers

    @property
    def kind(self) -> object:
        """What features that are read and written together have in common."""
        return self.coded

    def each(self, places: np.ndarray) -> EachFeature:
        """Return the view of another feature for each element."""
        return EachFeature(self.coded, places)


@dataclass(frozen=True)
class FeatureError(FeatureView):
    """What a dictionary does not explain: ``y - decode(encode(x))``.

    Args:
        coded: The dictionary, and where its tensors are.
    """

    coded: Coded

    def at(self, x: Tensor, companions: Companions, index: Index) -> Float[Tensor, "n width"]:
        """Return what is not explained at the elements."""
        vectors, which = _gathered(self.coded.encoded(x, companions), index)
        coder = self.coded.coder
        parts = torch.split(vectors, max(1, NUMBERS_AT_ONCE // coder.n_features))
        explained = torch.cat([coder.decode(coder.encode(part), part) for part in parts])[which]
        return (self.coded.described(x, companions)[index].to(explained) - explained).to(x.dtype)

    def add(self, x: Tensor, companions: Companions, index: Index, change: Tensor, before: Tensor) -> None:
        """Add the change."""
        del companions, before
        _add(x, index, change)


def difference(new: Tensor, now: Tensor) -> Tensor:
    """Return by how much values differ, in float32 at least; exactly 0 where they are the same."""
    dtype = torch.promote_types(now.dtype, torch.float32)
    return new.to(now).to(dtype) - now.to(dtype)


def _gathered(x: Float[Tensor, "row *lead width"], index: Index) -> tuple[Tensor, Int[Tensor, " n"]]:
    """Return the vectors at elements, each once, and the vector of each element."""
    flat = index[0]
    for place, size in zip(index[1:], x.shape[1:], strict=False):
        flat = flat * size + place
    different, which = torch.unique(flat, return_inverse=True)
    return x.reshape(-1, x.shape[-1])[different], which


def _add(x: Tensor, index: Index, change: Tensor) -> None:
    x[index] = (x[index].to(change) + change).to(x.dtype)
