"""New values as functions of the current ones: constants, steering, projection, fitted tables, functions of one's own.

Each takes the current values ``[element, *value_axes]`` of some tokens and returns the new ones in the same shape.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from causalpatch.base.errors import PatchError
from causalpatch.engine.apart import Change, depends_on_others, refuse_mixing
from causalpatch.engine.means import Table
from causalpatch.engine.memory import is_out_of_memory
from causalpatch.engine.resolve import Placement, Target
from causalpatch.patches import Fitted, ProjectOut


def spread(target: Target, array: np.ndarray, current: Tensor, what: str = "constant") -> Tensor:
    """Return an array once for each element.

    Args:
        target: What is written, for the error.
        array: A number, or an array that broadcasts to the site's value axes.
        current: Current values.
        what: What the array is, for the error.

    Raises:
        PatchError: The array does not broadcast to the value axes.
    """
    sizes = tuple(current.shape[1:])
    # Checked by itself: an array with one axis more would fit whenever there are as many elements by chance.
    meets = zip(reversed(array.shape), reversed(sizes), strict=False)
    if array.ndim > len(sizes) or any(n not in (1, size) for n, size in meets):
        raise PatchError(
            f"the {what} for '{target.site}' does not fit",
            facts=[(what, f"shape {array.shape}"), ("site", f"shape {sizes} per token")],
            fix="give a number, or an array over the site's value axes",
        )
    return torch.as_tensor(array, dtype=current.dtype, device=current.device).expand_as(current)


def projected(target: Target, value: ProjectOut, current: Tensor) -> Tensor:
    """Return the current values without their part along a direction.

    Raises:
        PatchError: The direction does not have the site's value axes, or there are none.
    """
    sizes, unit = tuple(current.shape[1:]), value.unit
    if not sizes or unit.shape != sizes:
        raise PatchError(
            f"the direction for '{target.site}' does not fit",
            facts=[("direction", f"shape {unit.shape}"), ("site", f"shape {sizes} per token")],
            fix="give a direction over the site's value axes" if sizes else "set a single number to zero instead",
        )
    flat = current.reshape(len(current), -1)
    along = torch.as_tensor(unit, dtype=current.dtype, device=current.device).reshape(-1)
    return (flat - (flat @ along)[:, None] * along).reshape(current.shape)


def from_fit(
    target: Target, value: Fitted, placement: Placement | None, groups: Sequence[str | None], current: Tensor
) -> Tensor:
    """Return the fitted value of each element.

    Args:
        target: What is written, for the errors.
        value: What was fitted.
        placement: The base token of each element; None for sites without positions.
        groups: The group of each element's pair.
        current: Current values.

    Raises:
        PatchError: The array does not have the site's axes, or was not fitted at a position.
        PairError: A pair's group is not among those that it was fitted on.
    """
    sizes = tuple(current.shape[1:])
    shape = value.array.shape[int(bool(value.groups)) + int(value.by_position) :]
    if shape != sizes or (value.by_position and placement is None):
        raise PatchError(
            f"the {value.how} for '{target.site}' does not fit",
            facts=[
                ("fitted", f"shape {shape}{' per token' * value.by_position}"),
                ("site", f"shape {sizes}{' per token' * (placement is not None)}"),
            ],
            fix="fit it on this site of this model",
        )
    table = torch.as_tensor(value.array, dtype=current.dtype, device=current.device)
    what = f"{value.how} of '{target.site}'"
    return Table(table, what, by_position=value.by_position, groups=value.groups).at(placement, groups)


def called(target: Target, function: Callable[[Tensor, Tensor], Tensor], current: Tensor, source: Tensor) -> Tensor:
    """Call a function of one's own.

    Raises:
        PatchError: It fails, or returns another shape.
    """
    try:
        value = function(current.clone(), source)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise PatchError(
            f"{target.value} for '{target.site}' failed",
            facts=[("given", f"shape {tuple(current.shape)}"), ("error", f"{type(error).__name__}: {error}")],
            fix="call it yourself on two tensors of that shape",
        ) from error
    if not isinstance(value, Tensor) or value.shape != current.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise PatchError(
            f"{target.value} for '{target.site}' did not return the shape it was given",
            facts=[("given", f"shape {tuple(current.shape)}"), ("returned", got)],
            fix="return the new value of every element, such as current * 0.5",
        )
    return value


def apart(tried: set[int], target: Target, change: Change, current: Tensor, source: Tensor) -> Tensor:
    """Call a function of one's own on elements, after a look at whether it mixes them.

    Args:
        tried: Numbers of the functions that were looked at; this one's is added.
        target: What is written.
        change: The function.
        current: Current values.
        source: Source values.

    Raises:
        PatchError: It mixes them.
    """
    number = id(target.value)
    if number not in tried and len(current) > 1:
        does = depends_on_others(change, current, source)
        if does:
            raise refuse_mixing(target.value, target.site)
        tried.update([] if does is None else [number])
    return change(current, source)
