"""A claim as a regression test: does another checkpoint still do what the claim says, on the very same pairs?

The claim's file holds its pairs, metric, direction, delta and alpha. They are measured in the new model and tested by
the same rules; it holds where every component has the verdict again that it had, on the same side. This opens nothing:
it makes no claim on the new model, and cannot take the place of one.

How far each share moved is told with an interval: both models are measured on the same pairs, so that it is a
difference within independent components, and narrower than two intervals apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import ModelUnsupported, NoGap, SettingError, StoreCorrupt
from causalpatch.base.extras import lazy
from causalpatch.experiment import Experiment
from causalpatch.metrics import Metric, named_metric
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.plain import pairs_of_plain
from causalpatch.patches.value import as_value, needs_fitting
from causalpatch.results.claim import Claim, Finding
from causalpatch.results.claim_words import sentence
from causalpatch.statistics.clusters import group_sums
from causalpatch.statistics.verdicts import INCONCLUSIVE, minimum_effect
from causalpatch.validation.bench import Bench
from causalpatch.validation.components import members_of
from causalpatch.validation.controls import with_joint
from causalpatch.validation.findings import find, numbers_of

if TYPE_CHECKING:
    import pandas as pd
    from scipy import special
else:
    pd = lazy("pandas")
    special = lazy("scipy.special")


@dataclass(frozen=True, eq=False)
class Recheck:
    """Whether a claim holds in another model.

    Args:
        holds: Whether every component has its verdict again, on the same side.
        reasons: In words: why not, or what was found again.
        rows: For each component ``share`` then and ``share_now``, ``change`` with ``low`` and ``high``, ``verdict``
            then and ``verdict_now``.
        claim: The claim.
        model: Name and hash of the new model.
    """

    holds: bool
    reasons: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    claim: Claim
    model: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """0 where the claim holds, else 1."""
        return int(not self.holds)

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per component."""
        return pd.DataFrame([dict(row) for row in self.rows])

    def __str__(self) -> str:
        head = "holds" if self.holds else "does not hold"
        lines = [f"the claim of '{self.claim.spec['model']['name']}' {head} in '{self.model['name']}'"]
        lines += [f"- {reason}" for reason in self.reasons]
        for row in self.rows:
            moved = "" if not np.isfinite(row["low"]) else f" ({row['low']:+.3f} to {row['high']:+.3f})"
            both = f"{row['share']:.3f} then, {row['share_now']:.3f} now"
            lines.append(f"  {row['component']}: {both}, change {row['change']:+.3f}{moved}")
        step = (
            "nothing: it holds"
            if self.holds
            else "find out what changed: sweep both models, or trace back checkpoints between them"
        )
        return "\n".join([*lines, f"next: {step}"])


def recheck(claim: Claim, model: Model, *, pairs: Pairs | None = None, metric: Metric | str | None = None) -> Recheck:
    """Measure a claim again in another model, by its own rules and on its own pairs.

    Args:
        claim: A claim that is supported, or absent up to delta.
        model: The other checkpoint.
        pairs: The claim's pairs, where its file could not hold them (pictures, encoders).
        metric: The claim's metric, where it is one of your own.

    Returns:
        Whether it holds, and why.

    Raises:
        SettingError: The claim is inconclusive, its metric is your own and not given, its pairs are not given and not
            in the file, or it patches a subspace or what was fitted.
        StoreCorrupt: The pairs are not those of the claim.
        ModelUnsupported: The model's tokens are others.
        SiteNotFound: A component is not in the model.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
        >>> claim = cp.confirm(experiment, ["z.3.2@-1"], ledger="openings.jsonl", checks=cp.Checks.none())
        >>> cp.recheck(claim, model).holds
        True

    Cost:
        One run per component and pair.
    """
    spec = claim.spec
    _require_decided(claim)
    held = _pairs(claim, model, pairs)
    chosen = named_metric(str(spec["metric"])) if metric is None else metric
    put = as_value(spec["put"]) if spec.get("put") else None
    bench = Bench(Experiment(model, held, chosen, spec["direction"], seed=int(spec["seed"])), put)
    members = members_of(claim.components, model)
    about = {"name": model.name, "hash": model.content_hash}
    try:
        numbers_of(bench, bench.gap()[None]).require_gap()
    except NoGap:
        sizes = f"{bench.gap().mean():.4g} now, {claim.gap.mean():.4g} then"
        reason = f"the behaviour itself is gone: no gap in {spec['metric']} between clean and corrupted runs ({sizes})"
        return Recheck(holds=False, reasons=(reason,), rows=(), claim=claim, model=about)
    names, sets = with_joint(members)
    effects, gap = bench.effects(sets, put), bench.gap()
    test = {name: spec[name] for name in ("delta", "alpha", "n_draws", "seed")}
    tested = minimum_effect(effects, gap, bench.group, **test)
    found = find(names, effects, gap, bench.group, tested, [None] * len(names))
    reasons, is_kept = [], []
    for before, after in zip(claim.findings[: len(members)], found[: len(members)], strict=True):
        is_kept.append(_is_kept(before, after))
        again = "again" if is_kept[-1] else f"not again {before.verdict}"
        reasons.append(f"{again}: {sentence(after, spec)}")
    changes = _changes(claim, effects, gap, bench.group, float(spec["alpha"]))
    rows = tuple(
        {
            "component": name,
            "share": before.share,
            "share_now": after.share,
            **change,
            "verdict": before.verdict,
            "verdict_now": after.verdict,
        }
        for name, before, after, change in zip(names, claim.findings, found, changes, strict=True)
    )
    lost = [reason for reason, kept in zip(reasons, is_kept, strict=True) if not kept]
    return Recheck(holds=not lost, reasons=tuple(lost or reasons), rows=rows, claim=claim, model=about)


