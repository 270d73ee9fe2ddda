"""``module(PATH).output``: any module of a model, by its path, with names for its axes."""

import json
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from causalpatch.base.axes import AXES
from causalpatch.base.errors import SiteSyntaxError
from causalpatch.base.suggest import closest
from causalpatch.sites.index import integer

Side = Literal["input", "output", "state", "cell"]

_ITEM = r"""\[\s*(?:-?[0-9]+|"(?:[^"\\]|\\.)*"|'[^'\\]*')\s*\]"""
_MODULE = re.compile(
    rf"module\((?P<path>[^()\s]*)\)\.(?P<side>input|output|state|cell)(?P<items>(?:{_ITEM})*)"
    r"(?:\s*axes=\((?P<axes>[^()]*)\))?(?P<rest>(?:#[^@#]*)?(?:@.*)?)"
)


@dataclass(frozen=True)
class ModuleRef:
    """One tensor that goes into or comes out of a module.

    Args:
        path: The module's path as in ``named_modules()``; empty for the model itself. In a set ``*`` stands for
            anything within one part of the path.
        side: ``"input"`` or ``"output"``; of a recurrent module also ``"state"``, what each step hands on to the next,
            and ``"cell"``, the cell of an LSTM.
        items: Picks inside a nested input or output, outermost first: ``[0]["key"]``.
        axes: Names of the tensor's axes after the pair; a unit counts on the first that is not ``position``.
        counts: The axis that a unit counts on, if it is another one.

    Raises:
        SiteSyntaxError: A part cannot be written in a site, or an axis name is unknown or given twice.
    """

    path: str
    side: Side
    items: tuple[int | str, ...] = ()
    axes: tuple[str, ...] = ()
    counts: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(i if isinstance(i, str) else integer(i) for i in self.items))
        object.__setattr__(self, "axes", tuple(self.axes))
        if not re.fullmatch(r"[^()\s]*", self.path):
            raise SiteSyntaxError(
                f"{self.path!r} is not the path of a module",
                facts=[("allowed", "no spaces, no parentheses")],
                fix="write it as in named_modules()",
            )
        if self.side not in get_args(Side):
            raise SiteSyntaxError(
                f"{self.side!r} is not a side of module({self.path})",
                facts=[("allowed", "   ".join(get_args(Side)))],
                fix=f"module({self.path}).output",
            )
        known = [axis for axis in AXES if axis != "pair"]
        for axis in self.axes:
            if axis not in known:
                near = closest(axis, known)
                raise SiteSyntaxError(
                    f"{axis!r} does not name an axis after the pair",
                    facts=[("axes", " ".join(dict.fromkeys([*near, *known])))],
                    fix=f"did you mean {near[0]!r}?" if near else "use one of these names",
                )
        if len(set(self.axes)) < len(self.axes):
            raise SiteSyntaxError(f"axes=({','.join(self.axes)}) names an axis twice", fix="name each axis once")
        units = [axis for axis in self.axes if axis != "position"]
        if self.counts is not None and self.counts not in units:
            raise SiteSyntaxError(
                f"no unit of module({self.path}) counts on {self.counts!r}",
                facts=[("axes", " ".join(units) or "none is named")],
                fix=f"write for instance #{units[-1]}=7" if units else "name the axes: axes=(channel,height,column)",
            )
        object.__setattr__(self, "counts", None if units[:1] == [self.counts] else self.counts)

    @property
    def unit_axis(self) -> str | None:
        """The axis that a unit counts on: by itself the first named one but ``position``; None without names."""
        return self.counts or next((axis for axis in self.axes if axis != "position"), None)

    def __str__(self) -> str:
        items = "".join(f"[{json.dumps(item, ensure_ascii=False)}]" for item in self.items)
        axes = f" axes=({','.join(self.axes)})" if self.axes else ""
        return f"module({self.path}).{self.side}{items}{axes}"


def parse_module(text: str) -> tuple[ModuleRef, str]:
    """Read the module part of a site.

    Returns:
        The module, and what follows it: ``#UNIT`` and ``@POSITION``, as text.

    Raises:
        SiteSyntaxError: The text does not follow the grammar of ``module(…)``.
    """
    found = _MODULE.fullmatch(text)
    if found is None:
        raise SiteSyntaxError(
            f"{text!r} is not a site of a module",
            facts=[
                ("grammar", 'module(PATH).output|input [i]["key"] axes=(…) #[AXIS=]UNIT @POSITION'),
                ("example", "module(conv2).output axes=(channel,height,column)#7"),
            ],
            fix="write it as in the example",
        )
    axes = tuple(part.strip() for part in found["axes"].split(",") if part.strip()) if found["axes"] else ()
    side = cast(Side, found["side"])
    return ModuleRef(found["path"], side, tuple(map(_item, re.findall(_ITEM, found["items"]))), axes), found["rest"]


def _item(text: str) -> int | str:
    inner = text[1:-1].strip()
    if inner.startswith("'"):
        return inner[1:-1]
    try:
        value: int | str = json.loads(inner)
    except json.JSONDecodeError as error:
        raise SiteSyntaxError(
            f"{inner} is not a key of a module's items",
            facts=[("allowed", 'numbers, and texts as in JSON: "key"')],
            fix='write ["key"]',
        ) from error
    return value
