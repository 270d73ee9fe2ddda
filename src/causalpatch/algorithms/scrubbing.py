"""Causal scrubbing: does the network still do its task when everything is resampled that the hypothesis lets go?

If a hypothesis says all that matters, then any activation may be replaced by its value on another input at which the
hypothesis sees no difference. Causal scrubbing does so everywhere at once, down a tree.

What is resampled, exactly. A *reference* input ``x`` is drawn. To compute a variable ``V`` in agreement with ``x``:

1. ``V`` depends, through variables that are mapped to nothing, on mapped variables (its *mapped parents*) and on inputs
   that are mapped to nothing (its *unmapped parents*).
2. A *base* input is drawn among all those that agree with ``x`` on the unmapped parents, and on nothing else. The
   network runs on it. So every activation at no mapped site comes from an input that is random but for these.
3. For each mapped parent ``P`` an input is drawn, each by itself, among all that agree with ``x`` on the *value of P*.
   ``P``'s sites are computed in agreement with that input, in a run of their own by these same rules, and put into the
   run. So what mapped sites hold comes from an input that agrees on the variable's value, and what their own parents'
   sites held in that run from inputs that agree on the parents' values, and so on up the tree. Every place in the tree
   has draws of its own, also where one variable stands in several places.
4. All other mapped sites are held at the values of the base's own run, so that a parent does not reach ``V`` through
   variables of which ``V`` is said not to be computed.
5. ``V``'s sites are read from this run. For the output, the network's own answer is.

A mapped input is computed in a run on the reference itself. With ``nodes``, such as ``["z", "mlp_out"]``, those are
held at the base's values too, so that a parent's sites reach ``V``'s directly, as edges between nodes, and not through
any node that the hypothesis does not name: this is the treeified graph of Chan et al. Without ``nodes`` whatever lies
between two mapped sites counts as part of the edge between them.

``recovered = (scrubbed - random) / (original - random)``, of means: *original* is the metric on the references,
*random* that of runs on inputs drawn at random, measured by the references' answers. 1: nothing of the behaviour is
lost.

Cost: per draw one run for each place in the tree, two for the originals and one for the random inputs.

References:
    Chan et al. 2022, "Causal Scrubbing: a method for rigorously testing interpretability hypotheses", Redwood Research
    (the algorithm, and treeified graphs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from causalpatch.algorithms.answers import CHOICE, make_key
from causalpatch.algorithms.findings import Findings, interval_text, percent
from causalpatch.algorithms.hypothesis import Hypothesis
from causalpatch.algorithms.pool import Data, Pool, make_pool
from causalpatch.algorithms.setting import Setting, mean
from causalpatch.algorithms.tree import Tree
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.seeds import generator
from causalpatch.engine import EngineName
from causalpatch.metrics import Metric, named_metric
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import Intervention
from causalpatch.sites import Site, SiteSet, expand, parse
from causalpatch.statistics import ratio_interval

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

WHOLE, SHUFFLED = "whole hypothesis", "shuffled mapping"
UNITS = {
    "draw": "one reference input, drawn from these inputs, which are all that the numbers speak of",
    "component": "one independent component of the references, given these inputs to resample from",
}


@dataclass(frozen=True, eq=False)
class Scrubbing(Findings):
    """What is left of the behaviour when all that a hypothesis lets go is resampled.

    ``table`` has a row for the whole hypothesis, one for what it says of each variable alone, and one for its sites
    dealt out to other variables: ``hypothesis``, ``recovered`` with ``low`` and ``high``, the means ``original``,
    ``scrubbed`` and ``random`` of the metric, ``right``: how often the scrubbed network's answer is the algorithm's,
    ``right_original`` and ``right_random``; ``resampled``: the share of draws that took another input than the one
    they stand in for; ``n`` and ``n_units``. ``samples`` has a row per draw.
    """

    kind: ClassVar[str] = "causal scrubbing"

    @property
    def recovered(self) -> float:
        """The share of the metric that the whole hypothesis recovers."""
        return float(self.row(hypothesis=WHOLE)["recovered"])

    def lines(self) -> list[str]:
        """Return what is printed above the table."""
        record = self.provenance
        held = f"; held: {', '.join(record['nodes'])}" if record["nodes"] else ""
        return [
            f"hypothesis: {record['text']}",
            f"metric {record['metric']}; answer: {record['answer']}{held}",
            f"unit: {record['unit']}; seed {record['seed']}",
        ]

    def shown(self) -> "pd.DataFrame":
        """Return the table as it is printed."""
        rows = self.table.to_dict("records")
        return pd.DataFrame(
            {
                "scrubbed by": [row["hypothesis"] for row in rows],
                "recovered": [percent(row["recovered"]) or "no gap" for row in rows],
                f"{self.provenance['level']:.0%} interval": [interval_text(row["low"], row["high"]) for row in rows],
                "original": [f"{row['original']:.3f}" for row in rows],
                "scrubbed": [f"{row['scrubbed']:.3f}" for row in rows],
                "random": [f"{row['random']:.3f}" for row in rows],
                "right": [percent(row["right"]) for row in rows],
                "resampled": [percent(row["resampled"]) for row in rows],
                "n": [row["n"] for row in rows],
            }
        )


def causal_scrubbing(  # noqa: PLR0913 - which metric, on which inputs, held how; each has a default
    model: Model,
    hypothesis: Hypothesis,
    data: Data = None,
    *,
    metric: Metric | str = "log_probability",
    nodes: Sequence[str | Site | SiteSet] = (),
    parts: bool = True,
    n: int = 200,
    seed: int = 0,
    level: float = 0.95,
    engine: EngineName = "auto",
    budget_gib: float | None = None,
) -> Scrubbing:
    """Measure how much of a behaviour is left when all that the hypothesis lets go is resampled.

    Args:
        model: The network.
        hypothesis: The algorithm, and where its variables are.
        data: As for ``interchange_accuracy``.
        metric: What is measured of the network's answer to the reference input: by default the log-probability of the
            answer that the algorithm gives. Pairs hold that answer, and as wrong answers all others that are possible.
        nodes: Sites that are held at each run's own random input wherever they are not mapped, such as
            ``["z", "mlp_out"]``; see above.
        parts: Whether each variable is scrubbed by itself, too, and by sites dealt out to other variables.
        n: Reference inputs that are drawn, with everything resampled anew for each.
        seed: Seed of all draws.
        level: Nominal coverage of the interval.
        engine: How the last runs are made; see ``Experiment``. Nested runs are full forwards.
        budget_gib: Memory for activations; see ``Experiment``.

    Returns:
        The share recovered by the whole hypothesis, and by its parts; it prints as a table.

    Raises:
        AlgorithmError: The hypothesis cannot write or read inputs.
        AnswerError: An output is no answer of the network, or the metric needs answers that there are not.
        SiteNotFound: A site is not in the model.
        PatchError: A site's tokens differ in number between inputs.

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
        >>> round(causal_scrubbing(model, where, n=20).recovered, 3)
        1.0
    """
    if n < 2:
        raise SettingError(f"{n} draws are too few", fix="n=200")
    measured = named_metric(metric) if isinstance(metric, str) else metric
    mapped = hypothesis.sites(model)
    pool = make_pool(model, hypothesis, data, seed)
    key = make_key(model, hypothesis, pool, [])
    asked = Setting(model, hypothesis, pool, key, mapped, engine, budget_gib, seed)
    held = [site for each in nodes for site in expand(parse(each), model.shape)]
    references = _references(pool, n, seed)
    outside = _Outside.of(asked, references, measured)
    rows, samples, engines = [], [], []
    for label, each in _parts(hypothesis, seed) if parts else [(WHOLE, hypothesis)]:
        part = Setting(model, each, pool, key, each.sites(model), engine, budget_gib, seed)
        row, sample, how = _scrub(Tree(part, held, label), outside, measured, level)
        rows.append(row)
        samples.append(sample)
        engines.append(how)
    record = asked.describe() | {
        "unit": UNITS[pool.unit],
        "metric": measured.name,
        "n": n,
        "level": level,
        "nodes": [str(each) for each in nodes],
        "engine": engines,
        "notes": _notes(rows),
    }
    return Scrubbing(pd.DataFrame(rows), pd.concat(samples, ignore_index=True), record)


@dataclass(frozen=True)
class _Outside:
    """What every scrubbed run is compared with.

    Args:
        references: Number of the reference input of each draw in the pool.
        group: What counts as one observation, ``(draw,)``.
        random: The metric on random inputs, ``(draw,)``.
        chosen: What the network answers there.
    """

    references: np.ndarray
    group: np.ndarray
    random: np.ndarray
    chosen: np.ndarray

    @classmethod
    def of(cls, asked: Setting, references: np.ndarray, measured: Metric) -> "_Outside":
        """Measure random inputs by the references' answers."""
        pool = asked.pool
        stream = generator(asked.seed, "random inputs", pool.name)
        others = stream.integers(0, len(pool), len(references))
        found = asked.experiment(_answered(asked, others, references), measured, asked.key.metric).baseline
        group = np.arange(len(references)) if pool.unit == "draw" else pool.components[references]
        return cls(references, group, found.corrupt[0], found.corrupt[1])


