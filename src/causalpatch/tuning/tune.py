"""Tuning of located parts: the rate is chosen on validation pairs, the located parts are trained, nothing else moves.

1. Components become rows and columns of projections (``parts``), or vectors behind them, or adapters on them.
2. Each rate of the schedule is tried with one seed. Of those at which enough validation pairs succeed, the one that
   moved the retain set least is taken.
3. The change of that training is returned.

Cost: one training for each rate; memory for the optimizer's state of what is trained alone.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch

from causalpatch.base.errors import SettingError
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.experiment import Experiment
from causalpatch.models import Model, Port
from causalpatch.tuning.data import TuningData
from causalpatch.tuning.low_rank import LowRank
from causalpatch.tuning.parts import Parts, parts_of, sites_of
from causalpatch.tuning.train import KeptSides, Schedule, Training, Trial, train_all
from causalpatch.tuning.tuned import Tuned
from causalpatch.tuning.ways import Offsets, Slices, Way
from causalpatch.validation.components import Asked

WAYS: Final = ("slice", "offset", "lora")


def tune(  # noqa: PLR0913 - what, on what data, in which way; each has a default
    experiment: Experiment | Model,
    components: Asked,
    data: TuningData,
    *,
    way: str = "slice",
    schedule: Schedule | None = None,
    rank: int = 4,
    shared: str = "leave",
    seed: int = 0,
) -> Tuned:
    """Train what was located, and nothing else.

    Args:
        experiment: The model, or an experiment with it.
        components: A claim, ``effects.top(k)``, a circuit, a localisation, or sites: heads, neurons, attention, MLPs.
        data: The behaviour to change and what must stay.
        way: ``"slice"``: the located heads' and neurons' own rows and columns; ``"offset"``: a vector behind each;
            ``"lora"``: adapters of PEFT on the projections that they lie in.
        schedule: How training goes.
        rank: Of ``"lora"``, the largest rank.
        shared: Whether keys and values are changed that also serve heads which were not located: ``"leave"``,
            ``"take"``.
        seed: Seed of the batches and of adapters.

    Returns:
        The change. The model that was given is as it was; ``tuned.model()`` has the change in its weights. Where
        training diverged or was stopped by Ctrl-C, the best checkpoint until then, and ``print(tuned)`` says so.

    Raises:
        SettingError: No component is named, or the way is unknown.
        ModelUnsupported: Components are of another model, or weights are quantised and the way is not ``"offset"``.
        SiteUnsupported: A component has no weights of its own.
        MissingExtra: ``"lora"`` is asked for and PEFT is not installed.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> target, retain = cp.load_pairs("agreement", model), cp.load_pairs("induction", model)
        >>> data = cp.TuningData.of(model, target, retain, side="corrupt")
        >>> tuned = cp.tune(model, ["mlp_out.3"], data, schedule=cp.Schedule(steps=20, rates=(0.03,)))
        >>> tuned.training.best.success
        1.0

    Cost:
        One training for each rate of the schedule.
    """
    model = experiment.model if isinstance(experiment, Experiment) else experiment
    schedule = schedule or Schedule()
    make = maker(model, components, data, way=way, rank=rank, shared=shared)
    searched, best = search(make, data, schedule, seed=seed)
    settings = {"way": way, "rank": rank, "shared": shared, "seed": seed, "schedule": vars(schedule)}
    return Tuned(
        model, best, searched[0], tuple(searched), {"data": data.record(), "settings": settings, "shared": shared}
    )


def maker(
    model: Model, components: Asked, data: TuningData, *, way: str, rank: int = 4, shared: str = "leave"
) -> Callable[[int], Way]:
    """Return what makes a fresh change of some components, by a seed.

    Raises:
        SettingError: The way is unknown, or no component is named.
    """
    if way not in WAYS:
        raise SettingError(f"way={way!r} is none", facts=[("known", " ".join(WAYS))], fix='way="slice"')
    sites = sites_of(components, model)
    parts = parts_of(sites, model, shared=shared, outputs_alone=way == "offset")
    return maker_of(model, parts, data, way=way, rank=rank)


def maker_of(model: Model, parts: Parts, data: TuningData, *, way: str, rank: int = 4) -> Callable[[int], Way]:
    """Return what makes a fresh change of some rows and columns, by a seed."""
    if way == "offset":
        sizes = sizes_behind(model, parts, data)
        return lambda seed: Offsets(model, parts, sizes)
    if way == "lora":
        return lambda seed: LowRank(model, parts, rank=rank, seed=seed)
    return lambda seed: Slices(model, parts)


def search(
    make: Callable[[int], Way], data: TuningData, schedule: Schedule, *, seed: int, kept: KeptSides | None = None
) -> tuple[list[Training], Way]:
    """Train with each rate, and return the trainings, the chosen one first, with its change.

    Args:
        make: Makes a fresh change by a seed.
        data: The data.
        schedule: How, with the rates.
        seed: Seed of the batches.
        kept: The prompts laid out, where they are from other trainings on the same data.
    """
    (found,) = search_all([make], data, schedule, seed=seed, kept=kept)
    return found


def search_all(
    makes: Sequence[Callable[[int], Way]],
    data: TuningData,
    schedule: Schedule,
    *,
    seed: int,
    kept: KeptSides | None = None,
) -> list[tuple[list[Training], Way]]:
    """Make several searches, of a small model side by side; see ``search``."""
    trials = [Trial(make(seed), rate, seed) for make in makes for rate in schedule.rates]
    made = list(zip(train_all(trials, data, schedule, kept=kept), trials, strict=True))
    found = []
    n = len(schedule.rates)
    for first in range(0, len(made), n):
        own = sorted(made[first : first + n], key=lambda each: each[0].best.rank(schedule.enough))
        found.append(([training for training, _ in own], own[0][1].way))
    return found


def sizes_behind(model: Model, parts: Parts, data: TuningData) -> dict[str, float]:
    """Return the usual size of what goes into (columns) or comes out of (rows) projections, on training prompts."""
    pairs = data.target["train"]
    ports = {f"{path}.columns": Port(path, "input") for path in parts.columns}
    ports |= {f"{path}.rows": Port(path, "output") for path in parts.rows}
    batch = pairs.batch("clean", range(min(len(pairs), 32)))
    _, held = run_with_hooks(model, inputs_of(model, batch), keep=list(ports.values()))
    mask = torch.as_tensor(batch.mask, device=model.device)
    found = {}
    for name, port in ports.items():
        places = parts.columns if name.endswith(".columns") else parts.rows
        numbers = torch.as_tensor(places[port.path], device=model.device)
        values = held[port].reshape(*mask.shape, -1)[mask][:, numbers]
        found[name] = float(values.double().square().mean().sqrt()) or 1.0
    return found
