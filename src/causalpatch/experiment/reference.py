"""The run that shares refer to: the corrupted run for pairs, everything ablated for other values.

Patches that take their value from the source run (denoising or noising) move the base run towards the source, and a
share is a share of the gap between clean and corrupted. Ablations (zero, mean, constants, functions of the site's own
value) take the clean run apart, so a share is a share of what ablating *everything that was asked for, at once* takes
away; it needs direction "noise". Where neither fits, effects stand and shares are refused, with the reason.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from causalpatch.engine import Target
from causalpatch.patches import From, Identity
from causalpatch.results.words import PAIRED


@dataclass(frozen=True)
class Reference:
    """The reference of a run.

    Args:
        targets: What the fully ablated run replaces; empty where the reference is the corrupted run, or none is.
        text: What results call it.
        no_share: Why there are no shares, or an empty text.
    """

    targets: tuple[Target, ...]
    text: str
    no_share: str = ""


def reference_of(interventions: Sequence[tuple[Target, ...]], direction: str) -> Reference:
    """Find the reference of some interventions.

    Args:
        interventions: What is patched.
        direction: Denoise or noise.
    """
    used = [target for group in interventions for target in group if not isinstance(target.value, Identity)]
    ablated = [target for target in used if not target.moves_to_source]
    if not ablated:
        return Reference((), PAIRED)
    elsewhere = [target for target in ablated if isinstance(target.value, From)]
    if elsewhere:
        why = f"a value of '{elsewhere[0].described}' does not move a run towards the other one of its pair"
        return Reference((), "none", why)
    kinds = sorted({target.described for target in ablated})
    if len(ablated) < len(used):
        return Reference((), "none", "patches from the source and ablations have different references")
    if direction == "denoise":
        why = f'{", ".join(kinds)} takes a run apart and cannot restore one; ablate the clean run: direction="noise"'
        return Reference((), "none", why)
    if len(kinds) > 1:
        return Reference((), "none", f"ablations of different kinds have different references: {', '.join(kinds)}")
    places: dict[tuple[object, ...], set[object]] = {}
    for target in ablated:
        places.setdefault((target.site, target.position, target.column), set()).add((target.value, target.inside))
    if any(len(values) > 1 for values in places.values()):
        return Reference((), "none", "several values for one place have no reference in common")
    together = tuple({(t.site, t.position, t.column): t for t in ablated}.values())
    held = tuple(_held(interventions, places))
    if any(sum(target not in held for target in group) == len(together) for group in interventions):
        why = "one intervention ablates all that was asked for, so that its share would be 1 whatever it does"
        return Reference((), "none", why)
    return Reference((*held, *together), f"{kinds[0]} at {len(together)} places together")


def _held(interventions: Sequence[tuple[Target, ...]], ablated: Collection[tuple[object, ...]]) -> Iterator[Target]:
    """Yield what keeps the value of the base run in every intervention, such as routers: the reference keeps it too."""
    common = set.intersection(*({t for t in group if isinstance(t.value, Identity)} for group in interventions))
    for target in interventions[0]:
        if target in common and (target.site, target.position, target.column) not in ablated:
            yield target
