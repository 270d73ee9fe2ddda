"""Recurrent modules of torch step by step: a state that is patched at one step is what the next ones start from.

``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` run all their steps in one call, and what they return feeds no step. So where a
state is read or patched, the module's own cells run one after the other, on its own weights:

1. without patches, held against what the module gives by itself: another result is an error;
2. with them: at each step and layer the writes are applied to all states so far, and the state of this step goes on.

A cell that the model calls in a loop of its own (``nn.LSTMCell`` and its like) runs as it is: its calls are the steps.

Symbols: T steps, L layers. Cost: three runs of the module, and T copies of its states where they are patched.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine.bypass import bypassed
from causalpatch.models import Port

Written = Callable[[str, int, Tensor], Tensor]
"""Applies what is written to the states (row, step, width) of a side (state or cell) and layer."""
Passed = Callable[[str, int, Tensor], None]
"""Is given the states of a side and layer when all steps are made."""
States = list[tuple[Tensor, ...]]  # of each layer: the state, and the cell of an LSTM

Seen = TypeVar("Seen")

_SIDES = ("state", "cell")
_CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)


@dataclass
class Stepwise:
    """A recurrent module's forward, step by step.

    Args:
        module: The module.
        path: Its path, for messages.
        n_steps: Steps that writes need states to have; 0 where nothing is written.
        written: Applies what is written.
        passed: Is given the states at the end.
    """

    module: nn.Module
    path: str
    n_steps: int
    written: Written
    passed: Passed
    calls: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        module = self.module
        if not isinstance(module, (nn.RNNBase, *_CELLS)):
            self._refuse(f"it is a {type(module).__name__}, not an RNN, GRU or LSTM of torch or one of their cells")
        if isinstance(module, nn.RNNBase) and module.bidirectional:
            self._refuse("it is bidirectional: a state of one direction reaches steps before and behind it")
        if isinstance(module, nn.RNNBase) and module.proj_size:
            self._refuse("it projects its states (proj_size)")
        self.own = module.forward

    @property
    def n_layers(self) -> int:
        """Number of layers; a cell is one."""
        return self.module.num_layers if isinstance(self.module, nn.RNNBase) else 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the module's forward."""
        if isinstance(self.module, _CELLS):
            return self._call_cell(*args, **kwargs)
        whole = self.own(*args, **kwargs)
        given, start = self._given(*args, **kwargs)
        plain = self._run(given, start, is_patched=False)
        expected = whole[0] if self._is_batch_first else whole[0].transpose(0, 1)
        error = float((plain[-1][0] - expected).abs().max()) if expected.numel() else 0.0
        if not error <= 256 * torch.finfo(expected.dtype).eps * (1 + float(expected.abs().max())):
            self._refuse(f"its steps one by one differ from its whole run by {error:.1e}")
        states = self._run(given, start, is_patched=True) if self.n_steps else plain
        for layer, held in enumerate(states):
            for side, tensor in zip(_SIDES, held, strict=False):
                self.passed(side, layer, tensor)
        output = states[-1][0] if self._is_batch_first else states[-1][0].transpose(0, 1)
        ends = tuple(torch.stack([held[n][:, -1] for held in states]) for n in range(len(states[0])))
        return output, ends if len(ends) > 1 else ends[0]

    def finish(self) -> None:
        """Hand on the states of a cell, whose calls are over."""
        if self.calls:
            for side, held in zip(_SIDES, zip(*self.calls, strict=True), strict=False):
                self.passed(side, 0, torch.stack(held, 1))

    @property
    def _is_batch_first(self) -> bool:
        return bool(getattr(self.module, "batch_first", True))

    def _given(
        self, input: Any, hx: Any = None
    ) -> tuple[Float[Tensor, "row step width"], list[list[Float[Tensor, "row hidden"]]]]:
        """Return the inputs, rows first, and the states that each layer starts from."""
        if not isinstance(input, Tensor) or input.ndim != 3:
            kind = f"a tensor with {input.ndim} axes" if isinstance(input, Tensor) else f"a {type(input).__name__}"
            self._refuse(f"it is given {kind}, not rows of equally many steps")
        given = input if self._is_batch_first else input.transpose(0, 1)
        is_lstm = isinstance(self.module, nn.LSTM)
        if hx is None:
            width = self.module.get_parameter("weight_hh_l0").shape[1]
            zero = given.new_zeros(self.n_layers, len(given), width)
            hx = (zero, zero) if is_lstm else zero
        held = hx if is_lstm else (hx,)
        return given, [[part[layer] for part in held] for layer in range(self.n_layers)]

    def _run(self, given: Tensor, start: list[list[Tensor]], *, is_patched: bool) -> States:
        """Run all steps; states of all layers, each (row, step, width)."""
        made: list[list[list[Tensor]]] = [[[] for _ in held] for held in start]
        now = [tuple(held) for held in start]
        for step in range(given.shape[1]):
            into = given[:, step]
            for layer in range(self.n_layers):
                held = self._cell(layer, into, now[layer])
                for place, part in enumerate(held):
                    made[layer][place].append(part)
                if is_patched:
                    held = tuple(
                        self._changed(_SIDES[place], layer, made[layer][place], given.shape[1])
                        for place in range(len(held))
                    )
                now[layer], into = held, held[0]
        return [tuple(torch.stack(parts, 1) for parts in of_layer) for of_layer in made]

    def _changed(self, side: str, layer: int, made: list[Tensor], n_steps: int) -> Tensor:
        """Apply what is written at the newest step, and return its state; steps to come are still zero."""
        to_come = [torch.zeros_like(made[0])] * (n_steps - len(made))
        step = len(made) - 1
        made[step] = self.written(side, layer, torch.stack([*made, *to_come], 1))[:, step]
        return made[step]

    def _cell(self, layer: int, into: Tensor, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        found = [getattr(self.module, f"{name}_l{layer}", None) for name in names]
        weights = [weight for weight in found if isinstance(weight, Tensor)]  # there may be no biases
        if isinstance(self.module, nn.LSTM):
            return torch.lstm_cell(into, held, *weights)
        if isinstance(self.module, nn.GRU):
            return (torch.gru_cell(into, held[0], *weights),)
        act = torch.rnn_relu_cell if self.module.nonlinearity == "relu" else torch.rnn_tanh_cell
        return (act(into, held[0], *weights),)

    def _call_cell(self, *args: Any, **kwargs: Any) -> Any:
        output = self.own(*args, **kwargs)
        parts = output if isinstance(output, tuple) else (output,)
        if parts[0].ndim != 2:
            self._refuse("it is given one row without a batch")
        self.calls.append(parts)
        if self.n_steps:
            n_steps, made = max(self.n_steps, len(self.calls)), []
            for place in range(len(parts)):
                so_far = [call[place] for call in self.calls]
                made.append(self._changed(_SIDES[place], 0, so_far, n_steps))
            self.calls[-1] = tuple(made)
        return self.calls[-1] if isinstance(output, tuple) else self.calls[-1][0]

    def _refuse(self, problem: str) -> NoReturn:
        raise SiteUnsupported(
            f"module({self.path}) has no state at each step",
            facts=[("problem", problem)],
            fix=f"patch module({self.path}).output, which feeds no later step of it",
        )


def stepwise(
    root: nn.Module,
    ports: Mapping[Port, int],
    change: Callable[[Collection[Port], Tensor], Tensor],
    end: Callable[[Collection[Port], Tensor], None],
    undo: ExitStack,
) -> Callable[[], None]:
    """Let recurrent modules run step by step.

    Args:
        root: The model.
        ports: Where states are met, and how many steps the writes there need; 0 where nothing is written.
        change: Applies what is written at ports to states (row, step, width).
        end: Is given all states at ports.
        undo: Puts the modules' own forwards back.

    Returns:
        What is called when the model has run.

    Raises:
        SiteUnsupported: A module has no such states.
    """
    every: list[Stepwise] = []
    for path in dict.fromkeys(port.path for port in ports):
        module, mine = root.get_submodule(path), {port: n for port, n in ports.items() if port.path == path}

        written, passed = partial(_at, change, tuple(mine), module), partial(_at, end, tuple(mine), module)
        one = Stepwise(module, path, max(mine.values()), written, passed)
        undo.enter_context(bypassed(module, one.forward))
        every.append(one)

    def finish() -> None:
        for one in every:
            one.finish()

    return finish


def _at(
    act: Callable[[Collection[Port], Tensor], Seen],
    ports: Collection[Port],
    module: nn.Module,
    side: str,
    layer: int,
    tensor: Tensor,
) -> Seen:
    """Let the ports of one side and layer see states."""
    last = getattr(module, "num_layers", 1) - 1
    return act([port for port in ports if port.side == side and (port.items or (last,)) == (layer,)], tensor)


def steps_of(index: tuple[Tensor, ...], value: object) -> int:
    """Return how many steps a write needs states to have.

    Args:
        index: Where it is written: rows, and steps where these are positions.
        value: The new value, or how it follows from the current one.
    """
    if len(index) == 1:
        return value.shape[1] if isinstance(value, Tensor) else 1
    return 1 + max(int(index[1].max()), 0)
