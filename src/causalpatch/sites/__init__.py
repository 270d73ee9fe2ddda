"""Names of activations: text in, text out, and the members of a set in one model."""

from causalpatch.sites.names import NAMES, SiteName
from causalpatch.sites.select import ModelShape, check, expand
from causalpatch.sites.site import EVERY, Every, Index, ModuleRef, Position, Range, Site, SiteSet, Span, parse

__all__ = [
    "EVERY",
    "NAMES",
    "Every",
    "Index",
    "ModelShape",
    "ModuleRef",
    "Position",
    "Range",
    "Site",
    "SiteName",
    "SiteSet",
    "Span",
    "check",
    "expand",
    "parse",
]
