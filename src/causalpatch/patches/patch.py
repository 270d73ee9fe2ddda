"""A patch is a site and where its new value comes from; an intervention is the patches made in one run."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from causalpatch.base.errors import PatchError
from causalpatch.patches.fixed import Source
from causalpatch.patches.value import Value, as_value
from causalpatch.sites import Site, SiteSet, parse

Alignment = Literal["first", "last", "mean"]


@dataclass(frozen=True)
class Patch:
    """A site and its new value.

    Args:
        site: What is replaced: a site or a set of sites, or its text. All sites of a set are replaced in the same run.
        value: The new value: ``Source()`` (default), ``Identity()``, ``Interpolate(alpha)``, ``Zero()``,
            ``Constant(array)``, ``Function(f)``, ``Mean()``, ``Resample()``, ``Noise()``, ``Steer(vector)``,
            ``ProjectOut(direction)``, ``Subspace(basis)``, ``From(site)`` or ``Fitted``; or its text, such as
            ``"zero"`` or ``"interpolate(0.5)"``, or a number.
        align: How positions meet when the site's span has different lengths in base and source: ``"first"`` and
            ``"last"`` use as many tokens as the shorter has, from that end; ``"mean"`` writes the mean of the
            source's tokens into each of the base's.
        column: The aligned column of the pairs to patch, instead of a position in the site. Sweeps over
            ``position`` use it, so that pairs of different lengths meet in one column.

    Raises:
        PatchError: The value or the alignment is unknown, or both a position and a column are given.

    Examples:
        >>> str(Patch("z.9.6@-1"))
        'z.9.6@-1 <- source'
        >>> str(Patch("mlp_out.3", "zero"))
        'mlp_out.3 <- zero'
    """

    site: Site | SiteSet
    value: Value = field(default_factory=Source)
    align: Alignment | None = None
    column: int | None = None

    def __init__(
        self,
        site: Site | SiteSet | str,
        value: Value | str | float | None = None,
        align: Alignment | None = None,
        column: int | None = None,
    ) -> None:
        object.__setattr__(self, "site", parse(site) if isinstance(site, str) else site)
        object.__setattr__(self, "value", Source() if value is None else as_value(value))
        object.__setattr__(self, "align", align)
        object.__setattr__(self, "column", column)
        if align not in (None, "first", "last", "mean"):
            raise PatchError(
                f"there is no alignment {align!r}", facts=[("known", "first, last, mean")], fix='write align="first"'
            )
        if column is not None and self.site.position is not None:
            raise PatchError(
                f"patch '{self.site}' has a position and an aligned column",
                facts=[("position", self.site.position), ("column", column)],
                fix="give one of them",
            )

    def __str__(self) -> str:
        column = "" if self.column is None else f"@column {self.column}"
        return f"{self.site}{column} <- {self.value}"


@dataclass(frozen=True)
class Intervention:
    """The patches that are made in one run.

    Args:
        patches: At least one patch.
        label: How results call it; by default the sites, joined by `` + ``.
    """

    patches: tuple[Patch, ...]
    label: str = ""

    def __post_init__(self) -> None:
        if not self.patches:
            raise PatchError("an intervention without patches", fix="name at least one site, such as 'z.9.6@-1'")
        if not self.label:
            object.__setattr__(self, "label", " + ".join(_short(patch) for patch in self.patches))

    @classmethod
    def of(
        cls, request: "Intervention | Patch | Site | SiteSet | str | Iterable[Patch | Site | SiteSet | str]"
    ) -> "Intervention":
        """Make an intervention from a patch, a site, a site's text, or several of them for one run.

        Raises:
            PatchError: The request is none of these.
        """
        if isinstance(request, Intervention):
            return request
        if isinstance(request, Patch | Site | SiteSet | str):
            return cls((_as_patch(request),))
        if isinstance(request, Iterable):
            return cls(tuple(_as_patch(item) for item in request))
        raise PatchError(
            f"{repr(request)[:60]} is not an intervention",
            facts=[("type", type(request).__name__)],
            fix="give a Patch, a site such as 'z.9.6@-1', or a list of them",
        )

    def __str__(self) -> str:
        return self.label


def _as_patch(request: object) -> Patch:
    if isinstance(request, Patch):
        return request
    if isinstance(request, Site | SiteSet | str):
        return Patch(request)
    raise PatchError(
        f"{repr(request)[:60]} is not a patch",
        facts=[("type", type(request).__name__)],
        fix="give a Patch or a site such as 'z.9.6@-1'",
    )


def _short(patch: Patch) -> str:
    column = "" if patch.column is None else f"@{patch.column}"
    suffix = "" if isinstance(patch.value, Source) else f" <- {patch.value}"
    return f"{patch.site}{column}{suffix}"
