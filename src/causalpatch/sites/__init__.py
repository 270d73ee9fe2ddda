"""Names of activations: text in, text out, and the members of a set in one model."""

from causalpatch.sites.edges import Edge, Path, Receiver, expand_receivers, expand_senders, parse_receiver
from causalpatch.sites.names import NAMES, SiteName
from causalpatch.sites.select import ModelShape, check, expand
from causalpatch.sites.site import EVERY, Every, Index, ModuleRef, Position, Range, Site, SiteSet, Span, parse

__all__ = [
    "EVERY",
    "NAMES",
    "Edge",
    "Every",
    "Index",
    "ModelShape",
    "ModuleRef",
    "Path",
    "Position",
    "Range",
    "Receiver",
    "Site",
    "SiteName",
    "SiteSet",
    "Span",
    "check",
    "expand",
    "expand_receivers",
    "expand_senders",
    "parse",
    "parse_receiver",
]
