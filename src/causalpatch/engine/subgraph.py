"""The part of a graph behind some ports, run again for many rows at once.

1. ``run_base`` runs the whole graph once for a batch and keeps the values that some subgraph reads from outside.
2. A ``Subgraph`` belongs to a set of entry ports. Its steps are the nodes between these and the answer. What a step
   reads from outside is looked up in the base run and gathered to the rows; sizes are computed anew for their number.
3. A value that does not lie row by row (heads and rows in one axis, say) is not gathered but computed again from
   values that do.
4. At an entry, writes are applied to a private copy of the tensor.

Symbols: B rows in the base run, R rows in a replay.
Cost: R rows of the operations behind the entries, and one gather of R rows per value read from outside.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, fx

from causalpatch.engine.export import MARK, Exported, ancestors, descendants
from causalpatch.engine.hooks import Write
from causalpatch.models import Port
from causalpatch.models.views import take


@dataclass(frozen=True, eq=False)
class BaseRun:
    """One run of the whole graph.

    Args:
        weights: Values of the nodes that are weights.
        inputs: The arguments of the forward.
        values: Values of nodes that are kept.
        sizes: The size that each symbol stands for.
        answer: The model's answer.
    """

    weights: Mapping[fx.Node, Any]
    inputs: Mapping[str, Any]
    values: Mapping[fx.Node, Any]
    sizes: Mapping[Any, int]
    answer: Shaped[Tensor, "row *shape"]


def run_base(
    exported: Exported, weights: Mapping[fx.Node, Any], inputs: Mapping[str, Any], keep: Collection[fx.Node]
) -> BaseRun:
    """Run the whole graph.

    Args:
        exported: The graph.
        weights: Values of the nodes that are weights.
        inputs: Arguments of the forward, for which the graph holds.
        keep: Nodes whose values are kept.
    """
    known = {**weights, **{exported.inputs[name]: value for name, value in inputs.items()}}
    needed = ancestors(exported.answer)
    steps = [node for node in exported.nodes if node in needed and node not in known]
    kept = set(keep) | {exported.answer}
    values = _run(exported, steps, known, kept, lambda node, x: x)
    sizes = exported.sizes(inputs) or {}
    return BaseRun(weights, inputs, {node: values[node] for node in kept}, sizes, values[exported.answer])


class Subgraph:
    """What has to run again when the tensors at some ports change.

    Args:
        exported: The graph.
        entries: The ports that are written, each with the other ports that writing needs.
    """

    def __init__(self, exported: Exported, entries: Iterable[tuple[Port, Sequence[Port]]]) -> None:
        self.exported = exported
        self._entries: dict[fx.Node, Port] = {}
        self._companions: dict[fx.Node, set[fx.Node]] = {}
        for port, companions in entries:
            node = exported.ports[port]
            self._entries[node] = port
            self._companions.setdefault(node, set()).update(exported.ports[other] for other in companions)
        needed = descendants(self._entries) & ancestors(exported.answer)
        outside: set[fx.Node] = set()
        waiting = list(needed)
        while waiting:
            node = waiting.pop()
            for read in (*node.all_input_nodes, *self._companions.get(node, ())):
                if read in needed or read in outside:
                    continue
                if _is_recomputed(exported, read):
                    needed.add(read)
                    waiting.append(read)
                else:
                    outside.add(read)
        self._steps = [node for node in exported.nodes if node in needed]
        self._outside = outside
        # What is gathered for an entry alone is a private copy already.
        self._private = {node for node in self._entries if self._reads_alone(node)}
        self.reads = frozenset(node for node in outside if node not in exported.weights and not _is_size(node))

    def run(
        self, base: BaseRun, local: Int[Tensor, " row"], writes: Mapping[Port, Sequence[Write]]
    ) -> Shaped[Tensor, "row *shape"]:
        """Run the subgraph for rows.

        Args:
            base: A base run that kept what ``reads`` names.
            local: For each row the row of the base run that it starts from.
            writes: What is written at each entry, in order.

        Returns:
            The model's answer for each row.
        """
        if not self._entries:
            return gather(base.answer, 0, local)
        sizes = {**base.sizes, self.exported.rows: len(local)}
        known = {node: self._look_up(node, base, local, sizes) for node in self._outside}
        values: dict[fx.Node, Any] = {}

        def change(node: fx.Node, tensor: Tensor) -> Tensor:
            if node not in self._entries:
                return tensor
            # A stride of 0 means that elements share memory, with one another or with the base run.
            tensor = tensor if node in self._private and 0 not in tensor.stride() else tensor.clone()
            for write in writes.get(self._entries[node], ()):
                companions = tuple(values[self.exported.ports[port]] for port in write.tap.companions)
                apply_write(write, tensor, companions)
            return tensor

        held = {node for each in self._companions.values() for node in each}
        _run(self.exported, self._steps, known, held | {self.exported.answer}, change, values)
        answer: Tensor = values[self.exported.answer]
        return answer

    def _reads_alone(self, entry: fx.Node) -> bool:
        """Tell whether an entry's tensor is gathered from the base run, and nothing else reads what is gathered."""
        (read,) = entry.all_input_nodes
        readers = [node for node in self._steps if read in node.all_input_nodes]
        is_gathered = read in self._outside and _row_axis(self.exported, read) is not None
        return is_gathered and readers == [entry] and all(read not in each for each in self._companions.values())

    def _look_up(self, node: fx.Node, base: BaseRun, local: Tensor, sizes: Mapping[Any, int]) -> Any:
        """Return the value of a node outside the subgraph, laid out for the rows of a replay."""
        if node in base.weights:
            return base.weights[node]
        if _is_size(node):
            return _evaluate(node, sizes)
        value = base.values[node]
        axis = _row_axis(self.exported, node)
        return value if axis is None else gather(value, axis, local)


