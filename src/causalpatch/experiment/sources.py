"""Whose activations go into a run: sites proven in every model that is read, and a second model of the same shape.

Two models are of one shape where their weights have the same names and shapes. Where the names differ, as behind an
adapter, they are where a family is known, every named site has the same sizes, and what they answer has too.
"""

from collections.abc import Iterator, Sequence

from causalpatch.base.errors import ModelUnsupported, SettingError, SiteNotFound
from causalpatch.engine import Role, Target, probe, require_positions, require_proofs
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import other
from causalpatch.patches import From
from causalpatch.sites import NAMES, Site


def require_sites(
    model: Model, source_model: Model | None, pairs: Pairs, base: Role, targets: Sequence[tuple[Target, ...]]
) -> None:
    """Make sure that all sites are what their names say, in every model that is read, before anything is measured.

    Args:
        model: The model that is patched.
        source_model: The model of the source runs, or None for the same one.
        pairs: The pairs.
        base: Which side is the base run's.
        targets: What is patched.

    Raises:
        SiteUnsupported: A site failed its proof, or has no column for each token.
        SiteNotFound: A module that is patched stands elsewhere in the model of the source runs.
    """
    asked = [target for group in targets for target in group]
    elsewhere = [(target, target.value) for target in asked if isinstance(target.value, From)]
    require_proofs(model, {target.provable for target in asked})
    for one, run in ((model, "base"), (source_model or model, "source")):
        require_proofs(one, {read_in(t, value).provable for t, value in elsewhere if value.run == run})
    if source_model is not None:
        require_proofs(source_model, {target.provable for target in asked if target.needs_source})
        taken = [target.site for target in asked if target.needs_source]
        taken += [read_in(t, value).site for t, value in elsewhere if value.run == "source"]
        _require_modules(model, source_model, pairs, base, {site for site in taken if site.module})
    if pairs.kind != "tokens":
        return
    by_token = {target.site for target in asked if target.site.module and target.has_position}
    require_positions(model, pairs, base, by_token)
    for one, run in ((model, "base"), (source_model or model, "source")):
        read = {read_in(t, value).site for t, value in elsewhere if value.run == run}
        role = base if run == "base" else other(base)
        require_positions(one, pairs, role, {site for site in read if site.module})


def _require_modules(model: Model, source_model: Model, pairs: Pairs, base: Role, sites: set[Site]) -> None:
    """Make sure that modules that are read stand in both models, and give tensors of the same sizes."""
    absent = [site for site in sites if site.module and site.module.path not in source_model.shape.module_paths]
    if absent:
        raise SiteNotFound(
            f"'{absent[0]}' stands elsewhere in the source model, '{source_model.name}'",
            facts=[("modules there", ", ".join(source_model.shape.module_paths[1:4]) + ", …")],
            fix="name a site that both have, such as resid_post.3, or open it without what is wrapped around it",
        )
    if not sites or _are_named_alike(model, source_model):
        return
    here, there = (probe(one, pairs, base, 0, sites) for one in (model, source_model))
    for site in sites:
        shapes = [tuple(run.value(site).shape) for run in (here, there)]
        if shapes[0] != shapes[1]:
            raise _other_shape(model, source_model, str(site), *(f"shape {shape}" for shape in shapes))


def read_in(target: Target, value: From) -> Target:
    """Return the place that a value is read at, as a target."""
    site = value.parsed
    return Target(site.at(None), None, None, value, None, target.has_position)  # type: ignore[arg-type]  # one site


def makers_of_runs(model: Model, source_model: Model | None, base: Role) -> tuple[str, ...]:
    """Return the names of the models that make the clean and the corrupted runs; nothing where they are one model."""
    if source_model is None:
        return ()
    names = (model.name, source_model.name)
    return names if base == "clean" else names[::-1]


