"""Edges between the heads and MLPs that a search found, and from them into the logits, each exactly."""

from typing import Final

import numpy as np

from causalpatch.attribution.confirm import FINE
from causalpatch.base.errors import CausalPatchError
from causalpatch.engine.wiring import graph_of
from causalpatch.experiment.edge_sets import EdgeSets
from causalpatch.experiment.edges import run_edges
from causalpatch.sites import Site
from causalpatch.sweeps.localize.nodes import cells_of
from causalpatch.sweeps.localize.search import Search

_CONTROLS: Final = 3  # of each pair and call: both untouched runs, and the identity patch


def measured_edges(search: Search) -> dict[str, float]:
    """Return the edges beyond delta between what a search found, and into the logits; say in its notes where not.

    Args:
        search: The search, ended.
    """
    try:
        return _edges(search)
    except CausalPatchError as error:
        search.notes.append(f"edges were not measured: {error.what}")
        return {}


def _edges(search: Search) -> dict[str, float]:
    meter = search.meter
    if meter.value is not None:
        search.notes.append(f"edges were not measured: they carry values of the source run, not '{meter.value}'")
        return {}
    graph = graph_of(meter.experiment.model)
    found = [Site.parse(cell.name) for cell in cells_of(search.nodes) if cell.is_component]
    names = list(dict.fromkeys(filter(None, map(_sender, found))))
    ends = [
        (sender, receiver)
        for sender in map(graph.find_sender, names)
        for receiver in range(graph.n_receivers)
        if graph.exists[sender, receiver] and graph.receiver_label(receiver).partition("<")[0] in (*names, "logits")
    ]
    # A run for each head that shares a key, at most.
    shared = meter.experiment.model.n_heads // max(1, meter.experiment.model.n_kv_heads)
    runs = (shared * len(ends) + _CONTROLS) * len(meter.experiment.pairs)
    meter.reserve = 0.0
    if not ends or not meter.has(runs):
        search.notes.append(
            "edges were not measured: " + ("they did not fit into the budget" if ends else "there are none")
        )
        return {}
    labels = list(graph.names(np.array(ends)))
    effects = run_edges(meter.experiment, EdgeSets.of_edges(np.array(ends), labels))
    meter.count(effects.provenance["cost"]["rows"], meter.flops_of(runs), effects.provenance["cost"]["seconds"])
    values = effects.recovered().values.tolist()
    meter.is_stopped |= not effects.is_complete  # what was not run has no number
    measured = [(label, value) for label, value in zip(labels, values, strict=True) if np.isfinite(value)]
    ranked = sorted(measured, key=lambda each: -abs(each[1]))
    return {name: value for name, value in ranked if abs(value) > (search.delta or FINE)}


def _sender(site: Site) -> str:
    """Return the name of a component in the graph of edges; nothing for parts of others."""
    if site.name in ("z", "head_out"):
        return f"a{site.layer}.h{site.unit}"
    return f"m{site.layer}" if site.name in ("mlp_out", "mlp_post") else ""
