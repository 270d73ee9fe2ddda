"""Exact effects of edges: any set of them interchanged in one run.

===========================  ===================================================================
wanted                       say
===========================  ===================================================================
one edge in each run         ``patch_edges(experiment, ["a0.h3 -> a2.h1<q>", "m0 -> logits"])``
several edges in one run     ``patch_edges(experiment, [["a0.h3 -> m1", "m0 -> logits"]])``
a node, by all its edges     ``patch_edges(experiment, ["a0.h3"])``
masks                        ``patch_edges(experiment, masks)``, booleans (mask, sender, receiver)
===========================  ===================================================================

In the base run, an edge carries what its sender gives in the source run instead of what it gives now, to this receiver
alone; all that follows is computed anew. This is the intervention that scores of edges approximate. With
``value="zero"`` or a mean it carries nothing, or what its sender gives on average.

References:
    Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability", 2304.14997;
    Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching", 2304.05969.
"""

from collections.abc import Sequence

import numpy as np

from causalpatch.base.errors import PathError
from causalpatch.engine.wiring import graph_of as _graph_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.edges import require_no_source_model, run_edges
from causalpatch.models import Model
from causalpatch.patches import Value
from causalpatch.results.effects import Effects
from causalpatch.sites.graph import Graph

Asked = str | Sequence[str]


def graph_of(model: Model | Experiment) -> Graph:
    """Return the graph of a model's components, by its family's table; nothing runs.

    Args:
        model: The model, or an experiment with it.

    Raises:
        ModelUnsupported: Its components are not known by name, or its stream is not the sum of what they add.

    Examples:
        >>> import causalpatch as cp
        >>> cp.graph_of(cp.open_model("zoo:stories")).n_edges
        479
    """
    return _graph_of(model.model if isinstance(model, Experiment) else model)


def patch_edges(
    experiment: Experiment,
    edges: Sequence[Asked] | np.ndarray,
    *,
    value: Value | str = "source",
    labels: Sequence[str] | None = None,
) -> Effects:
    """Measure sets of edges, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction.
        edges: For each run an edge or a node by name, or a list of these that are interchanged together; or masks
            ``(mask, sender, receiver)`` over ``graph_of(model)``.
        value: What edges carry instead: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``. Zero and means take a run
            apart, so that there are shares in the direction noise alone: of what is lost with all edges replaced.
        labels: What results call the runs; by default their edges, or ``mask 0``, ``mask 1``, ….

    Returns:
        Effects with the axis ``intervention``, then ``pair``.

    Raises:
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known; or source
            runs are made by another model.
        PathError: There is no such edge or node, or a mask does not fit the graph.
        PairError: Prompts of unequal lengths have no alignment.
        MetricError: A metric spells out answers of several tokens.
        SettingError: Edges cannot carry such a value.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> cp.patch_edges(experiment, ["a0.h3 -> a2.h1<q>", "m0"]).dims
        ('intervention', 'pair')

    Cost:
        One run per set and pair, from the first layer on that reads one of its edges; as many as heads share a key,
        where a set gives them different keys. In a run, a norm and a projection for each head's input that is changed.
    """
    require_no_source_model(experiment, "edges cannot take values from another model's runs", "leave source_model= out")
    masks, names = _masks(graph_of(experiment), edges)
    return run_edges(experiment, masks, names if labels is None else labels, value)


def _masks(graph: Graph, edges: Sequence[Asked] | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the mask and the name of each run."""
    if isinstance(edges, np.ndarray):
        masks = graph.check(edges)
        return masks, [f"mask {number}" for number in range(len(masks))]
    asked = [edges] if isinstance(edges, str) else list(edges)
    if not asked:
        raise PathError("there are no edges to interchange", fix='patch_edges(experiment, ["m0 -> logits"])')
    groups = [[each] if isinstance(each, str) else list(each) for each in asked]
    made = [
        graph.mask([text for text in group if "->" in text], [text for text in group if "->" not in text])
        for group in groups
    ]
    return np.stack(made), [", ".join(group) for group in groups]
