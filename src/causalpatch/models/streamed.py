"""A model whose weights are fetched when they are needed: one layer at a time, and what stands around the layers.

1. Between runs the module holds tensors without data (on the device ``meta``). Its weights are divided into *units*:
   each layer, and each module outside of the layers with parameters of its own.
2. A unit's module runs another forward: it fetches the unit's weights, runs, and lets them go. So the model can be
   called as ever, by anyone.
3. Whoever calls a layer many times holds it meanwhile (``holding``), and it is fetched once.
4. An embedding that is not held reads the rows of the ids that it is given and no more.

Cost: what is fetched, counted in ``loads`` and ``bytes_loaded``; memory for the largest unit, or for two layers where
the next is read ahead in a thread while one computes.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from causalpatch.base.errors import SettingError
from causalpatch.models.stores import Store

GIB = 2**30
_FEW = 4  # an embedding of which one in so many rows is wanted is read whole


@dataclass
class Unit:
    """Weights that are fetched together.

    Args:
        path: The module whose forward needs them.
        places: Where each stands: its name, the module that holds it and under what name, what stands there meanwhile.
        n_held: How many hold it.
    """

    path: str
    places: list[tuple[str, nn.Module, str, nn.Parameter]] = field(default_factory=list)
    n_held: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(stub.numel() * stub.element_size() for _, _, _, stub in self.places)


class StreamedWeights:
    """The weights of a module, fetched unit by unit.

    Args:
        module: The module; its parameters are without data.
        layers: Paths of its layers.
        store: Where the weights lie.
        device: Where the module runs.
        memory: Bytes that weights and activations may take together, or None.
        name: What the reader calls the model.

    Raises:
        SettingError: The memory does not suffice for the largest unit.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        store: Store,
        device: torch.device,
        *,
        memory: int | None = None,
        name: str = "the model",
    ) -> None:
        self.store, self.device, self.memory = store, device, memory
        self.layers = tuple(layers)
        self.units = _units_of(module, self.layers)
        self.loads: Counter[str] = Counter()
        self.bytes_loaded = 0
        self._guard = threading.RLock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="causalpatch-weights")
        self._ahead: tuple[str, Future[dict[str, Tensor]]] | None = None
        largest = max(self.units.values(), key=lambda unit: unit.n_bytes)
        layer_bytes = max(self.units[path].n_bytes for path in self.layers)
        # Of a tight limit the memory of a second layer is better spent on activations.
        self.reads_ahead = memory is None or memory >= 8 * layer_bytes
        self.resident_bytes = max(largest.n_bytes, layer_bytes * (1 + self.reads_ahead))
        if memory is not None and memory <= largest.n_bytes:
            raise _too_small(name, memory, largest)
        for unit in self.units.values():
            part = module.get_submodule(unit.path)
            kind = _FetchingRows if _is_table(part) else Fetching
            part.__dict__["forward"] = kind(self, unit.path, part.forward)

    @property
    def room_bytes(self) -> int | None:
        """Bytes that are left for activations, or None without a limit."""
        return None if self.memory is None else self.memory - self.resident_bytes

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer's weights."""
        return tuple(self.units[path].n_bytes for path in self.layers)

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights; what two modules share counts once."""
        stubs = {id(stub): stub for unit in self.units.values() for _, _, _, stub in unit.places}
        return sum(stub.numel() * stub.element_size() for stub in stubs.values())

    def path_of(self, part: nn.Module) -> str | None:
        """Return the unit that a module outside of the layers is, or None."""
        own = vars(part).get("forward")
        return own.path if isinstance(own, Fetching) and own.weights is self else None

    def is_held(self, path: str) -> bool:
        """Say whether a unit's weights are here."""
        return self.units[path].n_held > 0

    @contextmanager
    def holding(self, path: str, *, ahead: str | None = None) -> Iterator[None]:
        """Have a unit's weights in the module while the context is open; they are fetched once, whoever else holds it.

        Args:
            path: The unit.
            ahead: The unit that will be wanted next, whose weights are read meanwhile.
        """
        unit = self.units[path]
        with self._guard:
            if not unit.n_held:
                self._fetch(unit)
            unit.n_held += 1
            if ahead is not None and self.reads_ahead and not self.is_held(ahead):
                self._ahead = ahead, self._reader.submit(self._read, self.units[ahead])
        try:
            yield
        finally:
            with self._guard:
                unit.n_held -= 1
                if not unit.n_held:
                    _let_go(unit)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Return rows of a tensor, one for each id, on the device."""
        wanted, back = torch.unique(ids.cpu(), return_inverse=True)
        starts = torch.cat([torch.ones(1, dtype=torch.bool), wanted[1:] != wanted[:-1] + 1]).nonzero()[:, 0].tolist()
        ends = [*starts[1:], len(wanted)]
        parts = [
            self.store.rows(name, int(wanted[start]), int(wanted[end - 1]) + 1)
            for start, end in zip(starts, ends, strict=True)
        ]
        table = torch.cat(parts)
        self.bytes_loaded += table.nbytes
        return table.to(self.device)[back.to(self.device)]

    def _fetch(self, unit: Unit) -> None:
        tensors = self._read_before(unit) or self._read(unit)
        self.loads[unit.path] += 1
        self.bytes_loaded += unit.n_bytes
        try:
            for name, part, attribute, _ in unit.places:
                # One by one, so that what was read is let go as it arrives on the device.
                tensor = tensors.pop(name).to(self.device)
                part._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        except BaseException:
            _let_go(unit)
            raise

    def _read(self, unit: Unit) -> dict[str, Tensor]:
        return {name: self.store.read(name) for name, _, _, _ in unit.places}

    def _read_before(self, unit: Unit) -> dict[str, Tensor] | None:
        """Return what was read ahead, if it is what is wanted now."""
        if self._ahead is None or self._ahead[0] != unit.path:
            return None
        (_, found), self._ahead = self._ahead, None
        return found.result()


class Fetching:
    """A forward that has its module's weights fetched first.

    Args:
        weights: The weights.
        path: The unit.
        forward: The module's own forward.
    """

    def __init__(self, weights: StreamedWeights, path: str, forward: Callable[..., Any]) -> None:
        self.weights, self.path, self.forward = weights, path, forward
        self.__wrapped__ = forward  # whose signature this has

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with its weights."""
        with self.weights.holding(self.path):
            return self.forward(*args, **kwargs)


