"""Whether a function of one's own gives each element its value by itself.

How many elements of how many runs a function is given at once is the engine's affair. One that mixes them, such as
``current - current.mean(0)``, would give other numbers by another engine, or under another budget. So it is called on
two elements of a run together, and on each alone. What is random on purpose differs each time it is called, which is
seen by calling it once more, and is let pass: it cannot be told from one that mixes, and is no more reproducible.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from causalpatch.base.errors import PatchError

Change = Callable[[Tensor, Tensor], Tensor]


def depends_on_others(change: Change, current: Tensor, source: Tensor) -> bool | None:
    """Say whether elements get another value beside others than alone; None where these do not show it.

    Args:
        change: The function, which is called three times, or four where it looks as if it did.
        current: Current values, ``[element, *value_axes]``.
        source: Source values, in the same order.
    """
    others = (current != current[:1]).reshape(len(current), -1).any(1).nonzero()
    if not len(others):
        return None
    chosen = torch.tensor([0, int(others[-1, 0])], device=current.device)
    both = current[chosen], source[chosen]
    together = change(*both)
    alone = torch.cat([change(both[0][[i]], both[1][[i]]) for i in range(2)])
    # Products of more rows round differently, which is far less than what another element brings in.
    scale = max(float(values.abs().nan_to_num(0.0, posinf=0.0).max()) for values in (together, alone, both[0]))
    allowed = torch.finfo(current.dtype).eps ** 0.5 * scale
    if torch.isclose(together, alone, rtol=0.0, atol=allowed, equal_nan=True).all():
        return False
    return bool(torch.equal(change(*both), together))


def refuse_mixing(value: object, site: object) -> PatchError:
    """Return the error for a function that looks at other elements."""
    return PatchError(
        f"{value} for '{site}' gives a token another value beside others than alone",
        facts=[
            ("called on", "two tokens of these runs together, and on each alone"),
            ("why not", "how many tokens of how many runs it is given at once is up to the engine"),
        ],
        fix="compute each entry of the first axis from itself, and what all share beforehand: current - fixed_mean",
    )
