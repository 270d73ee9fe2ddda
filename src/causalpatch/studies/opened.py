"""A study with its model opened and its pairs read: what checks, runs and verifications begin with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from causalpatch.base.errors import StudyError
from causalpatch.base.extras import require
from causalpatch.base.spec import content_hash
from causalpatch.experiment import Experiment
from causalpatch.experiment.measured import Runner
from causalpatch.models import Model, open_model
from causalpatch.pairs import Pairs, load_pairs
from causalpatch.pairs.tasks import TASKS
from causalpatch.studies.store import Store, store_address
from causalpatch.studies.study import ExecutorPart, ModelPart, PairsPart, Side, Study, TuneStep
from causalpatch.tuning.data import TuningData
from causalpatch.tuning.lm_eval_tasks import lm_eval_task


@dataclass
class Opened:
    """A study, opened.

    Args:
        study: The study.
        folder: What paths in it are seen from.
        runner: Who makes the runs; by default each experiment itself.
    """

    study: Study
    folder: Path
    runner: Runner | None = None
    _of_others: dict[str, Pairs] = field(default_factory=dict)
    _of_tuning: dict[str, TuningData] = field(default_factory=dict)

    @cached_property
    def models(self) -> tuple[Model, Model | None]:
        """The model, and the one of the source runs where this is another."""
        part = self.study.executor
        spread = part.device_map if part.kind == "local" else None
        return open_models(self.study.model, device_of(part, 0), str(self.folder), spread)

    @cached_property
    def store(self) -> Store:
        """Where its run is kept; it need not be there yet."""
        return Store(store_address(self.study, self.folder))

    @property
    def model(self) -> Model:
        """The model."""
        return self.models[0]

    @cached_property
    def pairs(self) -> Pairs:
        """All pairs that the study keeps."""
        return read_pairs(self.study.pairs, self.model, self.folder)

    @cached_property
    def sides(self) -> dict[Side, Pairs]:
        """Pairs by what steps are made on."""
        split = self.study.split
        if split is None:
            return {"all": self.pairs}
        discovery, held_out = self.pairs.split(split.discovery, split.seed, by=split.by)
        return {"all": self.pairs, "discovery": discovery, "held_out": held_out}

    def experiment(self, side: Side, seed: int) -> Experiment:
        """Return the experiment that a step is made by.

        Args:
            side: On which pairs.
            seed: Of draws and statistics.
        """
        return self._experiment(self.sides[side], self.study.metric or [metric_of(self.study.pairs.name)], seed)

    def unrelated(self, name: str, seed: int) -> Experiment:
        """Return the experiment on a behaviour that should not be touched.

        Args:
            name: A task, or a file.
            seed: Of the statistics.
        """
        if name not in self._of_others:
            self._of_others[name] = read_pairs(PairsPart(name=name), self.model, self.folder)
        return self._experiment(self._of_others[name], [metric_of(name)], seed)

    def tuning_data(self, step: TuneStep) -> TuningData:
        """Return what a step trains on and tests, divided by the split's seed.

        Args:
            step: The step.

        Raises:
            StudyError: A file is not there.
            MissingExtra: Tasks of lm-eval are asked for, which is not installed.
            PairError: Retain and target data overlap, or there are too few components for three sides.
        """
        if step.lm_eval:
            require("lm_eval")
        name = step.model_dump_json()
        if name not in self._of_tuning:
            beside = {key: self._given(value) for key, value in step.others.items()}
            near, said = (None if each is None else self._given(each) for each in (step.neighbours, step.paraphrases))
            self._of_tuning[name] = TuningData.of(
                self.model,
                self._given(step.target),
                self._given(step.retain),
                neighbours=near,
                others=beside,
                paraphrases=said,
                evaluate={task: lm_eval_task(task) for task in step.lm_eval},
                side=step.side,
                seed=self.study.split.seed if self.study.split else 0,
            )
        return self._of_tuning[name]

    def _given(self, name: str) -> Pairs | str:
        """Return the pairs of a task, or the path of a file.

        Raises:
            StudyError: It is neither.
        """
        path = seen_from(self.folder, name)
        if Path(path).is_file():
            return path
        if name in TASKS:
            return load_pairs(name, self.model)
        raise StudyError(
            f"'{name}' is no file, and no task",
            facts=[("looked in", self.folder.absolute())],
            fix="name a file, seen from the study's folder, or a task that causalpatch tasks lists",
        )

    def facts(self) -> dict[str, Any]:
        """Return what numbers depend on beside the study's text."""
        source = self.models[1]
        return {
            "model": self.model.content_hash,
            "pairs": self.pairs.content_hash,
            **({} if source is None else {"source model": source.content_hash}),
            **{
                f"data of '{name}'": content_hash(self.tuning_data(step).record())
                for step, name in zip(self.study.steps, self.study.step_names, strict=True)
                if isinstance(step, TuneStep)
            },
        }

    def _experiment(self, pairs: Pairs, metrics: list[str], seed: int) -> Experiment:
        made = Experiment(
            self.model,
            pairs,
            list(metrics),
            self.study.direction,
            source_model=self.models[1],
            budget_gib=self.study.budget.gib,
            seed=seed,
            show_progress=False,
        )
        made.runner = self.runner
        return made


