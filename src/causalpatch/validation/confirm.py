"""Confirmation: components that were found before are tested on pairs that the search never saw.

1. Refuse what cannot become a claim: fewer than 10 independent components of pairs, pairs that discovery saw, no gap.
2. Fix the spec, and look its pairs up in the ledger of opened ones; the opening is written down before the claim is
   handed out.
3. Measure every component, and all together, on every pair; test them all at once against ``delta``
   (``statistics.verdicts``): the error rate is spent here, once, over everything that was sent.
4. Measure controls, and what tells how far the claim reaches.
5. Say it in fixed words, with what limits it.

Cost: for k components one run per pair for each, one for the set, k (k - 1) / 2 for interactions, 99 for matched sets,
two for each other of the kinds (64 at most), and 3 (k + 1) for doses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.base.spec import content_hash
from causalpatch.experiment import Experiment
from causalpatch.experiment.provenance import MIRRORED
from causalpatch.experiment.subset import with_pairs
from causalpatch.metrics import Metric
from causalpatch.pairs import Pairs
from causalpatch.pairs.plain import plain_pairs
from causalpatch.patches import Constant, Noise, Subspace, Value, Zero
from causalpatch.patches.value import spell
from causalpatch.results.claim import REUSED, Check, Claim, Finding
from causalpatch.results.claim_words import NEVER_SAID
from causalpatch.results.words import counted, percent
from causalpatch.statistics.clusters import group_sums
from causalpatch.statistics.permutation import smallest_p
from causalpatch.statistics.together import simulated_family_coverage
from causalpatch.statistics.verdicts import GROUPS_FOR_MAX_T, INCONCLUSIVE, MinimumEffect, minimum_effect
from causalpatch.validation import controls, interplay, sensitivity
from causalpatch.validation.bench import Bench
from causalpatch.validation.components import Asked, Member, Wire, closed_in, delta_of, members_of, origin_of, shares_of
from causalpatch.validation.findings import find, numbers_of
from causalpatch.validation.held_out import require_apart, require_enough, require_other
from causalpatch.validation.ledger import Ledger, model_hash
from causalpatch.validation.put import put_of

RULES = "minimum effect beyond delta, max-T over whole components of pairs, skew-adjusted Fieller intervals; 1"


@dataclass(frozen=True)
class Checks:
    """Which controls and further looks a claim gets.

    Args:
        n_matched: Matched sets at most; 99 or more, or none.
        n_others: Other components that are measured again with the set ablated, at most.
        most_interactions: Members above which no pairs of them are measured.
        doses: Shares of the way from base to source.
        metrics: Further metrics; by default those that read the same answers.
        corruptions: Values for ablations; by default other pairs' values, and means fitted on the discovery pairs.
        n_draws: Random flips of whole components of pairs.
    """

    n_matched: int = controls.LEAST_DRAWN
    n_others: int = 64
    most_interactions: int = 8
    doses: tuple[float, ...] = (0.25, 0.5, 0.75)
    metrics: tuple[Metric | str, ...] | None = None
    corruptions: tuple[Value | str, ...] | None = None
    n_draws: int = 9999

    @classmethod
    def none(cls) -> "Checks":
        """Return no control that costs a run; the claim says which were left out."""
        return cls(n_matched=0, n_others=0, most_interactions=0, doses=(), metrics=(), corruptions=())

    def most_runs(self, n_members: int, n_pairs: int, *, n_discovery: int = 0, n_unrelated: int = 0) -> int:
        """Return how many runs a claim takes at most: sets that are alike run once, and some controls may not apply.

        Args:
            n_members: Components that are confirmed.
            n_pairs: Held-out pairs.
            n_discovery: Pairs that the components were found on.
            n_unrelated: Pairs of unrelated behaviours.
        """
        n_sets = n_members + (n_members > 1)  # each alone, and all together
        each = n_sets + self.n_matched + len(self.doses) * n_sets
        if n_members <= self.most_interactions:
            each += n_members * (n_members - 1) // 2
        if self.n_matched or self.doses:
            each += n_sets + 1 + n_members  # shuffled pairs, the whole source, straight to the logits
        if self.n_others:
            each += 1 + 2 * self.n_others
        n_values = (2 if n_discovery else 1) if self.corruptions is None else len(self.corruptions)
        return each * n_pairs + n_values * (n_sets * n_pairs + n_discovery) + n_sets * n_unrelated


def confirm(  # noqa: PLR0913 - what is claimed, on what evidence, by which rules; each has a default
    experiment: Experiment,
    components: Asked,
    *,
    delta: float | None = None,
    alpha: float = 0.05,
    found_on: Experiment | Pairs | None = None,
    unrelated: Sequence[Experiment | Pairs] = (),
    value: Value | str | None = None,
    checks: Checks | None = None,
    ledger: str | Any | None = None,
) -> Claim:
    """Test on held-out pairs whether components restore (remove) more than ``delta`` of the gap, as a claim.

    Args:
        experiment: The model, the held-out pairs, the metric (of several the first is claimed) and the direction.
        components: Sites or edges, their texts, ``effects.top(k)`` of a sweep on discovery pairs, or what has
            ``components``, such as a localisation.
        delta: Share of the gap that does not count yet; .1 by default, of neurons, features and edges .02.
        alpha: Probability that even one component is wrongly called supported.
        found_on: The pairs, or the experiment, that the components were found on.
        unrelated: Other behaviours on which the components should do nothing: experiments, or pairs for this metric.
        value: What is put in: the source's value, or a ``Subspace`` of it. In the direction noise also an ablation:
            ``"zero"``, a number, ``"mean"``, ``"resample"`` or ``"noise"``; shares are then of the gap between the
            clean run and the run in which all attention and MLPs have such values. Means and the width of noise are
            fitted on the discovery pairs.
        checks: Which controls are made; all by default.
        ledger: File of the openings of held-out pairs, or a ``Ledger``; the user's own by default.

    Returns:
        The claim. Its verdict is *supported*, *absent up to delta* or *inconclusive*, with the reason.

    Raises:
        PairError: There are fewer than 10 independent components of pairs; the search saw some of them; or a value was,
            or would be, fitted on them.
        NoGap: Clean and corrupted runs do not differ enough, so a share means nothing.
        SiteNotFound: A component is not in the model.
        SettingError: No component is named, one twice, delta or alpha is impossible, no share can be given of the
            value, or the ledger cannot be written.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> discovery, held_out = cp.load_pairs("ioi", model).split()
        >>> found = cp.sweep(cp.Experiment(model, discovery), "z@-1").top(2)
        >>> claim = cp.confirm(cp.Experiment(model, held_out), found, found_on=discovery, ledger="openings.jsonl",
        ...                    checks=cp.Checks.none())
        >>> claim.verdict, claim.supported
        ('supported', ['z.3.2@-1', 'z.3.1@-1'])

    Cost:
        See the module.

    References:
        Zhang & Nanda 2024, 2309.16042 (patching practice); Westfall & Young 1993 (max-T); Murphy & Myors 1999
        (minimum-effect tests).
    """
    checks = checks or Checks()
    members = members_of(components, experiment.model)
    delta = delta_of(members) if delta is None else delta
    discovery = found_on.pairs if isinstance(found_on, Experiment) else found_on
    origin = origin_of(components)
    put, is_ablation = put_of(value, experiment, members)
    controls.check_number(checks.n_matched)
    n_components = require_enough(experiment.pairs, alpha)
    if origin is not None:
        require_other(experiment.pairs, origin)
    if discovery is not None:
        require_apart(experiment.pairs, discovery)
    if put is not None:
        sensitivity.require_not_fitted_here(put, experiment.pairs, discovery)
    others = [each if isinstance(each, Experiment) else with_pairs(experiment, each) for each in unrelated]
    asked = sensitivity.with_more_metrics(experiment, checks.metrics)
    bench = Bench(asked, put if is_ablation else None, discovery)
    numbers_of(bench, bench.gap()[None]).require_gap()
    test: dict[str, Any] = {"delta": float(delta), "alpha": alpha, "n_draws": checks.n_draws, "seed": experiment.seed}
    minimum_effect(bench.gap()[None], bench.gap(), bench.group, **test)  # refuses an impossible delta or alpha
    spec = _spec(bench, members, put, n_components, test, discovery, origin)
    book = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
    opened = book.opened(experiment)

    names, sets = controls.with_joint(members)
    alike = controls.matched_sets(members, experiment, checks.n_matched)
    bench.measure([*sets, *interplay.pairs_within(members, checks.most_interactions), *alike[0]], put)
    effects = bench.effects(sets, put)
    tested = minimum_effect(effects, bench.gap(), bench.group, **test)
    shares = shares_of(components, members)
    findings = find(names, effects, bench.gap(), bench.group, tested, [*shares, *[None] * (len(names) - len(shares))])
    if opened:
        findings = [_reused(each) for each in findings]
    made, n_more = _checks(bench, members, put, checks, alike, others, discovery, test)
    made.insert(0, controls.planted(names, effects, bench.gap(), bench.group, test))
    book.write(experiment, content_hash(spec))  # at last: where something failed before, nobody has seen a number
    return Claim(
        spec=spec,
        findings=tuple(findings),
        effects=effects,
        gap=bench.gap(),
        group=bench.group.astype(np.int64),
        pair_ids=tuple(experiment.pairs.ids),
        checks=tuple(made),
        limits=tuple(_limits(bench, tested, discovery or origin, [*closed_in(components)], made)),
        reused={name: len(held) for name, held in opened.items()},
        record={**bench.provenance, "n_runs": bench.n_runs + n_more, "ledger": book.place},
        held_out=plain_pairs(experiment.pairs),
    )


def _spec(
    bench: Bench,
    members: Sequence[Member],
    value: Value | None,
    n_components: int,
    test: dict[str, Any],
    discovery: Pairs | None,
    origin: Any,
) -> dict[str, Any]:
    """Return what is asked, before any number is seen."""
    experiment = bench.experiment
    model, pairs = experiment.model, experiment.pairs
    found = None if discovery is None else {"name": discovery.name, "hash": discovery.content_hash, "n": len(discovery)}
    if found is None and origin is not None:
        found = {name: origin.get(name) for name in ("name", "hash", "n")}
    inside = {"subspace": value.hash} if isinstance(value, Subspace) else {}
    inside |= {} if value is None or bench.ablation is None else {"reference": bench.reference, "put": spell(value)}
    return {
        "components": list(map(str, members)),
        "kind": "edges" if isinstance(members[0], Wire) else "sites",
        "value": "source" if value is None else str(value),
        **inside,
        "metric": experiment.metrics[0].name,
        "direction": experiment.direction,
        **test,
        "smallest_p": max(smallest_p(n_components), 1 / (test["n_draws"] + 1)),
        "unit": "connected component of the pair graph",
        "rules": RULES,
        "model": {"name": model.name, "hash": model_hash(experiment)},
        "pairs": {"name": pairs.name, "hash": pairs.content_hash, "n": len(pairs), "n_components": n_components},
        "found_on": found,
    }


def _checks(  # noqa: PLR0913 - everything that was measured and asked for meets here
    bench: Bench,
    members: Sequence[Member],
    value: Value | None,
    checks: Checks,
    alike: Any,
    others: Sequence[Experiment],
    discovery: Pairs | None,
    test: dict[str, Any],
) -> tuple[list[Check], int]:
    """Return the controls and further looks, and how many runs they took beside the bench's own."""
    wants_runs = checks.n_matched or checks.doses
    turned = [each if bench.ablation is None else each.turned(bench.experiment.direction) for each in others]
    apart = [Bench(each, bench.ablation, discovery) for each in turned]
    specific, n_specific = controls.specificity(members, value, apart, test)
    backup, n_backup = interplay.backup(bench, members, value, checks.n_others, test)
    corrupted, n_corrupted = sensitivity.other_corruptions(bench, members, checks.corruptions, discovery, test)
    left_out = "left out: Checks.none()"
    made = [
        controls.matched(bench, members, value, alike),
        controls.shuffled(bench, members, value) if wants_runs else Check("shuffled pairs", skipped=left_out),
        controls.identity(bench),
        controls.whole_source(bench, members) if wants_runs else Check("whole source", skipped=left_out),
        specific,
        interplay.interactions(bench, members, value, checks.most_interactions, test),
        backup,
        interplay.direct_and_indirect(bench, members, value, test)
        if wants_runs
        else Check("direct and indirect", skipped=left_out),
        sensitivity.other_metrics(bench, members, value, test),
        corrupted,
        sensitivity.dose_response(bench, members, checks.doses if value is None else (), test),
    ]
    return made, n_specific + n_backup + n_corrupted


