"""Values that come from the data: means, other pairs' values, noise, and what was fitted on other pairs beforehand.

=============  ==========================================================================================
value          the site's new value
=============  ==========================================================================================
``Mean``       its mean over the prompts of one side, pads excluded, summed in float64
``Resample``   its value in the prompt of another pair, drawn with a seed
``Noise``      its current value and Gaussian noise as wide as the data's own values are spread
``Optimal``    the constant that harms the model least, learnt by gradient descent
``Fitted``     what was fitted beforehand: a mean over discovery pairs, an optimal constant
=============  ==========================================================================================

What is drawn depends on the seed, the number of the draw, the site and the prompt alone: it is the same in every cell
of a sweep, in every engine, and whichever pairs run beside it.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from causalpatch.base.errors import PatchError
from causalpatch.patches.fixed import finite, plain_array

Side = Literal["corrupt", "clean"]
SIGMAS = 3.0
"""Noise is so many standard deviations wide, as in ROME."""


@dataclass(frozen=True)
class Mean:
    """Mean ablation: the site's mean over prompts.

    Args:
        over: ``"pairs"`` keeps positions apart: one mean per real-token position, over the prompts that have it.
            ``"positions"`` takes one mean over all prompts and all their real tokens.
        side: The prompts that the mean is taken over, ``"corrupt"`` or ``"clean"``.
        per_group: Whether each pair gets the mean over the prompts of its own ``group`` instead of all.

    References:
        Wang et al. 2022, "Interpretability in the Wild", 2211.00593 (mean ablation).
    """

    over: Literal["pairs", "positions"] = "pairs"
    side: Side = "corrupt"
    per_group: bool = False

    def __post_init__(self) -> None:
        if self.over not in ("pairs", "positions"):
            raise PatchError(
                f"a mean cannot be taken over {self.over!r}",
                facts=[("known", "pairs, positions")],
                fix='Mean(over="pairs") keeps positions apart',
            )
        _check_side(self.side, "a mean", "Mean")

    def __str__(self) -> str:
        group = " of each group" if self.per_group else ""
        return f"mean over {self.over} of the {self.side} side{group}"


@dataclass(frozen=True)
class Resample:
    """Resample ablation: the value that the site has in the prompt of another pair.

    The other pair is drawn among those whose prompt is another one and has as many tokens as the base prompt; token k
    then takes the value of token k. Where no prompt is as long, it is drawn among all others, and positions meet as
    they are named: ``@-1`` is the last token of each prompt, a span the span of the same name, a column the aligned
    column. A site at all positions then needs pairs that are aligned by columns.

    Args:
        seed: Seed of the draw.
        draw: Number of the draw; others are other pairs, as far as there are any.
        side: The prompts that values are taken from, ``"corrupt"`` or ``"clean"``.

    References:
        Chan et al. 2022, "Causal scrubbing" (resampling ablation).
    """

    seed: int = 0
    draw: int = 0
    side: Side = "corrupt"

    def __post_init__(self) -> None:
        _check_side(self.side, "a resampled value", "Resample")
        _check_draw(self.draw, "Resample")

    def __str__(self) -> str:
        return f"resampled from the {self.side} side{_numbered(self.seed, self.draw)}"


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on top of the site's current value, the corruption of causal tracing.

    ``current + sigma * standard normal``. The draws are the same in every cell of a sweep. ``sweep(..., draws=n)``
    measures several draws, which gives their spread.

    Args:
        sigma: Standard deviation of the noise, in the unit of the site. By default ``multiple`` standard deviations
            of all numbers that the site has at the patched tokens, over the prompts of ``side``: for
            ``embed@subject`` the spread of the subject tokens' embeddings over the data, as in ROME.
        multiple: How many standard deviations, where ``sigma`` is not given.
        seed: Seed of the draws.
        draw: Number of the draw.
        side: The prompts that the standard deviation is taken over, ``"corrupt"`` or ``"clean"``.

    References:
        Meng et al. 2022, "Locating and Editing Factual Associations in GPT", 2202.05262 (noise of three standard
        deviations on the embeddings of the subject).
    """

    sigma: float | None = None
    multiple: float = SIGMAS
    seed: int = 0
    draw: int = 0
    side: Side = "corrupt"

    def __post_init__(self) -> None:
        for name in ("sigma", "multiple"):
            number = getattr(self, name)
            if number is None:
                continue
            object.__setattr__(self, name, finite(number, f"the {name} of noise", f"Noise({name}=3.0)"))
            if number < 0:
                raise PatchError(
                    f"the {name} of noise is {number:g}",
                    facts=[("needed", "0 or more")],
                    fix="leave it out to take 3 standard deviations of the data",
                )
        _check_side(self.side, "noise", "Noise")
        _check_draw(self.draw, "Noise")

    def __str__(self) -> str:
        width = f"{self.multiple:g} standard deviations" if self.sigma is None else f"sigma {self.sigma:.4g}"
        return f"Gaussian noise of {width}{_numbered(self.seed, self.draw)}"


