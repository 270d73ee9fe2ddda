"""Dictionaries of one model: what is added, to which site it belongs, and how its features are tapped.

1. A source is read in its published layout (``published``), or is a module of the user's.
2. Its site is what its files say or what the user says; where both do, they must agree.
3. Its widths must be those of the sites in this model, which is seen before any weight is loaded.
4. Settings that depend on the model are settled: what TransformerLens' processing of weights had changed.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from causalpatch.base.errors import CausalPatchError, SettingError
from causalpatch.models.dictionaries.coder import Coder, ModuleCoder, WeightCoder
from causalpatch.models.dictionaries.published import MLP_IN, SCALED, Published, read
from causalpatch.models.dictionaries.views import Coded, Feature, FeatureError
from causalpatch.models.taps import Port, Tap
from causalpatch.models.views import Whole
from causalpatch.sites.site import Site, SiteSet, parse

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
FLAT = {"z": "head", "mlp_post": "neuron"}
"""Sites of units side by side that a dictionary takes all together."""


@dataclass(frozen=True)
class Wanted:
    """What the user says of a dictionary.

    Args:
        site: The site that it describes, or None for what its files say.
        reads: The site that it encodes where that is another one, or None for what its files say.
        processed: Whether it was trained on weights that TransformerLens had processed, or None.
        scale: What vectors are multiplied by before they are encoded, or None.
    """

    site: str | None = None
    reads: str | None = None
    processed: bool | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Anatomy:
    """What dictionaries must know of a model.

    Args:
        name: Its name.
        tap: Where a named site is tapped; raises where it is not.
        widths: Width of all that stands at a site, by the site's name.
        like: A tensor of the model, for its dtype and device.
        is_centered: Whether the norms take the mean away, so that TransformerLens centres the stream.
        has_value_bias: Whether values have a bias, which TransformerLens folds away.
    """

    name: str
    tap: Callable[[Site], Tap]
    widths: Mapping[str, int]
    like: Tensor
    is_centered: bool
    has_value_bias: bool


@dataclass(frozen=True, eq=False)
class Dictionary:
    """One layer of a dictionary that was added to a model.

    Args:
        name: The name that its features go by.
        layer: The layer.
        writes: The name of the site that it describes, such as ``resid_pre``.
        reads: The name of what it encodes: the same for an autoencoder; ``mlp_in`` is what goes into the MLP.
        architecture: The kind of arithmetic, and the layout in which it was published.
        source: Its file, or the class of the module.
        ports: The tensor that is written, and further ones that must be read.
        coded: Its arithmetic, and how its tensors lie.
    """

    name: str
    layer: int
    writes: str
    reads: str
    architecture: str
    source: str
    ports: tuple[Port, ...] = field(repr=False)
    coded: Coded = field(repr=False)

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.coded.coder.n_features

    @property
    def coder(self) -> Coder:
        """The arithmetic: ``encode`` and ``decode``."""
        return self.coded.coder

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the file, or of the module's weights; computed when it is first asked for."""
        digest = hashlib.sha256()
        coder = self.coder
        if isinstance(coder, ModuleCoder):
            for key, tensor in coder.module.state_dict().items():
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().double().numpy().tobytes())
            return digest.hexdigest()
        with Path(self.source).open("rb") as file:
            for part in iter(lambda: file.read(1 << 22), b""):
                digest.update(part)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what records say of it, as plain data."""
        names = ("name", "layer", "writes", "reads", "architecture", "source")
        told = {name: getattr(self, name) for name in names}
        return {**told, "features": self.n_features, "hash": self.content_hash}

    def tap(self, site: Site) -> Tap:
        """Return where and how a feature, or what is not explained, is read and written."""
        view = FeatureError(self.coded) if site.unit is None else Feature(self.coded, site.unit)
        return Tap(site, self.ports[0], view, self.ports[1:])


class Registry:
    """The dictionaries of a model, by name and layer."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, Dictionary]] = {}

    @property
    def sizes(self) -> dict[str, dict[int, int]]:
        """Number of features by name and layer."""
        return {name: {n: one.n_features for n, one in layers.items()} for name, layers in self._known.items()}

    def of(self, name: str, layer: int) -> Dictionary:
        """Return one layer of a dictionary that is known to exist."""
        return self._known[name][layer]

    def add(self, name: str, source: Any, wanted: Wanted, anatomy: Anatomy) -> list[Dictionary]:
        """Add a dictionary, or further layers of one.

        Args:
            name: The name that its features go by.
            source: A folder or file, or a module.
            wanted: What the user says of it.
            anatomy: The model.

        Raises:
            SettingError: The name cannot stand in a site or has this layer already, the site is missing or is not what
                the files say, or a width does not fit.
            ModelNotFound: There is no dictionary there.
            ModelUnsupported: A setting of it is not applied.
        """
        try:
            parse(f"feature({name}).0.0")
        except CausalPatchError as error:
            facts = [("allowed", "no spaces, no parentheses, no / and @")]
            raise SettingError(f"{name!r} cannot name a dictionary", facts=facts, fix='name it "res"') from error
        made = [_settle(name, each, wanted, anatomy) for each in _published(source, wanted, anatomy)]
        layers = self._known.get(name, {})
        for one in made:
            before = layers.get(one.layer)
            is_same = before is not None and (before.source, before.writes) == (one.source, one.writes)
            if before is not None and not (is_same and before.content_hash == one.content_hash):
                raise SettingError(
                    f"the dictionary '{name}' has layer {one.layer} already",
                    facts=[("known", f"{before.writes}.{before.layer} from '{before.source}'")],
                    fix=f'model.remove_dictionary("{name}"), or add it by another name',
                )
        if len({one.layer for one in made}) < len(made):
            layer = next(one.layer for n, one in enumerate(made) if one.layer in {each.layer for each in made[:n]})
            files = [Path(one.source).parent.name for one in made if one.layer == layer]
            raise SettingError(
                f"'{source}' holds {len(files)} dictionaries of layer {layer}",
                facts=[("folders", ", ".join(files[:4]))],
                fix="add one of its folders",
            )
        self._known[name] = {**layers, **{one.layer: one for one in made}}
        return made

    def remove(self, name: str) -> None:
        """Forget a dictionary.

        Raises:
            SettingError: There is none of this name.
        """
        if name not in self._known:
            raise SettingError(
                f"there is no dictionary {name!r}",
                facts=[("known", ", ".join(self._known) or "none")],
                fix="name one of these",
            )
        del self._known[name]

    def __iter__(self) -> Any:
        return iter([one for layers in self._known.values() for one in layers.values()])


