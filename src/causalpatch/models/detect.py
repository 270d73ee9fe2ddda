"""Which family a model belongs to: by its configuration, else by the names of its modules, else none.

1. Every configuration inside the model (its own, or that of a model wrapped in it) is looked at; one whose
   ``model_type`` a family lists, and whose values fit the family's ``when``, decides, provided that the modules which
   the family's table names are there.
2. Otherwise the module names are compared with every family's table. Only if all are there, and a layer holds nothing
   else, is the family taken over; the model is then marked as *assumed*, since equal names do not prove equal
   arithmetic (Granite has Llama's names and scales what it adds to the stream).
3. Otherwise the model is generic, and the closest family is proposed in words: "7 of 9 names match llama".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from causalpatch.models.families import FAMILIES, Family, Parted
from causalpatch.models.pictures import Grid
from causalpatch.models.table import (
    OPTIONAL,
    FamilyTable,
    Numbers,
    Place,
    attention_path,
    fact_modules,
    input_width,
    join,
    output_width,
)

# What the part is called that reads and writes texts, in models that are given more.
_LANGUAGE = ("language_model", "text_model")
# Configuration entries that scale what a sublayer adds to the stream; 1 or absent in every family of the tables.
_STREAM_SCALES = ("residual_multiplier", "residual_scale", "scale_depth", "skip_connection_multiplier")


@dataclass(frozen=True)
class Finding:
    """What was found about a model's family.

    Args:
        table: The family's table, found in the model, or None for a generic model.
        source: What decided: the configuration, the names of the modules, or nothing.
        note: A line for the reader.
        towers: The tables of a model that is given pictures, by stream: ``"vision"``, and ``"text"`` of one that
            compares them with texts.
    """

    table: FamilyTable | None
    source: Literal["config", "structure", "none"]
    note: str
    towers: Mapping[str, FamilyTable] = field(default_factory=dict)


def find_family(module: nn.Module) -> Finding:
    """Find the family of a model.

    Args:
        module: The model, possibly wrapped in another module.

    Returns:
        The finding. Its note says why no family was found, and which one comes closest.
    """
    names = frozenset(name for name, _ in module.named_modules())
    found: dict[bool, FamilyTable] = {}  # of what is given pictures, and of what is not
    reasons = []
    for config in _configs(module):
        for family in FAMILIES:
            is_known = getattr(config, "model_type", None) in family.model_types and _fits(family, config)
            if not is_known or (family.pictures is not None) in found:
                continue
            table = _bind(family, config, module, names)
            if isinstance(table, FamilyTable):
                found[family.pictures is not None] = table
            else:
                reasons.append(table)
    if not found:
        return _by_structure(module, names, reasons)
    vision, other = found.get(True), found.get(False)
    if vision is None or other is None:
        towers = {} if vision is None else {"vision": vision}
    elif other.family.is_compared:
        towers = {"vision": vision, "text": other}
    else:
        towers = {"vision": _as_far_as_read(vision, module)}
    main = vision if other is None or "text" in towers else other
    return Finding(main, "config", _said(main, module), towers)


def _said(table: FamilyTable | None, module: nn.Module) -> str:
    if table is None:
        return ""
    types = (getattr(config, "model_type", None) for config in _configs(module))
    named = next(name for name in types if name in table.family.model_types)
    return f"{table.family.name}: the configuration says {named!r}"


def _as_far_as_read(vision: FamilyTable, module: nn.Module) -> FamilyTable:
    """Leave out the last layers of a vision tower, which run though nothing reads them."""
    read = next((n for c in _configs(module) if (n := getattr(c, "vision_feature_layer", None)) is not None), None)
    if read is None:
        return vision
    n_layers = vision.numbers.n_layers
    behind = [place if place >= 0 else n_layers + 1 + place for place in ([read] if isinstance(read, int) else read)]
    return vision.up_to(min(n_layers, max(behind)), module)


def _by_structure(module: nn.Module, names: frozenset[str], reasons: list[str]) -> Finding:
    config = next(_configs(module), None)
    closest, share = "", 0.0
    for family in FAMILIES:
        if family.needs_config:
            continue
        found, wanted = _count_names(family, names)
        obstacle = _obstacle(family, module, config, names) if found == wanted else ""
        if found == wanted and not obstacle:
            table = _bind(family, config, module, names)
            if isinstance(table, FamilyTable):
                return Finding(table, "structure", f"{family.name}: assumed, all {wanted} names match")
            reasons.append(table)
        if found / wanted > share:
            share = found / wanted
            closest = f"{found} of {wanted} names match {family.name}" + (f", but {obstacle}" if obstacle else "")
    return Finding(None, "none", "; ".join(["no known family", *dict.fromkeys(reasons), *filter(None, [closest])]))


def _configs(module: nn.Module) -> Iterator[object]:
    """Yield the configurations in the model, outermost first."""
    seen = set()
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and not isinstance(config, nn.Module | Mapping) and id(config) not in seen:
            seen.add(id(config))
            yield config


def _fits(family: Family, config: object) -> bool:
    return all(getattr(config, key, value) == value for key, value in family.when.items())


def _obstacle(family: Family, module: nn.Module, config: object, names: frozenset[str]) -> str:
    """Say what stands against taking a family over though all its names match; empty if nothing does."""
    for name in _STREAM_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"{name} is {getattr(config, name)}"
    for key, value in family.when.items():
        if getattr(config, key, None) != value:
            return f"{key} is not {value}"
    _, inside = _wanted(family)
    known = {path.partition(".")[0] for path in inside} | set(family.extras)
    layer = module.get_submodule(join(_bases(family, names)[0], family.layers, "0"))
    more = [name for name, _ in layer.named_children() if name not in known]
    # Weights of the layer's or the attention's own act where no module's name shows it (Doge scales its residuals so).
    for part in (layer, layer.get_submodule(attention_path(family))):
        more += [name for name, _ in part.named_parameters(recurse=False)]
    return f"a layer also has {more[0]!r}" if more else ""


def _bases(family: Family, names: frozenset[str]) -> list[str]:
    """Return the paths below which the family's list of layers stands, outermost first."""
    first = join(family.layers, "0")
    found = [name[: -len(first)].rstrip(".") for name in names if name == first or name.endswith(f".{first}")]
    if family.stream:  # the other stream's layers have the same name
        found = [base for base in found if base.rpartition(".")[2] == family.base.rpartition(".")[2]]
    return sorted(found, key=lambda base: (base.count("."), base))


