"""Whose activations go into a run: sites proven in every model that is read, and a second model of the same shape."""

from collections.abc import Sequence

from causalpatch.base.errors import ModelUnsupported, SettingError
from causalpatch.engine import Role, Target, require_positions, require_proofs
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import other
from causalpatch.patches import From


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
    """
    asked = [target for group in targets for target in group]
    elsewhere = [(target, target.value) for target in asked if isinstance(target.value, From)]
    require_proofs(model, {target.provable for target in asked})
    for one, run in ((model, "base"), (source_model or model, "source")):
        require_proofs(one, {read_in(t, value).provable for t, value in elsewhere if value.run == run})
    if source_model is not None:
        require_proofs(source_model, {target.provable for target in asked if target.needs_source})
    if pairs.kind != "tokens":
        return
    by_token = {target.site for target in asked if target.site.module and target.has_position}
    require_positions(model, pairs, base, by_token)
    for one, run in ((model, "base"), (source_model or model, "source")):
        read = {read_in(t, value).site for t, value in elsewhere if value.run == run}
        role = base if run == "base" else other(base)
        require_positions(one, pairs, role, {site for site in read if site.module})


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


def check_same_shape(model: Model, other_model: Model) -> None:
    """Make sure that values of one model fit into another.

    Args:
        model: The model that is patched.
        other_model: The model of the source runs.

    Raises:
        SettingError: The other one is no opened model, or is elsewhere or in another dtype.
        ModelUnsupported: They differ in their family, counts, modules or weights; the message names the first.
    """
    if not isinstance(other_model, Model):
        raise SettingError(
            f"source_model is no opened model but a {type(other_model).__name__}",
            fix="Experiment(model, pairs, source_model=open_model(other))",
        )
    names = (f"'{model.name}'", f"'{other_model.name}'" if other_model.name != model.name else "the source model")
    for what in ("device", "dtype"):
        own, theirs = getattr(model, what), getattr(other_model, what)
        if own != theirs:
            raise SettingError(
                f"{names[0]} and {names[1]} differ in their {what}",
                facts=[(names[0], own), (names[1], theirs)],
                fix=f'open both alike: open_model(…, {what}="{str(own).removeprefix("torch.")}")',
            )
    difference = _difference(model, other_model)
    if difference is not None:
        what, own, theirs = difference
        raise ModelUnsupported(
            f"{names[1]} is not of the same shape as {names[0]}: {what}",
            facts=[(names[0], own), (names[1], theirs)],
            fix="take another checkpoint of the same model, whose activations mean the same thing",
        )


def _difference(model: Model, other_model: Model) -> tuple[str, object, object] | None:
    """Return the first thing in which two models differ: what, and how each has it."""
    families = tuple(one.family.name if one.family else "none known" for one in (model, other_model))
    counts = [("family", *families)]
    counts += [(what, *(str(getattr(one, what)) for one in (model, other_model))) for what in ("kind", "vocab_size")]
    counts.insert(1, ("layers", str(model.shape.n_layers), str(other_model.shape.n_layers)))
    for what, own, theirs in counts:
        if own != theirs:
            return what.replace("vocab_size", "vocabulary"), own, theirs
    mine, yours = (
        {name: f"shape {tuple(tensor.shape)}" for name, tensor in one.module.named_parameters()}
        for one in (model, other_model)
    )
    for name in {**mine, **yours}:
        own, theirs = mine.get(name, "none"), yours.get(name, "none")
        if own != theirs:
            return f"weight {name}", own, theirs
    return None
