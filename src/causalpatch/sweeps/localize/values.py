"""What a search puts in: the source run's values, or an ablation.

Ablations take clean runs apart (direction noise). A share is then one of what the run loses in which all parts of the
whole have such values at once. Means and widths of noise are fitted once for each site, on all pairs of the search.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.experiment import Experiment
from causalpatch.patches import Constant, Interpolate, Intervention, Mean, Noise, Patch, Resample, Source, Value, Zero
from causalpatch.patches.value import as_value, needs_fitting
from causalpatch.sites import expand

_ABLATIONS: Final = (Zero, Constant, Mean, Resample, Noise)


def value_of(asked: Value | str | float | None, direction: str) -> Value | None:
    """Return what a search puts in; None for the source's values.

    Args:
        asked: The value or its text; None for the source's.
        direction: Of the experiment.

    Raises:
        SettingError: It cannot be had by all parts, or it takes runs apart and the direction is denoise.
    """
    value = Source() if asked is None else as_value(asked)
    if isinstance(value, Source | Interpolate):
        return None if isinstance(value, Source) else value
    if not isinstance(value, _ABLATIONS) or (isinstance(value, Constant) and np.ndim(value.array) > 0):
        raise SettingError(
            f"a search cannot put in the value '{value}'",
            facts=[("known", "source, interpolate, zero, a number, mean, resample, noise"), ("why", _WHY)],
            fix='value="mean", or patch what the search found with it: experiment.run(…)',
        )
    if direction != "noise":
        raise SettingError(
            f"'{value}' takes a run apart and cannot restore one",
            facts=[("direction", direction), ("needed", "noise: parts of clean runs are ablated")],
            fix='localize(experiment.turned("noise"), …)',
        )
    return value


_WHY: Final = "parts of every size must be able to have it, all of them at once too"


@dataclass
class Filling:
    """Puts a search's value into its interventions.

    Args:
        experiment: The search's, on all of its pairs.
        value: The value; None for what interventions put in themselves, which is the source's unless they say another.
    """

    experiment: Experiment
    value: Value | None
    _fitted: dict[str, Value] = field(default_factory=dict)

    @property
    def is_ablation(self) -> bool:
        """Whether shares are of what the whole loses, not of the pairs' own gap."""
        return self.value is not None and not isinstance(self.value, Interpolate)

    def plain(self, asked: Sequence[Intervention]) -> list[Intervention]:
        """Return interventions with the value as it is, to foretell what they cost."""
        if self.value is None:
            return list(asked)
        return [
            Intervention(tuple(replace(patch, value=self.value) for patch in each.patches), each.label)
            for each in asked
        ]

    def n_to_fit(self, asked: Sequence[Intervention]) -> int:
        """Return how many runs it takes to fit what some interventions put in: one of each pair, or none."""
        return len(self.experiment.pairs) if self._to_fit(asked) else 0

    def filled(self, asked: Sequence[Intervention]) -> list[Intervention]:
        """Return interventions with the value, fitted at their sites where it is fitted at all."""
        if self.value is None or not needs_fitting(self.value):
            return self.plain(asked)
        missing = self._to_fit(asked)
        if missing:
            made = self.experiment.fit([Intervention((Patch(site, self.value),), site) for site in missing])
            self._fitted |= {each.label: each.patches[0].value for each in made}
        return [Intervention(tuple(map(self._patch, self._sites(each))), each.label) for each in asked]

    def _patch(self, site: str) -> Patch:
        return Patch(site, self._fitted[site])

    def _to_fit(self, asked: Sequence[Intervention]) -> list[str]:
        if self.value is None or not needs_fitting(self.value):
            return []
        sites = dict.fromkeys(site for each in asked for site in self._sites(each))
        return [site for site in sites if site not in self._fitted]

    def _sites(self, intervention: Intervention) -> list[str]:
        shape = self.experiment.model.shape
        return [str(site) for patch in intervention.patches for site in expand(patch.site, shape)]
