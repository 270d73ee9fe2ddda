"""Scores: approximate effects from gradients, of nodes, neurons and edges."""

from causalpatch.attribution.edges import EdgeScores, attribute_edges

__all__ = ["EdgeScores", "attribute_edges"]
