"""The record that goes with every number of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from causalpatch.engine import Target
from causalpatch.patches import Intervention
from causalpatch.results.provenance import record

if TYPE_CHECKING:
    from causalpatch.experiment.experiment import Experiment


def provenance_of(
    experiment: "Experiment",
    asked: Sequence[Intervention],
    targets: Sequence[tuple[Target, ...]],
    reference: Sequence[Target],
) -> dict[str, Any]:
    """Return how the numbers of a run come to be, as plain data.

    Args:
        experiment: The experiment.
        asked: The interventions.
        targets: Their sites.
        reference: What the fully ablated run replaces; empty where the reference is the corrupted run.
    """
    values = sorted({str(patch.value) for each in asked for patch in each.patches})
    sites = list(dict.fromkeys(str(patch.site) for each in asked for patch in each.patches))
    kinds = sorted({target.site.unit_axis or target.site.name for group in targets for target in group})
    model, pairs = experiment.model, experiment.pairs
    mirrored = pairs.check().mirrored_share
    notes = []
    if mirrored > 0.1:
        notes.append(f"{mirrored:.0%} of the pairs are mirrored: the other direction is redundant by construction")
    return record(
        {
            "granularity": ", ".join(kinds),
            "kind": "node",
            "value": ", ".join(values),
            "positions": _positions_text(asked),
            "direction": experiment.direction,
            "circuit": "single interventions, the rest of the run intact",
        },
        site=sites[0] if len(sites) == 1 else f"{sites[0]} … {sites[-1]} ({len(sites)} sites)",
        direction=experiment.direction,
        value=", ".join(values),
        reference=f"{', '.join(values)} at {len(reference)} places together" if reference else "corrupted run",
        model={
            "name": model.name,
            "hash": model.content_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention": model.attention,
        },
        pairs={"name": pairs.name, "hash": pairs.content_hash, "n": len(pairs)},
        metrics=[metric.name for metric in experiment.metrics],
        higher_is_better={metric.name: metric.higher_is_better for metric in experiment.metrics},
        engine={"tier": "reference", "reason": "full forwards with plain hooks"},
        seed=experiment.seed,
        mirrored_share=mirrored,
        notes=notes,
    )


def _positions_text(interventions: Sequence[Intervention]) -> str:
    patches = [patch for each in interventions for patch in each.patches]
    if any(patch.column is not None for patch in patches):
        return "each aligned column by itself"
    return ", ".join(sorted({"all" if p.site.position is None else f"@{p.site.position}" for p in patches}))
