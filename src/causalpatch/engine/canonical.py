"""Two names for one run: interventions brought to one form, and those that are the same run once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from causalpatch.engine.job import Block, Job
from causalpatch.engine.means import Means
from causalpatch.engine.resolve import Target
from causalpatch.models import Model
from causalpatch.patches import Source
from causalpatch.sites import ModuleRef, Site


@dataclass(frozen=True)
class Copies:
    """Which interventions of a job each of its different runs stands for.

    Args:
        of: For each run the interventions.
    """

    of: Sequence[np.ndarray]

    def spread(self, block: Block) -> Iterator[Block]:
        """Yield a block for all interventions that its runs stand for."""
        counts = np.array([len(self.of[i]) for i in block.interventions.tolist()])
        numbers = np.concatenate([self.of[i] for i in block.interventions.tolist()])
        each = np.repeat(np.arange(len(block.pairs)), counts)
        yield Block(numbers, block.pairs[each], block.values[:, each], block.status[each])


def without_repeats(job: Job, means: Means) -> tuple[Job, Means, Copies]:
    """Return a job of different runs, in one form each.

    The stream out of a layer is the stream into the next. All heads' ``z`` of a layer from the source run is its
    ``attn_out``, where the job asks for that too: it is known to be a function of them then.

    The controls are kept as they are, behind the rest: the identity patch must run, whatever else does.

    Args:
        job: The job.
        means: Means of its sites.

    Returns:
        The job of different runs, the means under their sites' names in it, and what each run stands for.
    """
    has_attn_out = any(target.site.name == "attn_out" for targets in job.interventions for target in targets)
    asked = [
        canonical(_as_attn_out(targets, job.model) if has_attn_out else targets, job.model)
        for targets in job.interventions
    ]
    known: dict[object, int] = {}
    of: list[list[int]] = []
    kept: list[tuple[Target, ...]] = []
    for number, targets in enumerate(asked):
        key: object = number if number >= job.n_asked else tuple(_key(target) for target in targets)
        if key not in known:
            known[key] = len(kept)
            kept.append(targets)
            of.append([])
        of[known[key]].append(number)
    reference = None if job.reference is None else next(n for n, some in enumerate(of) if job.reference in some)
    fitted = {(name, mean): held for (site, mean), held in means.of.items() for name in _names(site, job.model)}
    copies = Copies([np.array(some) for some in of])
    return replace(job, interventions=kept, reference=reference), replace(means, of=fitted), copies


def canonical(targets: tuple[Target, ...], model: Model) -> tuple[Target, ...]:
    """Return targets under the names by which they run, in the order in which they are written.

    Args:
        targets: The targets of one intervention.
        model: The model.
    """
    if all(target.site.name != "resid_post" for target in targets):
        return targets
    shared = shared_outputs(model, targets)
    late, others = [], []
    for target in targets:
        if target.site.name != "resid_post":
            others.append(target)
        elif target.site in shared:
            others.append(replace(target, site=_as_module(target.site, model)))
        else:
            late.append(replace(target, site=_late(target.site, model)))
    # What leaves a layer is written before what enters the next.
    return (*late, *others)


def _as_attn_out(targets: tuple[Target, ...], model: Model) -> tuple[Target, ...]:
    """Return ``attn_out`` instead of the source run's ``z`` of every head of a layer that is else left alone."""
    n_heads = model.shape.units.get("head", 0)
    if len(targets) < n_heads or any(t.site.layer is None or t.anchor for t in targets):
        return targets
    changed = list(targets)
    for layer in {target.site.layer for target in targets}:
        here = [target for target in targets if target.site.layer == layer]
        first = here[0]
        is_copied = isinstance(first.value, Source) and first.inside is None and first.align != "mean"
        whole = {_key(replace(first, site=Site("z", layer, head))) for head in range(n_heads)}
        if is_copied and len(here) == n_heads and {_key(target) for target in here} == whole:
            place = changed.index(first)
            changed = [target for target in changed if target.site.layer != layer]
            changed.insert(place, replace(first, site=Site("attn_out", layer)))
    return tuple(changed)


def _names(site: Site, model: Model) -> tuple[Site, ...]:
    """Return all names under which a site may run."""
    return (site, _late(site, model), _as_module(site, model)) if site.name == "resid_post" else (site,)


def _late(site: Site, model: Model) -> Site:
    """Return the stream into the next layer for the stream out of a layer that is not the last."""
    if site.layer is None or site.layer == model.shape.n_layers - 1:
        return site
    return Site("resid_pre", site.layer + 1)


def _as_module(site: Site, model: Model) -> Site:
    """Return the stream out of a layer by the name of its module: it is written there, not where it enters the next."""
    return Site("module", module=ModuleRef(model.tap(site).port.path, "output"))


def shared_outputs(model: Model, targets: Sequence[Target]) -> set[Site]:
    """Return each ``resid_post`` beside which a module's own name, or a feature, stands at the same output.

    The two are one tensor and are written there in the order in which they were named, so that neither may be written
    elsewhere.

    Args:
        model: The model.
        targets: The targets of one intervention.
    """
    streams = {t.site: model.tap(t.site).port for t in targets if t.site.name == "resid_post"}
    named = {t.site.module.path for t in targets if t.site.module is not None and t.site.module.side == "output"}
    named |= {model.tap(t.site).port.path for t in targets if t.anchor == "resid_post"}
    return {site for site, port in streams.items() if port.path in named}


def _key(target: Target) -> object:
    # Values with arrays or functions are one only if they are the same object.
    value = target.value
    by_value = type(value).__name__ in ("Source", "Zero", "Identity", "Interpolate", "Mean", "Scattered")
    place = (target.site, target.position, target.column, target.align)
    return (*place, value if by_value else id(value), target.inside)
