"""Scores: approximate effects from gradients, of nodes, neurons and edges."""

from causalpatch.attribution.confirm import confirm_scores
from causalpatch.attribution.edges import attribute_edges
from causalpatch.attribution.nodes import attribute
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.scores import Scores

__all__ = ["EdgeScores", "Scores", "attribute", "attribute_edges", "confirm_scores"]
