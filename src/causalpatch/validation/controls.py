"""Controls of a claim: what must have no effect, what must have one, and what sets like it do.

=================  ======================================================================================
control            is
=================  ======================================================================================
matched sets       other sets of the same kinds and depths: all of them where there are fewer than asked
                   for, else at least 99 drawn without replacement; descriptive
shuffled pairs     the set with the values of other pairs
identity           values put back where they were: the noise floor
whole source       the stream behind the last layer from the source: all of the gap, by construction
planted effect     each component's own spread around a share of exactly 2 delta: would it be supported?
specificity        the same components on unrelated behaviours
=================  ======================================================================================
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import CausalPatchError, NoGap, PairError, PatchError, SettingError
from causalpatch.base.seeds import generator
from causalpatch.experiment import Experiment
from causalpatch.patches import Resample, Value
from causalpatch.results.claim import TOGETHER, Check
from causalpatch.results.words import counted
from causalpatch.sites import Site
from causalpatch.statistics.intervals import MIN_GROUPS, TOO_FEW
from causalpatch.statistics.verdicts import minimum_effect
from causalpatch.validation.bench import Bench
from causalpatch.validation.components import Member, Node, Wire, siblings
from causalpatch.validation.findings import interval_rows, numbers_of, share_of

LEAST_DRAWN: Final = 99  # so that p can be .01
REACH: Final = 2  # layers, where a depth has too few others
_ENOUGH: Final = 19  # sets, so that p can be .05
_MOST_LISTED: Final = 20_000  # combinations that are written out
_TRIES: Final = 50  # draws per set that is wanted


def check_number(n_matched: int) -> None:
    """Make sure that enough matched sets are drawn, or none.

    Raises:
        SettingError: There are some, but fewer than 99.
    """
    if n_matched and n_matched < LEAST_DRAWN:
        raise SettingError(
            f"{n_matched} matched sets are too few to compare with",
            facts=[("needed", f"{LEAST_DRAWN} or more, so that p can be .01; or none")],
            fix=f"Checks(n_matched={LEAST_DRAWN})",
        )


def matched_sets(
    members: Sequence[Member], experiment: Experiment, n_sets: int
) -> tuple[list[tuple[Member, ...]], int, bool]:
    """Return sets that are like the members in kind and depth.

    Args:
        members: The set.
        experiment: For the model, and the seed of the draw.
        n_sets: How many at most.

    Returns:
        The sets, how many layers further off their members may be, and whether these are all that there are.
    """
    draw = generator(experiment.seed, "matched sets")
    found: tuple[list[tuple[Member, ...]], int, bool] = ([], 0, True)
    for reach in (0, REACH):
        pools = [[one for one in siblings(each, experiment, reach) if one not in set(members)] for each in members]
        sets, is_all = _draw_sets(pools, n_sets, draw)
        if len(sets) > len(found[0]):
            found = sets, reach, is_all
        if len(found[0]) >= _ENOUGH or all(isinstance(each, Wire) for each in members):
            break
    return found


def _draw_sets(
    pools: Sequence[Sequence[Member]], n_sets: int, draw: np.random.Generator
) -> tuple[list[tuple[Member, ...]], bool]:
    if not n_sets or not all(pools):
        return [], True
    if math.prod(map(len, pools)) <= _MOST_LISTED:
        everything = {frozenset(each): each for each in itertools.product(*pools) if len(set(each)) == len(each)}
        sets = list(everything.values())
        if len(sets) <= n_sets:
            return sets, True
        return [sets[place] for place in sorted(draw.choice(len(sets), n_sets, replace=False).tolist())], False
    made: dict[frozenset[Member], tuple[Member, ...]] = {}
    for _ in range(_TRIES * n_sets):
        one = tuple(pool[int(draw.integers(len(pool)))] for pool in pools)
        if len(set(one)) == len(one):
            made.setdefault(frozenset(one), one)
        if len(made) == n_sets:
            break
    return list(made.values()), False


def matched(bench: Bench, members: Sequence[Member], value: Value | None, found: tuple[Any, int, bool]) -> Check:
    """Compare the set with matched ones.

    Args:
        bench: Where sets are measured.
        members: The set.
        value: What is put in.
        found: What ``matched_sets`` returned.
    """
    sets, reach, is_all = found
    if not sets:
        return Check(
            "matched sets", skipped="there is nothing else of this kind in these layers, or none was asked for"
        )
    shares = share_of(bench.effects(sets, value), bench.gap())
    rows: tuple[dict[str, Any], ...] = tuple(
        {"members": " + ".join(map(str, one)), "share": float(share)}
        for one, share in zip(sets, shares, strict=True)
        if np.isfinite(share)
    )
    observed = float(share_of(bench.effects([members], value), bench.gap())[0])
    n_reaching = int(sum(abs(row["share"]) >= abs(observed) for row in rows))
    p = (1 + n_reaching) / (1 + len(rows))
    about = {"observed": observed, "p": p, "smallest_p": 1 / (1 + len(rows)), "reach": reach, "is_all": is_all}
    return Check("matched sets", rows, about)


def shuffled(bench: Bench, members: Sequence[Member], value: Value | None) -> Check:
    """Put the values of other pairs in: what is specific to a pair's own source is gone."""
    name = "shuffled pairs"
    if value is not None or isinstance(members[0], Wire):
        return Check(name, skipped="made for sites that take the whole value of the source")
    side: Any = "clean" if bench.experiment.direction == "denoise" else "corrupt"
    names, sets = with_joint(members)
    try:
        effects = bench.effects(sets, Resample(seed=bench.experiment.seed, side=side))
    except (PatchError, PairError) as error:
        return Check(name, skipped=error.what)
    shares = share_of(effects, bench.gap())
    rows = tuple({"component": one, "share": float(share)} for one, share in zip(names, shares, strict=True))
    return Check(name, rows)