def _published(source: Any, wanted: Wanted, anatomy: Anatomy) -> Iterable[Published | nn.Module]:
    if isinstance(source, nn.Module):
        if not all(callable(getattr(source, name, None)) for name in ("encode", "decode")):
            raise SettingError(
                f"a {type(source).__name__} is no dictionary",
                facts=[("needed", "encode(x) gives the features, decode(features) describes x")],
                fix="give it these two methods, or give the folder of a published dictionary",
            )
        return [source]
    if not isinstance(source, str | Path):
        raise SettingError(
            f"{repr(source)[:60]} is no dictionary",
            facts=[("allowed", "a folder, a file, or a torch module with encode and decode")],
            fix="give the folder of a published dictionary",
        )
    found = read(Path(source))
    if wanted.site is not None and len(found) > 1:
        raise SettingError(
            f"'{source}' holds {len(found)} dictionaries, for which one site was given",
            facts=[("site", wanted.site), ("folders", ", ".join(one.path.parent.name for one in found[:4]))],
            fix="add its folders one by one",
        )
    return found


def _settle(name: str, source: Published | nn.Module, wanted: Wanted, anatomy: Anatomy) -> Dictionary:
    """Bring together what a source says, what the user says and what the model is."""
    says = source if isinstance(source, Published) else None
    title = str(says.path) if says else type(source).__name__
    site = _one_of(title, wanted.site, says.writes if says else None, anatomy, says)
    layer = site.layer if isinstance(site.layer, int) else 0
    reads = _read_site(title, layer, wanted, says, anatomy)
    tap = _whole(site.name, layer, anatomy)
    given = None if reads is None else _given(reads, layer, anatomy)
    n_in = anatomy.widths[site.name if reads is None else reads]
    coder = _coder(title, source, wanted, anatomy, site.name if reads is None else reads, n_in)
    for what, where, own in (("in", reads or site.name, coder.width_in), ("out", site.name, coder.width_out)):
        if own != anatomy.widths[where]:
            _refuse_width(title, what, f"{where}.{layer}", (own, anatomy.widths[where]), anatomy, says)
    coded = Coded(coder, tap.view, len(tap.companions), None if given is None else given.view)
    more = () if given is None else (given.port, *given.companions)
    return Dictionary(
        name,
        layer,
        site.name,
        reads or site.name,
        f"{says.architecture} ({says.layout})" if says else "module",
        title,
        (tap.port, *tap.companions, *more),
        coded,
    )


