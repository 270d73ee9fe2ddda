"""Learning a subspace on some pairs and holding it to others.

1. The wanted answer of each pair is its answer, so that a loss and an accuracy are metrics as any others.
2. A rotation is learnt on the experiment's pairs (``engine.rotate``): cross-entropy of the wanted answer.
3. On held-out pairs, which share no prompt, entity or group with these, the interchange accuracy is measured, beside
   that of the whole site and of random subspaces of the same dimension.
4. The whole is done once more with the wanted answers shuffled among the pairs, on both sides: what the search gets
   out of a variable that is not there.
5. The parts of the subspace in the row space and in the null space of its reader are patched alone (``parts``).
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from causalpatch.base.errors import IllusionWarning, SettingError
from causalpatch.base.progress import bar
from causalpatch.base.seeds import generator
from causalpatch.engine import Rotation, RotationSearch, joined_site, learn_rotation
from causalpatch.experiment import Experiment
from causalpatch.metrics import cross_entropy, top1
from causalpatch.pairs import Pairs
from causalpatch.patches import FittedOn, Intervention, Patch, Subspace
from causalpatch.sites import Site, SiteSet, parse
from causalpatch.subspaces.alignment import Alignment
from causalpatch.subspaces.interchange import accuracies, aimed, marks_of, measured_on, refuse_shared
from causalpatch.subspaces.parts import measure_parts


@dataclass(frozen=True)
class SubspaceControls:
    """What a subspace that was learnt is held against.

    Args:
        n_random: Random subspaces of the same dimension.
        is_shuffled: Whether the search is made once more for shuffled wanted answers, which doubles its cost.
    """

    n_random: int = 5
    is_shuffled: bool = True


def learn_subspace(
    experiment: Experiment,
    site: str | Site | SiteSet,
    held_out: Pairs,
    *,
    dimension: int | Literal["boundless"] = 1,
    wanted: str | None = None,
    search: RotationSearch | None = None,
    controls: SubspaceControls | None = None,
) -> Alignment:
    """Learn the subspace of a site in which an interchange gives the wanted answers (distributed alignment search).

    Args:
        experiment: Model, pairs to learn on, and direction; its first metric measures the parts.
        site: One site, such as ``resid_mid.1@-1``, or all units of one layer together, such as ``mlp_post.3@-1``.
        held_out: Pairs to measure on, which share no prompt, entity or group with the others: ``pairs.split(0.5)``.
        dimension: Dimensions of the subspace; ``"boundless"`` learns them too.
        wanted: Column of the pairs that holds the wanted answer of each; by default the source's own answer.
        search: How it is searched for.
        controls: What it is held against.

    Returns:
        The subspace with its accuracy, controls, parts and history; it prints, and saves as safetensors.

    Raises:
        PairError: The two sets of pairs share something, or a column does not exist.
        AnswerError: A pair has no wanted answer, or one of several tokens.
        SettingError: The site has no subspace of this dimension.
        NotFinite: The loss is not a number.
        MemoryExhausted: One pair does not fit into memory.

    Warns:
        IllusionWarning: The subspace has its effect by way of what the model itself does not use.

    Cost:
        Per epoch a forward and a backward of every pair, and a forward more; twice that with shuffled answers. On
        held-out pairs a run for each control and part.

    References:
        Geiger et al. 2023, 2303.02536; Wu et al. 2023, 2305.08809 (boundless).
    """
    search, controls = search or RotationSearch(), controls or SubspaceControls()
    if not (dimension == "boundless" or (isinstance(dimension, int) and dimension >= 1)):
        raise SettingError(
            f"a subspace cannot have dimension {dimension!r}", fix='dimension=1, or dimension="boundless" to learn it'
        )
    marks = marks_of(experiment.pairs)
    refuse_shared(marks, experiment.pairs.name, held_out)
    place = parse(site)
    one = _one_site(experiment, place)
    learning = measured_on(experiment, aimed(experiment, wanted), cross_entropy)
    other = measured_on(experiment, held_out, experiment.metrics)
    testing = measured_on(experiment, aimed(other, wanted), top1)
    on = FittedOn(experiment.pairs.name, experiment.pairs.content_hash, len(experiment.pairs), learning.base)

    def learn(asked: Experiment) -> Rotation:
        job = asked.job([Intervention((Patch(one),))])
        n_dimensions = None if dimension == "boundless" else int(dimension)
        total = search.epochs * search.restarts
        with bar(f"learning '{place}'", total, is_shown=experiment.show_progress) as advance:
            return learn_rotation(job, cross_entropy, n_dimensions, search, experiment.seed, advance=advance)

    found = learn(learning)
    value = Subspace(found.basis, on=on)
    drawn = [Subspace(basis) for basis in _random(value.basis, controls.n_random, experiment.seed)]
    measured = accuracies(testing, [Patch(one, value), Patch(one), *(Patch(one, each) for each in drawn)])
    against = {"whole site": measured[1].share}
    if drawn:
        shares = [each.share for each in measured[2:]]
        against |= {"random subspaces": float(np.mean(shares)), "best random": max(shares)}
    if controls.is_shuffled:
        mixed = [_shuffled(each, experiment.seed) for each in (learning, testing)]
        against["shuffled"] = accuracies(mixed[1], [Patch(one, Subspace(learn(mixed[0]).basis))])[0].share
    parts = measure_parts(other, Patch(one, value), value, None)
    if parts.is_illusion:
        warnings.warn(IllusionWarning(f"the subspace of '{place}' may be an illusion: {parts.illusion}"), stacklevel=2)
    return Alignment(
        site=one,
        value=value,
        model=experiment.model.name,
        direction=experiment.direction,
        wanted=wanted or "",
        accuracy=measured[0],
        controls=against,
        parts=parts,
        epochs=found.epochs,
        settings={**asdict(search), **asdict(controls), "dimension": dimension, "seed": experiment.seed},
        marks=marks,
    )


def _one_site(experiment: Experiment, site: Site | SiteSet) -> Site | SiteSet:
    """Return the one site that a subspace can lie in: of all units of a layer their common tensor."""
    is_units = isinstance(site, SiteSet) and site.info.unit_axis is not None and isinstance(site.layer, int)
    return joined_site(experiment.model, site) if is_units else Site.parse(str(site))


def _random(basis: np.ndarray, n_draws: int, seed: int) -> Sequence[np.ndarray]:
    """Return random bases of the same shape."""
    return [generator(seed, "random subspace", number).standard_normal(basis.shape) for number in range(n_draws)]


def _shuffled(experiment: Experiment, seed: int) -> Experiment:
    """Return the same experiment with the answers of its pairs shuffled among them."""
    pairs = experiment.pairs
    order = generator(seed, "shuffled answers").permutation(len(pairs))
    return measured_on(experiment, pairs.with_answers([pairs[int(i)].answer for i in order]), experiment.metrics)
