"""The same experiment on other pairs."""

from causalpatch.experiment.experiment import Experiment
from causalpatch.pairs import Pairs


def with_pairs(experiment: Experiment, pairs: Pairs) -> Experiment:
    """Return the same experiment on other pairs, at the precision of the model.

    Args:
        experiment: Model, metrics, direction and settings.
        pairs: The pairs.
    """
    made = Experiment(
        experiment.model,
        pairs,
        experiment.metrics,
        experiment.direction,
        source_model=experiment.source_model,
        engine=experiment.engine,
        padding_side=experiment.padding_side,
        budget_gib=experiment.budget_gib,
        max_rows=experiment.max_rows,
        seed=experiment.seed,
        show_progress=experiment.show_progress,
    )
    made.runner = experiment.runner
    return made