def identity(bench: Bench) -> Check:
    """Say what a patch seems to do that puts back what was there."""
    floor = bench.provenance.get("noise_floor")
    if not floor:
        return Check("identity", skipped="of edges the values are computed anew")
    rows = [
        {"metric": name, "share": float(largest) / max(abs(float(bench.gap(number).mean())), 1e-300)}
        for number, (name, largest) in enumerate(floor.items())
    ]
    return Check("identity", tuple(rows[:1]))


def whole_source(bench: Bench, members: Sequence[Member]) -> Check:
    """Patch the stream behind the last layer: by construction all of the gap, where prompts are equally long."""
    name, model = "whole source", bench.experiment.model
    if bench.ablation is not None:
        return Check(name, skipped="shares are of a gap to an ablated run, which no source restores")
    if isinstance(members[0], Wire) or model.streams or not model.shape.n_layers or "resid_post" in model.shape.refused:
        return Check(name, skipped="the model has no one stream behind its last layer, or edges are meant")
    last = Node(Site("resid_post", model.shape.n_layers - 1))
    try:
        share = float(share_of(bench.effects([[last]]), bench.gap())[0])
    except CausalPatchError as error:
        return Check(name, skipped=error.what)
    return Check(name, ({"site": str(last), "share": share},))


def planted(
    names: Sequence[str], effects: np.ndarray, gap: np.ndarray, group: np.ndarray, test: dict[str, Any]
) -> Check:
    """Plant a share of exactly 2 delta into each component's own spread, and test all of them again."""
    left = effects - share_of(effects, gap)[:, None] * gap
    tested = minimum_effect(left + 2 * test["delta"] * gap, gap, group, **test)
    rows = tuple(
        {"component": name, "verdict": str(verdict)} for name, verdict in zip(names, tested.verdicts, strict=True)
    )
    return Check("planted effect", rows)


def specificity(
    members: Sequence[Member], value: Value | None, others: Sequence[Bench], test: dict[str, Any]
) -> tuple[Check, int]:
    """Measure the same components on unrelated behaviours.

    Args:
        members: The set.
        value: What is put in.
        others: Where sets are measured on the other behaviours.
        test: Of the minimum-effect test.

    Returns:
        The check, with the effects of each component on every pair (a double dissociation needs them), and how many
        runs it took.
    """
    if not others:
        return Check("specificity", skipped="no unrelated behaviour was given: confirm(…, unrelated=[experiment])"), 0
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    n_runs = 0
    names, sets = with_joint(members)
    for bench in others:
        pairs = bench.experiment.pairs
        behaviour = pairs.name
        try:
            numbers_of(bench, bench.gap()[None]).require_gap()
            effects = bench.effects(sets, value)
        except (NoGap, PairError) as error:
            rows.append({"behaviour": behaviour, "component": TOGETHER, "share": None, "problem": error.what})
            continue
        n_runs += bench.n_runs
        measured.append(
            {
                "pairs": pairs.content_hash,
                "metric": bench.experiment.metrics[0].name,
                "direction": bench.experiment.direction,
                "components": names[: len(members)],
                "effects": effects[: len(members)].tolist(),
            }
        )
        n_components = len(np.unique(bench.group))
        if n_components < MIN_GROUPS:
            shares = share_of(effects, bench.gap()).tolist()
            made = [{"share": share, "verdict": TOO_FEW} for share in shares]
        else:
            made = interval_rows(effects, bench.gap(), bench.group, test)
        about = counted(n_components, "independent component")
        rows += [
            {"behaviour": behaviour, "component": name, **row, "components": about}
            for name, row in zip(names, made, strict=True)
        ]
    return Check("specificity", tuple(rows), {"measured": measured}), n_runs


def with_joint(members: Sequence[Member]) -> tuple[list[str], list[tuple[Member, ...]]]:
    """Return each member alone, and at last all of them where there are several: names, and sets."""
    sets: list[tuple[Member, ...]] = [(each,) for each in members]
    names = list(map(str, members))
    if len(members) > 1:
        sets.append(tuple(members))
        names.append(TOGETHER)
    return names, sets
