"""Path patching: what one component sends to another one, and what that does.

The base run is made again with one change: an input of a component (the *receiver*) is what it would be if an earlier
component (the *sender*) had sent its value of the source run, and nothing else had changed in between. All that comes
behind the receiver is free to change. So an effect is that of the direct way from the one to the other.

=====================  ==============================================================
wanted                 say
=====================  ==============================================================
all heads to a query   ``path_patch(experiment, "head_out", "q.5.1")``
to several inputs      ``path_patch(experiment, "head_out", [["q.5.1", "k.5.1"]])``
MLPs passed through    ``path_patch(…, recompute_mlps=True)``
token by token         ``path_patch(…, positions="each")``
what goes straight out ``direct_effect(experiment, ["head_out", "mlp_out"])``
longer paths, sets     ``path_patch(experiment, paths=["embed -> q.1.0 -> logits"])``
=====================  ==============================================================

References:
    Wang et al. 2022, "Interpretability in the Wild", 2211.00593 (path patching; there MLPs are recomputed);
    Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching", 2304.05969 (sets of paths).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from causalpatch.base.errors import ModelUnsupported, PathError, SettingError
from causalpatch.engine.trees import why_not_before
from causalpatch.experiment import Experiment
from causalpatch.patches.patch import Alignment
from causalpatch.results.effects import Effects
from causalpatch.sites import Site, SiteSet
from causalpatch.sites.edges import Edge, Path, Receiver, expand_receivers, expand_senders
from causalpatch.sweeps.path_runs import Asked, Cell, measure_paths

TWO_STREAMS = "it has an encoder and a decoder, and only single streams are followed"
Senders = str | Site | SiteSet | Sequence[str | Site | SiteSet]
Receivers = str | Receiver | Sequence[str | Receiver | Sequence[str | Receiver]]
Paths = Sequence[Path | Edge | str | Sequence[Path | Edge | str]]


def path_patch(
    experiment: Experiment,
    senders: Senders | None = None,
    receivers: Receivers | None = None,
    *,
    paths: Paths | None = None,
    recompute_mlps: bool = False,
    positions: Literal["each"] | None = None,
    align: Alignment | None = None,
) -> Effects:
    """Patch paths from senders to receivers, each pair of them in a run of its own; or any sets of paths.

    Args:
        experiment: Model, pairs, metrics and direction. Senders take their value from the source run.
        senders: What sends: ``"head_out"`` (all heads), ``"mlp_out.2"``, ``"embed"``, ``"resid_pre.3@-1"``, or a list.
        receivers: What receives: ``"q.5.1"``, ``"k"`` (all keys, by kv_head), ``"mlp_in.4"``, ``"logits"``, or a list;
            a list within the list is patched together in one run, by those of its members that the sender precedes.
        paths: Instead of both: for each run a path, or a list of paths that are patched together.
        recompute_mlps: Whether MLPs between a sender and its receiver are computed from the changed stream, so that
            ways through them count too. By default they are frozen, as attention always is.
        positions: ``"each"`` lets the sender differ at one aligned column at a time, along an axis ``position``.
        align: How spans of unequal lengths meet; see ``Patch``.

    Returns:
        Effects with the axes ``sender`` and ``receiver``, ``position`` where it is asked for, then ``pair``; of paths
        with the axis ``intervention``. Cells whose sender does not stand before their receiver are *skipped*.

    Raises:
        PathError: A path is not well formed, or nothing can go along it.
        SiteNotFound: A component is not in the model.
        SiteUnsupported: The model does not have a site, or it failed its proof.
        ModelUnsupported: The model has an encoder and a decoder, or its layers cannot be run token by token; the
            message says why.
        PairError: Prompts of a pair differ in length and have no alignment.
        SettingError: Neither senders and receivers nor paths are named, or both.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
        >>> path_patch(experiment, "head_out.0:2", ["q.2.1", "k.2.1"]).dims
        ('sender', 'receiver', 'pair')

    Cost:
        One run per cell and pair, from the receiver on; and before them one run of each prompt, with norms and
        projections of the receivers for each sender. See ``engine.paths``.
    """
    _require_one_stream(experiment)
    with_paths = paths is not None
    if with_paths == (senders is not None or receivers is not None) or (senders is None) != (receivers is None):
        raise SettingError(
            "path patching needs senders and receivers, or paths",
            facts=[
                ("given", ", ".join(name for name, x in _named(senders, receivers, paths) if x is not None) or "none")
            ],
            fix='path_patch(experiment, "head_out", "q.5.1"), or path_patch(experiment, paths=["embed -> q.1.0"])',
        )
    if positions not in (None, "each"):
        raise SettingError(f"positions cannot be {positions!r}", facts=[("known", "each")], fix='positions="each"')
    if with_paths:
        if positions is not None:
            raise SettingError(
                "sets of paths have no axis 'position'",
                facts=[("positions", positions)],
                fix='name positions in the paths: "head_out.3.2@-1 -> q.5.1"',
            )
        asked = _of_paths(paths or ())
    else:
        asked = _of_pairs(experiment, senders or (), receivers or (), walks=positions == "each")
    return measure_paths(experiment, asked, align, recompute_mlps=recompute_mlps)


def direct_effect(
    experiment: Experiment,
    senders: Senders = ("head_out", "mlp_out"),
    *,
    positions: Literal["each"] | None = None,
    align: Alignment | None = None,
) -> Effects:
    """Measure what components add to the logits directly, not through any later component.

    The stream behind the last layer changes by what the sender changes, and the final norm, the unembedding, scales and
    soft-caps are applied to it as a whole: nothing is taken for linear, and the norm's scale is not frozen.

    Args:
        experiment: Model, pairs, metrics and direction.
        senders: As for ``path_patch``; by default all heads and all MLPs.
        positions: As for ``path_patch``.
        align: As for ``path_patch``.

    Returns:
        Effects with the axis ``sender``, ``position`` where it is asked for, then ``pair``.

    Raises:
        PathError: What is named cannot send.
        SiteNotFound: A component is not in the model.
        ModelUnsupported: The model has an encoder and a decoder.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
        >>> direct_effect(experiment, "head_out.3").dims
        ('sender', 'pair')

    Cost:
        One final norm and unembedding of the tokens that are read, per sender and pair.
    """
    _require_one_stream(experiment)
    if positions not in (None, "each"):
        raise SettingError(f"positions cannot be {positions!r}", facts=[("known", "each")], fix='positions="each"')
    asked = _of_pairs(experiment, senders, "logits", walks=positions == "each")
    axes = {axis: values for axis, values in asked.axes.items() if axis != "receiver"}
    asked = Asked(axes, asked.labels, asked.cells, asked.title, asked.kind)
    return measure_paths(experiment, asked, align, recompute_mlps=False)


def _require_one_stream(experiment: Experiment) -> None:
    if experiment.model.streams:
        raise ModelUnsupported(
            f"paths of '{experiment.model.name}' cannot be patched",
            facts=[("why", TWO_STREAMS)],
            fix="patch whole sites, such as sweep(experiment, 'cross_z')",
        )


def _of_paths(paths: Paths) -> Asked:
    """Lay out sets of paths side by side."""
    if isinstance(paths, str | Path | Edge):
        paths = [paths]
    sets = [tuple(map(Path.of, [each] if isinstance(each, str | Path | Edge) else each)) for each in paths]
    if not sets or not all(sets):
        raise PathError("there is no path to patch", fix='paths=["head_out.3.2 -> q.5.1"]')
    labels = [" + ".join(map(str, some)) for some in sets]
    cells = [Cell(place, label, some) for place, (label, some) in enumerate(zip(labels, sets, strict=True))]
    title = labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]} ({len(labels)} sets of paths)"
    kind = "edge" if all(len(path.nodes) == 2 for some in sets for path in some) else "path"
    return Asked({"intervention": labels}, {}, cells, title, kind)


def _of_pairs(experiment: Experiment, senders: Senders, receivers: Receivers, *, walks: bool) -> Asked:
    """Lay out every sender with every receiver that it precedes."""
    model = experiment.model
    sending, of_sender = _senders(experiment, senders)
    receiving, of_receiver = _receivers(experiment, receivers)
    reach = {
        (s, group): [r for r in group if why_not_before(s, r, model) is None] for s in sending for group in receiving
    }
    sending = _possible(sending, receiving, reach, of_sender, model, is_sender=True)
    receiving = _possible(receiving, sending, reach, of_receiver, model, is_sender=False)
    axes: dict[str, Sequence[Any]] = {
        "sender": [str(sender) for sender in sending],
        "receiver": [_group_text(group) for group in receiving],
    }
    labels: dict[str, Sequence[str]] = {}
    columns: Sequence[int | None] = [None]
    if walks:
        _check_walk([*sending, *(r for group in receiving for r in group)])
        aligned = experiment.pairs.aligned()
        columns = axes["position"] = list(range(aligned.n_columns))
        labels["position"] = aligned.labels(experiment.base)
    cells = []
    for place, (sender, group, column) in enumerate(itertools.product(sending, receiving, columns)):
        edges = tuple(Path(Edge(sender, receiver)) for receiver in reach[sender, group])
        at = "" if column is None else f", position {column}"
        if edges:
            cells.append(Cell(place, f"{sender} -> {_group_text(group)}{at}", edges, column))
    title = f"{_span(axes['sender'])} -> {_span(axes['receiver'])}"
    return Asked(axes, labels, cells, title, "edge")


def _senders(experiment: Experiment, asked: Senders) -> tuple[list[Site], dict[Site, bool]]:
    """Return the senders, and whether each was named by itself."""
    listed = [asked] if isinstance(asked, str | Site | SiteSet) else list(asked)
    found: dict[Site, bool] = {}
    for each in listed:
        members = expand_senders(each, experiment.model.shape)
        for site in members:
            found[site] = found.get(site, False) or len(members) == 1
    if not found:
        raise PathError("there is no sender", fix='path_patch(experiment, "head_out", "q.5.1")')
    return list(found), found


_Group = tuple[Receiver, ...]


def _receivers(experiment: Experiment, asked: Receivers) -> tuple[list[_Group], dict[_Group, bool]]:
    """Return the receivers, those that are patched together in one group, and whether each was named by itself."""
    listed: Sequence[Any] = [asked] if isinstance(asked, str | Receiver) else list(asked)
    found: dict[_Group, bool] = {}
    shape = experiment.model.shape
    for each in listed:
        if isinstance(each, str | Receiver):
            members = expand_receivers(each, shape)
            for receiver in members:
                found[receiver,] = found.get((receiver,), False) or len(members) == 1
        else:
            group = tuple(dict.fromkeys(receiver for one in each for receiver in expand_receivers(one, shape)))
            found[group] = True
    if not found or not all(found):
        raise PathError("there is no receiver", fix='path_patch(experiment, "head_out", "q.5.1")')
    return list(found), found


def _possible(
    some: Sequence[Any],
    others: Sequence[Any],
    reach: Mapping[Any, Any],
    named: Mapping[Any, bool],
    model: Any,
    *,
    is_sender: bool,
) -> list[Any]:
    """Return the senders (receivers) that precede (follow) at least one of the others; named ones must.

    Raises:
        PathError: One that was named by itself does not, or none does.
    """

    def has(one: Any) -> bool:
        return any(reach[(one, other) if is_sender else (other, one)] for other in others)

    kept = [one for one in some if has(one)]
    lost = next((one for one in some if one not in kept and (named[one] or not kept)), None)
    if lost is not None:
        sender, group = (lost, others[0]) if is_sender else (others[0], lost)
        raise PathError(
            f"nothing goes from '{sender}' to '{_group_text(group)}'",
            facts=[
                ("why", why_not_before(sender, group[0], model)),
                ("order", "attention of layer 0, its MLP, attention of layer 1, …"),
            ],
            fix="name senders that stand before their receivers",
        )
    return kept


def _check_walk(nodes: Sequence[Site | Receiver]) -> None:
    """Make sure that positions are walked along by no one who has one."""
    fixed = next((node for node in nodes if node.position is not None), None)
    if fixed is not None:
        raise SettingError(
            f"'{fixed}' has a position, so that there is none to walk along",
            facts=[("why", "what is sent at a token is received at that token")],
            fix=f'leave "@{fixed.position}" out, or positions="each"',
        )


def _group_text(group: _Group) -> str:
    return " + ".join(map(str, group))


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"


def _named(senders: Any, receivers: Any, paths: Any) -> list[tuple[str, Any]]:
    return [("senders", senders), ("receivers", receivers), ("paths", paths)]