def _one_of(
    title: str, asked: str | None, said: str | None, anatomy: Anatomy, says: Published | None
) -> Site | SiteSet:
    """Return the site that a dictionary describes."""
    if asked is None and said is None:
        raise SettingError(
            f"it is not known to which site the dictionary '{title}' belongs",
            facts=[("layout", f"{says.layout}: its files name no site of ours" if says else "a module names no site")],
            fix='say it: add_dictionary(…, site="resid_post.3")',
        )
    found = [parse(text) for text in (asked, said) if text is not None]
    for site in found:
        is_known = site.name in (*STREAM, *FLAT) and isinstance(site.layer, int) and site.position is None
        if not is_known or not (site.unit is None or not isinstance(site.unit, int)):
            raise SettingError(
                f"a dictionary cannot belong to '{site}'",
                facts=[("allowed", " ".join(f"{name}.LAYER" for name in (*STREAM, *FLAT)))],
                fix='name one of these, such as site="resid_post.3"',
            )
    if len({_canonical(site) for site in found}) > 1:
        raise SettingError(
            f"the dictionary '{title}' belongs to '{_short(found[1])}', not to '{_short(found[0])}'",
            facts=[("its files", f"name {_short(found[1])}" + (f" of {says.model}" if says and says.model else ""))],
            fix="leave site= out, or give the dictionary of that site",
        )
    return found[-1]


def _canonical(site: Site | SiteSet) -> tuple[str, int]:
    layer = site.layer if isinstance(site.layer, int) else 0
    return ("resid_pre", layer + 1) if site.name == "resid_post" else (site.name, layer)


def _short(site: Site | SiteSet) -> str:
    return f"{site.name}.{site.layer}"


def _read_site(title: str, layer: int, wanted: Wanted, says: Published | None, anatomy: Anatomy) -> str | None:
    """Return the name of what is encoded, or None for what is described."""
    asked, said = wanted.reads, says.reads if says else None
    if asked is None and said is None:
        return MLP_IN if says is not None and says.is_transcoder else None
    names = []
    for text in (text for text in (asked, said) if text is not None):
        name, _, of = text.partition(".")
        if name not in (MLP_IN, *STREAM, *FLAT) or (of or str(layer)) != str(layer):
            raise SettingError(
                f"a dictionary of layer {layer} cannot read '{text}'",
                facts=[("allowed", " ".join(f"{name}.{layer}" for name in (MLP_IN, *STREAM, *FLAT)))],
                fix=f'reads="{MLP_IN}" is what goes into the MLP of that layer',
            )
        names.append(name)
    if len(set(names)) > 1:
        raise SettingError(
            f"the dictionary '{title}' reads '{names[1]}', not '{names[0]}'",
            facts=[("its files", f"name {names[1]}")],
            fix="leave reads= out",
        )
    return names[-1]


def _whole(name: str, layer: int, anatomy: Anatomy) -> Tap:
    """Return the tap of all that stands at a site."""
    tap = anatomy.tap(Site(name, layer, 0 if name in FLAT else None))
    return replace(tap, view=Whole()) if name in FLAT else tap


