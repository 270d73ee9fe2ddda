"""How far learning has come, kept by an experiment's runner, so that it goes on where it was stopped.

What is kept after some steps is all that later ones depend on: what is learnt, what the optimizers know, the state of
the draws, and the losses so far. So learning that goes on gives the numbers of learning that was never stopped, bit for
bit on one kind of machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from causalpatch.experiment import Experiment
from causalpatch.experiment.measured import Runner

RUNS_PER_ROW: Final = 3  # a forward and a backward, in forwards


@dataclass(frozen=True, eq=False)
class State:
    """What is learnt, and all that the next steps depend on.

    Args:
        learnt: What is learnt, by name.
        optimizers: Each of one of these, in their order.
        draws: Where gates are drawn from.
    """

    learnt: Mapping[str, Tensor]
    optimizers: tuple[torch.optim.Optimizer, ...]
    draws: torch.Generator

    def arrays(self) -> dict[str, np.ndarray]:
        """Return it as arrays by name."""
        held = {name: each.detach().cpu().numpy() for name, each in self.learnt.items()}
        held["draws"] = self.draws.get_state().numpy()
        for number, optimizer in enumerate(self.optimizers):
            for key, value in optimizer.state_dict()["state"].get(0, {}).items():
                held[f"{number}:{key}"] = value.detach().cpu().numpy()
        return held

    def restore(self, held: Mapping[str, np.ndarray]) -> None:
        """Put back what ``arrays`` gave."""
        with torch.no_grad():
            for name, each in self.learnt.items():
                each.copy_(torch.from_numpy(held[name]))
        self.draws.set_state(torch.from_numpy(held["draws"]))
        for number, optimizer in enumerate(self.optimizers):
            known = {
                key.partition(":")[2]: torch.from_numpy(value)
                for key, value in held.items()
                if key.startswith(f"{number}:")
            }
            if known:
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": {0: known}, "param_groups": groups})


@dataclass(frozen=True, eq=False)
class Kept:
    """Where learning is kept; nowhere without a runner.

    Args:
        experiment: Model, pairs and metric.
        runner: Who keeps it.
        name: What names the learning beside them.
    """

    experiment: Experiment
    runner: Runner | None
    name: Mapping[str, Any]

    @classmethod
    def of(cls, experiment: Experiment, name: Mapping[str, Any]) -> "Kept":
        """Return where the learning of an experiment is kept."""
        return cls(experiment, experiment.runner, name)

    def every(self, runs: int) -> int:
        """Return after how many steps of so many runs it is kept: as many as make a shard."""
        return 1 if self.runner is None else max(1, self.runner.portion(self.experiment) // max(1, runs))

    def recall(self, state: State) -> list[float]:
        """Put back how far learning had come, and return its losses; none where it begins."""
        held = None if self.runner is None else self.runner.recall(self.experiment, self.name)
        if held is None:
            return []
        state.restore(held)
        found: list[float] = held["losses"].tolist()
        return found

    def keep(self, state: State, losses: list[float]) -> None:
        """Keep how far it has come."""
        if self.runner is not None:
            self.runner.keep(self.experiment, self.name, {**state.arrays(), "losses": np.array(losses)})
