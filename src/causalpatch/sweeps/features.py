"""The features of a dictionary with the largest effects.

A dictionary has thousands of features, and few of them can matter: patched from the source run, a feature that has the
same value in both runs changes nothing, and an ablated one that is silent neither. So

1. all features are read in the untouched runs, at the patched tokens;
2. those that differ in some pair (for ``"zero"``: that are active) are patched, each in a run of its own; all others
   have no effect, which is known without a run;
3. beside them, all of these features together, what the dictionary does not explain, and the whole tensor are patched.

What the dictionary does not explain is kept in every run. Where it has a large effect itself, features tell a part of
the story only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import NoGap, SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.suggest import closest
from causalpatch.engine import Activity
from causalpatch.experiment import Experiment, activity
from causalpatch.patches import Intervention, Patch, Source, Value, Zero
from causalpatch.patches.value import as_value
from causalpatch.results.effects import Effects
from causalpatch.sites import Position, parse
from causalpatch.sites.index import parse_position

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

ALL, REST, WHOLE = "all features", "not explained", "whole"
"""What is patched beside single features: those that can matter together, the rest of the tensor, and all of it."""


@dataclass(frozen=True)
class TopFeatures:
    """Effects of a dictionary's features.

    Args:
        name: The dictionary.
        effects: By layer, the effects of the features that can have one; axis ``feature``.
        totals: By layer, the effects of ``all features``, of what is ``not explained`` and of the ``whole`` tensor;
            axis ``intervention``.
        activities: By layer, what all features are in the untouched runs.
        k: How many rows the table shows.
    """

    name: str
    effects: Mapping[int, Effects]
    totals: Mapping[int, Effects]
    activities: Mapping[int, Activity]
    k: int = 20

    def table(self, k: int | None = None, metric: str | None = None) -> "pd.DataFrame":
        """Return the features with the largest effects, the largest first.

        Args:
            k: How many; by default as many as were asked for.
            metric: Which metric, where there are several.

        Returns:
            A row per feature: ``layer``, ``feature``; ``effect``, its mean over pairs; ``share_of_layer``, over the
            effect of the whole tensor; ``recovered``, its share of the gap, with the interval ``low`` to ``high``; mean
            activations in both runs (``base``, ``source``), and ``n_pairs``, in how many pairs it differs. NaN where
            there is no number, or no gap.
        """
        rows = [row for layer in self.effects for row in self._rows(layer, metric)]
        rows.sort(key=lambda row: -abs(row["effect"]))
        return pd.DataFrame(rows[: self.k if k is None else k])

    def total(self, layer: int, what: str, metric: str | None = None) -> float:
        """Return the mean effect of what was patched beside single features.

        Args:
            layer: The layer.
            what: ``"all features"``, ``"not explained"`` or ``"whole"``.
            metric: Which metric, where there are several.
        """
        effects = _one(self.totals[layer], metric)
        return float(effects.effect().sel(intervention=what))

    def __repr__(self) -> str:
        lines = []
        for layer, effects in self.effects.items():
            found, first = self.activities[layer], effects.metrics[0]
            n = len(found.base)
            lines.append(
                f"TopFeatures of '{self.name}' in layer {layer}: {effects.to_xarray().sizes['feature']} of {n} differ"
            )
            said = [f"{what} {self.total(layer, what, first):+.3g}" for what in (WHOLE, ALL, REST)]
            lines.append(f"  {first}: {', '.join(said)}; variance explained {found.explained:.1%}")
        return "\n".join(
            [*lines, self.table(metric=next(iter(self.effects.values())).metrics[0]).to_string(index=False)]
        )

    def _rows(self, layer: int, metric: str | None) -> list[dict[str, Any]]:
        effects, found = _one(self.effects[layer], metric), self.activities[layer]
        whole = self.total(layer, WHOLE, metric)
        shares = _shares(effects)
        units = effects.to_xarray()["feature"].values.tolist()
        values = effects.effect().values.tolist()
        return [
            {
                "layer": layer,
                "feature": unit,
                "effect": value,
                "share_of_layer": value / whole if whole else float("nan"),
                **{column: values[row] for column, values in shares.items()},
                "base": float(found.base[unit]),
                "source": float(found.source[unit]),
                "n_pairs": int(found.n_differing[unit]),
            }
            for row, (unit, value) in enumerate(zip(units, values, strict=True))
        ]


def top_features(
    experiment: Experiment,
    name: str,
    layer: int | Sequence[int] | None = None,
    *,
    position: Position | str | int | None = None,
    k: int = 20,
    value: Value | str | None = None,
    budget: int | None = None,
) -> TopFeatures:
    """Patch every feature of a dictionary that can have an effect, each in a run of its own.

    Args:
        experiment: Model, pairs, metrics and direction.
        name: A dictionary that was added to the model.
        layer: A layer or several; by default all that the dictionary covers.
        position: Where in each prompt, such as ``-1`` or ``"subject"``; all positions at once by default.
        k: How many features the table shows.
        value: ``"source"`` (default) or ``"zero"``.
        budget: Most runs of the model, counted in rows (one feature on one pair); more are refused.

    Returns:
        The effects by layer and a table of the largest. Features that are not in it have no effect.

    Raises:
        SettingError: There is no such dictionary or layer, the value is another one, no feature can have an effect, or
            the runs are more than the budget.

    Cost:
        Two runs per pair, and one for each feature that can have an effect, on every pair.
    """
    layers, wanted = _layers(experiment, name, layer), Source() if value is None else as_value(value)
    if not isinstance(wanted, Source | Zero):
        raise SettingError(
            f"the features that {wanted} changes are not known before they are patched",
            facts=[("known", "source: those that differ; zero: those that are active")],
            fix=f'sweep(experiment, "feature({name}).{layers[0]}.0:100@-1", value=…)',
        )
    at = parse_position(position) if isinstance(position, str) else position
    effects: dict[int, Effects] = {}
    totals: dict[int, Effects] = {}
    activities: dict[int, Activity] = {}
    for number in layers:
        site = parse(f"feature({name}).{number}.0").at(at)
        found = activities[number] = activity(experiment, Patch(site, wanted))
        units = np.flatnonzero(found.n_differing).tolist()
        _check(experiment, name, number, len(units), budget)
        patches = [Patch(parse(f"feature({name}).{number}.{unit}").at(at), wanted) for unit in units]
        title = str(parse(f"feature({name}).{number}").at(at))
        effects[number] = experiment.run(patches, axes={"feature": units}, title=title)
        rest, whole = (
            parse(text).at(at) for text in (f"feature_error({name}).{number}", _whole(experiment, name, number))
        )
        asked = [Intervention(tuple(patches), ALL), Intervention((Patch(rest, wanted),), REST)]
        asked.append(Intervention((Patch(whole, wanted),), WHOLE))
        totals[number] = experiment.run(asked, title=title)
    return TopFeatures(name, effects, totals, activities, k)


def _whole(experiment: Experiment, name: str, layer: int) -> str:
    return f"{experiment.model.dictionaries.of(name, layer).writes}.{layer}"


def _layers(experiment: Experiment, name: str, layer: int | Sequence[int] | None) -> list[int]:
    known = experiment.model.shape.dictionaries
    if name not in known:
        near = closest(name, known)
        raise SettingError(
            f"there is no dictionary {name!r} in '{experiment.model.name}'",
            facts=[("known", ", ".join(dict.fromkeys([*near, *known])) or "none")],
            fix=f"did you mean {near[0]!r}?" if near else f'model.add_dictionary("{name}", FOLDER)',
        )
    asked = sorted(known[name]) if layer is None else [layer] if isinstance(layer, int) else list(layer)
    lacking = [one for one in asked if one not in known[name]]
    if lacking or not asked:
        raise SettingError(
            f"the dictionary {name!r} has no layer {lacking[0] if lacking else 'to look at'}",
            facts=[("layers", ", ".join(map(str, sorted(known[name]))))],
            fix="name one of these",
        )
    return asked


def _check(experiment: Experiment, name: str, layer: int, n_units: int, budget: int | None) -> None:
    """Make sure that there is something to run, and not too much."""
    if not n_units:
        raise SettingError(
            f"no feature of '{name}' in layer {layer} can have an effect on '{experiment.pairs.name}'",
            facts=[("why", "at the patched tokens none differs between the runs, or none is active")],
            fix="patch at other positions",
        )
    rows = n_units * len(experiment.pairs)
    if budget is not None and rows > budget:
        raise SettingError(
            f"{n_units:,} features of '{name}' in layer {layer} take {rows:,} runs of the model",
            facts=[("budget", f"{budget:,} runs")],
            fix=f"name a position, take fewer pairs, or say budget={rows}",
        )


def _shares(effects: Effects) -> dict[str, list[float]]:
    """Return each feature's share of the gap with its interval; NaN where there is no gap."""
    columns = ("recovered", "low", "high")
    try:
        summary = effects.summary()
    except NoGap:
        return {column: [float("nan")] * effects.to_xarray().sizes["feature"] for column in columns}
    return {column: summary[column].astype(float).tolist() for column in columns}


def _one(effects: Effects, metric: str | None) -> Effects:
    return effects.metric(metric) if metric is not None and len(effects.metrics) > 1 else effects
