"""Tensors inside what modules take and return: picked out, and put back without touching the rest.

Modules take positional and keyword arguments and return tensors, tuples, mappings or output objects. A port's items
say which tensor is meant; with none, it is the first argument, or the output itself, or the first of a tuple.

A router returns each token's few experts and their weights. The tensor of its routes holds the weights of all experts,
0 for those not chosen. When weights are put back, all experts go on whose weight is not 0, however many these are.
"""

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from causalpatch.base.errors import PatchDidNotFire, SiteUnsupported
from causalpatch.models import Port


def pick_input(port: Port, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tensor that ``port`` names among the arguments of a call.

    Raises:
        SiteUnsupported: There is no tensor there.
    """
    first, rest = _first_input(port, args, kwargs)
    held = args[first] if isinstance(first, int) else kwargs[first]
    return _tensor(port, _pick(port, held, rest))


def put_input(
    port: Port, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with the tensor that ``port`` names replaced."""
    first, rest = _first_input(port, args, kwargs)
    if isinstance(first, int):
        return (*args[:first], _put(args[first], rest, value), *args[first + 1 :]), kwargs
    return args, {**kwargs, first: _put(kwargs[first], rest, value)}


def pick_output(port: Port, output: Any) -> Tensor:
    """Return the tensor that ``port`` names in what a module returned.

    Raises:
        SiteUnsupported: There is no tensor there.
    """
    if port.side == "routes":
        return _weights_of_all(*_routes(port, output))
    return _tensor(port, _pick(port, output, _output_items(port, output)))


def put_output(port: Port, output: Any, value: Tensor) -> Any:
    """Return the output with the tensor that ``port`` names replaced."""
    if port.side == "routes":
        return (output[0], *_rerouted(*_routes(port, output), value))
    return _put(output, _output_items(port, output), value)


def with_rows(port: Port, tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return a tensor with rows and positions as its first two axes, where these lie elsewhere.

    Args:
        port: Where the tensor is met; another port shows how many rows and positions there are.
        tensor: The tensor.
        like: The tensor at that other port, or None where it has not passed.

    Raises:
        PatchDidNotFire: It has not passed.
    """
    if like is None:
        needed = f"{port.like.side} of {port.like.path}" if port.like else "nothing"
        raise PatchDidNotFire(
            f"a site at {port.side} of '{port.path}' needs a tensor that was not there in time",
            facts=[("needed", needed)],
            fix="its modules do not run in the order that its family says; patch module(PATH).output",
        )
    return tensor.reshape(*like.shape[:2], tensor.shape[-1])


def _routes(
    port: Port, output: Any
) -> tuple[Float[Tensor, "token expert"], Float[Tensor, "token chosen"], Int[Tensor, "token chosen"]]:
    """Return what a router gave: logits of all experts, weights of the chosen ones, and which these are."""
    if type(output) is tuple and len(output) == 3 and all(isinstance(part, Tensor) for part in output):
        logits, weights, experts = output
        is_sparse = weights.shape == experts.shape and not experts.is_floating_point()
        if is_sparse and logits.ndim == weights.ndim == 2 and len(logits) == len(weights):
            return logits, weights, experts
    raise SiteUnsupported(
        f"what the router '{port.path}' returns is not known",
        facts=[("expected", "logits, and weights and numbers of the chosen experts"), ("got", type(output).__name__)],
        fix=f"see what it returns, and patch module({port.path}).output[0]",
    )


def _weights_of_all(
    logits: Float[Tensor, "token expert"],
    weights: Float[Tensor, "token chosen"],
    experts: Int[Tensor, "token chosen"],
) -> Float[Tensor, "token expert"]:
    # Added: where a token has fewer experts than others, some stand twice, with a weight of 0.
    return weights.new_zeros(logits.shape).scatter_add_(1, experts, weights)


def _rerouted(
    logits: Float[Tensor, "token expert"],
    weights: Float[Tensor, "token chosen"],
    experts: Int[Tensor, "token chosen"],
    value: Float[Tensor, "token expert"],
) -> tuple[Float[Tensor, "token given"], Int[Tensor, "token given"]]:
    """Return the weights and numbers of the experts that go on, at least as many as there were."""
    is_same = (value == _weights_of_all(logits, weights, experts)).all(1, keepdim=True)
    n_before = weights.shape[1]
    n_now = max(n_before, int((value != 0).sum(1).max()))
    numbers = value.abs().topk(n_now, dim=1).indices
    # A token that keeps its weights keeps the order of its experts too, in which they are summed up.
    own_weights, own_experts = (functional.pad(own, (0, n_now - n_before)) for own in (weights, experts))
    return torch.where(is_same, own_weights, value.gather(1, numbers)), torch.where(is_same, own_experts, numbers)


def _first_input(port: Port, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, tuple[int | str, ...]]:
    if port.items:
        first, rest = port.items[0], port.items[1:]
        present = first < len(args) if isinstance(first, int) else first in kwargs
        if not present:
            _refuse(port, f"the call had {len(args)} positional arguments and {', '.join(kwargs) or 'no keywords'}")
        return first, rest
    if args:
        return 0, ()
    named = [name for name, held in kwargs.items() if isinstance(held, Tensor)]
    if not named:
        _refuse(port, "the call had no tensor argument")
    return named[0], ()


def _output_items(port: Port, output: Any) -> tuple[int | str, ...]:
    return (0,) if not port.items and isinstance(output, tuple | list) and output else port.items


def _pick(port: Port, held: Any, items: tuple[int | str, ...]) -> Any:
    for item in items:
        if isinstance(held, Tensor):
            # Its first axis is the row: an item of it would be one run of the batch.
            _refuse(port, f"it is a tensor already, which has no item {item!r}", f"leave out [{item!r}]")
        try:
            held = held[_key(held, item)]
        except (KeyError, IndexError, TypeError):
            inside = ", ".join(map(str, held)) if isinstance(held, Mapping) else f"a {type(held).__name__}"
            _refuse(port, f"there is no item {item!r} in {inside}")
    return held


def _put(held: Any, items: tuple[int | str, ...], value: Tensor) -> Any:
    if not items:
        return value
    item, rest = items[0], items[1:]
    if isinstance(held, tuple) and isinstance(item, int):
        item = item % len(held)
        parts = (*held[:item], _put(held[item], rest, value), *held[item + 1 :])
        return type(held)(*parts) if hasattr(held, "_fields") else parts
    changed, key = copy.copy(held), _key(held, item)
    changed[key] = _put(held[key], rest, value)
    return changed


def _key(held: Any, item: int | str) -> Any:
    """Return what an item is called in a container: the n-th of an output object goes by its name."""
    if isinstance(held, Mapping) and isinstance(item, int) and item not in held:
        names = list(held)
        if not -len(names) <= item < len(names):
            raise IndexError(item)
        return names[item]
    return item


def _tensor(port: Port, held: Any) -> Tensor:
    if not isinstance(held, Tensor):
        inside = f"a {type(held).__name__}"
        if isinstance(held, Mapping):
            inside += f" with {', '.join(map(str, held))}"
        _refuse(port, f"it is {inside}, not a tensor")
    return held


def _refuse(port: Port, problem: str, fix: str = "") -> NoReturn:
    items = "".join(f"[{item!r}]" for item in port.items)
    raise SiteUnsupported(
        f"module({port.path}).{port.side}{items} names no tensor",
        facts=[("problem", problem)],
        fix=fix or f'pick an item, such as module({port.path}).{port.side}[0] or ["name"]',
    )
