"""Interchange accuracy: does a network answer as the algorithm does when a variable is taken from another input?

1. A *base* and a *source* input are drawn. The algorithm runs on the base with a variable's value from the source: its
   counterfactual output is what is expected.
2. The network runs on the base with the variable's sites patched from its run on the source.
3. Interchange accuracy is the share of draws in which the network's answer is the expected one.

An interchange that changes nothing is passed by sites that hold nothing, so the share among *changing* draws, whose
expected output differs from the base's own, is the one that counts. Beside it stand: the whole, in which changing
draws weigh as much as they occur; the best constant answer (chance); what the network does without any patch; random
sites of the same kind; and the sites of the hypothesis' other variables.

Cost: per set of variables and draw one run for its sites, one for the identity patch, one per random and per shuffled
set, and two untouched.

References:
    Geiger et al. 2021, "Causal Abstractions of Neural Networks", 2106.02997; Geiger et al. 2023, "Causal Abstraction:
    A Theoretical Foundation for Mechanistic Interpretability", 2301.04709.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from causalpatch.algorithms.answers import make_key
from causalpatch.algorithms.couples import Couples, draw_couples, possible
from causalpatch.algorithms.findings import Findings, interval_text, percent
from causalpatch.algorithms.hypothesis import Hypothesis
from causalpatch.algorithms.matched import draw_matched
from causalpatch.algorithms.pool import Data, make_pool
from causalpatch.algorithms.setting import Setting, answers_of, differs, mean, needs_equal_lengths
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.seeds import generator
from causalpatch.engine import EngineName
from causalpatch.models import Model
from causalpatch.patches import Intervention
from causalpatch.statistics import share_interval

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

MAPPED, IDENTITY = "mapped", "identity"


@dataclass(frozen=True, eq=False)
class Interchange(Findings):
    """Interchange accuracy of every variable, or set of variables, that was asked for.

    ``table`` has the columns ``variable``, ``sites``, ``n`` and ``n_units``; ``changing`` with ``low`` and ``high``:
    the accuracy among draws whose output changes; ``whole`` with ``whole_low`` and ``whole_high``; ``changing_share``;
    ``chance``; ``model``: how often the network is right on bases and sources as they are; ``identity``: how often
    the identity patch changes its answer; ``random`` and ``random_most`` with ``n_random``; ``shuffled_most``: the best
    of the other variables' sites. Accuracies of controls are among changing draws. ``samples`` has a row per draw.
    """

    kind: ClassVar[str] = "interchange accuracy"

    def accuracy(self, *variables: str) -> float:
        """Return the accuracy of a variable, or of several interchanged together, among changing draws.

        Raises:
            AlgorithmError: It was not measured.
        """
        return float(self.row(variable=" + ".join(variables))["changing"])

    def lines(self) -> list[str]:
        """Return what is printed above the table."""
        record = self.provenance
        return [
            f"hypothesis: {record['text']}",
            f"answer: {record['answer']}; seed {record['seed']}",
            f"unit: {record['unit']}",
        ]

    def shown(self) -> "pd.DataFrame":
        """Return the table as it is printed."""
        rows = self.table.to_dict("records")
        return pd.DataFrame(
            {
                "variable": [row["variable"] for row in rows],
                "changing": [percent(row["changing"]) for row in rows],
                f"{self.provenance['level']:.0%} interval": [interval_text(row["low"], row["high"]) for row in rows],
                "whole": [percent(row["whole"]) for row in rows],
                "chance": [percent(row["chance"]) for row in rows],
                "random sites (most)": [
                    f"{percent(row['random'])} ({percent(row['random_most'])})" if row["n_random"] else "none alike"
                    for row in rows
                ],
                "others' sites": [percent(row["shuffled_most"]) or "no others" for row in rows],
                "identity changes": [percent(row["identity"]) for row in rows],
                "network right": [percent(row["model"]) for row in rows],
                "n": [row["n"] for row in rows],
            }
        )


def interchange_accuracy(  # noqa: PLR0913 - what, on which inputs, how many, with which controls; each has a default
    model: Model,
    hypothesis: Hypothesis,
    data: Data = None,
    *,
    variables: Sequence[str | Sequence[str]] | None = None,
    n: int = 200,
    n_random: int = 10,
    seed: int = 0,
    level: float = 0.95,
    engine: EngineName = "auto",
    budget_gib: float | None = None,
) -> Interchange:
    """Measure how often the network answers as the algorithm does when variables are taken from another input.

    Args:
        model: The network.
        hypothesis: The algorithm, and where its variables are.
        data: ``Pairs`` whose inputs the hypothesis reads; a list of inputs that it writes; or None for all inputs that
            the algorithm can have.
        variables: Variables, or sets of them that are interchanged together from one source; by default each that is
            mapped, and all together.
        n: Draws for each, half of them changing the output.
        n_random: Sets of random sites of the same kind.
        seed: Seed of all draws.
        level: Nominal coverage of intervals.
        engine: How runs are made; see ``Experiment``.
        budget_gib: Memory for activations; see ``Experiment``.

    Returns:
        A row per variable or set; it prints as a table.

    Raises:
        AlgorithmError: The hypothesis cannot write or read inputs, an interchange never changes the output, or a
            variable is not mapped.
        AnswerError: An output is no answer of the network.
        SiteNotFound: A site is not in the model.
        PairError: Prompts of unequal lengths are patched at all positions.

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
        >>> interchange_accuracy(model, where, n=20).accuracy("is_plural")
        1.0
    """
    if n < 2:
        raise SettingError(f"{n} draws are too few for an accuracy", fix="n=200")
    mapped = hypothesis.sites(model)
    pool = make_pool(model, hypothesis, data, seed)
    sets = _sets(hypothesis, variables)
    every = [site for sites in mapped.values() for site in sites]
    found = possible(pool, seed, equally_long=needs_equal_lengths(model, pool, every))
    drawn = [draw_couples(pool, hypothesis, each, found, n, seed) for each in sets]
    key = make_key(model, hypothesis, pool, [out for couples in drawn for out in couples.expected])
    asked = Setting(model, hypothesis, pool, key, mapped, engine, budget_gib, seed)
    rows, samples, engines = [], [], []
    for names, couples in zip(sets, drawn, strict=True):
        row, sample, how = _measure(asked, names, couples, n_random, level)
        rows.append(row)
        samples.append(sample)
        engines.append(how)
    record = asked.describe() | {"n": n, "n_random": n_random, "level": level, "engine": engines}
    return Interchange(pd.DataFrame(rows), pd.concat(samples, ignore_index=True), record)


def _sets(hypothesis: Hypothesis, asked: Sequence[str | Sequence[str]] | None) -> list[tuple[str, ...]]:
    if asked is None:
        alone: list[tuple[str, ...]] = [(name,) for name in hypothesis.variables]
        return [*alone, *([hypothesis.variables] if len(alone) > 1 else [])]
    listed = [asked] if isinstance(asked, str) else asked
    sets = [(each,) if isinstance(each, str) else tuple(each) for each in listed]
    for name in (name for each in sets for name in each):
        hypothesis.require(name)
    if not sets or not all(sets):
        raise SettingError("there is no variable to interchange", fix=f"variables={list(hypothesis.variables)}")
    return sets


def _measure(
    asked: Setting, names: tuple[str, ...], couples: Couples, n_random: int, level: float
) -> tuple[dict[str, Any], "pd.DataFrame", dict[str, Any]]:
    """Measure one set of variables; return its row, its samples and the engine."""
    hypothesis, pool, key = asked.hypothesis, asked.pool, asked.key
    sites = [site for name in names for site in asked.mapped[name]]
    stream = generator(asked.seed, "random sites", *names)
    others = [name for name in hypothesis.variables if name not in names]
    controls = {
        **{
            f"random {k}": each
            for k, each in enumerate(draw_matched(asked.model, sites, asked.every_site, n_random, stream))
        },
        **{f"sites of {name}": asked.mapped[name] for name in others},
    }
    interventions = [
        Intervention(hypothesis.patches(sites), MAPPED),
        Intervention(hypothesis.patches(sites, "identity"), IDENTITY),
        *(Intervention(hypothesis.patches(each), label) for label, each in controls.items()),
    ]
    chosen, how = answers_of(asked.experiment(pool.pairs(couples.base, couples.source)), interventions)
    outputs = pool.outputs(hypothesis)
    at = {name: [outputs[i] for i in places.tolist()] for name, places in _runs(couples)}
    right = {label: key.is_right(each, couples.expected) for label, each in chosen.items()}
    is_changing = couples.is_changing
    accuracy = {label: mean(each[is_changing]) for label, each in right.items()}
    random = [accuracy[label] for label in controls if label.startswith("random ")]
    row: dict[str, Any] = {
        "variable": " + ".join(names),
        "sites": " + ".join(map(str, sites)),
        "n": len(couples),
        "n_units": len(set(couples.group.tolist())),
        **_shares(right[MAPPED], couples, level),
        "chance": key.chance([out for out, is_one in zip(couples.expected, is_changing, strict=True) if is_one]),
        "model": mean(np.concatenate([key.is_right(chosen[name], at[name]) for name in ("base", "source")])),
        "identity": mean(differs(chosen[IDENTITY], chosen["base"])),
        "random": float(np.mean(random)) if random else np.nan,
        "random_most": max(random, default=np.nan),
        "n_random": len(random),
        "shuffled_most": max((accuracy[f"sites of {name}"] for name in others), default=np.nan),
    }
    return row, _samples(row["variable"], couples, at, chosen, right), how


def _runs(couples: Couples) -> tuple[tuple[str, np.ndarray], ...]:
    return ("base", couples.base), ("source", couples.source)


def _shares(right: np.ndarray, couples: Couples, level: float) -> dict[str, float]:
    """Return the accuracy among changing draws and over all couples, with intervals.

    The whole weighs the two kinds of draws by how often they occur. Its interval adds up theirs, each at half the
    error rate, so that it holds at least as often as it says.
    """
    changing = couples.is_changing
    share = couples.changing_share
    own = share_interval(right[changing], couples.group[changing], level=level)
    weights = [(share, changing), *([(1 - share, ~changing)] if (~changing).any() else [])]
    careful = 1 - (1 - level) / len(weights)
    parts = [(w, share_interval(right[rows], couples.group[rows], level=careful)) for w, rows in weights]
    total = sum(weight for weight, _ in parts)

    def combined(end: str) -> float:
        return sum(weight * float(getattr(each, end)) for weight, each in parts) / total

    return {
        "changing": own.estimate,
        "low": own.low,
        "high": own.high,
        "whole": combined("estimate"),
        "whole_low": combined("low"),
        "whole_high": combined("high"),
        "changing_share": share,
    }


def _samples(
    name: str,
    couples: Couples,
    at: dict[str, list[Any]],
    chosen: dict[str, np.ndarray],
    right: dict[str, np.ndarray],
) -> "pd.DataFrame":
    """Return a row per draw: which inputs, what was expected, and what the network answered in every run."""
    columns: dict[str, Any] = {
        "variable": name,
        "base": couples.base,
        "source": couples.source,
        "group": couples.group,
        "base_output": list(map(repr, at["base"])),
        "source_output": list(map(repr, at["source"])),
        "expected": list(map(repr, couples.expected)),
        "is_changing": couples.is_changing,
    }
    columns |= {f"answer: {label}": values for label, values in chosen.items()}
    columns |= {f"right: {label}": values for label, values in right.items() if label not in ("base", "source")}
    return pd.DataFrame(columns)
