"""Graph files of other tools: scores and circuits as EAP-IG and the circuit track of MIB write and read them.

Both write the same two layouts, by ``Graph.to_json`` and ``Graph.to_pt``:

==========================  ==========================================================================================
``.json``                   ``.pt``
==========================  ==========================================================================================
``cfg``                     the same: ``n_layers``, ``n_heads``, ``parallel_attn_mlp``, ``d_model``
``edges``: by name          ``edges_scores``, ``edges_in_graph``: ``(sender, receiver)``, in the order of ``src_nodes``
``score`` and ``in_graph``  and ``dst_nodes``
``nodes``: by name          ``nodes_in_graph``, and ``nodes_scores`` where nodes have scores: ``(sender,)``
``in_graph`` and ``score``
==========================  ==========================================================================================

Senders and receivers stand in the order of ``sites.graph``; their ``input`` is ``embed``, and ``a->b`` is ``a -> b``.

*Sign.* Their scores say what the quantity that was scored does when the corrupted prompt's value is put into the clean
run. Their scripts score a *loss*, the negative of the metric, so that what matters has a positive score. *Scale.* They
divide a mean over a batch by the number of pairs once more, so that scores are known but for a factor: read their order
and their ratios.

References:
    Hanna et al. 2024, "Have Faith in Faithfulness", 2403.17806 (github.com/hannamw/EAP-IG); Mueller et al. 2025, "MIB:
    A Mechanistic Interpretability Benchmark", 2504.13151 (github.com/hannamw/MIB-circuit-track).
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from causalpatch.base.errors import ModelUnsupported, PathError, ResultsNotFound, SettingError, StoreCorrupt
from causalpatch.circuits.circuit import Circuit, inputs_of, record_of
from causalpatch.circuits.exact import graph_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.provenance import require_same_model
from causalpatch.models import Model
from causalpatch.results.arrays import replacing
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.provenance import describe_program
from causalpatch.results.score_words import importance_of
from causalpatch.sites.graph import Graph

Scored = Literal["loss", "metric"]
_UNSCALED = "scores out of a graph file are known but for a factor: read their order and ratios, not shares of a gap"
_CFG = ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")


@dataclass(frozen=True, eq=False)
class GraphFile:
    """What a graph file holds.

    Args:
        scores: Scores of edges, with the sign of the effect on the metric when the corrupted value is put in, known but
            for a factor; None where no edge has a score other than 0.
        circuit: The edges that are in the graph; None where none is.
        nodes: Scores of senders by name, positive for what matters; empty where they have none.
    """

    scores: EdgeScores | None
    circuit: Circuit | None
    nodes: Mapping[str, float]


@dataclass(eq=False)
class _Held:
    """The contents of a file over the components of a graph.

    Args:
        scores: ``(sender, receiver)``, NaN where there is none; as in the file.
        kept: Which edges are in the graph.
        nodes: Score of each sender, NaN where it has none.
        is_whole: For each sender whether none of its neurons is left out.
    """

    scores: np.ndarray
    kept: np.ndarray
    nodes: np.ndarray
    is_whole: np.ndarray


def read_graph(path: str | Path, model: Model | Experiment, *, of: Scored = "loss") -> GraphFile:
    """Read a graph file of EAP-IG or of the circuit track of MIB.

    Args:
        path: Ends in ``.json`` or ``.pt``. Nothing is unpickled but tensors and plain data.
        model: The model that it was made for.
        of: What was scored: ``"loss"``, as their scripts do, so that positive is what matters; or ``"metric"``, which
            falls when what matters is corrupted.

    Returns:
        Scores, circuit and scores of nodes, as far as they are there. ``scores.importance()`` has their order.

    Raises:
        ResultsNotFound: There is no such file.
        StoreCorrupt: It is no graph file, or holds what would have to be unpickled.
        ModelUnsupported: It is of another model, or leaves out neurons of a component.
        PathError: It names an edge or component that there is not.
        SettingError: The ending or ``of`` is not known.

    Examples:
        >>> import tempfile
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> circuit = cp.Circuit.of(model, ["a3.h2 -> logits"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = cp.write_graph(f"{folder}/circuit.json", model, circuit=circuit)
        ...     cp.read_graph(path, model).circuit.edges()
        ['a3.h2 -> logits']
    """
    path, held_model = Path(path), model.model if isinstance(model, Experiment) else model
    ending = _ending(path)
    if of not in ("loss", "metric"):
        raise SettingError(f"graph files hold no scores of {of!r}", facts=[("known", "loss, metric")], fix='of="loss"')
    if not path.is_file():
        raise ResultsNotFound(f"there is no graph file '{path}'", fix="name a file that Graph.to_json or to_pt wrote")
    graph = graph_of(held_model)
    data = _read_json(path) if ending == ".json" else _read_pt(path)
    _check_model(path, data["cfg"], held_model, graph)
    held = _of_json(path, data, graph) if ending == ".json" else _of_pt(path, data, graph)
    _check_numbers(path, held, graph)
    about = {"model": {"name": held_model.name, "hash": held_model.content_hash}}
    scores = circuit = None
    if np.nan_to_num(held.scores).any():
        record = {
            **describe_program(),
            **about,
            "method": f"'{path.name}'",
            "direction": "noise",
            # The metric falls by an unknown amount from clean to corrupted prompts: one unit of the file's scores.
            "mean_base": 0.0,
            "mean_source": -1.0,
            "notes": [_UNSCALED],
        }
        scores = EdgeScores(graph, -held.scores if of == "loss" else held.scores, record)
    if held.kept.any():
        circuit = Circuit(graph, held.kept, record_of(about, {"method": f"read from '{path.name}'"}))
    sign = 1 if of == "loss" else -1
    known = np.flatnonzero(~np.isnan(held.nodes))
    return GraphFile(scores, circuit, {graph.sender_label(int(n)): sign * float(held.nodes[n]) for n in known})


def write_graph(
    path: str | Path, model: Model | Experiment, scores: EdgeScores | None = None, *, circuit: Circuit | None = None
) -> Path:
    """Write scores, a circuit or both as a graph file that EAP-IG and the circuit track of MIB read.

    What is written is importance times the gap, |mean m(clean) - mean m(corrupted)|: in the metric's unit, and positive
    for what matters, in whichever direction scores were computed.

    Args:
        path: Ends in ``.json``, or in ``.pt``, which is smaller.
        model: The model that they are of.
        scores: Scores of edges, over positions summed.
        circuit: The edges that are in the graph; without one none is.

    Raises:
        ModelUnsupported: The scores or the circuit are of another model.
        SettingError: There is nothing to write, or the ending is not known.
        NoGap: Both runs that were scored have the same mean metric, so that scores have no direction.
    """
    path, held_model = Path(path), model.model if isinstance(model, Experiment) else model
    ending, graph = _ending(path), graph_of(held_model)
    if scores is None and circuit is None:
        raise SettingError("neither scores nor a circuit are given to write", fix="write_graph(path, model, scores)")
    values, kept = np.zeros(graph.shape), np.zeros(graph.shape, dtype=bool)
    if scores is not None:
        require_same_model(held_model, scores.provenance["model"], "scores are written for the model that they are of")
        record = scores.provenance
        gap = abs(float(record["mean_source"]) - float(record["mean_base"]))
        whole = scores.over_positions().values
        values = np.where(graph.exists, importance_of(whole, record) * gap, 0.0)
    if circuit is not None:
        circuit.require(held_model)
        kept = circuit.mask
    cfg = dict(zip(_CFG, (graph.n_layers, graph.n_heads, graph.is_parallel, held_model.width), strict=True))
    write = _write_json if ending == ".json" else _write_pt
    with replacing(path) as partial:
        write(partial, cfg, graph, values, kept)
    return path


def _write_json(path: Path, cfg: Mapping[str, Any], graph: Graph, values: np.ndarray, kept: np.ndarray) -> None:
    nodes = {name: {"in_graph": bool(used)} for name, used in zip(_senders(graph), _used(graph, kept), strict=True)}
    scores, is_in = (each[tuple(graph.edges.T)].tolist() for each in (values, kept))
    names = (name.replace(" -> ", "->").replace("embed", "input") for name in graph.names(graph.edges))
    edges = {name: {"score": s, "in_graph": k} for name, s, k in zip(names, scores, is_in, strict=True)}
    text = json.dumps({"cfg": cfg, "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges})
    path.write_text(text, encoding="utf-8")


def _write_pt(path: Path, cfg: Mapping[str, Any], graph: Graph, values: np.ndarray, kept: np.ndarray) -> None:
    held = {
        "cfg": cfg,
        "src_nodes": _senders(graph),
        "dst_nodes": list(graph.receiver_labels),
        "edges_scores": torch.tensor(values, dtype=torch.float32),
        "edges_in_graph": torch.tensor(kept),
        "nodes_in_graph": torch.tensor(_used(graph, kept)),
    }
    torch.save(held, path)


def _senders(graph: Graph) -> list[str]:
    """Return the senders as these files call them."""
    return ["input", *graph.sender_labels[1:]]


def _used(graph: Graph, kept: np.ndarray) -> np.ndarray:
    """Return which senders have an edge in the graph, to them or from them, ``(sender,)``."""
    into = inputs_of(graph)
    found: np.ndarray = kept.any(1) | np.array([bool(kept[:, inputs].any()) for inputs in into])
    return found


def _ending(path: Path) -> str:
    if path.suffix not in (".json", ".pt"):
        raise SettingError(
            f"graph files end in .json or .pt, and not as '{path.name}'", fix=f"{path.stem}.json, or {path.stem}.pt"
        )
    return path.suffix


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _corrupt(path, f"it is no JSON: {str(error)[:60]}") from error
    return _with_keys(path, data, ("cfg", "nodes"))


def _read_pt(path: Path) -> dict[str, Any]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _corrupt(path, "it holds more than tensors and plain data, or is no file of torch.save") from error
    except (RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        raise _corrupt(path, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}") from error
    return _with_keys(path, data, ("cfg", "src_nodes", "dst_nodes", "edges_in_graph"))


def _with_keys(path: Path, data: Any, needed: Sequence[str]) -> dict[str, Any]:
    missing = [key for key in needed if not isinstance(data, dict) or key not in data]
    if missing:
        raise _corrupt(path, f"it has no {', '.join(missing)}")
    held: dict[str, Any] = data
    if not isinstance(held["cfg"], dict) or not all(isinstance(held["cfg"].get(key), int) for key in _CFG[:3]):
        raise _corrupt(path, f"its cfg does not say {', '.join(_CFG[:3])}")
    return held


def _check_model(path: Path, cfg: Mapping[str, Any], model: Model, graph: Graph) -> None:
    """Make sure that a file is of a model of this shape.

    Raises:
        ModelUnsupported: It is not.
    """
    own = dict(zip(_CFG, (graph.n_layers, graph.n_heads, graph.is_parallel, model.width), strict=True))
    # Files of early versions do not say how wide the stream is.
    theirs = {key: cfg.get(key, own[key]) for key in _CFG}
    if theirs == own:
        return
    facts = [(where, _shape_words(each)) for where, each in (("file", theirs), ("model", own))]
    if theirs["n_heads"] == model.n_kv_heads != graph.n_heads:
        facts.append(("why", "it counts heads that share keys once; edges go into the heads of queries, one by one"))
    raise ModelUnsupported(
        f"the graph in '{path.name}' is not of '{model.name}'", facts=facts, fix="open the model that it was made for"
    )


def _shape_words(cfg: Mapping[str, Any]) -> str:
    blocks = "in parallel" if cfg["parallel_attn_mlp"] else "one after the other"
    return f"{cfg['n_layers']} layers of {cfg['n_heads']} heads, width {cfg['d_model']}, attention and MLP {blocks}"


def _of_json(path: Path, data: Mapping[str, Any], graph: Graph) -> _Held:
    """Return what a file by names holds."""
    held = _Held(
        np.full(graph.shape, np.nan), np.zeros(graph.shape, dtype=bool), *_nodes_of_json(path, data["nodes"], graph)
    )
    senders = {name: number for number, name in enumerate(_senders(graph))}
    receivers = {name: number for number, name in enumerate(graph.receiver_labels)}
    try:
        for name, info in data.get("edges", {}).items():
            sender, _, receiver = name.partition("->")
            at = senders.get(sender, -1), receivers.get(receiver, -1)
            if min(at) < 0 or not graph.exists[at]:
                at = graph.parse(name)  # says what is wrong with it
            held.scores[at], held.kept[at] = info.get("score", np.nan), info.get("in_graph", False)
    except (AttributeError, TypeError, ValueError) as error:
        raise _corrupt(path, "its edges do not have a score and in_graph each") from error
    return held


def _nodes_of_json(path: Path, nodes: Any, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Return the score of each sender, and whether none of its neurons is left out."""
    scores, is_whole = np.full(graph.n_senders, np.nan), np.ones(graph.n_senders, dtype=bool)
    try:
        for name, info in nodes.items():
            sender = None if name == "logits" else graph.find_sender(name)
            if sender is not None and isinstance(info, dict):  # a truth value alone in files of early versions
                scores[sender] = info.get("score", np.nan)
                is_whole[sender] = all(info.get("neurons", ()))
    except (AttributeError, TypeError, ValueError) as error:
        raise _corrupt(path, "its nodes do not have a score and in_graph each") from error
    return scores, is_whole


def _of_pt(path: Path, data: Mapping[str, Any], graph: Graph) -> _Held:
    """Return what a file of tensors holds."""
    order = [
        _places(path, data[key], known)
        for key, known in (("src_nodes", _senders(graph)), ("dst_nodes", graph.receiver_labels))
    ]

    def tensor(key: str, *axes: int, empty: float) -> np.ndarray:
        shape = tuple(graph.shape[axis] for axis in axes)
        given = data.get(key, torch.full(shape, empty))
        if not isinstance(given, Tensor) or tuple(given.shape[: len(shape)]) != shape:
            found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise _corrupt(path, f"its {key} are of shape {found}, not {shape}")
        return given.double().numpy()[np.ix_(*(order[axis] for axis in axes))]

    neurons = tensor("neurons_in_graph", 0, empty=1.0)
    return _Held(
        tensor("edges_scores", 0, 1, empty=np.nan),
        tensor("edges_in_graph", 0, 1, empty=0.0) != 0,
        tensor("nodes_scores", 0, empty=np.nan),
        np.all(neurons.reshape(graph.n_senders, -1), axis=1, keepdims=True)[:, 0],
    )


def _places(path: Path, names: Any, known: Sequence[str]) -> list[int]:
    """Return for each of our components where it stands in the file."""
    there = {name: number for number, name in enumerate(names)}
    strange = [name for name in known if name not in there]
    if strange or len(there) != len(known):
        other = next((name for name in there if name not in known), "none")
        raise PathError(
            f"'{path.name}' does not have the components of the model",
            facts=[("in file", f"{len(there)}, such as {other}"), ("missing", ", ".join(strange[:4]) or "none")],
            fix="open the model that it was made for",
        )
    return [there[name] for name in known]


def _check_numbers(path: Path, held: _Held, graph: Graph) -> None:
    """Make sure that numbers stand at edges alone, and that circuits are of whole components.

    Raises:
        StoreCorrupt: An edge has an infinite score.
        PathError: There are scores, or there is more of the graph, where no edge is.
        ModelUnsupported: Neurons are left out.
    """
    beyond = held.kept | (np.isfinite(held.scores) & (held.scores != 0))  # what is no edge is 0, or -inf in some files
    wrong = np.argwhere(beyond & ~graph.exists)
    if len(wrong):
        raise PathError(
            f"'{path.name}' has a number at '{graph.label(*map(int, wrong[0]))}', which is no edge",
            facts=[("such", f"{len(wrong):,} of {graph.n_senders * graph.n_receivers:,} entries")],
            fix="see whether its rows are senders, and its columns receivers",
        )
    held.scores[~graph.exists] = np.nan
    if np.isinf(held.scores).any():
        edge = graph.label(*map(int, np.argwhere(np.isinf(held.scores))[0]))
        raise _corrupt(path, f"the score of '{edge}' is infinite")
    parted = np.flatnonzero(held.kept.any(1) & ~held.is_whole)
    if len(parted):
        raise ModelUnsupported(
            f"the circuit in '{path.name}' leaves out neurons of '{graph.sender_label(int(parted[0]))}'",
            facts=[("why", "circuits here are of edges between whole components")],
            fix="write it again without neurons",
        )


def _corrupt(path: Path, why: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"the graph in '{path.name}' cannot be read",
        facts=[("why", why)],
        fix="write it by Graph.to_json or to_pt",
    )
