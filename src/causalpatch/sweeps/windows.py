"""Windows of layers and sets of sites: what is patched together in one run.

One site at a time misses what several do together: a layer restores little where the next ones undo it, and two heads
that stand in for each other both look unimportant. So

- ``window`` names the sites of neighbouring layers, and ``sweep(…, window=10)`` slides it over the layers;
- ``together`` makes one intervention of a set, ``everything_but`` names its complement, and ``joint`` measures a found
  set alone, together, and everything but it.
"""

from collections.abc import Sequence

from causalpatch.base.errors import SettingError
from causalpatch.experiment import Experiment
from causalpatch.models import Model
from causalpatch.patches import Intervention, Patch, Value
from causalpatch.results.effects import Effects
from causalpatch.sites import Site, SiteSet, expand, parse
from causalpatch.sweeps.grid import layers_around


def window(model: Model, site: str | Site | SiteSet, layer: int, size: int) -> list[Site]:
    """Return the sites of neighbouring layers.

    As in causal tracing, a window of ``size`` layers begins ``size // 2`` before its middle and is cut off at the first
    and the last layer: of 10 around layer 7 it is layers 2 to 11.

    Args:
        model: The model.
        site: A site of every layer, such as ``"mlp_out"``, ``"attn_out@subject"`` or ``"z.*.3"``.
        layer: The middle.
        size: Layers in a window that is not cut off.

    Raises:
        SettingError: The site has no layers, the model no such layer, or the window no size.
        SiteNotFound: The site is not in the model.

    Examples:
        >>> import causalpatch as cp
        >>> [str(site) for site in cp.window(cp.open_model("zoo:stories"), "mlp_out@-1", 1, 3)]
        ['mlp_out.0@-1', 'mlp_out.1@-1', 'mlp_out.2@-1']
    """
    wanted = parse(site) if isinstance(site, str) else site
    if not wanted.info.has_layer:
        raise SettingError(f"'{wanted}' has no layers to slide a window over", fix='window(model, "mlp_out", 3, 5)')
    members = expand(wanted, model.shape)
    layers = sorted({each.layer for each in members if each.layer is not None})
    if layer not in layers:
        raise SettingError(
            f"there is no window around layer {layer} of '{wanted}'",
            facts=[("layers", f"{layers[0]} to {layers[-1]}")],
            fix="name one of these",
        )
    chosen = layers_around(layer, size)
    return [each for each in members if each.layer in chosen]


def together(
    sites: Sequence[str | Site | SiteSet], value: Value | str | float | None = None, label: str = ""
) -> Intervention:
    """Return one intervention that patches a set of sites in one run, all with the same value.

    Args:
        sites: The sites.
        value: The new value, the source run's by default; see ``Patch``.
        label: How results call it; by default the sites.

    Raises:
        PatchError: There are no sites.

    Examples:
        >>> str(together(["z.2.1@-1", "z.3.0@-1"], "zero"))
        'z.2.1@-1 <- zero + z.3.0@-1 <- zero'
    """
    return Intervention(tuple(Patch(site, value) for site in sites), label)


def everything_but(
    model: Model, sites: Sequence[str | Site | SiteSet], of: Sequence[str | Site | SiteSet] | None = None
) -> list[Site]:
    """Return all sites of some kinds but those that are named.

    Args:
        model: The model.
        sites: What is left out.
        of: What there is, such as ``["z", "mlp_out"]``; by default all sites of the kinds that are named.

    Returns:
        The others, at the position that the named ones have.

    Raises:
        SettingError: The sites stand at several positions, are not among ``of``, or leave nothing.
        SiteNotFound: A site is not in the model.

    Examples:
        >>> import causalpatch as cp
        >>> len(cp.everything_but(cp.open_model("zoo:stories"), ["z.2.1@-1", "z.3@-1"]))
        11
    """
    named = [each for site in sites for each in expand(_parsed(site), model.shape)]
    positions = list(dict.fromkeys(str(each.position) for each in named))
    if len(positions) != 1:
        raise SettingError(
            f"the complement of sites at {len(positions)} positions is not one set",
            facts=[("positions", ", ".join(positions) or "no sites")],
            fix="name sites at one position, or at none for all positions",
        )
    kinds = of if of is not None else list(dict.fromkeys(map(_kind_of, named)))
    position = named[0].position
    whole = [each for kind in kinds for each in expand(_parsed(kind).at(position), model.shape)]
    strange = next((each for each in named if each not in set(whole)), None)
    if strange is not None:
        raise SettingError(
            f"'{strange}' is not among what there is to choose from",
            facts=[("of", ", ".join(map(str, kinds)))],
            fix=f'add it: of=[…, "{strange.name}"]',
        )
    others = [each for each in whole if each not in set(named)]
    if not others:
        raise SettingError(
            f"everything but all {len(named)} sites is nothing",
            facts=[("of", ", ".join(map(str, kinds)))],
            fix='name fewer, or say of what: of=["z", "mlp_out"]',
        )
    return others


