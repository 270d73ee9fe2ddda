"""How far patched runs are off distribution, in a table."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.engine import fit_values, measure_distance, without_controls
from causalpatch.experiment.experiment import Experiment
from causalpatch.experiment.requests import Request, as_interventions

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")


def off_distribution(experiment: Experiment, interventions: Iterable[Request] | Request) -> "pd.DataFrame":
    """Say how far patched runs are off what the model computes by itself.

    A patch with a large effect that is also far off may show what a state does that the model never is in.

    Args:
        experiment: Model, pairs, metrics and direction.
        interventions: As for ``Experiment.run``.

    Returns:
        A row per intervention: ``norm_ratio``, the length of the new values over that of the base run's own, and
        ``change_elsewhere``, the mean KL divergence, in nats, of next-token distributions at tokens that no metric
        reads, from the first patched one on; means over pairs, NaN where there is nothing to compare.

    Raises:
        SiteNotFound: A site is not in the model.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model), direction="noise")
        >>> table = cp.off_distribution(experiment, [cp.Patch("mlp_out.1", "zero"), cp.Patch("mlp_out.1", "identity")])
        >>> table["norm_ratio"].round(6).tolist()
        [0.0, 1.0]

    Cost:
        One full forward per intervention and pair.
    """
    asked = as_interventions(interventions)
    job = without_controls(experiment.job(asked))
    fitted = fit_values(job)
    found = measure_distance(fitted.job, experiment.gauge, fitted.means)
    columns = {name: _over_pairs(getattr(found, name)) for name in ("norm_ratio", "change_elsewhere")}
    return pd.DataFrame({"intervention": [each.label for each in asked], **columns})


def _over_pairs(values: np.ndarray) -> np.ndarray:
    """Return means over the pairs that have a number, (intervention,); NaN where none has."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(1)
    means: np.ndarray = np.divide(total, known.sum(1), out=np.full(len(values), np.nan), where=known.any(1))
    return means
