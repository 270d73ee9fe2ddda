"""What a claim puts in: the source run's values, or an ablation, of which the gap is that to a run with all ablated.

1. The source's whole value, a part of the way to it, or a subspace of it: the gap is that between the clean and the
   corrupted run.
2. Zero, a number, a mean, another pair's value, noise (direction noise): a component takes a share of what the model
   loses where all attention and MLPs have such values at once. Means and widths of noise are fitted on the discovery
   pairs.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.experiment import Experiment
from causalpatch.experiment.towards import sublayers_of
from causalpatch.patches import Constant, Interpolate, Mean, Noise, Resample, Source, Subspace, Value, Zero
from causalpatch.patches.value import as_value
from causalpatch.validation.components import Member, Wire

_ABLATIONS: Final = (Zero, Constant, Mean, Resample, Noise)


def put_of(value: Value | str | None, experiment: Experiment, members: Sequence[Member]) -> tuple[Value | None, bool]:
    """Return what is put in, None for the source's whole value, and whether it is an ablation.

    Args:
        value: As asked.
        experiment: The experiment.
        members: The components.

    Raises:
        SettingError: No share can be given of it, or not in this direction, of these components or in this model.
    """
    put = None if value is None else as_value(value)
    if put is None or isinstance(put, Source):
        return None, False
    if isinstance(members[0], Wire):
        raise SettingError(
            f"edges cannot be claimed with the value '{put}'",
            facts=[("edges", "carry what the source run's sender gives")],
            fix="leave value= out, or claim the heads and MLPs at their ends",
        )
    held = put.of if isinstance(put, Subspace) else put
    if isinstance(held, Source | Interpolate):
        return put, False
    is_array = isinstance(put, Constant) and np.ndim(put.array) > 0
    if not isinstance(put, _ABLATIONS) or is_array:
        raise SettingError(
            f"no claim is made of the value '{put}'",
            facts=[
                ("claimed", "source, interpolate, subspaces of these; zero, a number, mean, resample, noise"),
                ("why", "all attention and MLPs must be able to have it at once: that is what a share is of"),
            ],
            fix='value="mean", or leave it out and ask for Checks(corruptions=(…,))',
        )
    if experiment.direction != "noise":
        raise SettingError(
            f"'{put}' takes a run apart and cannot restore one",
            facts=[("direction", experiment.direction), ("needed", "noise: components of clean runs are ablated")],
            fix='confirm(experiment.turned("noise"), …)',
        )
    if experiment.model.streams or not sublayers_of(experiment.model):
        raise SettingError(
            f"no run has '{put}' everywhere, so that there is no gap to take a share of",
            facts=[("model", f"'{experiment.model.name}'"), ("needed", "one stream of layers with attention or MLPs")],
            fix="leave value= out: the gap is then that between clean and corrupted runs",
        )
    return put, True
