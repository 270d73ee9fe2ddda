"""A circuit: a set of edges of one model, what is asked of it, and how it was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.base.errors import ModelUnsupported, RequestError
from causalpatch.engine.wiring import graph_of
from causalpatch.experiment import Experiment
from causalpatch.models import Model
from causalpatch.results import arrays, drawing
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.pictures import Picture
from causalpatch.results.provenance import describe_program
from causalpatch.results.score_words import unit_of
from causalpatch.results.words import counted
from causalpatch.sites.graph import KINDS, Graph

_SHOWN = 12  # edges that a printed circuit names
CIRCUIT, COMPLEMENT = (
    "circuit: its edges intact, all others ablated",
    "complement: its edges ablated, all others intact",
)
"""What of the model is intact."""
CARRIED = {"source": "source: what the corrupted prompt's run sends", "zero": "zero: nothing"}
"""What ablated edges carry, in words; means speak for themselves."""


@dataclass(frozen=True, eq=False)
class Circuit(arrays.Saved):
    """Edges of a model, and how they were found; nothing in it can be changed.

    Args:
        graph: All edges of the model.
        mask: Which of them belong to it, booleans ``(sender, receiver)``.
        record: The model, the six facts, and how it was found, as plain data.

    Raises:
        PathError: The mask does not fit the graph.

    Examples:
        >>> import causalpatch as cp
        >>> circuit = cp.Circuit.of(cp.open_model("zoo:stories"), ["a3.h2 -> logits", "a0.h2 -> a1.h1<v>"])
        >>> circuit.n_edges, circuit.complement().n_edges
        (2, 477)
        >>> circuit.edges()
        ['a0.h2 -> a1.h1<v>', 'a3.h2 -> logits']
    """

    format = "causalpatch circuit"

    graph: Graph
    mask: np.ndarray
    record: Mapping[str, Any]

    def __post_init__(self) -> None:
        mask = self.graph.check(self.mask)[0].copy()
        mask.setflags(write=False)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "record", dict(self.record))

    @classmethod
    def of(cls, model: Model | Experiment, edges: Iterable[str] = (), nodes: Iterable[str] = ()) -> Circuit:
        """Return a circuit of edges that are named.

        Args:
            model: The model, or an experiment with it.
            edges: Edges by name, such as ``"a0.h3 -> a2.h1<q>"``.
            nodes: Senders, each with all edges that go out of it.

        Raises:
            PathError: There is no such edge or sender.
            ModelUnsupported: The model has no graph of edges.
        """
        held = model.model if isinstance(model, Experiment) else model
        graph = graph_of(held)
        return cls(graph, graph.mask(edges, nodes), record_of({"model": _name_of(held)}, {"method": "given"}))

    @property
    def n_edges(self) -> int:
        """How many edges belong to it."""
        return int(self.mask.sum())

    @property
    def fraction(self) -> float:
        """Its share of the model's edges."""
        return self.n_edges / self.graph.n_edges

    @property
    def facts(self) -> dict[str, str]:
        """The six facts without which numbers of a circuit mean little.

        References:
            Miller et al. 2024, "Transformer Circuit Faithfulness Metrics are not Robust", 2407.08734.
        """
        return dict(self.record["facts"])

    @property
    def method(self) -> str:
        """How it was found, in a word or two."""
        return str(self.record["found"]["method"])

    def edges(self) -> list[str]:
        """Return the names of its edges, sender by sender."""
        return list(self.graph.names(np.argwhere(self.mask)))

    def nodes(self) -> list[str]:
        """Return the names of the components that send along its edges."""
        return [self.graph.sender_label(int(sender)) for sender in np.flatnonzero(self.mask.any(1))]

    def complement(self) -> Circuit:
        """Return all edges that do not belong to it."""
        facts = self.facts
        facts["circuit"] = COMPLEMENT if facts["circuit"] == CIRCUIT else CIRCUIT
        return Circuit(self.graph, self.graph.exists & ~self.mask, {**self.record, "facts": facts})

    def connected(self) -> Circuit:
        """Return its edges that lie on a way from the embedding to the logits; all others can do nothing in it.

        Searches never drop edges by themselves, so that a circuit has as many as were asked for.
        """
        graph, mask = self.graph, self.mask.copy()
        into = inputs_of(graph)
        heard = np.zeros(graph.n_senders, dtype=bool)
        heard[0] = True
        for sender in range(1, graph.n_senders):
            heard[sender] = bool((mask[:, into[sender]] & heard[:, None]).any())
        mask &= heard[:, None]
        reaches = np.zeros(graph.n_receivers, dtype=bool)
        reaches[graph.logits] = True
        for sender in range(graph.n_senders - 1, 0, -1):
            reaches[into[sender]] = bool((mask[sender] & reaches).any())
        return Circuit(graph, mask & reaches, {**self.record, "found": {**self.record["found"], "connected": True}})

    def require(self, model: Model) -> None:
        """Make sure that a model is the one whose circuit this is.

        Raises:
            ModelUnsupported: It has other weights, or other components.
        """
        graph, own = graph_of(model), self.record["model"]
        if graph == self.graph and own["hash"] == model.content_hash:
            return
        facts = [
            ("circuit of", f"'{own['name']}', weights {own['hash'][:12]}, {self.graph.n_edges:,} edges"),
            ("given", f"'{model.name}', weights {model.content_hash[:12]}, {graph.n_edges:,} edges"),
        ]
        fix = "open the model it was found in, or name its edges in this one: Circuit.of(model, circuit.edges())"
        raise ModelUnsupported("a circuit is evaluated in the model that it was found in", facts=facts, fix=fix)

    def require_edges(self) -> None:
        """Make sure that there is something in it.

        Raises:
            RequestError: It has no edges.
        """
        if not self.n_edges:
            raise RequestError(
                "the circuit has no edges",
                facts=[("found by", self.method), ("f", "0 by definition: everything is ablated")],
                fix="take more edges, or a lower threshold",
            )

    def plot(self, scores: EdgeScores | None = None) -> Picture:
        """Draw the circuit: components in rows by depth, edges as lines.

        Args:
            scores: What goes along edges, for the width of lines; without them all are alike.

        Raises:
            RequestError: It has no edges.
            PathError: Scores are of another graph.
        """
        self.require_edges()
        edges = np.argwhere(self.mask)
        lines = [f"'{self.record['model']['name']}' · {self.facts['circuit']}"]
        values = None
        if scores is not None:
            self.graph.check(scores.graph.exists)
            values = scores.over_positions().values[tuple(edges.T)]
            lines.append(f"width: {unit_of(scores.provenance)}")
        title = f"{self.n_edges:,} of {counted(self.graph.n_edges, 'edge')}: {self.method}"
        return drawing.draw(self.graph, edges, values, title=title, lines=lines)

    def _parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"edges": np.argwhere(self.mask)}, {"graph": self.graph.plain(), "record": self.record}

    @classmethod
    def _of_parts(cls, held: dict[str, np.ndarray], about: dict[str, Any]) -> Circuit:
        graph = Graph(*about["graph"])
        return cls(graph, graph.mask(map(tuple, held["edges"].tolist())), about["record"])

    def __len__(self) -> int:
        return self.n_edges

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, str) and bool(self.mask[self.graph.parse(edge)])

    def __repr__(self) -> str:
        share = f"{self.n_edges:,} of {counted(self.graph.n_edges, 'edge')}, {self.fraction:.1%}"
        return f"Circuit({share}; {self.method}; '{self.record['model']['name']}')"

    def __str__(self) -> str:
        lines = [repr(self), *(f"  {name:<11}  {value}" for name, value in self.facts.items())]
        found = ", ".join(f"{key} {value}" for key, value in self.record["found"].items() if key != "scores")
        lines.append(f"  {'found':<11}  {found}")
        named = self.edges()[:_SHOWN]
        rest = self.n_edges - len(named)
        return "\n".join([*lines, *(f"    {edge}" for edge in named), *([f"    … and {rest:,} more"] if rest else [])])


