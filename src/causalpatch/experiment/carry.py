"""Values carried from one run into another: read in a patched run, put in as given, pair by pair.

``Experiment.run`` takes values from the untouched source run. Where the source is a *patched* run itself, such as in
causal scrubbing, its values are read first and then put into the next run.
"""

from collections.abc import Sequence

import numpy as np

from causalpatch.base.errors import PairError, PatchError
from causalpatch.engine import Placer, read_patched, targets_of
from causalpatch.experiment.experiment import Experiment
from causalpatch.experiment.requests import Request
from causalpatch.patches import Fitted, FittedOn, Intervention, Patch
from causalpatch.sites import Site

GIVEN = "given values"


def read_values(
    experiment: Experiment, sites: Sequence[Site], intervention: Request | None = None
) -> list[list[np.ndarray]]:
    """Return what sites hold in a patched run of every pair.

    Args:
        experiment: Model, pairs and direction; which side is patched is the direction's affair.
        sites: The sites, each at the positions that it names.
        intervention: What is patched in the run; nothing by default.

    Returns:
        For each site a list with the values of each pair, ``(element, *value_axes)`` in the order of its tokens, or
        ``(*value_axes)`` for sites without positions.

    Raises:
        SiteNotFound: A site is not in the model.
        PairError: A pair lacks a position that is patched or read.

    Cost:
        One full forward per pair, and one more where the patches read the base run.
    """
    written = [] if intervention is None else [Intervention.of(intervention)]
    reading = Intervention(tuple(Patch(site, "identity") for site in sites))
    read = targets_of(experiment.model, reading)
    experiment.job([reading])  # proves the sites that are read
    return read_patched(experiment.job(written), read)


def put_values(experiment: Experiment, site: Site, values: Sequence[np.ndarray], how: str = GIVEN) -> Patch:
    """Return a patch that gives every pair values of its own.

    Args:
        experiment: Model, pairs and direction. Each pair has a ``group`` of its own, by which its values are found.
        site: The site, at the positions that are written in the base's prompt.
        values: The values of each pair, as ``read_values`` returns them.
        how: How results call them.

    Raises:
        PairError: Pairs share a group, or have none.
        PatchError: A pair has more or fewer tokens there than values.
    """
    pairs = experiment.pairs
    groups = [pair.group for pair in pairs]
    names = tuple(group for group in groups if group is not None)
    if len(set(names)) < len(pairs):
        raise PairError(
            f"pairs of '{pairs.name}' cannot be told apart to be given values of their own",
            facts=[("pairs", len(pairs)), ("different groups", len(set(names)))],
            fix="give each pair a group of its own in the column group",
        )
    base = experiment.base
    on = FittedOn(pairs.name, pairs.content_hash, len(pairs), base)
    (target,) = targets_of(experiment.model, Intervention((Patch(site, "identity"),)))
    if not target.has_position:
        return Patch(site, Fitted(np.stack(list(values)), how, on, groups=names))
    places = Placer(pairs, base).places(target, range(len(pairs)))
    shape = np.asarray(values[0]).shape[1:]
    table = np.full((len(pairs), int(pairs.of(target.stream).lengths(base).max()), *shape), np.nan)
    for number, (place, value) in enumerate(zip(places, values, strict=True)):
        n_tokens = 0 if place is None else len(place.base)
        if place is None or n_tokens != len(value):
            raise PatchError(
                f"values of {len(value)} tokens cannot be put at {n_tokens} tokens of '{site}'",
                facts=[("pair", f"{number} of '{pairs.name}'")],
                fix="name one token, such as @-1, or a span that is equally long in all prompts",
            )
        table[number, place.base] = value
    return Patch(site, Fitted(table, how, on, by_position=True, groups=names))