def _wanted(family: Family) -> tuple[frozenset[str], frozenset[str]]:
    """Return the module paths that the family's table names: below the base, and below each layer."""
    outside, inside = {family.layers}, set(family.norms)
    outside |= set() if family.pictures is None else {family.pictures.patches}
    for name, fact in family.sites.items():
        if name in OPTIONAL:
            continue
        (outside if name in ("embed", "final_norm") else inside).update(fact_modules(fact))
    return frozenset(outside), frozenset(inside - {""})


def _count_names(family: Family, names: frozenset[str]) -> tuple[int, int]:
    """Return how many of the names in the family's table the model has, and how many there are."""
    outside, inside = _wanted(family)
    best = 0
    for base in _bases(family, names):
        found = sum(join(base, name) in names for name in outside)
        best = max(best, found + sum(join(base, family.layers, "0", name) in names for name in inside))
    return best, len(outside) + len(inside)


def _bind(family: Family, config: object, module: nn.Module, names: frozenset[str]) -> FamilyTable | str:
    """Find the family's parts in the model and read its counts; a text says what does not fit."""
    encoder = None if family.encoder is None else _bind(family.encoder, config, module, names)
    if isinstance(encoder, str):
        return encoder
    outside, inside = _wanted(family)
    reasons: list[str] = []
    for base in _bases(family, names):
        layers = module.get_submodule(join(base, family.layers))
        n_layers = len(list(layers.children()))
        expected = {join(base, name) for name in outside}
        expected |= {join(base, family.layers, str(layer), name) for layer in range(n_layers) for name in inside}
        missing = sorted(expected - names)
        if missing:
            reasons.append(f"{family.name} was expected, but there is no module {missing[0]!r}")
            continue  # another part of the model may have layers of the same name
        numbers = _count(family, config, module, join(base, family.layers, "0"), n_layers)
        if isinstance(numbers, str):
            return numbers
        return FamilyTable(family, Place(base, _whole(family, base, names)), numbers, module, encoder)
    reasons.append(f"{family.name} was expected, but there is no module {join(family.base, family.layers)!r}")
    return reasons[0]