def open_models(
    part: ModelPart, device: str | None, folder: str, device_map: str | None = None
) -> tuple[Model, Model | None]:
    """Return the model of a study, with its dictionaries, and the one of the source runs where this is another.

    Args:
        part: What the study says of it.
        device: Where it is to run.
        folder: What paths are seen from.
        device_map: How it is spread over several devices, instead.
    """
    place = Path(folder)
    how: dict[str, Any] = {"device": device} if device_map is None else {"device_map": device_map}
    how |= {"dtype": part.dtype, "weights": part.weights, "memory_gib": part.memory_gib}
    model = open_model(seen_from(place, part.name), **how)
    for name, source in part.dictionaries.items():
        model.add_dictionary(name, seen_from(place, source))
    if part.source_model is None:
        return model, None
    return model, open_model(seen_from(place, part.source_model), **how)


def read_pairs(part: PairsPart, model: Model, folder: Path) -> Pairs:
    """Return the pairs of a study.

    Args:
        part: What the study says of them.
        model: The model.
        folder: What paths are seen from.
    """
    pairs = load_pairs(seen_from(folder, part.name), model, first_token=part.first_token)
    if part.where:
        pairs = pairs.where(**part.where)
    if part.first is not None:
        pairs = pairs.take(range(min(part.first, len(pairs))))
    return pairs.align(part.align) if part.align else pairs


def seen_from(folder: Path, name: str) -> str:
    """Return a name as it is, or the path that it is in a folder, where there is such a path."""
    return str(folder / name) if (folder / name).exists() else name


def metric_of(pairs: str) -> str:
    """Return the metric that suits a task; of pairs from a file the logit difference."""
    return TASKS[pairs].metric if pairs in TASKS else "logit_difference"


def n_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def n_workers(part: ExecutorPart) -> int:
    """Return how many workers measure; of Ray how many are asked for."""
    if part.kind == "local":
        return 1
    if part.kind == "ray":
        return part.workers or 1
    n_gpus = torch.cuda.device_count() if part.device in (None, "cuda") else 0
    return part.workers or n_gpus or 2


def threads_of(part: ExecutorPart) -> int:
    """Return how many CPU threads each worker has: the cores shared evenly, of Ray the CPUs that it is given."""
    if part.kind == "ray":
        return part.threads or max(1, int(part.cpus_per_worker))
    return part.threads or max(1, n_cores() // n_workers(part))


def device_of(part: ExecutorPart, worker: int) -> str | None:
    """Return where a worker measures: each has a GPU of its own where there are as many.

    With Ray GPUs belong to its workers, so that the study's own process stays on the CPU.
    """
    if part.kind == "ray":
        return "cpu"
    n_gpus = torch.cuda.device_count() if part.device in (None, "cuda") else 0
    if part.kind == "processes" and n_gpus:
        return f"cuda:{worker % n_gpus}"
    return part.device


@contextmanager
def using_threads(n_threads: int) -> Iterator[None]:
    """Let torch use so many CPU threads for a while.

    Args:
        n_threads: How many.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