def _given(name: str, layer: int, anatomy: Anatomy) -> Tap:
    """Return the tap of what is encoded."""
    if name != MLP_IN:
        return _whole(name, layer, anatomy)
    down = anatomy.tap(Site("mlp_post", layer, 0))
    return Tap(down.site, Port(down.port.path.rpartition(".")[0], "input"), Whole())


def _coder(title: str, source: Published | nn.Module, wanted: Wanted, anatomy: Anatomy, given: str, n_in: int) -> Coder:
    if not isinstance(source, Published):
        if wanted.scale is not None or wanted.processed:
            raise SettingError(
                f"scale= and processed= are for published files; '{title}' is a module",
                fix="let its encode and decode do it",
            )
        return _module_coder(source, n_in, anatomy)
    recipe = replace(source.recipe, centers=_is_centered(title, source, wanted, anatomy, given))
    if wanted.scale is not None and (source.is_transcoder or not wanted.scale > 0):
        raise SettingError(
            f"scale={wanted.scale} cannot be applied to '{title}'",
            facts=[("allowed", "a number above 0, for autoencoders")],
            fix="leave scale= out",
        )
    if source.needs_scale and wanted.scale is None:
        raise SettingError(
            f"the dictionary '{title}' needs the scale of its activations",
            facts=[("its files", f"say normalize_activations {SCALED}, but not by which number")],
            fix="add_dictionary(…, scale=sqrt(width) / mean norm in training); SAELens lists it with its releases",
        )
    recipe = recipe if wanted.scale is None else replace(recipe, scale=float(wanted.scale))
    return WeightCoder(recipe, source.weights, anatomy.like.dtype, anatomy.like.device)


def _module_coder(module: nn.Module, n_in: int, anatomy: Anatomy) -> ModuleCoder:
    try:
        return ModuleCoder(module, n_in, anatomy.like)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        first = next(iter(str(error).strip().splitlines()), "")[:90]
        raise SettingError(
            f"'{type(module).__name__}' does not encode vectors of width {n_in}",
            facts=[("error", f"{type(error).__name__}: {first}")],
            fix="give a module whose encode takes (n, width) and whose decode takes (n, features)",
        ) from error


def _is_centered(title: str, source: Published, wanted: Wanted, anatomy: Anatomy, given: str) -> bool:
    """Settle what TransformerLens' processing of weights had changed in what is encoded."""
    centers = given in STREAM and anatomy.is_centered
    folds = given == MLP_IN or (given == "z" and anatomy.has_value_bias)
    is_processed = source.is_processed if wanted.processed is None else wanted.processed
    if is_processed is None and (centers or folds):
        what = "took the mean from the stream" if centers else "folded norms and biases away"
        raise SettingError(
            f"it is not known whether '{title}' was trained on processed weights",
            facts=[
                ("matters", f"TransformerLens {what} of {anatomy.name!r} unless it was told not to"),
                ("its files", "do not say so"),
            ],
            fix="add_dictionary(…, processed=True) for TransformerLens' default, False for the model as it is",
        )
    if is_processed and folds:
        raise SettingError(
            f"'{title}' reads what is not in '{anatomy.name}'",
            facts=[("why", f"in processed weights '{given}' lacks the norm's weights, or the bias of the values")],
            fix="give a dictionary of the model as it is, or a torch module that undoes it",
        )
    return bool(is_processed) and centers


def _refuse_width(
    title: str, what: str, where: str, widths: tuple[int, int], anatomy: Anatomy, says: Published | None
) -> NoReturn:
    own, theirs = widths
    verb = "encodes" if what == "in" else "describes"
    raise SettingError(
        f"the dictionary '{title}' does not fit '{anatomy.name}'",
        facts=[
            ("dictionary", f"{verb} vectors of width {own}" + (f", of {says.model}" if says and says.model else "")),
            (where, f"has width {theirs}"),
        ],
        fix="give a dictionary of this model and this site",
    )
