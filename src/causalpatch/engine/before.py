"""Several features of one tensor in one run: all of them are read before any of them is written.

What a feature is depends on the whole vector, so that writing one feature would change what the next one is. The plain
meaning of "these features take these values" is that each is counted from the same vector ``x``:

    x' = x + sum over patched features of (new - f(x)) * direction + (new error - error(x))

A feature that is written twice in a run goes on from what it was given first, as sites do everywhere.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from causalpatch.models import FeatureView, View
from causalpatch.models.dictionaries.views import EachFeature, difference
from causalpatch.models.views import Companions, Index


class Before:
    """A tensor as it was before its features were written, and what they were given since.

    Args:
        tensor: The tensor; it is not changed.
        kind: How what is described lies in it.
    """

    def __init__(self, tensor: Shaped[Tensor, "row *axes"], kind: type) -> None:
        self.tensor = tensor
        self.kind = kind
        self._given: dict[object, list[tuple[Int[Tensor, " n"], Float[Tensor, n * value]]]] = {}

    @classmethod
    def of(cls, tensor: Shaped[Tensor, "row *axes"], view: View, before: "Before | None") -> "Before | None":
        """Return what a view is to be read from; None for all but features, which see what was written.

        Args:
            tensor: The tensor as it is.
            view: The view.
            before: What the view written last was read from.
        """
        if not isinstance(view, FeatureView):
            return None
        # The middle of a block comes behind what attention adds, though it is written in the same tensor.
        is_alike = before is not None and before.kind is type(view.coded.written)
        return before if is_alike else cls(tensor.clone(), type(view.coded.written))

    def write(
        self,
        view: View,
        tensor: Shaped[Tensor, "row *axes"],
        companions: Companions,
        index: Index,
        value: Tensor | Callable[[Tensor], Tensor],
    ) -> None:
        """Write features, or what is not explained, into a tensor.

        Args:
            view: How they lie in it.
            tensor: The tensor, in which other features may have been written since.
            companions: The tensors at the tap's other ports.
            index: The elements.
            value: Their new values, or a function of the current ones.
        """
        if not isinstance(view, FeatureView):
            raise AssertionError(view)  # `of` has told it apart
        now = view.at(self.tensor, companions, index)
        given = self._given.setdefault((view.coded, isinstance(view, EachFeature)), [])
        keys = self._keys(view, index)
        for known, values in given:
            now = _later(now, keys, known, values)
        new = (value if isinstance(value, Tensor) else value(now)).to(now)
        view.add(tensor, companions, index, difference(new, now), self.tensor)
        given.append((keys, new))

    def _keys(self, view: FeatureView, index: Index) -> Int[Tensor, " n"]:
        """Return a number for each element: where it is, and of which feature."""
        keys = torch.zeros_like(index[0])
        for place, size in zip(index, self.tensor.shape, strict=False):
            keys = keys * size + place
        return keys * view.coded.coder.n_features + view.units(len(keys)).to(keys.device)


def _later(
    now: Float[Tensor, "n *value"],
    keys: Int[Tensor, " n"],
    known: Int[Tensor, " m"],
    values: Float[Tensor, "m *value"],
) -> Float[Tensor, "n *value"]:
    """Return values of elements, those that are known already as they were given."""
    sorted_keys, order = known.sort()
    place = torch.searchsorted(sorted_keys, keys).clamp(max=len(known) - 1)
    is_known = (sorted_keys[place] == keys).reshape(-1, *[1] * (now.ndim - 1))
    return torch.where(is_known, values[order[place]], now)
