"""What a module is made of, in one number: what was found out about a module holds for as long as this stays the same.

Users change models between two runs: they swap a part, set a forward, choose another attention kernel. Weights may
change freely, since no assumption of an engine rests on their values.
"""

from collections.abc import Iterator

from torch import nn

from causalpatch.engine.hooks import quiet
from causalpatch.models import Model

_SIMPLE = (str, int, float, bool, type(None))


def structure_of(model: Model) -> int:
    """Return a number that changes when parts, classes, forwards, settings or buffers of a model are replaced.

    Args:
        model: The model.
    """
    with quiet(model):  # forwards that another thread's run stands in for are put back first
        return hash(tuple(_facts(model.module)))


def _facts(module: nn.Module) -> Iterator[object]:
    for path, part in module.named_modules():
        kind = type(part)
        yield path, id(part), id(kind), id(kind.forward), id(kind.__call__)
        yield tuple((name, x) for name, x in vars(part).items() if name != "training" and isinstance(x, _SIMPLE))
        yield tuple((name, id(x)) for name, x in vars(part).items() if callable(x))
        settings = vars(part).get("config")
        if settings is not None:
            yield tuple((name, x) for name, x in vars(settings).items() if isinstance(x, _SIMPLE))
        for name, weight in (*part._parameters.items(), *part._buffers.items()):
            yield name, None if weight is None else (weight.data_ptr(), weight.dtype, tuple(weight.shape))
