"""Scores of edges made by hand, and exact ones, for tests of what circuits are taken from them."""

import numpy as np

import causalpatch as cp
from causalpatch.attribution import EdgeScores


def scores_of(graph, values, *, base=0.0, source=1.0, model=None):
    """Return given scores, one for each edge; by default importance is the score."""
    array = np.full(graph.shape, np.nan)
    array[tuple(graph.edges.T)] = values
    named = {"name": "made up", "hash": ""} if model is None else {"name": model.name, "hash": model.content_hash}
    record = {"method": "by hand", "mean_base": base, "mean_source": source, "model": named, "metrics": ["metric"]}
    return EdgeScores(graph, array, record)


def exact_scores(experiment):
    """Return the exact effect of each edge by itself."""
    graph = cp.graph_of(experiment)
    effects = cp.patch_edges(experiment, list(graph.names(graph.edges)))
    base, source = experiment.baseline.clean.mean(), experiment.baseline.corrupt.mean()
    if experiment.direction == "denoise":
        base, source = source, base
    return scores_of(graph, effects.effect().values, base=base, source=source, model=experiment.model)
