"""A family's table of facts, found in one real model: from a site to its tap."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from causalpatch.models.families import Absent, At, Fact, Family, Parted, ShareOf, SumOf
from causalpatch.models.taps import Port, Side, Tap
from causalpatch.models.views import BiasTerm, Columns, HeadShare, KeyRow, ModuleUnit, Sum, Whole
from causalpatch.sites.names import ATTENTION_SITES, NAMES
from causalpatch.sites.site import Site

# Inside attention: the side of the port, and for rows over keys what hidden keys read as.
_INSIDE: Mapping[str, tuple[Side, float | None]] = {
    "q_rot": ("query", None),
    "k_rot": ("key", None),
    "scores": ("scores", -math.inf),
    "pattern": ("pattern", 0.0),
}
# The site whose projection a bias belongs to.
_BIAS_OF = {"q_bias": "q", "k_bias": "k", "v_bias": "v", "attn_bias": "z", "mlp_bias": "mlp_post"}
# A family is recognised without these, and a model that lacks one has all the rest.
OPTIONAL = frozenset({"pos_embed", "mlp_pre", "mlp_gate"})


@dataclass(frozen=True)
class Place:
    """Where the parts of a family stand in a model, which may be wrapped in another.

    Args:
        base: Path of the module that holds the layers, the embedding and the final norm.
        whole: Path of the module whose output holds the logits, or None where the model has no head.
    """

    base: str
    whole: str | None


@dataclass(frozen=True)
class Numbers:
    """The counts of one model.

    Args:
        n_layers: Number of layers.
        width: Width of the stream.
        n_heads: Number of query heads.
        n_kv_heads: Number of key and value heads.
        head_width: Width of a head, as the output projection takes it.
        n_neurons: Width of the MLP, as the down projection takes it.
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    n_neurons: int


class FamilyTable:
    """The sites of one model by its family's facts.

    Args:
        family: The table of facts.
        place: Where its parts stand in the model.
        numbers: The model's counts.
        module: The model.
    """

    def __init__(self, family: Family, place: Place, numbers: Numbers, module: nn.Module) -> None:
        self.family = family
        self.place = place
        self.numbers = numbers
        self._modules = dict(module.named_modules())
        self.refused: Mapping[str, str] = dict(self._refusals())

    @property
    def units(self) -> dict[str, int]:
        """Units in a layer by axis."""
        return {"head": self.numbers.n_heads, "kv_head": self.numbers.n_kv_heads, "neuron": self.numbers.n_neurons}

    def layer_path(self, layer: int) -> str:
        """Return the path of a layer."""
        return join(self.place.base, self.family.layers, str(layer))

    def tap(self, site: Site) -> Tap:
        """Return the tap of a named site that is known to exist."""
        if site.name == "logits":
            return Tap(site, Port(self.place.whole or "", "output", ("logits",)), Whole())
        if site.name in ATTENTION_SITES:
            return self._inside(site)
        if site.name in _BIAS_OF:
            return self._bias(site)
        fact = self.family.sites[site.name]
        parent = self.place.base if site.layer is None else self.layer_path(site.layer)
        match fact:
            case At():
                return Tap(site, _port(parent, fact), Whole())
            case SumOf():
                return Tap(site, _port(parent, fact.changed), Sum(), (_port(parent, fact.kept),))
            case Parted():
                is_neuron = NAMES[site.name].unit_axis == "neuron"
                width = 1 if is_neuron else self.numbers.head_width
                view = Columns(self._start(site, fact, width), width, squeeze=is_neuron)
                return Tap(site, Port(join(parent, fact.module), fact.side), view)
            case ShareOf():
                path = join(parent, fact.module)
                width = self.numbers.head_width
                start = width * (site.unit or 0)
                weight = projection_rows(self._modules[path]).narrow(0, start, width)
                return Tap(site, Port(path, "output"), HeadShare(weight, start, width), (Port(path, "input"),))
            case Absent():
                raise LookupError(fact.reason)  # the shape of the model refuses it before

    def _start(self, site: Site, fact: Parted, width: int) -> int:
        """Return a unit's first column."""
        unit = site.unit or 0
        if fact.by_unit:
            return (unit * fact.parts + fact.part) * width
        return (fact.part * self.units[NAMES[site.name].unit_axis or ""] + unit) * width

    def _inside(self, site: Site) -> Tap:
        """Return the tap of a site inside attention, the same in all families that attend by the interface."""
        path, (side, hidden) = join(self.layer_path(site.layer or 0), attention_path(self.family)), _INSIDE[site.name]
        if hidden is None:
            return Tap(site, Port(path, side), ModuleUnit(axis=2, index=site.unit or 0))
        return Tap(site, Port(path, side), KeyRow(site.unit or 0, hidden), (Port(path, "visible"),))

    def _bias(self, site: Site) -> Tap:
        """Return the tap of the bias that a projection adds."""
        path, fact = self._projection(site.name, site.layer or 0)
        bias = self._modules[path].get_parameter("bias")
        if site.unit is None:
            return Tap(site, Port(path, "output"), BiasTerm(bias, 0))
        width = self.numbers.head_width
        start = self._start(site, fact, width)
        return Tap(site, Port(path, "output"), BiasTerm(bias.narrow(0, start, width), start))

    def _projection(self, name: str, layer: int) -> tuple[str, Parted]:
        """Return the path of the projection whose bias a site is, and how its units lie."""
        fact = self.family.sites[_BIAS_OF[name]]
        if not isinstance(fact, Parted):
            raise LookupError(name)  # refused before
        return join(self.layer_path(layer), fact.module), fact

    def _refusals(self) -> Iterator[tuple[str, str]]:
        sites = self.family.sites
        for name in NAMES:
            fact = sites.get(name)
            if isinstance(fact, Absent):
                yield name, fact.reason
            elif name == "logits" and self.place.whole is None:
                yield name, "the model has no head; open the whole model, or use final_norm"
            elif name in _BIAS_OF and (why := self._why_no_bias(name)):
                yield name, why
            elif isinstance(fact, ShareOf):
                projection = self._modules[join(self.layer_path(0), fact.module)]
                if not _is_plain(projection):
                    kind = type(projection).__name__
                    yield name, f"the output projection is {kind}, not a plain linear map; use z"
            elif name in OPTIONAL and (why := self._why_not_there(name, fact)):
                yield name, why

    def _why_no_bias(self, name: str) -> str | None:
        if not isinstance(self.family.sites[_BIAS_OF[name]], Parted):
            return f"this family has no {_BIAS_OF[name]}"
        for layer in range(self.numbers.n_layers):
            path, _ = self._projection(name, layer)
            if not isinstance(getattr(self._modules[path], "bias", None), Tensor):
                return f"{path} has no bias"
        return None

    def _why_not_there(self, name: str, fact: Fact | None) -> str | None:
        """Say why a site that not every model of a family has is not in this one, or None."""
        if fact is None:
            return "the table of this family does not name it"
        layers = range(self.numbers.n_layers) if NAMES[name].has_layer else [None]
        for layer, module in ((layer, module) for layer in layers for module in fact_modules(fact)):
            path = join(self.place.base if layer is None else self.layer_path(layer), module)
            if path not in self._modules:
                return f"there is no module {path}"
            if isinstance(fact, Parted):
                wanted = fact.parts * self.numbers.n_neurons
                width = output_width(self._modules[path])
                if width != wanted:
                    return f"{path} gives {width} columns where {wanted} were expected"
        return None


