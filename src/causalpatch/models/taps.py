"""Ports and taps: where in a model's forward pass a site is found, and through which view."""

from dataclasses import dataclass
from typing import Final, Literal

from causalpatch.models.views import View
from causalpatch.sites.site import Site

Side = Literal[
    "input",
    "output",
    "state",
    "cell",
    "routes",
    "query",
    "key",
    "value",
    "visible",
    "head_key",
    "head_value",
    "scores",
    "pattern",
]

STEPS: Final = ("state", "cell")
"""Sides that are no door of a module: what one step of a recurrent module hands on to the next."""

INSIDE: Final = ("query", "key", "value", "visible", "head_key", "head_value", "scores", "pattern")
"""Sides that are no door of a module: tensors on the way through attention, in the order in which they pass."""


@dataclass(frozen=True)
class Port:
    """One tensor that passes a module's door, or the inside of a router or an attention module.

    ==================  ==========================================  ==========================================
    side                axes                                        what it is
    ==================  ==========================================  ==========================================
    ``input, output``   the module's own                            what goes into the module, what comes out
    ``state, cell``     row position width                          what each step of a recurrent module hands on
    ``routes``          token expert                                weights of all experts, by what a router returns
    ``query``           row position head head_width                queries as attention compares them
    ``key``             row position kv_head head_width             keys as attention compares them
    ``value``           row position kv_head head_width             values as attention weighs them
    ``head_key``        row position head head_width                keys, once for each head that they serve
    ``head_value``      row position head head_width                values, once for each head that they serve
    ``visible``         row query_position one key_position         which keys a query sees; only read
    ``scores``          row query_position head key_position        what the softmax gets, sinks apart
    ``pattern``         row query_position head key_position        what the softmax gives, sinks apart
    ==================  ==========================================  ==========================================

    Args:
        path: The module, as in ``named_modules()``; ``""`` is the model itself.
        side: Where the tensor is met, as in the table.
        items: Picks within the arguments or the output, outermost first. For ``input``, a first number counts
            positional arguments, a first text names a keyword argument, and nothing means the first positional
            argument or, if there is none, the first keyword argument. For ``output``, nothing means the tensor
            itself, or the first item of a tuple. For ``state`` and ``cell``, a number counts the layers of a recurrent
            module, and nothing means the last.
        like: Where the tensor does not have rows and positions as its first two axes: a port that passes before, and
            whose tensor does. What is read and written has them.
    """

    path: str
    side: Side
    items: tuple[int | str, ...] = ()
    like: "Port | None" = None

    @property
    def is_inside(self) -> bool:
        """Whether the tensor is met inside attention, where no hook of a module stands."""
        return self.side in INSIDE


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
