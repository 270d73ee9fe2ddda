"""A family's table of facts, found in one real model: from a site to its tap."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from causalpatch.models.experts import EXPERT_SITES, NO_EXPERTS, ExpertTerm, count_experts, layers_without
from causalpatch.models.families import (
    NO_CROSS,
    Absent,
    At,
    Fact,
    Family,
    Parted,
    Positional,
    RoutedBy,
    ShareOf,
    SumOf,
    TermOf,
)
from causalpatch.models.pictures import Grid, PositionTerm
from causalpatch.models.taps import Port, Side, Tap
from causalpatch.models.views import BiasTerm, Columns, HeadShare, KeyRow, ModuleUnit, Scaled, Sum, View, Whole
from causalpatch.sites.names import ATTENTION_SITES, CROSS_SITES, NAMES
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
OPTIONAL = frozenset({"pos_embed", "mlp_pre", "mlp_gate"}) | EXPERT_SITES


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
        n_heads: Number of query heads; 0 where there are none that are known by name, as of all that follow.
        n_kv_heads: Number of key and value heads.
        head_width: Width of a head, as the output projection takes it.
        n_neurons: Width of the MLP, as the down projection takes it.
        query_width: Width of a head's query, and of the key that it meets.
        embed_width: Width of the token embedding.
        first_position: The id of the first token's position.
        grid: The tokens that it makes of pictures, where these are what it is given.
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    n_neurons: int
    query_width: int
    embed_width: int
    first_position: int = 0
    grid: Grid | None = None

    def sizes(self, name: str) -> dict[str, int]:
        """Return the sizes of the axes of a site's value.

        Args:
            name: The site's name.
        """
        width = self.embed_width if name == "embed" else self.width
        return {"width": width, "head_width": self.query_width if name[0] in "qk" else self.head_width}


class FamilyTable:
    """The sites of one model by its family's facts.

    Args:
        family: The table of facts.
        place: Where its parts stand in the model.
        numbers: The model's counts.
        module: The model.
        encoder: For a decoder that reads an encoder, the sites of that.
    """

    def __init__(
        self,
        family: Family,
        place: Place,
        numbers: Numbers,
        module: nn.Module,
        encoder: "FamilyTable | None" = None,
    ) -> None:
        self.family = family
        self.encoder = encoder
        self.place = place
        self.numbers = numbers
        self._modules = dict(module.named_modules())
        self._layers = {layer: self.layer_path(layer) for layer in range(numbers.n_layers)}
        places = [fact for fact in family.sites.values() if isinstance(fact, At | Parted) and fact.is_folded]
        self._folded = {join(path, fact.module): path for fact in places for path in self._layers.values()}
        facts = {name: fact for name in EXPERT_SITES if isinstance(fact := family.sites.get(name), RoutedBy | TermOf)}
        self.lacking: Mapping[str, Mapping[int, str]] = {
            name: layers_without(fact, self._layers, self._modules) for name, fact in facts.items()
        }
        experts = facts.get("expert_out")
        self.n_experts = count_experts(experts, self._layers, self._modules) if isinstance(experts, TermOf) else 0
        self.refused: Mapping[str, str] = dict(self._refusals())

    def up_to(self, n_layers: int, module: nn.Module) -> "FamilyTable":
        """Return the table of the first layers alone."""
        return FamilyTable(self.family, self.place, replace(self.numbers, n_layers=n_layers), module, self.encoder)

    @property
    def units(self) -> dict[str, int]:
        """Units in a layer by axis, so far as there are any."""
        found = {"head": self.numbers.n_heads, "kv_head": self.numbers.n_kv_heads, "neuron": self.numbers.n_neurons}
        found |= {"expert": self.n_experts}
        return {axis: count for axis, count in found.items() if count}

    def layer_path(self, layer: int) -> str:
        """Return the path of a layer."""
        return join(self.place.base, self.family.layers, str(layer))

    def rows_of(self, path: str) -> Port | None:
        """Return what has the rows and positions of a module that lays them into one axis; None for any other."""
        layer = self._folded.get(path)
        return None if layer is None else Port(layer, "input")

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
                view: View = Scaled(self._factor(parent, fact)) if fact.times else Whole()
                return Tap(site, _port(parent, fact), view)
            case SumOf():
                total = Sum(self._factor(parent, fact.changed))
                return Tap(site, _port(parent, fact.changed), total, (_port(parent, fact.kept),))
            case Parted():
                is_neuron = NAMES[site.name].unit_axis == "neuron"
                width = 1 if is_neuron else self.numbers.sizes(site.name)["head_width"]
                columns = Columns(self._start(site, fact, width), width, squeeze=is_neuron)
                return Tap(site, _port(parent, fact), columns)
            case ShareOf():
                path = join(parent, fact.module)
                width = self.numbers.head_width
                start = width * (site.unit or 0)
                weight = projection_rows(self._modules[path]).narrow(0, start, width)
                return Tap(site, Port(path, "output"), HeadShare(weight, start, width), (Port(path, "input"),))
            case RoutedBy():
                return Tap(site, Port(join(parent, fact.module), "routes", like=Port(parent, "input")), Whole())
            case Positional():
                path, grid = join(parent, fact.module), self.numbers.grid
                n_without = grid.n_registers if grid else 0
                placed = PositionTerm(self._modules[path], fact.parameter, n_without, fact.is_without)
                return Tap(site, Port(path, "output"), placed)
            case TermOf():
                path, like = join(parent, fact.module), Port(parent, "input")
                goes_in = (Port(path, "input", like=like), Port(join(parent, fact.router), "routes", like=like))
                term = ExpertTerm(self._modules[path], site.unit or 0)
                return Tap(site, Port(path, "output", like=like), term, goes_in)
            case Absent():
                raise LookupError(fact.reason)  # the shape of the model refuses it before

    def _start(self, site: Site, fact: Parted, width: int) -> int:
        """Return a unit's first column."""
        unit, n_units = site.unit or 0, self.units[NAMES[site.name].unit_axis or ""]
        if fact.parts == 3 and self.numbers.n_kv_heads:
            return _start_of_three(fact, unit, self.numbers.n_heads, self.numbers.n_kv_heads) * width
        if fact.by_unit:
            # The parts of a unit may differ in width: a part is as far from the end of its unit as others come behind.
            stretch = (output_width(self._modules[join(self.layer_path(0), fact.module)]) or 0) // n_units
            return unit * stretch + (stretch - width if fact.part == fact.parts - 1 else fact.part * width)
        return (fact.part * n_units + unit) * width

    def _factor(self, layer: str, fact: At) -> float:
        """Return what the model multiplies a tensor by before it adds it to the stream."""
        return float(getattr(self._modules[layer], fact.times)) if fact.times else 1.0

    def _inside(self, site: Site) -> Tap:
        """Return the tap of a site inside attention, the same in all families that attend by the interface."""
        within = self.family.cross if site.name in CROSS_SITES else attention_path(self.family)
        path, (side, hidden) = join(self.layer_path(site.layer or 0), within), _INSIDE[site.name.removeprefix("cross_")]
        if hidden is None:
            return Tap(site, Port(path, side), ModuleUnit(axis=2, index=site.unit or 0))
        return Tap(site, Port(path, side), KeyRow(site.unit or 0, hidden), (Port(path, "visible"),))

    def _bias(self, site: Site) -> Tap:
        """Return the tap of the bias that a projection adds."""
        fact = self.family.sites[_BIAS_OF[site.name]]
        if not isinstance(fact, Parted):
            raise LookupError(site.name)  # refused before
        port = replace(_port(self.layer_path(site.layer or 0), fact), side="output")
        bias = self._modules[port.path].get_parameter("bias")
        if site.unit is None:
            return Tap(site, port, BiasTerm(bias, 0))
        width = self.numbers.sizes(site.name)["head_width"]
        start = self._start(site, fact, width)
        return Tap(site, port, BiasTerm(bias.narrow(0, start, width), start))

    def _refusals(self) -> Iterator[tuple[str, str]]:
        sites = self.family.sites
        no_heads = sites["z"].reason if isinstance(sites["z"], Absent) else ""
        for name in NAMES:
            fact = sites.get(name)
            if isinstance(fact, Absent):
                yield name, fact.reason
            elif name in CROSS_SITES and not self.family.cross:
                yield name, NO_CROSS.reason
            elif name == "logits" and self.place.whole is None:
                yield name, "the model has no head; open the whole model, or use final_norm"
            elif name in ATTENTION_SITES and no_heads:
                yield name, no_heads
            elif name in _BIAS_OF and (why := self._why_no_bias(name)):
                yield name, why
            elif isinstance(fact, ShareOf):
                paths = (join(self.layer_path(layer), fact.module) for layer in range(self.numbers.n_layers))
                if why := next(filter(None, (why_not_plain(self._modules[path]) for path in paths)), None):
                    yield name, f"the output projection {why}; use z"
            elif name in OPTIONAL and (why := self._why_not_there(name, fact)):
                yield name, why

    def _why_no_bias(self, name: str) -> str | None:
        fact = self.family.sites[_BIAS_OF[name]]
        if isinstance(fact, Absent):
            return fact.reason
        (module,) = fact_modules(fact)
        paths = [join(self.layer_path(layer), module) for layer in range(self.numbers.n_layers)]
        bare = [path for path in paths if not isinstance(getattr(self._modules[path], "bias", None), Tensor)]
        return f"{module if bare == paths else bare[0]} has no bias" if bare else None

    def _why_no_experts(self, name: str, fact: Fact | None) -> str | None:
        if fact is None or len(self.lacking[name]) == self.numbers.n_layers:
            return NO_EXPERTS
        if name == "expert_out" and not self.n_experts:
            return "how many experts its layers have is not known; use router or mlp_out"
        return None

    def _why_not_there(self, name: str, fact: Fact | None) -> str | None:
        """Say why a site that not every model of a family has is not in this one, or None."""
        if name in EXPERT_SITES:
            return self._why_no_experts(name, fact)
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
    return projection_rows(projection) if is_plain and why_not_plain(projection) is None else None