def _scrub(
    tree: Tree, outside: _Outside, measured: Metric, level: float
) -> tuple[dict[str, Any], "pd.DataFrame", dict[str, Any]]:
    """Scrub by one hypothesis; return its row, its samples and the engine of the last runs."""
    asked, references = tree.asked, outside.references
    run = tree.answer_run(references)
    pairs = _answered(asked, run.base, references)
    asks = Intervention(tuple(tree.patches(pairs, run)), "scrubbed")
    effects = asked.experiment(pairs, measured, asked.key.metric).run(asks)
    data = effects.to_xarray()
    order = [pair.id for pair in pairs]
    scrubbed, chosen = (
        data["metric"].sel(metric_name=name, intervention="scrubbed").reindex(pair=order).values
        for name in (measured.name, CHOICE)
    )
    original, own = (
        data["baseline_source"].sel(metric_name=name).reindex(pair=order).values for name in (measured.name, CHOICE)
    )
    outputs = [asked.pool.outputs(asked.hypothesis)[i] for i in references.tolist()]
    key = asked.key
    found = ratio_interval(scrubbed - outside.random, original - outside.random, outside.group, level=level)
    row = {
        "hypothesis": tree.label,
        "mapping": str(asked.hypothesis),
        "n": found.n_pairs,
        "n_units": found.n_groups,
        "recovered": found.estimate,
        "low": found.low,
        "high": found.high,
        "original": mean(original),
        "scrubbed": mean(scrubbed),
        "random": mean(outside.random),
        "right": mean(key.is_right(chosen, outputs)),
        "right_original": mean(key.is_right(own, outputs)),
        "right_random": mean(key.is_right(outside.chosen, outputs)),
        "resampled": tree.n_drawn[1] / max(1, tree.n_drawn[0]),
        "note": found.note,
    }
    samples = pd.DataFrame(
        {
            "hypothesis": tree.label,
            "reference": references,
            "base": run.base,
            "group": outside.group,
            "output": list(map(repr, outputs)),
            "original": original,
            "scrubbed": scrubbed,
            "random": outside.random,
            "answer: original": own,
            "answer: scrubbed": chosen,
            "answer: random": outside.chosen,
        }
    )
    return row, samples, dict(effects.provenance["engine"])


