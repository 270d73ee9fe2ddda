"""How components of a claim work together: pairwise interactions, stand-ins, and ways past other components.

1. *Interactions*: ``effect(a and b) - effect(a) - effect(b)``, as a share of the gap. Beyond delta it is *synergy*
   where it adds to the set's effect, *redundancy* where it takes away from it.
2. *Backup*: the set is ablated in clean runs (it takes its corrupted values), and others of its kinds are ablated
   beside it: ``effect(set and other) - effect(set)``, against ``effect(other)`` alone. What grows stands in.
3. *Direct and indirect*: what a component adds to the logits along no other component, and the rest of its effect.

Each family has simultaneous intervals of its own. None of this is part of the claim's error rate: it is description.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import MetricError, PairError, UnsupportedError
from causalpatch.base.seeds import generator
from causalpatch.engine.wiring import graph_of
from causalpatch.experiment.edge_sets import EdgeSets
from causalpatch.experiment.edges import run_edges
from causalpatch.experiment.towards import towards
from causalpatch.patches import Value
from causalpatch.results.claim import Check
from causalpatch.statistics.verdicts import ABSENT, SUPPORTED
from causalpatch.validation.bench import Bench
from causalpatch.validation.components import Member, Node, Wire, kin
from causalpatch.validation.findings import interval_rows, share_of

_SENDERS: Final = {"z": "a{layer}.h{unit}", "head_out": "a{layer}.h{unit}", "mlp_out": "m{layer}"}


def pairs_within(members: Sequence[Member], most: int) -> list[tuple[Member, Member]]:
    """Return the pairs of members whose interaction is measured; none where there are more members than ``most``."""
    return list(itertools.combinations(members, 2)) if len(members) <= most else []


def interactions(
    bench: Bench, members: Sequence[Member], value: Value | None, most: int, test: dict[str, Any]
) -> Check:
    """Measure how far pairs of members add up.

    Args:
        bench: Where sets are measured.
        members: The set.
        value: What is put in.
        most: Members above which no pairs are measured.
        test: Of the minimum-effect test.
    """
    pairs = pairs_within(members, most)
    if not pairs:
        why = "there is one component" if len(members) == 1 else f"there are more than {most} components"
        return Check("interactions", skipped=why)
    both = bench.effects(pairs, value)
    first, second = (bench.effects([(pair[side],) for pair in pairs], value) for side in (0, 1))
    kinds = {SUPPORTED: "", ABSENT: "additive"}
    rows = []
    for pair, row in zip(pairs, interval_rows(both - first - second, bench.gap(), bench.group, test), strict=True):
        beyond = "synergy" if row["share"] > 0 else "redundancy"
        kind = kinds.get(row["verdict"], "not told") or beyond
        rows.append({"first": str(pair[0]), "second": str(pair[1]), "kind": kind, **row})
    return Check("interactions", tuple(rows))


def backup(
    bench: Bench, members: Sequence[Member], value: Value | None, n_others: int, test: dict[str, Any]
) -> tuple[Check, int]:
    """Ablate the set in clean runs, and measure the others of its kinds again.

    Args:
        bench: Where sets are measured; in the direction denoise another one is made.
        members: The set.
        value: What is put in.
        n_others: How many others at most; they are drawn where there are more.
        test: Of the minimum-effect test.

    Returns:
        The check, and how many runs it took beside the bench's own.
    """
    others = kin(members, bench.experiment) if n_others else []
    if not others:
        return Check("backup", skipped="there are no others of this kind, or none were asked for"), 0
    n_all = len(others)
    if n_all > n_others:
        chosen = generator(bench.experiment.seed, "others").choice(n_all, n_others, replace=False)
        others = [others[place] for place in sorted(chosen.tolist())]
    noising = bench if bench.experiment.direction == "noise" else Bench(bench.experiment.turned("noise"))
    whole = tuple(members)
    alone, beside = [(other,) for other in others], [(*whole, other) for other in others]
    noising.measure([whole, *alone, *beside], value)
    of_alone, of_set = noising.effects(alone, value), noising.effects([whole], value)
    grown = noising.effects(beside, value) - of_set - of_alone
    shares = share_of(of_alone, noising.gap())
    rows = []
    for other, share, row in zip(others, shares, interval_rows(grown, noising.gap(), noising.group, test), strict=True):
        is_backup = row["verdict"] == SUPPORTED and row["share"] > 0
        told = {"alone": float(share), "growth": row["share"], "low": row["low"], "high": row["high"]}
        rows.append({"component": str(other), **told, "is_backup": is_backup})
    about = {"n": len(others), "n_all": n_all, "is_all": n_all == len(others)}
    extra = 0 if noising is bench else noising.n_runs
    return Check("backup", tuple(rows), about), extra


def direct_and_indirect(bench: Bench, members: Sequence[Member], value: Value | None, test: dict[str, Any]) -> Check:
    """Divide each component's effect into what goes straight to the logits, and what goes through others.

    Args:
        bench: Where sets are measured.
        members: The set.
        value: What is put in.
        test: Of the minimum-effect test.
    """
    name = "direct and indirect"
    why = _why_not_divided(bench, members, value)
    if why:
        return Check(name, skipped=why)
    experiment = bench.experiment.measuring(bench.experiment.metrics[:1])
    try:
        graph = graph_of(experiment.model)
        edges = np.array([(graph.find_sender(_sender(member)), graph.logits) for member in members])
        effects = run_edges(experiment, EdgeSets.of_edges(edges, list(map(str, members))))
        if not effects.is_complete:
            raise KeyboardInterrupt
    except (UnsupportedError, PairError, MetricError) as error:
        return Check(name, skipped=error.what)
    direct = towards(experiment, effects)
    total = bench.effects([(member,) for member in members], value)
    parts = interval_rows(np.concatenate([direct, total - direct]), bench.gap(), bench.group, test)
    rows = []
    for member, one, rest in zip(members, parts[: len(members)], parts[len(members) :], strict=True):
        row: dict[str, Any] = {"component": str(member)}
        for kind, part in (("direct", one), ("indirect", rest)):
            row |= {kind: part["share"], f"{kind}_low": part["low"], f"{kind}_high": part["high"]}
        rows.append(row)
    return Check(name, tuple(rows))


def _why_not_divided(bench: Bench, members: Sequence[Member], value: Value | None) -> str:
    """Return why effects cannot be divided into direct and indirect ones; an empty text where they can."""
    if any(isinstance(member, Wire) for member in members):
        return "an edge is a direct way itself"
    nodes = [member for member in members if isinstance(member, Node)]
    if value is not None or any(node.column is not None for node in nodes):
        return "made for whole values of the source, at all tokens or at the last"
    strange = next((node for node in nodes if node.site.name not in _SENDERS or node.site.stream), None)
    if strange is not None:
        return f"'{strange}' is no head or MLP of one stream that adds to it by itself"
    reads_last = bench.experiment.metrics[0].position == -1
    if any(node.site.position is not None and (node.site.position != -1 or not reads_last) for node in nodes):
        return "made for sites at all tokens, or at the last one where the metric reads it"
    return ""


def _sender(member: Member) -> str:
    """Return what the graph calls a site."""
    site = member.site if isinstance(member, Node) else None
    return "" if site is None else _SENDERS[site.name].format(layer=site.layer, unit=site.unit)
