"""Circuits: edges and nodes of a decoder, interchanged exactly."""

from causalpatch.circuits.exact import graph_of, patch_edges
from causalpatch.sites.graph import Graph

__all__ = ["Graph", "graph_of", "patch_edges"]
