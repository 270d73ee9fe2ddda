"""The row space and the null space of what reads a site, and the illusion that a subspace may be.

A subspace may have an effect though the model never uses it. Let one direction be *disconnected* (nothing that reads
the site sees it) but differ between the runs, and another *dormant* (it is the same in all runs) but have an effect
when it is moved. A patch along their sum reads off the first and writes into the second: it opens a pathway that is
shut otherwise.

1. The reader is the linear map W that the site's value goes into. A direction v is the sum of v_row, in the row space
   of W, and v_null, in its null space, which W does not see.
2. The whole subspace, its part in the row space and its part in the null space are patched alone. An honest subspace
   keeps its effect without its null part. If less than half of the effect is left, it is flagged.
3. Where some of the site's own numbers (neurons) go nowhere, their rows of W being 0, the subspace without these is
   patched too, and flagged likewise: with a reader of few outputs the row space mixes what is used with what is
   dormant.

Assumptions: what reads the site is W alone. A norm between the two is left out.

References:
    Makelov, Lange & Nanda 2023, "Is This the Subspace You Are Looking for? An Interpretability Illusion for Subspace
    Activation Patching", 2311.17030.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from causalpatch.base.errors import IllusionWarning, SettingError
from causalpatch.engine import moves_of, paths_that_read
from causalpatch.experiment import Experiment
from causalpatch.models import Reader, named_reader, reader_of
from causalpatch.patches import Intervention, Patch, Subspace
from causalpatch.sites import Site, SiteSet

LEFT = 0.5
"""A subspace whose part in the row space has less than this share of its effect is flagged."""
MORE = 1.5
"""A subspace that does so many times what the whole site does is remarked on."""
MEANINGFUL = 0.1
"""An effect of less than this share of the gap between the runs is none to be explained."""
NOTHING = 1e-6
"""A part shorter than this is rounding; directions have length 1."""

Name = Literal["site", "subspace", "row", "null", "connected"]
_WORDS: Mapping[Name, str] = {
    "subspace": "the subspace",
    "row": "its part in the row space",
    "null": "its part in the null space",
    "connected": "without numbers that go nowhere",
    "site": "the whole site",
}


@dataclass(frozen=True)
class Part:
    """A part of a subspace, patched alone.

    Args:
        share: Share of the subspace's squared length that lies in it; the shares of row and null space add up to 1.
        effect: Mean change of the metric; 0 where nothing lies in it, so that nothing was run.
        moves: How far the site moves along it between base and source run: root mean square.
    """

    share: float
    effect: float
    moves: float


@dataclass(frozen=True)
class Parts:
    """What lies of a subspace in the row space and in the null space of its reader, and what each part does.

    Args:
        site: The site.
        reader: The linear maps that read it; empty where none is known.
        rank: Rank of the reader; 0 where there is none.
        width: Numbers per token.
        metric: What effects are changes of.
        gap: Mean metric of the source run minus that of the base run.
        of: Parts by name: ``"subspace"`` (the whole of it), ``"row"``, ``"null"``, ``"connected"``, ``"site"``; of
            these the middle three only where there is a reader.
        illusion: Why the subspace is flagged as an illusion; empty where it is not.
        on: Name of the pairs.
    """

    site: str
    reader: str
    rank: int
    width: int
    metric: str
    gap: float
    of: Mapping[str, Part]
    illusion: str
    on: str

    @property
    def is_illusion(self) -> bool:
        """Whether the subspace has its effect by way of what the model itself does not use."""
        return bool(self.illusion)

    @property
    def excess(self) -> float:
        """Effect of the subspace over that of the whole site; NaN where the whole site has none."""
        site = self.of["site"].effect
        return self.of["subspace"].effect / site if site else float("nan")

    def __str__(self) -> str:
        reader = (
            f"{self.reader} (rank {self.rank} of {self.width})" if self.reader else "none known: name it with reader="
        )
        lines = [
            f"read by  {reader}",
            f"effects are changes of {self.metric} on '{self.on}'; the gap between the runs is {self.gap:.4g}",
            f"{'':32}  {'share':>6}  {'effect':>9}  {'moves':>9}",
        ]
        for name, words in _WORDS.items():
            part = self.of.get(name)
            if part is not None:
                share = f"{'':6}" if name == "site" else f"{part.share:6.3f}"
                lines.append(f"{words:32}  {share}  {part.effect:9.4g}  {part.moves:9.4g}")
        said = (
            "cannot be tested without a reader"
            if not self.reader
            else "none seen: the effect stays without the null part"
        )
        if self.reader and not self.illusion and abs(self.of["subspace"].effect) < MEANINGFUL * abs(self.gap):
            said = "nothing to test: the subspace has next to no effect"
        lines.append(f"illusion: {'YES, ' + self.illusion if self.illusion else said}")
        if self.excess > MORE:
            lines.append(f"beware: the subspace alone does {self.excess:.1f} times what the whole site does")
        return "\n".join(lines)


def subspace_parts(
    experiment: Experiment, site: str | Site | SiteSet, subspace: Subspace, *, reader: str | None = None
) -> Parts:
    """Say what of a subspace what reads the site can see, and whether its effect is an illusion.

    Args:
        experiment: Model, pairs, metric and direction; take pairs that the subspace was not found on.
        site: Where the subspace lies.
        subspace: The subspace.
        reader: Path of the linear map that reads the site. By default the output projection of ``z``; the maps behind
            the norm that follows for the residual stream and what is added to it; else every linear map whose input is
            the site's own tensor.

    Raises:
        SettingError: The reader is not a linear map of the site's width, or the patch is not of one site.
        PatchError: The subspace does not have the site's value axes.

    Warns:
        IllusionWarning: The subspace has its effect by way of what the model itself does not use.

    Cost:
        Up to five patched runs per pair, four for the untouched runs, and a singular value decomposition of the reader.

    References:
        Makelov, Lange & Nanda 2023, 2311.17030.
    """
    found = measure_parts(experiment, Patch(site, subspace), subspace, reader)
    if found.is_illusion:
        warnings.warn(
            IllusionWarning(f"the subspace of '{found.site}' may be an illusion: {found.illusion}"), stacklevel=2
        )
    return found


def measure_parts(experiment: Experiment, patch: Patch, subspace: Subspace, reader: str | None) -> Parts:
    """Return the parts of a subspace; see ``subspace_parts``."""
    job = experiment.job([Intervention((patch,))])
    if len(job.interventions[0]) != 1:
        raise SettingError(
            f"'{patch.site}' names {len(job.interventions[0])} sites, and a subspace lies in one",
            fix="name one layer, and one unit or a basis with an axis for all of its units",
        )
    (target,) = job.interventions[0]
    moves = moves_of(job, target)
    reads = _reader_of(experiment, patch, target.site, subspace.rows.shape[1], reader)
    bases: dict[str, np.ndarray] = {"subspace": subspace.rows}
    if reads is not None:
        rows, connected = _spaces(reads)
        inside = subspace.rows @ rows @ rows.T
        bases |= {"row": inside, "null": subspace.rows - inside}
        if (np.linalg.norm(subspace.rows[:, ~connected], axis=1) > NOTHING).any():
            bases["connected"] = subspace.rows * connected
    spans = {name: _span(basis) for name, basis in bases.items()}
    effects = _effects(experiment, patch, subspace, spans)
    base = experiment.baseline.corrupt if experiment.base == "corrupt" else experiment.baseline.clean
    source = experiment.baseline.clean if experiment.base == "corrupt" else experiment.baseline.corrupt
    parts = {
        name: Part(float((basis**2).sum() / subspace.dimension), effects[name], _length(moves @ spans[name].T))
        for name, basis in bases.items()
    }
    parts["site"] = Part(float("nan"), effects["site"], _length(moves))
    gap = float(source[0].mean() - base[0].mean())
    return Parts(
        site=str(patch.site),
        reader=reads.text if reads else "",
        rank=0 if reads is None else rows.shape[1],
        width=subspace.rows.shape[1],
        metric=experiment.metrics[0].name,
        gap=gap,
        of=parts,
        illusion=_illusion(parts, gap),
        on=experiment.pairs.name,
    )


def _reader_of(experiment: Experiment, patch: Patch, site: Site, width: int, asked: str | None) -> Reader | None:
    """Return who reads a site: who was named, who the facts say, or who is seen to."""
    model = experiment.model
    if asked is not None:
        return named_reader(model, asked, width)
    known = reader_of(model, site) if site.module is None else None
    if known is not None:
        return known
    paths = paths_that_read(experiment.job([Intervention((patch,))]), site)
    readers = [named_reader(model, path, width) for path in paths]
    if not readers:
        return None
    weight = np.concatenate([reader.weight.numpy() for reader in readers], axis=1)
    return replace(readers[0], text=" and ".join(paths), weight=readers[0].weight.new_tensor(weight))


def _spaces(reader: Reader) -> tuple[Float[np.ndarray, "width rank"], np.ndarray]:
    """Return an orthonormal basis of what a reader sees, and which of the site's numbers go anywhere."""
    weight = reader.weight.numpy()
    left, sizes, _ = np.linalg.svd(weight, full_matrices=False)
    least = sizes.max(initial=0.0) * max(weight.shape) * reader.precision
    connected: np.ndarray = np.abs(weight).max(axis=1) > least
    return left[:, sizes > least], connected


