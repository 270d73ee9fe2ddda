"""Shards: some interventions on some pairs, measured and stored in one piece.

What is measured names a shard: the model's weights, the pairs, the interventions, metrics and settings, and with them
the shape of the piece, since rounding may depend on what stands in one batch. So a shard's numbers are the same
whoever measures it, bit for bit where the arithmetic is the same (one kind of CPU, as many threads, float32; on some
CPUs only with ``MKL_CBWR=AUTO,STRICT``, as products are rounded there by where in memory an array begins).

A shard is a parquet file, a row per cell and pair, pairs fastest: ``cell``, ``pair``, ``metric:NAME`` for each metric,
``status``. What it is of, and the metrics of the unpatched runs, stand as JSON in the file's own metadata.
"""

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.extras import lazy
from causalpatch.base.spec import content_hash
from causalpatch.engine import EngineName, Precision, Remembered, targets_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.measured import Measured, Work
from causalpatch.metrics import named_metric
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.batch import PaddingSide
from causalpatch.patches import Intervention
from causalpatch.patches.files import plain_interventions

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as parquet
else:
    pa = lazy("pyarrow")
    parquet = lazy("pyarrow.parquet")

RULES: Final = 1  # goes up when shards of equal requests get other numbers
ABOUT: Final = b"causalpatch"
ROWS: Final = 2**20  # in a group of rows, at most: what a reader holds at once


@dataclass(frozen=True)
class Setting:
    """How runs are made, as an experiment says it.

    Args:
        metrics: Names of built-in metrics.
        direction: Denoise or noise.
        engine: Which engine.
        precision: ``"screen"``, or None.
        recheck_top: Of a screen.
        padding_side: Where prompts are padded.
        budget_gib: Memory for activations in GiB.
        max_rows: Most rows in a forward.
        seed: Seed of what a screen draws; None without one, where nothing is drawn.
    """

    metrics: tuple[str, ...]
    direction: Any
    engine: EngineName
    precision: Precision | None
    recheck_top: int
    padding_side: PaddingSide
    budget_gib: float | None
    max_rows: int | None
    seed: int | None

    @classmethod
    def of(cls, experiment: Experiment) -> "Setting":
        """Return the setting of an experiment.

        Raises:
            MetricError: A metric has no name that others know.
        """
        names = tuple(metric.name for metric in experiment.metrics)
        for name in names:
            named_metric(name)
        screens = experiment.precision == "screen"
        return cls(
            names,
            experiment.direction,
            experiment.engine,
            experiment.precision,
            experiment.recheck_top if screens else 0,
            experiment.padding_side,
            experiment.budget_gib,
            experiment.max_rows,
            experiment.seed if screens else None,
        )

    def experiment(self, model: Model, pairs: Pairs, source_model: Model | None) -> Experiment:
        """Return the experiment of this setting on some pairs."""
        return Experiment(
            model,
            pairs,
            list(self.metrics),
            self.direction,
            source_model=source_model,
            engine=self.engine,
            precision=self.precision,
            recheck_top=self.recheck_top,
            padding_side=self.padding_side,
            budget_gib=self.budget_gib,
            max_rows=self.max_rows,
            seed=self.seed or 0,
            show_progress=False,
        )


@dataclass(frozen=True, eq=False)
class Request:
    """What a shard is of, whole enough to be measured by another process.

    Args:
        key: What names the shard.
        pairs: The pairs.
        work: What is measured on them.
        setting: How runs are made.
        others: Cells of other shards of the same pairs, one for each place in the model that they patch: what the
            untouched runs of these pairs had better keep.
    """

    key: str
    pairs: Pairs
    work: Work
    setting: Setting
    others: tuple[Intervention, ...] = ()

    @property
    def n_runs(self) -> int:
        """Runs of the model, those without a patch not counted."""
        return len(self.pairs) * self.work.runs_per_pair

    @property
    def group(self) -> str:
        """What shards have in common whose untouched runs are the same."""
        return self.pairs.content_hash

    @property
    def words(self) -> str:
        """How large it is, in words."""
        return f"{self.work.n_cells:,} cells on {len(self.pairs):,} pairs"

    def measure(self, model: Model, source_model: Model | None, remembered: Remembered | None = None) -> Measured:
        """Make the runs.

        Args:
            model: The model.
            source_model: The one of the source runs, where this is another.
            remembered: Untouched runs of the shard before, which are not made again where the pairs are the same.

        Raises:
            KeyboardInterrupt: The user stopped them: a part of a shard is none.
        """
        with undisturbed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="stopped: ")  # says that what was made is kept
            experiment = self._experiment(model, source_model)
            if remembered is not None:
                places = [targets_of(experiment.model, each) for each in self.others]
                remembered.turn_to((self.group, self.setting.direction), places)
            experiment.remembered = remembered
            found = self.work.measured(experiment)
        if not found.record["complete"] or len(found.kept) < len(self.pairs):
            raise KeyboardInterrupt
        return found

    def _experiment(self, model: Model, source_model: Model | None) -> Experiment:
        """Return the experiment, that of the shard before where it is the same: it knows its untouched runs."""
        name = (id(model), id(source_model), self.pairs.content_hash, self.setting)
        if not _LAST or _LAST[0][0] != name:
            _LAST[:] = [(name, self.setting.experiment(model, self.pairs, source_model))]
        return _LAST[0][1]