def _reused(finding: Finding) -> Finding:
    """Return a finding on pairs that were opened before: it cannot be supported, nor absent."""
    return Finding(**{**vars(finding), "verdict": INCONCLUSIVE, "why": REUSED})


def _limits(
    bench: Bench, tested: MinimumEffect, origin: object, closed: Sequence[str], made: Sequence[Check]
) -> list[str]:
    """Return what must be said with a claim."""
    limits = []
    rough = tested.is_approximate
    if rough.any():
        counts = group_sums((bench.gap(),), bench.group).counts[0]
        holds = simulated_family_coverage(counts.astype(int).tolist(), len(rough), level=1 - tested.alpha)
        few = f"fewer than {GROUPS_FOR_MAX_T} independent components, or these are skewed"
        limits.append(
            f"approximate: {few}, for {int(rough.sum())} of {counted(len(rough), 'share')}; intervals no wider than "
            f"these hold together in {percent(round(holds, 3))} of simulations of normal and exponential values"
        )
    if origin is None:
        limits.append(
            "where the components were found was not said (found_on=): if that was on these pairs, the claim is void"
        )
    mirrored = bench.experiment.pairs.check().mirrored_share
    if mirrored > MIRRORED:
        limits.append(
            f"{mirrored:.0%} of the pairs are mirrored: the other direction is redundant by construction, and no claim "
            "of it"
        )
    if isinstance(bench.ablation, Zero | Constant | Noise):
        limits.append(
            f"'{bench.ablation}' is none of the model's own values: shares hold what such a value does by itself too"
        )
    limits += [str(note) for note in bench.provenance.get("notes", ()) if "mirrored" not in str(note)]
    limits += closed
    missing = [each.name for each in made if each.skipped]
    if missing:
        limits.append(f"not made: {', '.join(missing)}")
    return [*limits, NEVER_SAID]
