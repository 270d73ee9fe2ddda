"""What a comparison is asked to be, and what it will take: counted before anything is trained."""

from dataclasses import dataclass
from typing import Final

from causalpatch.base.errors import SettingError
from causalpatch.results.tuning import Margins
from causalpatch.results.words import counted
from causalpatch.tuning.arms import KINDS
from causalpatch.tuning.train import Schedule

LEAST_DRAWN: Final = 19  # so that p can be .05
LEAST_SEEDS: Final = 3


@dataclass(frozen=True)
class Comparison:
    """What is compared, and by which rules.

    Args:
        way: ``"slice"``, ``"offset"`` or ``"lora"``; the same for all arms but full fine-tuning.
        schedule: How each training goes.
        margins: What may change at most.
        arms: Arms beside the base and the located one; all by default.
        n_random: Random draws, where there are more matched sets; 19 or more.
        n_seeds: Seeds of each arm; of fewer than 3 the report says so.
        alpha: Largest rank p that counts as evidence.
        rank: Of adapters.
        shared: Whether keys and values are changed that other heads use too.
        prefix: The words of the arm ``prefix``; by default examples of the training pairs.
        mechanism: Whether the located arm is looked into afterwards.

    Raises:
        SettingError: There are too few seeds or draws.
    """

    way: str = "slice"
    schedule: Schedule = Schedule()  # noqa: RUF009 - it cannot be changed
    margins: Margins = Margins()  # noqa: RUF009 - likewise
    arms: tuple[str, ...] = KINDS
    n_random: int = LEAST_DRAWN
    n_seeds: int = 3
    alpha: float = 0.05
    rank: int = 4
    shared: str = "leave"
    prefix: str | None = None
    mechanism: bool = True

    def __post_init__(self) -> None:
        if self.n_seeds < 1 or self.n_random < LEAST_DRAWN or not 0 < self.alpha < 1:
            raise SettingError(
                f"no comparison is made with n_random={self.n_random}, n_seeds={self.n_seeds}, alpha={self.alpha}",
                facts=[
                    ("n_random", f"{LEAST_DRAWN} or more, so that p can be .05"),
                    ("n_seeds", "at least 1"),
                ],
                fix="Comparison()",
            )

    @property
    def n_each(self) -> int:
        """Trainings of each arm."""
        return len(self.schedule.rates) + self.n_seeds - 1


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison will take, counted beforehand.

    Args:
        arms: Arms in which something is trained.
        n_random: How many of these are random draws.
        n_each: Trainings of each.
        n_rates: Rates that are tried.
        n_seeds: Seeds.
        n_steps: Most steps of a training.
        notes: What is to be known of the arms.
    """

    arms: tuple[str, ...]
    n_random: int
    n_each: int
    n_rates: int
    n_seeds: int
    n_steps: int
    notes: tuple[str, ...]

    @property
    def n_trainings(self) -> int:
        """Trainings in all."""
        return len(self.arms) * self.n_each

    def __str__(self) -> str:
        others = [name for name in self.arms if not name.startswith("random ")]
        lines = [
            f"{self.n_trainings} trainings of at most {self.n_steps} steps: {len(self.arms)} arms "
            f"({', '.join(others)}, {counted(self.n_random, 'random draw')}) x ({self.n_rates} rates + "
            f"{self.n_seeds - 1} more seeds at the chosen one)"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
