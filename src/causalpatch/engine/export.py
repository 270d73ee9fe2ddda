"""A module as a graph of operations in which ports can be found: exported once, with a mark at every port.

1. While the module is traced, a hook at each port sends its tensor through an operation of our own, the mark, which
   changes nothing. In the graph the mark *is* the port: what reads the port's tensor reads the mark, and nothing else
   does, also where two ports hold the same tensor (a dropout's input and output, a stream and what reads it).
2. The graph is functionalised: an operation in place would spoil values that are kept for later.
3. Weights are inputs of the graph. They are looked up in the module each time, so a changed weight counts.
4. Rows are a symbol, and so are positions where the module allows it; other sizes are fixed, and a module is exported
   again for others.

Hooks cannot be told apart in a trace: a module with hooks of its user's is refused before it comes here.
"""

import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.hooks import quiet
from causalpatch.engine.memory import is_out_of_memory
from causalpatch.engine.ports import pick_input, pick_output, put_input, put_output
from causalpatch.engine.structure import Structure, structure_of
from causalpatch.models import Model, Port

_LIBRARY = torch.library.Library("causalpatch", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch does not annotate it
_LIBRARY.define("port(Tensor x, int number) -> Tensor")  # type: ignore[no-untyped-call]  # the same
_LIBRARY.impl("port", lambda x, number: x.clone(), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # the same
# The strides are those of what is marked: the trace goes on as if there were no mark.
torch.library.register_fake(
    "causalpatch::port", lambda x, number: x.new_empty_strided(x.shape, x.stride()), lib=_LIBRARY
)
MARK = torch.ops.causalpatch.port.default
# Kinds of inputs by name: to import them from where they are defined takes a second.
_WEIGHTS = ("PARAMETER", "BUFFER", "CONSTANT_TENSOR")
_Symbol = Any  # of sympy, which torch brings along


@dataclass(frozen=True, eq=False)
class Exported:
    """A module as a graph.

    Args:
        owner: The graph, and what it holds besides weights.
        inputs: The node of each argument of the forward, by name.
        weights: The module's own name of each node that stands for a parameter, buffer or constant.
        constants: Constants that were made in the forward.
        ports: The node of each port.
        answer: The node that gives the model's answer.
        rows: The symbol that stands for the number of rows.
        limits: The range of each symbol in which the graph holds.
        structure: What the module was made of; the graph holds for nothing else.
        checked: What was compared with the model and agreed.
    """

    owner: fx.GraphModule
    inputs: Mapping[str, fx.Node]
    weights: Mapping[fx.Node, str]
    constants: Mapping[str, Any]
    ports: Mapping[Port, fx.Node]
    answer: fx.Node
    rows: _Symbol
    limits: Mapping[_Symbol, Any]
    structure: Structure
    checked: set[object] = field(default_factory=set)

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes, each behind those that it reads."""
        return list(self.owner.graph.nodes)

    def sizes(self, inputs: Mapping[str, Any]) -> dict[_Symbol, int] | None:
        """Return the size that each symbol stands for in a call; None if the graph does not hold for it.

        Args:
            inputs: The arguments of the forward.
        """
        if set(inputs) != set(self.inputs):
            return None
        sizes: dict[_Symbol, int] = {}
        for name, value in inputs.items():
            traced = self.inputs[name].meta.get("val")
            if not isinstance(traced, Tensor):
                if traced is not value and traced != value:
                    return None
                continue
            if not isinstance(value, Tensor) or (value.dtype, value.device) != (traced.dtype, traced.device):
                return None
            if value.ndim != traced.ndim:
                return None
            for wanted, size in zip(traced.shape, value.shape, strict=True):
                expected = wanted if isinstance(wanted, int) else sizes.setdefault(wanted.node.expr, size)
                if expected != size:
                    return None
        return sizes if all(self._allows(*item) for item in sizes.items()) else None

    def _allows(self, symbol: _Symbol, size: int) -> bool:
        limits = self.limits.get(symbol)
        return symbol == self.rows or limits is None or bool(limits.lower <= size <= limits.upper)

    def find_weights(self, module: nn.Module) -> dict[fx.Node, Any] | None:
        """Return what stands in the module now for each node that is a weight; None if the graph does not hold for it.

        Args:
            module: The module.
        """
        found: dict[fx.Node, Any] = {}
        for node, name in self.weights.items():
            *path, last = name.split(".")
            try:
                value = getattr(module.get_submodule(".".join(path)), last)
            except AttributeError:
                value = self.constants.get(name)
            traced = node.meta.get("val")
            if isinstance(traced, Tensor):
                if not isinstance(value, Tensor) or _kind(value) != _kind(traced):
                    return None
                value = value.detach()
            found[node] = value
        return found


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def export(model: Model, inputs: Mapping[str, Any], ports: Collection[Port]) -> Exported:
    """Export a model with marks at its ports.

    Args:
        model: The model.
        inputs: Arguments of its forward, with two or more rows.
        ports: The ports that are to be found in the graph.

    Raises:
        ModelUnsupported: The module cannot be exported, or a port is not exactly one node on the way to the answer.
    """
    order = list(dict.fromkeys(ports))
    structure = structure_of(model)
    sizes = {name: _dynamic(model, value) for name, value in inputs.items()}
    with quiet(model), _silence(), _marking(model.module, order):
        try:
            program = torch.export.export(model.module, (), dict(inputs), dynamic_shapes=sizes, strict=False)
            program = program.run_decompositions({})
        except Exception as error:
            if is_out_of_memory(error):
                raise
            first = next(iter(str(error).strip().splitlines()), "")[:200]
            raise refusal(model, _reason(error), f"{type(error).__name__}: {first}") from error
    exported = _read(model, program, order, structure)
    if exported.find_weights(model.module) is None:
        raise refusal(model, "its graph has weights that its modules do not have")
    return exported


def refusal(model: Model, reason: str, *details: object) -> ModelUnsupported:
    """Return the error that says why a model cannot be run as a graph."""
    return ModelUnsupported(
        f"'{model.name}' cannot be run as a graph: {reason}",
        facts=[("details", detail) for detail in details],
        fix='engine="rows" runs the model as it is',
    )


@cache
def _rows() -> Any:
    """Return the size that all inputs share; not made sooner, since that takes torch a second."""
    return torch.export.Dim("rows")


def _dynamic(model: Model, value: Any) -> dict[int, Any] | None:
    """Say which axes of an input may change: the first is rows; of prompts the second is positions."""
    if not isinstance(value, Tensor):
        return None
    axes: dict[int, Any] = {0: _rows()}
    if model.kind == "tokens" and value.ndim == 2 and not value.is_floating_point():
        axes[1] = torch.export.Dim.AUTO
    return axes


def _reason(error: Exception) -> str:
    """Say in the user's words what stopped an export."""
    if "GuardOnDataDependent" in type(error).__name__:
        return "its forward decides by the values of tensors (an if, a loop, or .item())"
    if "Constraints violated" in str(error):
        # len(x) is a plain number for Python, so that the trace cannot follow it.
        return "its forward fixes the number of rows, by len(x) or by a choice; x.shape[0] can be followed"
    return "torch.export fails on it"


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what the exporter prints from the user: the error that is raised says it once more."""
    loggers = [logging.getLogger(name) for name in ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        # torch 2.13 prints half a graph to the error stream when an export fails.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was_disabled in zip(loggers, before, strict=True):
            logger.disabled = was_disabled


@contextmanager
def _marking(root: nn.Module, ports: Collection[Port]) -> Iterator[None]:
    """Send the tensor of each port through its mark; the number of a mark is the port's place in the order."""
    with ExitStack() as hooks:
        for number, port in enumerate(ports):
            module = root.get_submodule(port.path)
            if port.side == "input":
                handle = module.register_forward_pre_hook(
                    in_this_thread(partial(_mark_input, port, number)), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(in_this_thread(partial(_mark_output, port, number)))
            hooks.callback(handle.remove)
        yield


def _mark_input(
    port: Port, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    return put_input(port, args, kwargs, MARK(pick_input(port, args, kwargs), number))


def _mark_output(port: Port, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    del module, args
    return put_output(port, output, MARK(pick_output(port, output), number))


def _read(
    model: Model, program: torch.export.ExportedProgram, ports: Collection[Port], structure: Structure
) -> Exported:
    """Find in an exported program what a replay needs."""
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(signature.buffers_to_mutate.values())
        raise refusal(model, "its forward changes its own buffers", names)
    nodes = list(program.graph.nodes)
    by_name = {node.name: node for node in nodes}
    holes = [node for node in nodes if node.op == "placeholder"]
    kinds = list(zip(holes, signature.input_specs, strict=True))
    weights = {node: str(spec.target) for node, spec in kinds if spec.kind.name in _WEIGHTS}
    inputs = {node.name: node for node, spec in kinds if spec.kind.name == "USER_INPUT"}
    if len(weights) + len(inputs) < len(kinds):
        raise refusal(model, "its graph takes inputs that are not tensors")
    if program.call_spec.in_spec is not None:
        # Nodes may bear other names than the arguments that they stand for.
        _, inputs = tree_unflatten(list(inputs.values()), program.call_spec.in_spec)
    shown = [spec for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    outputs = [by_name.get(str(getattr(spec.arg, "name", None))) for spec in shown]
    answer = _answer(model, program, outputs)
    symbol = _rows_symbol(model, inputs, answer)
    found = _find_marks(model, nodes, ports, symbol)
    on_the_way = ancestors(answer)
    for port, node in found.items():
        if node not in on_the_way:
            raise refusal(model, f"its answer does not depend on the {port.side} of '{port.path}'")
    limits = program.range_constraints
    return Exported(program.graph_module, inputs, weights, program.constants, found, answer, symbol, limits, structure)


def _answer(model: Model, program: torch.export.ExportedProgram, outputs: list[fx.Node | None]) -> fx.Node:
    """Return the node whose value the model's answer is."""
    flat = [None if node is None else node.meta.get("val") for node in outputs]
    spec = program.call_spec.out_spec
    value = model.logits(tree_unflatten(flat, spec))
    return next(node for node, each in zip(outputs, flat, strict=True) if node is not None and each is value)


def _rows_symbol(model: Model, inputs: Mapping[str, fx.Node], answer: fx.Node) -> _Symbol:
    traced = [node.meta.get("val") for node in (*inputs.values(), answer)]
    firsts = [value.shape[0] if value.ndim else 0 for value in traced if isinstance(value, Tensor)]
    symbols = {None if isinstance(size, int) else size.node.expr for size in firsts}
    if len(symbols) != 1 or None in symbols:
        raise refusal(model, "its inputs and its answer do not have one row for each run")
    return symbols.pop()


def _find_marks(model: Model, nodes: list[fx.Node], ports: Collection[Port], rows: _Symbol) -> dict[Port, fx.Node]:
    found: dict[Port, fx.Node] = {}
    for number, port in enumerate(ports):
        marks = [node for node in nodes if node.target is MARK and node.args[1] == number]
        where = f"the {port.side} of '{port.path}'"
        if len(marks) > 1:
            raise refusal(model, f"{where} passes {len(marks)} times in one forward")
        if not marks:
            raise refusal(model, f"{where} does not pass, or its answer does not depend on it")
        shape = marks[0].meta["val"].shape
        if not shape or isinstance(shape[0], int) or shape[0].node.expr != rows:
            raise refusal(model, f"{where} has no row for each run", f"shape {tuple(map(str, shape))}")
        found[port] = marks[0]
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node and everything that its value depends on."""
    seen, waiting = {node}, [node]
    while waiting:
        new = [each for each in waiting.pop().all_input_nodes if each not in seen]
        seen.update(new)
        waiting += new
    return seen


def descendants(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """Return nodes and everything whose value depends on them."""
    seen, waiting = set(nodes), list(nodes)
    while waiting:
        new = [each for each in waiting.pop().users if each not in seen]
        seen.update(new)
        waiting += new
    return seen
