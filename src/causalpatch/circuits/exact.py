"""Exact effects of edges: any set of them interchanged in one run, and every single one.

===========================  ===================================================================
wanted                       say
===========================  ===================================================================
every edge by itself         ``patch_edges(experiment)``
one edge in each run         ``patch_edges(experiment, ["a0.h3 -> a2.h1<q>", "m0 -> logits"])``
several edges in one run     ``patch_edges(experiment, [["a0.h3 -> m1", "m0 -> logits"]])``
a node, by all its edges     ``patch_edges(experiment, ["a0.h3"])``
masks                        ``patch_edges(experiment, masks)``, booleans (mask, sender, receiver)
===========================  ===================================================================

In the base run, an edge carries what its sender gives in the source run instead of what it gives now, to this receiver
alone; all that follows is computed anew. This is the intervention that scores of edges approximate. With
``value="zero"`` or a mean it carries nothing, or what its sender gives on average.

Runs of one edge are made by the wavefront where the model's layers can be run on rows: what stands before the receiver
is the base run, and what stands behind it is computed where it can change. All other runs, and these where the layers
cannot, are forwards in which inputs are put together. The record says which, and why.

References:
    Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability", 2304.14997;
    Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching", 2304.05969.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from causalpatch.base.errors import PathError
from causalpatch.engine.wiring import graph_of as _graph_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_jobs import require_no_source_model
from causalpatch.experiment.edge_sets import EdgeSets
from causalpatch.experiment.edges import run_edges
from causalpatch.models import Model
from causalpatch.pairs import Pairs
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
    edges: Sequence[Asked] | np.ndarray | Tensor | None = None,
    *,
    value: Value | str = "source",
    labels: Sequence[str] | None = None,
    fitted_on: Pairs | None = None,
) -> Effects:
    """Measure sets of edges, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction. With ``engine="auto"`` or ``"wavefront"``, single edges that
            carry the source run's values are run by the wavefront where the model allows.
        edges: For each run an edge or a node by name, or a list of these that are interchanged together; or masks
            ``(mask, sender, receiver)`` over ``graph_of(model)``. By default every edge of the graph by itself, in the
            order of ``graph_of(model).edges``.
        value: What edges carry instead: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``. Zero and means take a run
            apart, so that there are shares in the direction noise alone: of what is lost with all edges replaced.
        fitted_on: The pairs that means are those of; by default the experiment's own, which fit themselves better than
            others.
        labels: What results call the runs; by default their edges, or ``mask 0``, ``mask 1``, ….

    Returns:
        Effects with the axis ``intervention``, then ``pair``. Stopped by Ctrl-C, they hold what was measured, with a
        warning; other cells are ``skipped`` and hold no number.

    Raises:
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known; or source
            runs are made by another model.
        PathError: There is no such edge or node, a mask does not fit the graph, or a set is empty.
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
        A single edge: the tokens and layers that it can change; norm and projections once for a sender and a layer.
        Else one run per set and pair, from the first layer on that reads one of its edges; as many as heads share a
        key, where a set gives them different keys. In a run, a norm and a projection for each head's input that is
        changed.
    """
    require_no_source_model(experiment, "edges cannot take values from another model's runs", "leave source_model= out")
    asked = _asked(graph_of(experiment), edges)
    return run_edges(
        experiment, asked if labels is None else replace(asked, labels=list(labels)), value, fitted_on=fitted_on
    )


def _asked(graph: Graph, edges: Sequence[Asked] | np.ndarray | Tensor | None) -> EdgeSets:
    """Return the runs that are asked for, those of one edge by its numbers alone."""
    if edges is None:
        return EdgeSets.of_edges(graph.edges, graph.names(graph.edges))
    if isinstance(edges, np.ndarray | Tensor):
        masks = graph.check(edges)
        if not len(masks):
            raise PathError("there are no edges to interchange", fix='patch_edges(experiment, ["m0 -> logits"])')
        _require_some([bool(mask.any()) for mask in masks], [f"mask {number}" for number in range(len(masks))])
        return EdgeSets.of_masks(masks, [f"mask {number}" for number in range(len(masks))])
    listed = [edges] if isinstance(edges, str) else list(edges)
    if not listed:
        raise PathError("there are no edges to interchange", fix='patch_edges(experiment, ["m0 -> logits"])')
    groups = [[each] if isinstance(each, str) else list(each) for each in listed]
    _require_some(list(map(bool, groups)), [f"set {number}" for number in range(len(groups))])
    is_single = np.array([len(group) == 1 and "->" in group[0] for group in groups])
    single = np.array([graph.parse(group[0]) for group, one in zip(groups, is_single, strict=True) if one])
    made = [
        graph.mask([text for text in group if "->" in text], [text for text in group if "->" not in text])
        for group, one in zip(groups, is_single, strict=True)
        if not one
    ]
    masks = np.stack(made) if made else np.zeros((0, *graph.shape), dtype=bool)
    names = [", ".join(group) for group in groups]
    return EdgeSets(names, np.flatnonzero(is_single), single.reshape(-1, 2), masks)


def _require_some(has_any: Sequence[bool], names: Sequence[str]) -> None:
    """Make sure that each run interchanges something: what did nothing is not to look like an effect of 0.

    Raises:
        PathError: One does not.
    """
    empty = [name for name, some in zip(names, has_any, strict=True) if not some]
    if empty:
        raise PathError(
            f"{empty[0]} names no edge",
            facts=[("empty", f"{len(empty)} of {len(names)}")],
            fix="leave it out: the base run is experiment.baseline",
        )
