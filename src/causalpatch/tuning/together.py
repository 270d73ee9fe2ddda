"""Several changes of one model in one run, each on rows of its own.

A small model's run is mostly calls, not arithmetic: a run of as many rows for each of several changes costs little more
than for one. At each module that one of them acts at, its term is computed from its own rows alone; rows do not see
each other anywhere in the model, so that each change does what it would do in a run of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.added import AtInput, AtOutput, added
from causalpatch.tuning.ways import Added, Way


def may_be_together(ways: Sequence[Way]) -> bool:
    """Say whether changes can run side by side: by terms, in one model, from one layer on."""
    first = ways[0]
    return all(isinstance(each, Added) and each.model is first.model and each.entry == first.entry for each in ways)


@contextmanager
def side_by_side(ways: Sequence[Way], sizes: Sequence[int]) -> Iterator[nn.Module]:
    """Give the module to run, with each change in effect on its own rows.

    Args:
        ways: The changes; more than one of them by terms alone (``may_be_together``).
        sizes: Rows of each, in order.

    Raises:
        ModelUnsupported: A module is given something else than the rows in their order.
    """
    if len(ways) == 1:
        with ways[0].running() as module:
            yield module
        return
    ends = list(accumulate(sizes))
    rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    at_inputs: dict[str, list[tuple[slice, AtInput]]] = {}
    at_outputs: dict[str, list[tuple[slice, AtOutput]]] = {}
    for way, own in zip(ways, rows, strict=True):
        if isinstance(way, Added):
            inputs, outputs = way.terms()
            for path, term in inputs.items():
                at_inputs.setdefault(path, []).append((own, term))
            for path, behind in outputs.items():
                at_outputs.setdefault(path, []).append((own, behind))
    module = ways[0].model.module
    n = ends[-1]
    with added(
        module,
        {path: partial(_each_input, n, terms) for path, terms in at_inputs.items()},
        {path: partial(_each_output, n, terms) for path, terms in at_outputs.items()},
    ):
        yield module


def _each_input(
    n: int, terms: Sequence[tuple[slice, AtInput]], x: Float[Tensor, "row *axes"]
) -> Float[Tensor, "row *axes"]:
    blocks = [(_block(own, n, x), term) for own, term in terms]
    return _joined(x, [(own, term(x[own])) for own, term in blocks])


def _each_output(
    n: int, terms: Sequence[tuple[slice, AtOutput]], x: Float[Tensor, "row *more"], y: Float[Tensor, "row *axes"]
) -> Float[Tensor, "row *axes"]:
    blocks = [(_block(own, n, x), term) for own, term in terms]
    return _joined(y, [(own, term(x[own], y[own])) for own, term in blocks])


def _block(own: slice, n: int, x: Float[Tensor, "row *axes"]) -> slice:
    """Return where some of n rows stand in a tensor, in which a row may be as many as it has tokens."""
    each, rest = divmod(len(x), n)
    if rest or not each:
        raise ModelUnsupported(
            "rows cannot be told apart inside the model",
            facts=[("rows", n), ("a projection is given", len(x))],
            fix="train one change at a time",
        )
    return slice(own.start * each, own.stop * each)


def _joined(
    whole: Float[Tensor, "row *axes"], changed: Sequence[tuple[slice, Float[Tensor, "_ *axes"]]]
) -> Float[Tensor, "row *axes"]:
    """Return a tensor with some blocks of its rows replaced, in their order."""
    parts: list[Tensor] = []
    end = 0
    for own, part in changed:
        parts += [whole[end : own.start], part] if own.start > end else [part]
        end = own.stop
    return torch.cat([*parts, whole[end:]] if end < len(whole) else parts)
