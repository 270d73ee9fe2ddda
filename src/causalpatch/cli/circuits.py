"""Commands on edges: score nodes or edges, find a circuit on half of the pairs, evaluate it on the other half."""

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.cli import show as view
from causalpatch.cli.options import Device, Direction, First, Json, ModelName, OneMetric, Out, PairsName, Top, Where
from causalpatch.cli.requests import metric_of_task, prepared

tables = lazy("causalpatch.results.top")

Scored = Annotated[
    Literal["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"],
    typer.Option("--scores", help="How edges are scored."),
]
Value = Annotated[
    Literal["source", "zero", "mean", "mean(over=positions)"],
    typer.Option("--value", help="What ablated edges carry instead."),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Points of integrated gradients.")]
AllPairs = Annotated[
    bool, typer.Option("--all-pairs", help="Use all pairs; otherwise discover and evaluate each have a half.")
]


def attribute(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    site: Annotated[
        list[str] | None, typer.Option("--site", help="Nodes to score, such as z or mlp_post@-1; by default all edges.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Edges: eap-ig, eap, …; nodes: atp, ig, atp*, relp, ….")
    ] = None,
    over: Annotated[str | None, typer.Option("--over", help="Of nodes: axes of the grid, such as layer,head.")] = None,
    positions: Annotated[
        bool, typer.Option("--positions", help="Of edges: score the receivers' positions one by one.")
    ] = False,
    steps: Steps = 5,
    rule: Annotated[
        Literal["midpoint", "eap-ig"],
        typer.Option("--rule", help="Where these points lie: midpoint, or eap-ig as in the published code."),
    ] = "midpoint",
    confirm: Annotated[
        int | None, typer.Option("--confirm", min=0, help="Patch the N largest exactly, and a sample of the others.")
    ] = None,
    sample: Annotated[int, typer.Option("--sample", min=0, help="How many of the others are drawn, by score.")] = 100,
    at_most: Annotated[
        int | None,
        typer.Option("--at-most", min=0, help="Instead of --sample: as many as bound the number missed by this."),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Share of the gap that matters: .1; of neurons, features and edges .02."),
    ] = None,
    metric: OneMetric = None,
    direction: Direction = "denoise",
    where: Where = None,
    first: First = None,
    device: Device = None,
    out: Out = None,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Score edges, or nodes, by gradients: approximate, from a few runs for all of them; --confirm patches some."""
    _require_of_kind(site, over, positions=positions)
    if confirm is None and (at_most is not None or delta is not None):
        raise SettingError(
            "--at-most and --delta say how scores are confirmed, and none are", fix="--confirm 50 --at-most 5"
        )
    opened, loaded = prepared(model, pairs, where, first, device=device)
    experiment = cp.Experiment(opened, loaded, metric=metric or metric_of_task(pairs), direction=direction)
    asked: dict[str, Any] = {"steps": steps, "rule": rule, **({"method": method} if method else {})}
    found: dict[str, Any]
    if site:
        found = cp.attribute(experiment, site, over=over.split(",") if over else None, **asked)
    else:
        found = {"edges": cp.attribute_edges(experiment, positions=positions, **asked)}
    files = {name: [str(each.save(out / f"{view.file_name(name)}.npz"))] for name, each in found.items()} if out else {}
    confirmed: dict[str, Any] = {}
    if confirm is not None:
        how: dict[str, Any] = {"at_most": at_most, "delta": delta}
        confirmed = {name: each.confirm(confirm, sample, **how) for name, each in found.items()}
    if out:
        for name, each in confirmed.items():
            stem = f"{view.file_name(name)}-confirmed"
            files[name].append(str(each.save(out / f"{stem}.npz")))
            files[name] += [str(each.plot().save(out / f"{stem}.{ending}")) for ending in ("svg", "png", "csv")]
    if as_json:
        tables = {name: each.top(top).to_dataframe().to_dict("records") for name, each in found.items()}
        said = {name: {**each.summary().iloc[0], "notes": each.notes} for name, each in confirmed.items()}
        view.json_object({"scores": tables, **({"confirmed": said} if confirmed else {}), "files": files})
        return
    for name, each in found.items():
        view.text(str(each.top(top)))
        if name in confirmed:
            view.text(f"\n{confirmed[name]}")
    for path in itertools.chain.from_iterable(files.values()):
        view.text(f"wrote {path}")


def _require_of_kind(site: list[str] | None, over: str | None, *, positions: bool) -> None:
    """Make sure that options of nodes go with nodes, and those of edges with edges."""
    if site and positions:
        raise SettingError("--positions is for edges, and nodes are asked for", fix="--over layer,position")
    if over and not site:
        raise SettingError("--over is for nodes, and edges are asked for", fix="--site z --over layer,head")


Method = Annotated[
    Literal["top", "greedy", "acdc", "hard-concrete", "ugs", "sigmoid-topk"],
    typer.Option("--method", help="By scores: top, greedy; by runs: acdc; by masks that are learnt: the others."),
]


def discover(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    out: Annotated[Path, typer.Option("--out", help="Folder for circuit.npz and its drawing; made where missing.")],
    method: Method = "top",
    n_edges: Annotated[int | None, typer.Option("--n-edges", min=1, help="How many edges.")] = None,
    fraction: Annotated[float | None, typer.Option("--fraction", help="Their share of all; .05 by default.")] = None,
    by: Annotated[
        Literal["importance", "magnitude"], typer.Option("--by", help="Whether what works against counts as much.")
    ] = "importance",
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Of acdc: the loss that an edge prevents, in the metric's unit."),
    ] = None,
    scored: Scored = "eap-ig",
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Points of integrated gradients (5), or steps of learning (300)."),
    ] = None,
    value: Value = "source",
    metric: OneMetric = None,
    where: Where = None,
    first: First = None,
    all_pairs: AllPairs = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find a circuit on one half of the pairs: by scores of edges, by ACDC, or by masks that are learnt."""
    if (method == "acdc") != (threshold is not None) or (method == "acdc" and (n_edges or fraction)):
        raise SettingError(
            "acdc takes a threshold, and other methods a number of edges",
            facts=[("asked", f"{method}, threshold {threshold}, edges {n_edges or fraction}")],
            fix="--method acdc --threshold 0.1, or --method top --n-edges 20",
        )
    opened, loaded = prepared(model, pairs, where, first, device=device)
    half = loaded if all_pairs else loaded.split()[0]
    experiment = cp.Experiment(opened, half, metric=metric or metric_of_task(pairs))
    scores = None
    size: dict[str, Any] = {"n_edges": n_edges} if n_edges else {"fraction": fraction or 0.05}
    if threshold is not None:
        circuit = cp.acdc(experiment, threshold, value=value)
    elif method in ("hard-concrete", "ugs", "sigmoid-topk"):
        circuit = cp.learn_circuit(experiment, **size, method=method, steps=steps or 300, value=value)
    elif value != "source":
        raise SettingError(
            f"scores by gradients are those of the source's values, not of {value}",
            facts=[("methods for zero and means", "acdc, hard-concrete, ugs, sigmoid-topk")],
            fix="--method hard-concrete",
        )
    else:
        scores = cp.attribute_edges(experiment, scored, steps=steps or 5)
        circuit = cp.discover_circuit(scores, **size, method="greedy" if method == "greedy" else "top", by=by)
    files = [circuit.save(out / "circuit.npz")]
    if circuit.n_edges:
        files += [circuit.plot(scores).save(out / f"circuit.{ending}") for ending in ("svg", "png", "csv", "json")]
    if as_json:
        said: dict[str, Any] = {"edges": circuit.edges(), "n_edges": circuit.n_edges, "of": circuit.graph.n_edges}
        view.json_object(
            {**said, "facts": circuit.facts, "found": circuit.record["found"], "files": list(map(str, files))}
        )
        return
    view.text(str(circuit))
    view.text(
        f"\nfound on {len(half)} of {len(loaded)} pairs; wrote {', '.join(path.name for path in files)} into {out}/"
    )
    if not all_pairs:
        view.text(
            f"  evaluate it on the others (same --where and --first): "
            f"causalpatch evaluate {model} {pairs} --circuit {files[0]}"
        )


def evaluate(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    circuit: Annotated[
        Path | None, typer.Option("--circuit", help="What discover wrote; without it all sizes by scores of edges.")
    ] = None,
    scored: Scored = "eap-ig",
    steps: Steps = 5,
    value: Value = "source",
    n_random: Annotated[int, typer.Option("--random", min=0, help="Random circuits of each size.")] = 5,
    delta: Annotated[float, typer.Option("--delta", help="f within 1 - delta and 1 + delta is called faithful.")] = 0.1,
    metric: OneMetric = None,
    where: Where = None,
    first: First = None,
    all_pairs: AllPairs = False,
    device: Device = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Run the model with nothing but a circuit, beside its complement and random circuits, on held-out pairs."""
    opened, loaded = prepared(model, pairs, where, first, device=device)
    found_on, held_out = (loaded, loaded) if all_pairs else loaded.split()
    chosen = metric or metric_of_task(pairs)
    what: Any = cp.Circuit.load(circuit) if circuit else None
    if what is None:
        what = cp.attribute_edges(cp.Experiment(opened, found_on, metric=chosen), scored, steps=steps)
    record = what.record if circuit else what.provenance
    experiment = cp.Experiment(opened, held_out, metric=chosen)
    is_same = not all_pairs and record.get("pairs", {}).get("hash") == found_on.content_hash
    found = cp.evaluate_circuit(
        experiment, what, n_random=n_random, found_on=found_on if is_same else None, value=value
    )
    verdicts, hypotheses = found.equivalence(delta=delta), found.hypotheses()
    files = []
    if out:
        out.mkdir(parents=True, exist_ok=True)
        files = [found.save(out / "evaluation.npz")]
        files += [found.plot().save(out / f"faithfulness.{ending}") for ending in ("svg", "png", "csv")]
    if as_json:
        tests = {name: hypotheses[name] for name in hypotheses.columns if name.endswith(("equivalence", "dependence"))}
        rows = found.summary().assign(verdict=verdicts["verdict"], **tests).to_dict("records")
        view.json_object({"circuits": rows, "notes": found.notes, "files": list(map(str, files))})
    else:
        view.text(str(found))
        for row in verdicts.to_dict("records"):
            view.text(f"f within 1 ± {delta:g}, {row['n_edges']} edges by {row['order']}: {row['verdict']}")
        view.text("\ntests of Shi et al., small where not so: circuit like model; complement independent of model")
        view.text(tables.readable(hypotheses).to_string(index=False))
        if files:
            view.text(f"\nwrote {', '.join(path.name for path in files)} into {out}/")
    if not found.is_complete:
        raise typer.Exit(130)