def plain_widths(projection: nn.Module) -> tuple[int, int] | None:
    """Return the widths of what a module takes and gives that does nothing but multiply and add a bias, else None.

    Unlike for ``plain_rows``, its weights need not be there just now.
    """
    is_plain = type(projection) in (nn.Linear, Conv1D) and "forward" not in vars(projection)
    if not is_plain or why_not_plain(projection, may_be_away=True) is not None:
        return None
    rows, columns = projection_rows(projection).shape
    return rows, columns


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
    """Return the path of the module that attends, below the layer; the layer's own where none is named."""
    return family.attention or next(iter(fact_modules(family.sites["z"])), "").rpartition(".")[0]


def fact_modules(fact: Fact) -> tuple[str, ...]:
    """Return the paths that a fact names."""
    match fact:
        case SumOf():
            return (fact.changed.module, fact.kept.module)
        case TermOf():
            return (fact.module, fact.router)
        case Absent():
            return ()
        case _:
            return (fact.module,)


def _port(layer: str, place: At | Parted) -> Port:
    return Port(join(layer, place.module), place.side, like=Port(layer, "input") if place.is_folded else None)


def _start_of_three(fact: Parted, unit: int, n_heads: int, n_kv_heads: int) -> int:
    """Return where a head's queries, keys or values begin in a tensor of all three, in heads."""
    if not fact.by_unit:
        return (0, n_heads, n_heads + n_kv_heads)[fact.part] + unit
    n_group = n_heads // n_kv_heads
    if fact.part == 0:
        group, member = divmod(unit, n_group)
        return group * (n_group + 2) + member
    return unit * (n_group + 2) + n_group + fact.part - 1


def why_not_plain(projection: nn.Module, *, may_be_away: bool = False) -> str | None:
    """Say why a projection is not a plain product with weights that can be read, as of quantised ones; else None.

    Args:
        projection: The module.
        may_be_away: Whether its weights may be elsewhere between runs.
    """
    if not (isinstance(projection, nn.Linear | Conv1D) and projection.weight.is_floating_point()):
        kind = type(projection)
        name = kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__name__}"
        return f"is {name}, not a plain linear map"
    if type(projection.weight) not in (nn.Parameter, Tensor):
        return f"has weights of a kind of their own, {type(projection.weight).__name__}"
    is_away = projection.weight.is_meta and not may_be_away
    return "has its weights elsewhere between runs" if is_away else None