def _whole(family: Family, base: str, names: frozenset[str]) -> str | None:
    """Return the path of the module whose output holds the logits."""
    heads = (family.head, *family.other_heads)
    if base.rpartition(".")[2] in _LANGUAGE:  # a part of a model that is given more than texts
        parts = base.split(".")[:-1]
        around = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
        return next((outer for outer in around if any(join(outer, head) in names for head in heads)), None)
    if base != family.base and not base.endswith(f".{family.base}"):
        return None
    outer = base[: -len(family.base)].rstrip(".")
    return outer if any(join(outer, head) in names for head in heads) else None


def _count(family: Family, config: object, module: nn.Module, layer: str, n_layers: int) -> Numbers | str:
    """Read the counts from the configuration and hold them against the projections' real widths."""
    width, n_heads = getattr(config, family.width, None), getattr(config, family.heads, None) if family.heads else 0
    if not (isinstance(width, int) and isinstance(n_heads, int)):
        return f"{family.name} fits, but no configuration gives {family.width} and {family.heads}"
    n_kv_heads = getattr(config, family.kv_heads, None) if isinstance(family.kv_heads, str) else family.kv_heads
    # Some configurations leave the number of kv heads out where it is that of the heads.
    n_kv_heads = n_kv_heads if isinstance(n_kv_heads, int) and n_heads else n_heads
    columns: dict[str, int] = {}
    for name, fact in family.sites.items():
        if isinstance(fact, Parted) and name not in OPTIONAL:
            place = module.get_submodule(join(layer, fact.module))
            columns[name] = (input_width if fact.side == "input" else output_width)(place) or 0
    head_width, rest = divmod(columns.get("z", 0), max(1, n_heads))
    if rest or not all(columns.get(name, 1) for name in ("z", "mlp_post")):
        return f"{family.name} fits, but its projections do not divide into {n_heads} heads"
    query_width = sum(int(getattr(config, name, 0)) for name in family.query_width) or head_width
    embedding = module.get_submodule(join(_base_of(layer, family), *fact_modules(family.sites["embed"])))
    embed_width = getattr(embedding, "embedding_dim", width)
    neurons = columns.get("mlp_post", 0)
    first = 1 + getattr(config, family.positions_behind) if family.positions_behind else 0
    grid = None if family.pictures is None else Grid.of(family.pictures, config)
    numbers = Numbers(n_layers, width, n_heads, n_kv_heads, head_width, neurons, query_width, embed_width, first, grid)
    return _why_columns_differ(family, numbers, columns) or numbers


def _base_of(layer: str, family: Family) -> str:
    return layer[: -len(join(family.layers, "0"))].rstrip(".")


def _why_columns_differ(family: Family, numbers: Numbers, columns: Mapping[str, int]) -> str | None:
    """Say which projection does not have the columns that its heads need, or None."""
    own, shared = numbers.n_heads, numbers.n_kv_heads
    whole = (own * numbers.query_width, shared * numbers.query_width, shared * numbers.head_width)
    for name, expected in zip("qkv", whole, strict=True):
        fact = family.sites[name]
        if not isinstance(fact, Parted):
            continue
        # Of two parts in one tensor, keys and values, the key's may be narrower than the query.
        fits = columns[name] > expected if fact.parts == 2 else columns[name] == expected
        if fact.parts == 3:
            expected, fits = sum(whole), columns[name] == sum(whole)
        if not fits:
            return f"{family.name} fits, but {name} comes in {columns[name]} columns where {expected} were expected"
    return None