def joint(
    experiment: Experiment,
    sites: Sequence[str | Site | SiteSet],
    value: Value | str | float | None = None,
    *,
    of: Sequence[str | Site | SiteSet] | None = None,
) -> Effects:
    """Patch a found set: each of its sites alone, all together, and everything but the set.

    Effects of single sites do not add up where sites stand in for each other or cancel. Ablated together
    (``value="mean"``, direction noise), what the set removes says whether it is needed, and what everything but the
    set leaves says whether it suffices.

    Args:
        experiment: Model, pairs, metrics and direction.
        sites: The set.
        value: The new value, the source run's by default; see ``Patch``.
        of: What ``everything but`` counts as everything; see ``everything_but``.

    Returns:
        Effects with the axis ``intervention``: each site, ``together``, ``everything but``.

    Raises:
        SettingError: The complement is not one set, or empty.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model), direction="noise")
        >>> effects = joint(experiment, ["z.2.1@-1", "z.2.2@-1"], "mean")
        >>> effects.to_xarray()["intervention"].values.tolist()
        ['z.2.1@-1', 'z.2.2@-1', 'together', 'everything but']

    Cost:
        One run per site and pair, and two more.
    """
    members = [each for site in sites for each in expand(_parsed(site), experiment.model.shape)]
    others = everything_but(experiment.model, members, of)
    asked = [together([each], value, str(each)) for each in members]
    asked += [together(members, value, "together"), together(others, value, "everything but")]
    title = f"{len(members)} sites alone, together, and everything but them"
    return experiment.run(asked, title=title)


def sites_of(effects: Effects, k: int) -> list[Site]:
    """Return the sites of the k largest cells of a sweep over layers and units, to be patched together.

    Args:
        effects: What ``sweep`` returned; at a position, or over all positions at once.
        k: How many.

    Raises:
        SettingError: The sweep has other axes than layers and units.
        NoGap: Clean and reference runs do not differ enough, so cells have no shares to go by.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> heads = cp.sweep(cp.Experiment(model, cp.load_pairs("ioi", model)), "z@-1")
        >>> [site.name for site in sites_of(heads, 2)]
        ['z', 'z']
    """
    effects = effects.over_draws()
    swept = parse(str(effects.provenance.get("site", "")))
    unit = [axis for axis in effects.axes if axis != "layer"]
    if "layer" not in effects.axes or unit not in ([], [swept.unit_axis]):
        raise SettingError(
            f"cells of '{swept}' over {', '.join(effects.axes)} are no single sites",
            facts=[("needed", "the axis layer, and the site's unit where it has one")],
            fix='sweep layers and units, such as sweep(experiment, "z@-1")',
        )
    rows = effects.top(k).to_dataframe().to_dict("records")
    places = [(int(row["layer"]), int(row[unit[0]]) if unit else None) for row in rows]
    return [Site(swept.name, *each, swept.position, swept.stream, dictionary=swept.dictionary) for each in places]


def _kind_of(site: Site) -> str:
    return site.name if site.stream is None else f"{site.stream}/{site.name}"


def _parsed(site: str | Site | SiteSet) -> Site | SiteSet:
    return parse(site) if isinstance(site, str) else site