def check_same_shape(model: Model, other_model: Model, pairs: Pairs) -> None:
    """Make sure that values of one model fit into another.

    Args:
        model: The model that is patched.
        other_model: The model of the source runs.
        pairs: The pairs, on the first of which both are run where their weights have different names.

    Raises:
        SettingError: The other one is no opened model, is elsewhere or in another dtype, or is the same model with
            something around it.
        ModelUnsupported: They differ in their family, counts, sites, weights or answers; the message names the first.
    """
    if not isinstance(other_model, Model):
        raise SettingError(
            f"source_model is no opened model but a {type(other_model).__name__}",
            fix="Experiment(model, pairs, source_model=open_model(other))",
        )
    names = _names(model, other_model)
    for what in ("device", "dtype"):
        own, theirs = getattr(model, what), getattr(other_model, what)
        if own != theirs:
            raise SettingError(
                f"{names[0]} and {names[1]} differ in their {what}",
                facts=[(names[0], own), (names[1], theirs)],
                fix=f'open both alike: open_model(…, {what}="{str(own).removeprefix("torch.")}")',
            )
    modules = (model.module, other_model.module)
    if modules[0] is not modules[1] and any(a in set(b.modules()) for a, b in (modules, modules[::-1])):
        raise SettingError(
            f"{names[0]} and {names[1]} are one model: the one stands around the other",
            facts=[("so", "they run the same weights, adapters included, and no value would differ")],
            fix="load the model a second time, and put the adapter on one of the two",
        )
    difference = _difference(model, other_model, pairs)
    if difference is not None:
        raise _other_shape(model, other_model, *difference)


def _names(model: Model, other_model: Model) -> tuple[str, str]:
    return f"'{model.name}'", f"'{other_model.name}'" if other_model.name != model.name else "the source model"


def _other_shape(model: Model, other_model: Model, what: str, own: object, theirs: object) -> ModelUnsupported:
    names = _names(model, other_model)
    return ModelUnsupported(
        f"{names[1]} is not of the same shape as {names[0]}: {what}",
        facts=[(names[0], own), (names[1], theirs)],
        fix="take another checkpoint of the same model, whose activations mean the same thing",
    )


def _weights(model: Model) -> dict[str, str]:
    return {name: f"shape {tuple(tensor.shape)}" for name, tensor in model.module.named_parameters()}


def _are_named_alike(model: Model, other_model: Model) -> bool:
    return set(_weights(model)) == set(_weights(other_model))


def _difference(model: Model, other_model: Model, pairs: Pairs) -> tuple[str, object, object] | None:
    """Return the first thing in which two models differ: what, and how each has it."""
    is_by_weights = model.family is None or _are_named_alike(model, other_model)
    counts = zip(*(_counts(one, with_sites=not is_by_weights) for one in (model, other_model)), strict=True)
    for (what, own), (_, theirs) in counts:
        if own != theirs:
            return what, own, theirs
    if is_by_weights:
        mine, yours = _weights(model), _weights(other_model)
        for name in {**mine, **yours}:
            own, theirs = mine.get(name, "none"), yours.get(name, "none")
            if own != theirs:
                return f"weight {name}", own, theirs
        return None
    runs = [(one, probe(one, pairs, "clean", 0, [])) for one in (model, other_model)]
    own, theirs = (f"shape {tuple(one.logits(run.output).shape[1:])}" for one, run in runs)
    return ("what it answers to a prompt", own, theirs) if own != theirs else None


def _counts(model: Model, *, with_sites: bool) -> Iterator[tuple[str, str]]:
    """Yield what two models of one shape have in common, most telling first."""
    yield "family", model.family.name if model.family else "none known"
    yield "layers", str(model.shape.n_layers)
    yield "kind", model.kind
    yield "vocabulary", str(model.vocab_size)
    for name, info in NAMES.items() if with_sites else ():
        sizes = {**model.shape.units, **model.sizes(name)}
        axes = [axis for axis in (info.unit_axis, *info.value_axes) if axis]
        yield f"site {name}", ", ".join(f"{axis} {sizes[axis]}" for axis in axes if axis in sizes) or "no sizes"
