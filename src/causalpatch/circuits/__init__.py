"""Circuits: edges interchanged exactly, circuits found and evaluated, models whose circuits are known."""

from causalpatch.circuits.acdc import acdc
from causalpatch.circuits.bounds import Violation, completeness, minimality
from causalpatch.circuits.circuit import Circuit
from causalpatch.circuits.discover import discover_circuit
from causalpatch.circuits.evaluate import evaluate_circuit
from causalpatch.circuits.exact import graph_of, patch_edges
from causalpatch.circuits.stability import Stability, stability
from causalpatch.results.evaluation import Evaluation
from causalpatch.sites.graph import Graph

__all__ = [
    "Circuit",
    "Evaluation",
    "Graph",
    "Stability",
    "Violation",
    "acdc",
    "completeness",
    "discover_circuit",
    "evaluate_circuit",
    "graph_of",
    "minimality",
    "patch_edges",
    "stability",
]
