"""The strict test: what the hypothesis maps to nothing must not matter.

Interchange accuracy asks whether mapped sites hold what they should. It does not ask whether anything else matters: a
copy of a variable somewhere else, or a second way around it, passes unseen. So each *node*, a head or an MLP, that is
mapped to no variable is given its values from another input's run, and the network's answer must stay what it is.

1. A base and another input are drawn, whatever their outputs are.
2. One unmapped node at a time is patched from the other input's run into the base's.
3. The share of draws whose answer changes is reported for each node, worst first, with intervals that hold for all
   nodes together (Bonferroni).

A node that computes a mapped variable, but lies below its sites, changes the answer through them. That is a finding,
too: the hypothesis does not name it. ``hold_mapped=True`` holds the mapped sites at the base's values, so that only
what goes *around* them is seen.

Cost: one run per node and draw, one for all together, and two untouched.

References:
    Gupta et al. 2024, "InterpBench: Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability
    Techniques", 2407.14494 (strict interchange intervention training: nodes outside of the circuit have no effect).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from causalpatch.algorithms.answers import make_key
from causalpatch.algorithms.couples import Couples, draw_any, possible
from causalpatch.algorithms.findings import Findings, interval_text, percent
from causalpatch.algorithms.hypothesis import Hypothesis
from causalpatch.algorithms.pool import Data, make_pool
from causalpatch.algorithms.setting import Setting, answers_of, differs, needs_equal_lengths
from causalpatch.base.errors import AlgorithmError, SettingError
from causalpatch.base.extras import lazy
from causalpatch.engine import EngineName, Placer, targets_of
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import Identity, Intervention, Patch
from causalpatch.sites import Site, SiteSet, expand, parse
from causalpatch.statistics import share_interval

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

Verdict = Literal["passes", "fails", "inconclusive"]
TOGETHER = "all of them together"
NODES = ("z", "mlp_out")


@dataclass(frozen=True, eq=False)
class StrictTest(Findings):
    """How often the answer changes when nodes that are mapped to no variable take values of another input.

    ``table`` has a row per node, worst first, and one for all together: ``node``, ``n``, ``n_units``, ``changed`` with
    ``low`` and ``high``, and ``verdict``: ``passes`` where the interval ends at the tolerance or below, ``fails`` where
    it begins above it, else ``inconclusive``. ``samples`` has a row per draw.
    """

    kind: ClassVar[str] = "strict off-circuit test"

    @property
    def verdict(self) -> Verdict:
        """What the nodes say one by one: ``fails`` where one does, ``passes`` where all do."""
        found = set(self.table["verdict"][self.table["node"] != TOGETHER])
        if "fails" in found:
            return "fails"
        return "passes" if found == {"passes"} else "inconclusive"

    @property
    def worst(self) -> str:
        """The node whose values change the answer most often."""
        return str(next(node for node in self.table["node"] if node != TOGETHER))

    def lines(self) -> list[str]:
        """Return what is printed above the table."""
        record = self.provenance
        nodes = self.table[self.table["node"] != TOGETHER]
        failed = int((nodes["verdict"] == "fails").sum())
        how = ", mapped sites held" if record["hold_mapped"] else ""
        return [
            f"hypothesis: {record['text']}",
            f"{self.verdict}: {failed} of {len(nodes)} unmapped nodes change more than {record['tolerance']:.0%} of "
            f"the answers{how}",
            f"answer: {record['answer']}; seed {record['seed']}",
            f"unit: {record['unit']}",
        ]

    def shown(self) -> "pd.DataFrame":
        """Return the table as it is printed: the worst nodes, and all together."""
        rows = self.table.to_dict("records")
        kept = [row for row in rows if row["node"] != TOGETHER][:20] + [r for r in rows if r["node"] == TOGETHER]
        return pd.DataFrame(
            {
                "node": [row["node"] for row in kept],
                "answers changed": [percent(row["changed"]) for row in kept],
                f"{self.provenance['level']:.0%} together": [interval_text(row["low"], row["high"]) for row in kept],
                "verdict": [row["verdict"] for row in kept],
                "n": [row["n"] for row in kept],
            }
        )


def strict_test(  # noqa: PLR0913 - which nodes, on which inputs, how strict; each has a default
    model: Model,
    hypothesis: Hypothesis,
    data: Data = None,
    *,
    nodes: Sequence[str | Site | SiteSet] | None = None,
    positions: Sequence[str | int] | None = None,
    n: int = 200,
    tolerance: float = 0.05,
    hold_mapped: bool = False,
    seed: int = 0,
    level: float = 0.95,
    engine: EngineName = "auto",
    budget_gib: float | None = None,
) -> StrictTest:
    """Measure how often the network's answer changes when nodes outside of the hypothesis take other inputs' values.

    Args:
        model: The network.
        hypothesis: The algorithm, and where its variables are.
        data: As for ``interchange_accuracy``.
        nodes: What the network is made of: by default every head (``z``) and every MLP (``mlp_out``). Of models that
            are not known by layers name modules, such as ``["module(layers.*).output"]``.
        positions: Positions at which nodes are patched one by one, such as ``["subject", -1]``; by default at all
            positions at once. A node and position that a variable is mapped to is left out.
        n: Draws.
        tolerance: Share of answers that may change.
        hold_mapped: Whether mapped sites are held at the base's values, so that only ways around them count.
        seed: Seed of all draws.
        level: Nominal coverage of all intervals together.
        engine: How runs are made; see ``Experiment``.
        budget_gib: Memory for activations; see ``Experiment``.

    Returns:
        A row per node, worst first; it prints as a table.

    Raises:
        AlgorithmError: No node is left that is mapped to nothing, or the hypothesis cannot write or read inputs.
        SettingError: The tolerance is no share.
        SiteNotFound: A site is not in the model.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> verb = cp.CausalModel({"is_plural": lambda noun: noun.endswith("s")}, {"noun": ["key", "keys"]})
        >>> where = cp.Hypothesis(
        ...     verb,
        ...     {"is_plural": "resid_post.3@-1"},
        ...     encode=lambda noun: f"The {noun} near the door",
        ...     answers={True: " are", False: " is"},
        ... )
        >>> strict_test(model, where, n=20, hold_mapped=True).verdict
        'inconclusive'
    """
    if not 0 <= tolerance < 1:
        raise SettingError(f"a tolerance of {tolerance} is no share of answers", fix="tolerance=0.05")
    mapped = hypothesis.sites(model)
    pool = make_pool(model, hypothesis, data, seed)
    named = _nodes(model, nodes, positions)
    every = [site for sites in mapped.values() for site in sites]
    found = possible(pool, seed, equally_long=needs_equal_lengths(model, pool, [*named, *every]))
    couples = draw_any(pool, found, n, seed)
    key = make_key(model, hypothesis, pool, [])
    asked = Setting(model, hypothesis, pool, key, mapped, engine, budget_gib, seed)
    pairs = pool.pairs(couples.base, couples.source)
    left = unmapped(model, pairs, named, every)
    held = tuple(Patch(site, Identity()) for site in every) if hold_mapped else ()
    asks = [Intervention((Patch(site), *held), str(site)) for site in left]
    if len(left) > 1:
        asks.append(Intervention((*(Patch(site) for site in left), *held), TOGETHER))
    chosen, how = answers_of(asked.experiment(pairs), asks)
    table, samples = _tables([each.label for each in asks], chosen, couples, tolerance, level)
    record = asked.describe() | {
        "n": n,
        "nodes": [str(node) for node in (nodes or NODES)],
        "tolerance": tolerance,
        "hold_mapped": hold_mapped,
        "level": level,
        "engine": how,
        "notes": _notes([str(node) for node in named if node not in left]),
    }
    return StrictTest(table, samples, record)


def unmapped(model: Model, pairs: Pairs, nodes: Sequence[Site], mapped: Sequence[Site]) -> list[Site]:
    """Return the nodes that are mapped to no variable: they share no token of a site with one in any pair.

    Args:
        model: The network.
        pairs: The pairs; nodes are patched in their corrupted inputs.
        nodes: Sites.
        mapped: The sites of all variables.

    Raises:
        AlgorithmError: None is left.
    """
    placer = Placer(pairs, "corrupt")
    held: dict[str, list[Site]] = {}
    for site in mapped:
        held.setdefault(str(site.at(None)), []).append(site)

    def tokens(site: Site) -> list[set[int] | None]:
        (target,) = targets_of(model, Intervention((Patch(site, "identity"),)))
        if not target.has_position:
            return [None] * len(pairs)
        places = placer.places(target, range(len(pairs)))
        return [set() if place is None else set(place.base.tolist()) for place in places]

    def meets(node: Site) -> bool:
        others = held.get(str(node.at(None)), [])
        own = tokens(node) if others else []
        return any(
            a is None or b is None or bool(a & b) for site in others for a, b in zip(own, tokens(site), strict=True)
        )

    left = [node for node in nodes if not meets(node)]
    if not left:
        raise AlgorithmError(
            "every node is mapped to a variable",
            facts=[("nodes", ", ".join(map(str, nodes))[:88])],
            fix='name what else there is: nodes=["z", "mlp_out"]',
        )
    return left


def _notes(mapped: Sequence[str]) -> list[str]:
    """Return what must be said with the numbers."""
    if not mapped:
        return []
    more = f" and {len(mapped) - 8} more" if len(mapped) > 8 else ""
    return [f"not patched, for they are mapped at some position: {', '.join(mapped[:8])}{more}"]


def _nodes(
    model: Model, nodes: Sequence[str | Site | SiteSet] | None, positions: Sequence[str | int] | None
) -> list[Site]:
    """Return all nodes, at each of the positions."""
    if nodes is None and model.family is None:
        raise AlgorithmError(
            f"'{model.name}' is of no known family, so its nodes have no names",
            facts=[("modules", ", ".join(path for path in model.shape.module_paths if path)[:88])],
            fix='name them: nodes=["module(PATH).output", …]',
        )
    kinds = [parse(each) for each in (nodes if nodes is not None else NODES)]
    sites = [site for each in kinds for site in expand(each, model.shape)]
    if positions is None:
        return sites
    places = [parse(f"embed@{position}").position for position in positions]
    return [site.at(place) for site in sites for place in places]


def _tables(
    labels: Sequence[str], chosen: dict[str, np.ndarray], couples: Couples, tolerance: float, level: float
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    n_nodes = len([label for label in labels if label != TOGETHER])
    rows: list[dict[str, Any]] = []
    columns: dict[str, Any] = {
        "base": couples.base,
        "other": couples.source,
        "group": couples.group,
        "answer: base": chosen["base"],
        "answer: other": chosen["source"],
    }
    for label in labels:
        changed = differs(chosen[label], chosen["base"])
        found = share_interval(changed, couples.group, level=1 - (1 - level) / n_nodes)
        verdict: Verdict = "inconclusive"
        if found.is_bounded and found.high <= tolerance:
            verdict = "passes"
        elif found.is_bounded and found.low > tolerance:
            verdict = "fails"
        rows.append(
            {
                "node": label,
                "n": found.n_pairs,
                "n_units": found.n_groups,
                "changed": found.estimate,
                "low": found.low,
                "high": found.high,
                "verdict": verdict,
            }
        )
        columns[f"answer: {label}"] = chosen[label]
    rows.sort(key=lambda row: (row["node"] == TOGETHER, -np.nan_to_num(row["changed"])))
    return pd.DataFrame(rows), pd.DataFrame(columns)