def _span(basis: Float[np.ndarray, "direction width"]) -> Float[np.ndarray, "dimension width"]:
    """Return an orthonormal basis of what some directions span; directions that are rounding span nothing."""
    _, sizes, right = np.linalg.svd(basis, full_matrices=False)
    kept: np.ndarray = right[sizes > NOTHING]
    return kept


def _effects(
    experiment: Experiment, patch: Patch, subspace: Subspace, spans: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Return the mean effect of each part patched alone; of an empty one 0."""
    shape = subspace.basis.shape[1:]
    asked = {name: replace(subspace, basis=basis.reshape(-1, *shape)) for name, basis in spans.items() if len(basis)}
    patches = [Patch(patch.site, value, patch.align, patch.column) for value in (*asked.values(), subspace.of)]
    names = [*asked, "site"]
    effects = experiment.run(patches, axes={"intervention": names}).effect()
    values: Sequence[float] = np.asarray(effects.values, dtype=np.float64).reshape(-1, len(names))[0].tolist()
    return dict.fromkeys(spans, 0.0) | dict(zip(names, values, strict=True))


def _length(moves: Float[np.ndarray, "element dimension"]) -> float:
    return float(np.sqrt((moves**2).sum(1).mean())) if len(moves) else float("nan")


def _illusion(parts: Mapping[str, Part], gap: float) -> str:
    """Return why a subspace is an illusion; empty where it is not, or where there is no effect to explain."""
    whole = parts["subspace"].effect
    if "row" not in parts or abs(whole) < MEANINGFUL * abs(gap) or whole == 0:
        return ""
    for name, what in (("row", "its part in the row space alone"), ("connected", "without numbers that go nowhere")):
        part = parts.get(name)
        if part is not None and part.effect / whole < LEFT:
            lost = parts["null"].share if name == "row" else 1 - part.share
            return (
                f"{what} has {part.effect / whole:.0%} of the effect; the effect needs the {lost:.0%} of the subspace "
                "that nothing reads, which opens a dormant pathway"
            )
    return ""
