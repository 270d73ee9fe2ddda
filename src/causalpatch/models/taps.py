"""Ports and taps: where in a model's forward pass a site is found, and through which view."""

from dataclasses import dataclass
from typing import Literal

from causalpatch.models.views import View
from causalpatch.sites.site import Site


@dataclass(frozen=True)
class Port:
    """One tensor that passes a module's door.

    Args:
        path: The module, as in ``named_modules()``; ``""`` is the model itself.
        side: Whether the tensor goes in or comes out.
        items: Picks within the arguments or the output, outermost first. For ``input``, a first number counts
            positional arguments, a first text names a keyword argument, and nothing means the first positional
            argument or, if there is none, the first keyword argument. For ``output``, nothing means the tensor
            itself, or the first item of a tuple.
        like: Where the tensor does not have rows and positions as its first two axes: a port that passes before, and
            whose tensor does. What is read and written has them.
    """

    path: str
    side: Literal["input", "output"]
    items: tuple[int | str, ...] = ()
    like: "Port | None" = None


@dataclass(frozen=True)
class Tap:
    """Where and how one site is read and written.

    Args:
        site: The site.
        port: The tensor that is read and changed.
        view: How the site's value lies in that tensor.
        companions: Further tensors of the same run that the view needs; each passes before ``port`` does.
        has_position: Whether the axis after the row counts positions.
        assumes_position: Whether that is only assumed, because the site names no axes: what runs the model must look
            at the tensor before it trusts it.
    """

    site: Site
    port: Port
    view: View
    companions: tuple[Port, ...] = ()
    has_position: bool = True
    assumes_position: bool = False