def apply_write(write: Write, tensor: Shaped[Tensor, "row *axes"], companions: tuple[Tensor, ...]) -> None:
    """Write into a private copy of a port's tensor."""
    view, value = write.tap.view, write.value
    if not isinstance(value, Tensor):
        value = value(take(view, tensor, companions, write.index))
    view.write(tensor, companions, write.index, value.to(tensor))


def gather(value: Tensor, axis: int, index: Int[Tensor, " row"]) -> Tensor:
    """Return entries of one axis, with the others in the order in which they lie in memory.

    Operations behind may count on that order: a view can merge two axes only where they lie side by side.
    """
    if value.stride(axis) == 0:
        sizes = [-1] * value.ndim
        sizes[axis] = len(index)
        return value.narrow(axis, 0, 1).expand(sizes)
    whole = value.shape
    for other in range(value.ndim):
        if value.stride(other) == 0 and value.shape[other] > 1:
            value = value.narrow(other, 0, 1)
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda each: -strides[each])
    found = value.permute(order).index_select(order.index(axis), index.to(value.device))
    found = found.permute([order.index(each) for each in range(value.ndim)])
    return found.expand([*whole[:axis], len(index), *whole[axis + 1 :]])


def _run(
    exported: Exported,
    steps: Sequence[fx.Node],
    known: Mapping[fx.Node, Any],
    keep: Collection[fx.Node],
    change: Callable[[fx.Node, Tensor], Tensor],
    values: dict[fx.Node, Any] | None = None,
) -> dict[fx.Node, Any]:
    """Run nodes in order; a value is dropped when nothing reads it any more, unless it is kept."""
    values = {} if values is None else values
    values.update(known)
    last = {read: node for node in steps for read in node.all_input_nodes}
    dropped: dict[fx.Node, list[fx.Node]] = {}
    for read, node in last.items():
        if read not in keep:
            dropped.setdefault(node, []).append(read)
    for node in steps:
        values[node] = _value(exported, node, values, change)
        for read in dropped.get(node, ()):
            del values[read]
    return values


def _value(
    exported: Exported, node: fx.Node, values: Mapping[fx.Node, Any], change: Callable[[fx.Node, Tensor], Tensor]
) -> Any:
    if node.op == "get_attr":
        return getattr(exported.owner, str(node.target))
    if node.target is MARK:
        return change(node, values[node.all_input_nodes[0]])
    arguments, named = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*arguments, **named)  # type: ignore[operator]  # of a call this is what is called


def _is_size(node: fx.Node) -> bool:
    """Tell whether a node is a number computed from sizes alone."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat) and _is_known(node)


def _is_known(node: fx.Node) -> bool:
    # Symbols named u… and zuf… stand for values of tensors.
    return all(str(symbol).startswith("s") for symbol in node.meta["val"].node.expr.free_symbols)


def _evaluate(node: fx.Node, sizes: Mapping[Any, int]) -> Any:
    value = node.meta["val"]
    found = value.node.expr.subs(dict(sizes))
    if isinstance(value, torch.SymBool):
        return bool(found)
    return int(found) if isinstance(value, torch.SymInt) else float(found)


def _row_axis(exported: Exported, node: fx.Node) -> int | None:
    """Return the one axis of a value that counts rows; None where there is none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    axes = [axis for axis, size in enumerate(value.shape) if _counts_rows(exported, size)]
    return axes[0] if axes else None


def _counts_rows(exported: Exported, size: Any) -> bool:
    return isinstance(size, torch.SymInt) and exported.rows in _symbol(size).free_symbols


def _symbol(size: Any) -> Any:
    return size.node.expr


def _is_recomputed(exported: Exported, node: fx.Node) -> bool:
    """Tell whether a value cannot be taken from the base run because rows are not one axis of it by themselves."""
    if node.op == "placeholder":
        return False
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        counted = [size for size in value.shape if _counts_rows(exported, size)]
        return len(counted) > 1 or any(_symbol(size) != exported.rows for size in counted)
    if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return not _is_size(node)
    return isinstance(value, tuple | list)