class _FetchingRows(Fetching):
    """The forward of an embedding: it reads the rows that it is asked for, unless these are many."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        unit, ids = self.weights.units[self.path], next((x for x in (*args, *kwargs.values()) if _are_ids(x)), None)
        name, _, _, stub = unit.places[0]
        if self.weights.is_held(self.path) or ids is None or ids.unique().numel() * _FEW > stub.shape[0]:
            return super().__call__(*args, **kwargs)
        with _Rows(stub, lambda given: self.weights.rows(name, given)):
            found = self.forward(*args, **kwargs)
        # A class may use its table otherwise than to look up.
        return super().__call__(*args, **kwargs) if found.is_meta else found


class _Rows(TorchFunctionMode):
    """Look up rows elsewhere than in a table without data."""

    def __init__(self, table: Tensor, look_up: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._table, self._look_up = table, look_up

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if function is functional.embedding and len(args) > 1 and args[1] is self._table:
            return self._look_up(args[0])
        return function(*args, **(kwargs or {}))


def weights_of(module: nn.Module) -> StreamedWeights | None:
    """Return the weights of a module that are fetched when they are needed; None where they are in the module."""
    forwards = (vars(part).get("forward") for part in module.modules())
    return next((own.weights for own in forwards if isinstance(own, Fetching)), None)


def runs_own_forward(module: nn.Module) -> bool:
    """Say whether a module runs the forward of its class, with its weights fetched for it or not."""
    own = vars(module).get("forward")
    return own is None or isinstance(own, Fetching)


def _units_of(module: nn.Module, layers: Sequence[str]) -> dict[str, Unit]:
    """Divide a module's parameters into units."""
    units = {path: Unit(path) for path in layers}
    for path, part in module.named_modules():
        layer = next((each for each in layers if path == each or path.startswith(f"{each}.")), None)
        for attribute, stub in part._parameters.items():
            if stub is not None:
                unit = units.setdefault(path if layer is None else layer, Unit(path if layer is None else layer))
                unit.places.append((f"{path}.{attribute}" if path else attribute, part, attribute, stub))
    return units


def _let_go(unit: Unit) -> None:
    for _, part, attribute, stub in unit.places:
        part._parameters[attribute] = stub


def _is_table(part: nn.Module) -> bool:
    return isinstance(part, nn.Embedding) and part.max_norm is None and len(part._parameters) == 1


def _are_ids(given: Any) -> bool:
    return isinstance(given, Tensor) and not given.is_floating_point() and given.dtype != torch.bool


def _too_small(name: str, memory: int, largest: Unit) -> SettingError:
    needed = largest.n_bytes / GIB
    return SettingError(
        f"memory_gib={memory / GIB:.3g} does not hold the largest part of '{name}'",
        facts=[
            ("part", largest.path or "the model itself"),
            ("weights", f"{needed:.3g} GiB"),
            ("needed", f"more than that: about {2 * needed:.2g} GiB with activations beside it"),
        ],
        fix=f"memory_gib={2 * needed:.2g}",
    )
