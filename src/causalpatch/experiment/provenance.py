"""The record that goes with every number of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine import Role, Target
from causalpatch.experiment.reference import Reference
from causalpatch.metrics import Metric
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import From, Intervention, Value

# Above this share of mirrored pairs, denoising and noising are the same numbers on the same pairs.
MIRRORED = 0.1
# From so many on, places that values are read at are not all named.
MANY = 3


def describe_pairs(pairs: Pairs) -> dict[str, Any]:
    """Return which pairs these are, as plain data."""
    return {"name": pairs.name, "hash": pairs.content_hash, "n": len(pairs)}


def describe_setup(model: Model, pairs: Pairs, metrics: Sequence[Metric], direction: str, seed: int) -> dict[str, Any]:
    """Return what an experiment is made of, as plain data."""
    generates = {metric.name: vars(metric.generates) for metric in metrics if metric.generates is not None}
    return {
        "direction": direction,
        "model": {
            "name": model.name,
            "hash": model.content_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention": model.attention,
        },
        "pairs": describe_pairs(pairs),
        "metrics": [metric.name for metric in metrics],
        "higher_is_better": {metric.name: metric.is_higher_when_clean(direction) for metric in metrics},
        **({"generates": generates} if generates else {}),
        "seed": seed,
    }


def require_same_model(model: Model, record: Mapping[str, Any], what: str) -> None:
    """Make sure that a model is the one that something was computed in.

    Args:
        model: The model.
        record: Name and hash of the one that it was computed in.
        what: What is done with the same model alone.

    Raises:
        ModelUnsupported: It has other weights.
    """
    if record["hash"] != model.content_hash:
        raise ModelUnsupported(
            what,
            facts=[
                ("of", f"'{record['name']}', weights {record['hash'][:12]}"),
                ("given", f"'{model.name}', weights {model.content_hash[:12]}"),
            ],
            fix="open that model, or score this one",
        )


def describe_source(source_model: Model | None) -> dict[str, Any]:
    """Return the model of the source runs, as plain data; nothing where it is the one that is patched."""
    if source_model is None:
        return {}
    return {"source_model": {"name": source_model.name, "hash": source_model.content_hash}}


def describe_precision(model: Model, asked: str | None) -> dict[str, Any]:
    """Return in which precision runs were made that were not screened, as plain data."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"asked": asked or "as the model is", "product": dtype}


def notes_on(pairs: Pairs, base: Role, targets: Sequence[tuple[Target, ...]]) -> list[str]:
    """Return what must be said with the numbers of a run.

    Args:
        pairs: The pairs.
        base: Which side was changed.
        targets: What was patched.
    """
    from_source = [target for group in targets for target in group if target.moves_to_source]
    notes = []
    mirrored = pairs.check().mirrored_share if from_source else 0.0
    if mirrored > MIRRORED:
        notes.append(f"{mirrored:.0%} of the pairs are mirrored: the other direction is redundant by construction")
    walked = {t.stream for t in from_source if t.needs_source and t.has_position and t.position is None}
    for alignment in (pairs.of(stream).alignment for stream in sorted(walked, key=str)):
        if alignment is None:
            continue
        unmatched = [len(tokens) for tokens in alignment.unmatched(base)]
        if any(unmatched):
            notes.append(
                f"{sum(unmatched)} tokens of {np.count_nonzero(unmatched)} base prompts have no partner in the source: "
                "they are not patched"
            )
    return notes


def describe_request(
    asked: Sequence[Intervention],
    targets: Sequence[tuple[Target, ...]],
    reference: Reference,
    direction: str,
    model: Model,
) -> dict[str, Any]:
    """Return what was patched, with the six facts that every number needs, as plain data.

    Args:
        asked: The interventions.
        targets: Their sites.
        reference: The run that shares refer to.
        direction: Denoise or noise.
        model: The model, for the dictionaries whose features are patched.

    References:
        Miller et al. 2024, "Transformer Circuit Faithfulness Metrics are not Robust", 2407.08734.
    """
    values = _values_text([patch.value for each in asked for patch in each.patches])
    sites = list(dict.fromkeys(str(patch.site) for each in asked for patch in each.patches))
    kinds = sorted({target.site.unit_axis or target.site.name for group in targets for target in group})
    return {
        "site": sites[0] if len(sites) == 1 else f"{sites[0]} … {sites[-1]} ({len(sites)} sites)",
        "value": values,
        "reference": reference.text,
        "no_share": reference.no_share,
        **_dictionaries(model, targets),
        "facts": {
            "granularity": ", ".join(kinds),
            "kind": "node",
            "value": values,
            "positions": _positions_text(asked),
            "direction": direction,
            "circuit": "single interventions, the rest of the run intact",
        },
    }


def _values_text(values: Sequence[Value]) -> str:
    """Return values in words; of many that are read elsewhere the first and the last."""
    elsewhere = list(dict.fromkeys(str(value) for value in values if isinstance(value, From)))
    others = sorted({str(value) for value in values if not isinstance(value, From)})
    shown = elsewhere if len(elsewhere) < MANY else [f"{elsewhere[0]} … {elsewhere[-1]} ({len(elsewhere)} places)"]
    return ", ".join([*shown, *others])


def _dictionaries(model: Model, targets: Sequence[tuple[Target, ...]]) -> dict[str, Any]:
    """Return the dictionaries whose features are patched, as plain data; nothing where there are none."""
    sites = (target.site for group in targets for target in group)
    used = sorted({(site.dictionary, site.layer or 0) for site in sites if site.dictionary is not None})
    return {"dictionaries": [model.dictionaries.of(*each).describe() for each in used]} if used else {}


def _positions_text(interventions: Sequence[Intervention]) -> str:
    patches = [patch for each in interventions for patch in each.patches]
    if any(patch.column is not None for patch in patches):
        return "each aligned column by itself"
    return ", ".join(sorted({"all aligned" if p.site.position is None else f"@{p.site.position}" for p in patches}))