_LAST: Final[list[tuple[tuple[Any, ...], Experiment]]] = []
"""The experiment of the shard that was measured last, with what names it."""


def forget() -> None:
    """Let go of the experiment of the shard that was measured last."""
    _LAST.clear()


def texts_of(interventions: Sequence[Intervention]) -> list[str]:
    """Return what names each intervention: all of it but its label, arrays by their content.

    Raises:
        PatchError: A value is a function, which has no name that others know.
    """
    plain, _ = plain_interventions(interventions)
    return [json.dumps(each["patches"], sort_keys=True) for each in plain]


def context_of(experiment: Experiment, setting: Setting) -> dict[str, Any]:
    """Return all that a shard's numbers depend on beside its pairs and interventions."""
    model, source = experiment.model, experiment.source_model
    return {
        "rules": RULES,
        "model": model.content_hash,
        "source_model": None if source is None else source.content_hash,
        "dtype": str(model.dtype),
        "attention": model.attention,
        "setting": asdict(setting),
    }


def key_of(context: Mapping[str, Any], pairs: Pairs, texts: Sequence[str]) -> str:
    """Return what names a shard.

    Args:
        context: What ``context_of`` returned.
        pairs: Its pairs.
        texts: Its interventions, as ``texts_of`` names them.
    """
    return content_hash({**context, "pairs": pairs.content_hash, "interventions": list(texts)})


def encode(key: str, found: Measured, metrics: Sequence[str]) -> bytes:
    """Return the bytes of a shard, the same for the same numbers.

    Args:
        key: What names it.
        found: Its numbers.
        metrics: Names of the metrics.
    """
    n_cells, n_pairs = found.status.shape
    columns: dict[str, Any] = {
        "cell": pa.array(np.repeat(np.arange(n_cells, dtype=np.int32), n_pairs)),
        "pair": pa.array(np.tile(np.arange(n_pairs, dtype=np.int32), n_cells)),
    }
    columns |= {f"metric:{name}": pa.array(row.ravel()) for name, row in zip(metrics, found.values, strict=True)}
    columns["status"] = pa.array(found.status.ravel())
    baselines = {role: np.asarray(table).tolist() for role, table in found.baselines.items()}
    about = {"key": key, "metrics": list(metrics), "cells": n_cells, "pairs": n_pairs, "baselines": baselines}
    table = pa.table(columns).replace_schema_metadata({ABOUT: json.dumps(about, sort_keys=True).encode()})
    file = io.BytesIO()
    coded = ["cell", "pair", "status"]
    group = max(1, ROWS // n_pairs) * n_pairs
    parquet.write_table(table, file, use_dictionary=coded, compression="none", row_group_size=group)
    return file.getvalue()


def decode(key: str, data: bytes, entry: Mapping[str, Any]) -> Measured:
    """Return the numbers of a shard.

    Args:
        key: What names it.
        data: Its bytes, whose checksum was right.
        entry: What is known of it, with its record.
    """
    table = parquet.read_table(io.BytesIO(data), columns=None)
    about = json.loads(table.schema.metadata[ABOUT])
    shape = (about["cells"], about["pairs"])
    values = np.stack([table[f"metric:{name}"].to_numpy().reshape(shape) for name in about["metrics"]])
    status = table["status"].to_numpy().reshape(shape)
    baselines = {role: np.array(rows, dtype=np.float64) for role, rows in about["baselines"].items()}
    return Measured(values, status, baselines, np.arange(shape[1]), entry["about"]["record"])