@dataclass(frozen=True)
class Optimal:
    """Optimal ablation: the constant of each component that harms the model least, learnt on the pairs.

    A component that matters little under its best constant matters little; zero and mean ablation also count what a
    value that the model never sees does to it. The constant is the same at all patched tokens. It starts at the site's
    mean, and its loss on the pairs that it was learnt on is never above that of the mean. Learn it on discovery pairs
    (``Experiment.fit``) and measure on others.

    Args:
        objective: Name of the metric that is made small, or large where that is better: by default how far the next
            token's distribution is from the base run's.
        steps: Steps of gradient descent.
        rate: Size of the first steps, in standard deviations of the site.

    References:
        Li & Janson 2024, "Optimal ablation for interpretability", 2409.09951.
    """

    objective: str = "kl_from_base"
    steps: int = 100
    rate: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", finite(self.rate, "the rate of learning", "Optimal(rate=0.1)"))
        if self.steps < 1 or self.rate <= 0:
            raise PatchError(
                f"nothing is learnt in {self.steps} steps of {self.rate:g}",
                facts=[("needed", "one step or more, of more than 0")],
                fix="Optimal(steps=100, rate=0.1)",
            )

    def __str__(self) -> str:
        return f"optimal constant by {self.objective}"


@dataclass(frozen=True)
class FittedOn:
    """The pairs that something was fitted on.

    Args:
        name: Their name.
        hash: Hash of their content.
        n_pairs: How many they are.
        side: Which of their prompts were used.
    """

    name: str
    hash: str
    n_pairs: int
    side: Side


@dataclass(frozen=True, eq=False)
class Fitted:
    """A value that was fitted beforehand, on pairs that are named with it.

    ``Experiment.fit`` makes one of a mean, ``optimal_constants`` of a constant that was learnt.

    Args:
        array: The value, axes (group where there are groups, position where ``by_position``, the site's value axes);
            NaN where no prompt has the position.
        how: What it is, in words: ``"optimal constant"``.
        on: The pairs that it was fitted on.
        by_position: Whether each real-token position has its own value.
        groups: Names of the groups that have a value each; none where all pairs share one.
    """

    array: np.ndarray = field(repr=False)
    how: str
    on: FittedOn
    by_position: bool = False
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        array = np.asarray(np.array(self.array, dtype=np.float64) + 0.0)
        if self.by_position:
            missing = np.isnan(array).all(axis=tuple(range(int(bool(self.groups)) + 1, array.ndim)), keepdims=True)
            plain_array(np.where(missing, 0.0, array), f"the {self.how}", "fit it again")
        else:
            plain_array(array, f"the {self.how}", "fit it again")
        object.__setattr__(self, "array", array)

    @cached_property
    def hash(self) -> str:
        """Hash of the array: its shape and its numbers."""
        return hash_of(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fitted) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return (self.hash, self.how, self.on, self.by_position, self.groups)

    def __str__(self) -> str:
        return f"{self.how} fitted on {self.on.name!r}"


def hash_of(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's shape, dtype and numbers."""
    head = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _check_side(side: str, what: str, name: str) -> None:
    if side not in ("corrupt", "clean"):
        raise PatchError(
            f"{what} has no side {side!r}", facts=[("known", "corrupt, clean")], fix=f'{name}(side="corrupt")'
        )


def _check_draw(draw: int, name: str) -> None:
    if draw < 0:
        raise PatchError(f"there is no draw {draw}", facts=[("draws", "0, 1, 2, …")], fix=f"{name}(draw=0)")


def _numbered(seed: int, draw: int) -> str:
    """Return what tells a draw from the first one of seed 0."""
    return (f" seed {seed}" if seed else "") + (f" draw {draw}" if draw else "")