def join(*parts: str) -> str:
    """Join the parts of a module's path, leaving empty ones out."""
    return ".".join(part for part in parts if part)


def projection_rows(projection: nn.Module) -> Tensor:
    """Return a projection's weight such that ``input @ weight`` is its output without bias; axes (input, output)."""
    weight = projection.get_parameter("weight")
    return weight if isinstance(projection, Conv1D) else weight.T


def plain_rows(projection: nn.Module) -> Tensor | None:
    """Return ``projection_rows`` of a module that does nothing but multiply and add a bias, else None."""
    is_plain = type(projection) in (nn.Linear, Conv1D) and "forward" not in vars(projection)
    return projection_rows(projection) if is_plain else None


def input_width(projection: nn.Module) -> int | None:
    """Return the width of a projection's input, or None where its kind is not known."""
    if isinstance(projection, Conv1D):
        return int(projection.weight.shape[0])
    width = getattr(projection, "in_features", None)
    return width if isinstance(width, int) else None


def output_width(projection: nn.Module) -> int | None:
    """Return the width of a projection's output, or None where its kind is not known."""
    if isinstance(projection, Conv1D):
        return int(projection.weight.shape[1])
    width = getattr(projection, "out_features", None)
    return width if isinstance(width, int) else None


def attention_path(family: Family) -> str:
    """Return the path of the module around the output projection, below the layer."""
    return fact_modules(family.sites["z"])[0].rpartition(".")[0]


def fact_modules(fact: Fact) -> tuple[str, ...]:
    """Return the paths that a fact names."""
    match fact:
        case SumOf():
            return (fact.changed.module, fact.kept.module)
        case Absent():
            return ()
        case _:
            return (fact.module,)


def _port(parent: str, place: At) -> Port:
    return Port(join(parent, place.module), place.side)


def _is_plain(projection: nn.Module) -> bool:
    return isinstance(projection, nn.Linear | Conv1D) and projection.weight.is_floating_point()
