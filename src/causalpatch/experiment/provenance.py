"""The record that goes with every number of a run."""

from collections.abc import Sequence
from typing import Any

from causalpatch.engine import Target
from causalpatch.metrics import Metric
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import Intervention, Source
from causalpatch.results.provenance import MIXED

# Above this share of mirrored pairs, denoising and noising are the same numbers on the same pairs.
MIRRORED = 0.1


def describe_setup(model: Model, pairs: Pairs, metrics: Sequence[Metric], direction: str, seed: int) -> dict[str, Any]:
    """Return what an experiment is made of, as plain data."""
    mirrored = pairs.check().mirrored_share
    notes = []
    if mirrored > MIRRORED:
        notes.append(f"{mirrored:.0%} of the pairs are mirrored: the other direction is redundant by construction")
    return {
        "direction": direction,
        "model": {
            "name": model.name,
            "hash": model.content_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention": model.attention,
        },
        "pairs": {"name": pairs.name, "hash": pairs.content_hash, "n": len(pairs)},
        "metrics": [metric.name for metric in metrics],
        "higher_is_better": {metric.name: metric.is_higher_when_clean(direction) for metric in metrics},
        "engine": {"tier": "reference", "reason": "full forwards with plain hooks"},
        "seed": seed,
        "mirrored_share": mirrored,
        "notes": notes,
    }


def describe_request(
    asked: Sequence[Intervention], targets: Sequence[tuple[Target, ...]], reference: Sequence[Target], direction: str
) -> dict[str, Any]:
    """Return what was patched, with the six facts that every number needs, as plain data.

    Args:
        asked: The interventions.
        targets: Their sites.
        reference: What the fully ablated run replaces; empty where the reference is the corrupted run.
        direction: Denoise or noise.

    References:
        Miller et al. 2024, "Transformer Circuit Faithfulness Metrics are not Robust", 2407.08734.
    """
    values = ", ".join(sorted({str(patch.value) for each in asked for patch in each.patches}))
    sites = list(dict.fromkeys(str(patch.site) for each in asked for patch in each.patches))
    kinds = sorted({target.site.unit_axis or target.site.name for group in targets for target in group})
    return {
        "site": sites[0] if len(sites) == 1 else f"{sites[0]} … {sites[-1]} ({len(sites)} sites)",
        "value": values,
        "reference": _reference_text(values, targets, reference),
        "facts": {
            "granularity": ", ".join(kinds),
            "kind": "node",
            "value": values,
            "positions": _positions_text(asked),
            "direction": direction,
            "circuit": "single interventions, the rest of the run intact",
        },
    }


def _reference_text(values: str, targets: Sequence[tuple[Target, ...]], reference: Sequence[Target]) -> str:
    if not reference:
        return "corrupted run"
    has_source = any(isinstance(target.value, Source) for group in targets for target in group)
    return MIXED if has_source else f"{values} at {len(reference)} places together"


def _positions_text(interventions: Sequence[Intervention]) -> str:
    patches = [patch for each in interventions for patch in each.patches]
    if any(patch.column is not None for patch in patches):
        return "each aligned column by itself"
    return ", ".join(sorted({"all" if p.site.position is None else f"@{p.site.position}" for p in patches}))