def _parts(hypothesis: Hypothesis, seed: int) -> list[tuple[str, Hypothesis]]:
    """Return the whole hypothesis, what it says of each variable alone, and its sites dealt out to others."""
    names = hypothesis.variables
    if len(names) == 1:
        return [(WHOLE, hypothesis)]
    alone = [(f"{name} alone", hypothesis.only([name])) for name in names]
    return [(WHOLE, hypothesis), *alone, (SHUFFLED, hypothesis.shuffled(seed))]


def _references(pool: Pool, n: int, seed: int) -> np.ndarray:
    """Draw the reference inputs: each by itself, or all of them in turn where they are a sample."""
    stream = generator(seed, "references", pool.name)
    if pool.unit == "draw":
        return stream.integers(0, len(pool), n)
    rounds = [stream.permutation(len(pool)) for _ in range(-(-n // len(pool)))]
    return np.concatenate(rounds)[:n]


def _answered(asked: Setting, base: np.ndarray, references: np.ndarray) -> Pairs:
    """Return pairs of references (clean) and bases (corrupted) with the answers to the references."""
    outputs = asked.pool.outputs(asked.hypothesis)
    wanted = [outputs[number] for number in references.tolist()]
    right, wrong = ([get(out) for out in wanted] for get in (asked.key.answers, asked.key.wrong_answers))
    return asked.pool.pairs(base, references, right, wrong)


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what must be said with the numbers."""
    notes = [f"{row['hypothesis']}: {row['note']}" for row in rows if row["note"]]
    for row in rows:
        if row["resampled"] < 0.5:
            notes.append(
                f"{row['hypothesis']}: only {row['resampled']:.0%} of the draws found another input, so little was "
                "tested; give more inputs, or algorithm variables of fewer values"
            )
    return notes
