"""The untouched runs, measured: is there a behaviour to explain at all?"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Baseline:
    """The untouched runs, measured.

    Args:
        metrics: Names of the metrics.
        clean: Metrics of the clean runs, ``(metric, pair)``.
        corrupt: Metrics of the corrupted runs, ``(metric, pair)``.
        right_clean: Whether the clean run prefers the answer to the wrong answer, ``(pair,)``; None where pairs have
            no such answers.
        right_corrupt: Whether the corrupted run prefers the wrong answer, ``(pair,)``; None likewise.
        top1_clean: Whether the answer is the clean run's first choice of all, ``(pair,)``; None likewise.
        models: The names of the models that made the clean and the corrupted runs, where these are two.
    """

    metrics: tuple[str, ...]
    clean: np.ndarray
    corrupt: np.ndarray
    right_clean: np.ndarray | None
    right_corrupt: np.ndarray | None
    top1_clean: np.ndarray | None
    models: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{name}: clean {clean.mean():.3f}, corrupted {corrupt.mean():.3f}, gap {(clean - corrupt).mean():.3f}"
            for name, clean, corrupt in zip(self.metrics, self.clean, self.corrupt, strict=True)
        ]
        if self.right_clean is not None and self.right_corrupt is not None and self.top1_clean is not None:
            both = (self.right_clean & self.right_corrupt).mean()
            lines.append(
                f"right on clean {self.right_clean.mean():.0%} (top choice of all {self.top1_clean.mean():.0%}), "
                f"wrong answer preferred on corrupted {self.right_corrupt.mean():.0%}, both {both:.0%}"
            )
        if self.models:
            lines.insert(0, "clean runs of '{}', corrupted runs of '{}'".format(*self.models))
        return "\n".join(lines)