def record_of(provenance: Mapping[str, Any], found: Mapping[str, Any], value: str = "source") -> dict[str, Any]:
    """Return a circuit's record: the setup of what it was found by, the six facts, and how it was found.

    Args:
        provenance: The record of what it was found by.
        found: How it was found.
        value: What ablated edges carry.
    """
    kept = {key: provenance[key] for key in ("model", "pairs", "metrics", "seed") if key in provenance}
    facts = {
        "granularity": "heads (q, k, v), MLPs",
        "kind": "edge",
        "value": CARRIED.get(value, f"{value}, of what its sender gives"),
        "positions": "all aligned",
        "direction": "noise",
        "circuit": CIRCUIT,
    }
    return {**describe_program(), **kept, "found": dict(found), "facts": facts}


def _name_of(model: Model) -> dict[str, str]:
    return {"name": model.name, "hash": model.content_hash}


def inputs_of(graph: Graph) -> list[list[int]]:
    """Return for each sender the receivers by which it reads the stream; the embedding has none."""
    into: list[list[int]] = [[]]
    for layer in range(graph.n_layers):
        kinds = [graph.heads_to(kind, layer).start for kind in KINDS]
        into += [[first + head for first in kinds] for head in range(graph.n_heads)]
        into.append([graph.mlp_to(layer)])
    return into
