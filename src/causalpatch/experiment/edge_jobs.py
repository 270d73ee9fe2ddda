"""What the engine is asked for where edges are interchanged: a job that patches all senders, and what edges carry."""

from causalpatch.base.errors import MetricError, ModelUnsupported, PairError, SettingError
from causalpatch.engine import Job, Means, fit_values
from causalpatch.engine.put_in import patches_of_senders
from causalpatch.engine.wiring import graph_of
from causalpatch.experiment.experiment import Experiment
from causalpatch.experiment.subset import with_pairs
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import Intervention, Mean, Source, Value, Zero
from causalpatch.patches.value import as_value

Carried = Source | Zero | Mean
"""What edges can carry instead of what their senders give."""


def carried_of(value: Value | str) -> Carried:
    """Return what edges carry instead.

    Raises:
        PatchError: There is no such value.
        SettingError: Edges cannot carry it.
    """
    found = as_value(value)
    if not isinstance(found, Source | Zero | Mean):
        raise SettingError(
            f"edges cannot carry '{found}'",
            facts=[("known", '"source", "zero", "mean", Mean(…)')],
            fix='value="zero"',
        )
    return found


def job_of_edges(experiment: Experiment, carried: Carried, fitted_on: Pairs | None = None) -> tuple[Job, Means]:
    """Return a job whose one intervention patches all senders, with the means that it puts in.

    Args:
        experiment: The experiment.
        carried: What edges carry.
        fitted_on: The pairs that means are those of; by default the experiment's own.

    Raises:
        ModelUnsupported: The model's components are not known by name, or source runs are made by another model.
        MetricError: A metric reads further forwards than that of the prompt.
    """
    fix = "leave source_model= out"
    require_no_source_model(experiment, "edges cannot take values from another model's runs", fix)
    _require_plain(experiment)
    if fitted_on is not None and isinstance(carried, Mean):
        require_means(carried, fitted_on, experiment.pairs)
        means = fit_values(job_of_senders(with_pairs(experiment, fitted_on), carried)).means
        return job_of_senders(experiment, carried), means
    fitted = fit_values(job_of_senders(experiment, carried))
    return fitted.job, fitted.means


def require_means(mean: Mean, fitted_on: Pairs, pairs: Pairs) -> None:
    """Make sure that means of some pairs have a value for every token, and every group, of others.

    Args:
        mean: The mean.
        fitted_on: The pairs that it is of.
        pairs: The pairs that it is put into.

    Raises:
        PairError: It has not.
    """
    fitted, longest = (
        int(fitted_on.lengths(mean.side).max()),
        max(int(pairs.lengths(role).max()) for role in ("clean", "corrupt")),
    )
    if mean.over == "pairs" and longest > fitted:
        raise PairError(
            f"'{pairs.name}' has longer prompts than the pairs that means are of",
            facts=[("longest", f"{longest} tokens"), ("where means are of", f"{fitted} tokens")],
            fix='take one mean over all positions: value="mean(over=positions)"',
        )
    unknown = {pair.group for pair in pairs} - {pair.group for pair in fitted_on} if mean.per_group else set()
    if unknown:
        raise PairError(
            f"'{pairs.name}' has groups that the pairs do not have that means are of",
            facts=[("such as", sorted(map(str, unknown))[0])],
            fix="leave per_group out",
        )


def job_of_senders(experiment: Experiment, value: Value) -> Job:
    """Return what the engine is asked for where all senders are met: one intervention that patches them."""
    return experiment.job([patch_of_senders(experiment.model, value)])


def patch_of_senders(model: Model, value: Value) -> Intervention:
    """Return the intervention that patches all senders of a model.

    Raises:
        ModelUnsupported: Its components are not known by name.
    """
    graph = graph_of(model)
    return Intervention(tuple(patches_of_senders(value, graph.n_layers, graph.n_heads)))


def require_no_source_model(experiment: Experiment, what: str, fix: str) -> None:
    """Make sure that source runs are made by the model itself.

    Args:
        experiment: The experiment.
        what: What cannot be done otherwise.
        fix: What to type instead.

    Raises:
        ModelUnsupported: They are made by another model.
    """
    if experiment.source_model is not None:
        raise ModelUnsupported(what, facts=[("why", "what a head sends depends on its own output projection")], fix=fix)


def _require_plain(experiment: Experiment) -> None:
    """Make sure that each run is one forward.

    Raises:
        MetricError: A metric reads further ones.
    """
    gauge = experiment.gauge
    for metric in gauge.metrics:
        if (metric.spells_answers and gauge.forks) or metric.generates is not None:
            does = "spells out answers of several tokens" if metric.generates is None else "reads what is written on"
            raise MetricError(
                f"edges cannot be measured by '{metric.name}', which {does}",
                facts=[("pairs", f"'{experiment.pairs.name}'")],
                fix='measure the first token: load_pairs(…, first_token=True), or metric="kl_divergence"',
            )
