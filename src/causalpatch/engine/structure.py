"""What a module is made of, in facts: what was found out about a module holds for as long as these stay the same.

Users change models between two runs: they swap a part, set a forward, edit a setting, register a kernel again. Weights
may change freely in place, since no assumption of an engine rests on their values. Settings are followed into
containers, plain objects and configurations; what a function holds in its closure or reads off a module of Python is
not seen.

Facts that a model changes itself whenever it runs, such as a counter of its calls, do not count: what differs right
after a finding was made was not the user's doing.
"""

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from causalpatch.engine.hooks import quiet
from causalpatch.models import Model
from causalpatch.models.attention import kernels_of

_SIMPLE = (str, int, bool, type(None), bytes)
_ITEMS = (dict, list, tuple, set, frozenset, deque)
# What every module keeps about itself: parts and weights are looked at one by one, modes do not matter, and engines
# that hooks of the reader's could mislead look for them themselves.
_OWN = frozenset(vars(nn.Module()))
_MOST_ITEMS = 10_000  # a container of more, such as a vocabulary, is known by its size

Facts = dict[tuple[str, str], Hashable]
Found = TypeVar("Found")


@dataclass
class Structure:
    """What a model was made of at some time.

    Args:
        facts: A value for each part and each name within it.
        weights: Where each parameter and buffer lies, and its shape.
        moving: Those that the model changes itself when it runs.
    """

    facts: Facts
    weights: Facts
    moving: set[tuple[str, str]] = field(default_factory=set)

    def settle(self, after: "Structure") -> None:
        """Take note of what differs after the model ran."""
        self.moving |= self._changed(after)

    def is_still(self, now: "Structure", *, may_move_weights: bool = False) -> bool:
        """Tell whether a model is made of the same things.

        Args:
            now: What it is made of now.
            may_move_weights: Whether weights may be other tensors.
        """
        return self._changed(now, with_weights=not may_move_weights) <= self.moving

    def _changed(self, other: "Structure", *, with_weights: bool = True) -> set[tuple[str, str]]:
        differing = self.facts.items() ^ other.facts.items()
        if with_weights:
            differing |= self.weights.items() ^ other.weights.items()
        return {name for name, _ in differing}


class Findings(Generic[Found]):
    """What was found out about models, by key; each finding holds until its model is made of other things."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Structure, Found]]]
        self._known = weakref.WeakKeyDictionary()

    def of(
        self,
        model: Model,
        key: Hashable,
        find: Callable[[], Found],
        lasts: Callable[[Found], bool] = lambda _: True,
        *,
        anew: bool = False,
        now: Structure | None = None,
    ) -> Found:
        """Return what is known of a model, finding it out where it is not known or no longer holds.

        Args:
            model: The model.
            key: What is asked.
            find: Finds it out; what it raises is passed on, and nothing is kept.
            lasts: Says whether what was found may be kept.
            anew: Find it out again whatever is known.
            now: What the model is made of, where that was looked at already.
        """
        known, key = self._known.setdefault(model.module, {}), (key, model.shape.main)
        before = now or structure_of(model)
        if not anew and key in known and known[key][0].is_still(before):
            return known[key][1]
        found = find()
        if lasts(found):
            before = replace(before, moving=set())
            before.settle(structure_of(model))
            known[key] = (before, found)
        return found


def structure_of(model: Model) -> Structure:
    """Return facts that change when parts, classes, forwards, settings, buffers or kernels of a model are replaced.

    Args:
        model: The model.
    """
    with quiet(model):  # forwards that another thread's run stands in for are put back first
        return Structure(dict(_facts(model.module)), dict(_weights(model.module)))


def _facts(module: nn.Module) -> Iterator[tuple[tuple[str, str], Hashable]]:
    seen: set[int] = set()
    for device in ("cpu", "cuda"):
        is_mixed = torch.is_autocast_enabled(device)
        yield ("", f"autocast on {device}"), torch.get_autocast_dtype(device) if is_mixed else None
    kernels: dict[str, None] = {}
    for path, part in module.named_modules():
        kind = type(part)
        yield (path, "class"), tuple(_SERIALS.of(each) for each in (part, kind, kind.forward, kind.__call__))
        for name, value in vars(part).items():
            if name not in _OWN:
                yield (path, name), _fact(value, seen)
        kernel = getattr(getattr(part, "config", None), "_attn_implementation", None)
        kernels.setdefault(str(kernel))
    yield ("", "kernels"), tuple((name, *(_SERIALS.of(each) for each in kernels_of(name))) for name in kernels)


def _weights(module: nn.Module) -> Iterator[tuple[tuple[str, str], Hashable]]:
    for path, part in module.named_modules():
        for name, weight in (*part._parameters.items(), *part._buffers.items()):
            yield (path, name), None if weight is None else (weight.data_ptr(), weight.dtype, tuple(weight.shape))


def _fact(value: Any, seen: set[int]) -> Hashable:
    """Return what stands for a value; things that were met before count once."""
    if isinstance(value, _SIMPLE):
        return type(value).__name__, value
    if isinstance(value, float):
        return "float", repr(value)  # NaN is NaN
    if isinstance(value, Tensor):
        version = -1 if value.is_inference() else value._version
        return _SERIALS.of(value), value.data_ptr(), version, value.dtype, tuple(value.shape)
    if isinstance(value, np.ndarray) and value.size <= _MOST_ITEMS and not value.dtype.hasobject:
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, nn.Module | type) or id(value) in seen:
        return _SERIALS.of(value)
    if isinstance(value, _ITEMS):
        seen.add(id(value))
        if len(value) > _MOST_ITEMS:
            return _SERIALS.of(value), len(value)
        if isinstance(value, dict):  # item by item: a tuple made on the way would leave its id to the next
            return type(value).__name__, tuple((_fact(key, seen), _fact(item, seen)) for key, item in value.items())
        return type(value).__name__, tuple(_fact(item, seen) for item in value)
    settings = getattr(value, "__dict__", None)
    if callable(value) or not isinstance(settings, dict):
        return _SERIALS.of(value)
    seen.add(id(value))
    inside = tuple((name, _fact(item, seen)) for name, item in settings.items())
    return _SERIALS.of(type(value)), _SERIALS.of(value), inside


class _Serials:
    """Numbers of things, never given twice: Python gives the id of what is gone to what comes next."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._last = 0

    def of(self, thing: object) -> Hashable:
        """Return the number of a thing; its id where it cannot be followed."""
        place = id(thing)
        known = self._known.get(place)
        if known is not None and known[0]() is thing:
            return known[1]
        try:
            reference = weakref.ref(thing)
        except TypeError:
            return "id", place
        self._last += 1
        self._known[place] = (reference, self._last)
        return self._last


_SERIALS = _Serials()
