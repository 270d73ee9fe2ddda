"""Circuits: edges interchanged exactly, circuits found and evaluated, models whose circuits are known."""

from causalpatch.circuits.exact import graph_of, patch_edges
from causalpatch.sites.graph import Graph

__all__ = ["Graph", "graph_of", "patch_edges"]