def _require_decided(claim: Claim) -> None:
    if claim.reused or any(each.verdict == INCONCLUSIVE for each in claim.findings[: len(claim.components)]):
        raise SettingError(
            "an inconclusive claim says nothing that another model could be held to",
            facts=[("because", claim.reasons[0])],
            fix="confirm the components that are supported, on new pairs",
        )
    put = claim.spec.get("put")
    if claim.spec["value"] != "source" and (not put or needs_fitting(as_value(put))):
        raise SettingError(
            f"a claim of the value '{claim.spec['value']}' cannot be measured again from its file",
            facts=[("known", "source, and ablations that are fitted on nothing")],
            fix="confirm the same components with the source's whole value",
        )


def _pairs(claim: Claim, model: Model, given: Pairs | None) -> Pairs:
    """Return the claim's pairs as the model reads them."""
    spec = claim.spec["pairs"]
    if given is None and claim.held_out is None:
        raise SettingError(
            "the claim's file does not hold its pairs",
            facts=[
                ("pairs", f"'{spec['name']}', hash {spec['hash']}"),
                ("why", "they are no single prompts of tokens"),
            ],
            fix="give them: recheck(claim, model, pairs=pairs)",
        )
    pairs = given if given is not None else pairs_of_plain(claim.held_out or {}, model.tokenizer)
    if pairs.content_hash != spec["hash"]:
        raise StoreCorrupt(
            "these are not the pairs of the claim",
            facts=[("claim", f"'{spec['name']}', hash {spec['hash']}"), ("given", pairs.content_hash)],
            fix="give the pairs that it was confirmed on, in their order",
        )
    tokens = None if claim.held_out is None else claim.held_out["tokens"]
    if tokens is not None and model.tokenizer is not None and pairs.tokenizer is not None:
        now = pairs.tokens("clean", 0)
        if now != list(tokens):
            raise ModelUnsupported(
                f"'{model.name}' reads the claim's prompts as other tokens",
                facts=[("claim", " ".join(map(repr, tokens[:6]))), ("model", " ".join(map(repr, now[:6])))],
                fix="recheck it in a checkpoint with the same tokenizer",
            )
    return pairs


def _is_kept(before: Finding, after: Finding) -> bool:
    """Tell whether a component has its verdict again; where it is supported, on the same side."""
    same_side = before.share * after.share > 0
    return before.verdict == after.verdict and (same_side or before.verdict != "supported")


def _changes(
    claim: Claim, effects: np.ndarray, gap: np.ndarray, group: np.ndarray, alpha: float
) -> list[dict[str, float]]:
    """Return how far each share moved: a cluster-t interval of the difference, Bonferroni over all of them."""
    both = [(claim.effects, claim.gap), (effects, gap)]
    shares, moves = [], []
    for over, under in both:
        data = group_sums((over, under), group)
        top, bottom = data.means()
        share = top / bottom
        of_top, of_bottom = data.moves()
        shares.append(share)
        moves.append((of_top - share[:, None] * of_bottom) / bottom[:, None])
        n_groups = data.n_groups
    change = shares[1] - shares[0]
    error = np.sqrt(((moves[1] - moves[0]) ** 2).sum(-1))
    limit = special.stdtrit(np.maximum(n_groups - 1, 1), 1 - alpha / (2 * len(change)))
    return [
        {"change": float(one), "low": float(one - wide), "high": float(one + wide)}
        for one, wide in zip(change, limit * error, strict=True)
    ]
