"""Runs out of a store: what was measured is read, what was not is measured in shards and stored.

This is the runner of a study's experiments (``Experiment.runner``), so that every method resumes and is distributed
without knowing it: a sweep, each round of a search, each check of a claim asks for interventions, and those that were
measured before, by this session or one that was killed, cost a read.

1. Cut the request into shards (``cutting``) and read those that are finished. What is damaged counts as missing.
2. Take the lease of each missing shard, look once more whether it is there by now, and hand it to the executor.
3. Where another run holds the lease, go on with others; then wait until its shard is there, or its lease has run out.
4. Put the numbers together, and note what was asked for (a *call*), so that it can be read without a model.
"""

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, cast

import numpy as np

from causalpatch.base.errors import StoreCorrupt
from causalpatch.base.spec import content_hash
from causalpatch.experiment import Experiment
from causalpatch.experiment.measured import Measured, Work
from causalpatch.patches import Intervention, Patch
from causalpatch.studies.calls import Calls
from causalpatch.studies.cutting import Piece, cut, join, runs_of_shard
from causalpatch.studies.executors import Executor
from causalpatch.studies.journal import Journal
from causalpatch.studies.leases import Leases
from causalpatch.studies.shards import Request, Setting, context_of, decode, key_of
from causalpatch.studies.store import Run
from causalpatch.studies.study import ShardsPart
from causalpatch.studies.works import Patched, work_of

_POLL_S: Final = (0.05, 2.0)  # between two looks for what another run measures: at first, and at most
_MOST_PLACES: Final = 512


@dataclass
class _Wanted:
    """A shard of a call."""

    piece: Piece
    request: Request
    found: Measured | None = None


@dataclass
class StoredRuns:
    """Makes the runs of a study's experiments.

    Args:
        run: Where shards are stored.
        executor: Who measures those that are missing.
        leases: Which shards are being measured, and by whom.
        journal: What is told.
        shards: What the study says of their size.
        before_first: Called before the first shard of a step is measured.
    """

    run: Run
    executor: Executor
    leases: Leases
    journal: Journal
    shards: ShardsPart
    before_first: Callable[[], None] | None = None
    calls: list[str] = field(default_factory=list)
    _damaged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.noted = Calls(self.run)

    def measure(self, experiment: Experiment, asked: Sequence[Intervention] | Work) -> Measured:
        """Return the numbers of interventions, or another work, on all pairs of an experiment, made now or before."""
        work = work_of(asked)
        wanted = self._wanted(experiment, work)
        for each in wanted:
            each.found = self._read(each.request.key)
        missing = [each for each in wanted if each.found is None]
        keys = [each.request.key for each in missing]
        damaged = {key: self.run.damage[key] for key in keys if key in self.run.damage}
        if damaged:
            self.journal.tell("damaged", shards=damaged)
        total, left = (sum(each.request.n_runs for each in some) for some in (wanted, missing))
        self.journal.tell("call", shards=len(wanted), missing=len(missing), runs=total, left=left)
        if missing and self.before_first is not None:
            self.before_first()
            self.before_first = None
        self._fill(missing)
        found = join([each.piece for each in wanted], [cast(Measured, each.found) for each in wanted])
        self._note(experiment, work, wanted)
        return found

    def portion(self, experiment: Experiment) -> int:
        """Return how many runs of the model make a shard."""
        return runs_of_shard(experiment, self.shards)

    def recall(self, experiment: Experiment, name: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Return what was kept under a name; None where nothing was, or it is damaged."""
        data = self.run.recall(self._state(experiment, name))
        if data is None:
            return None
        self.journal.tell("recalled", what=dict(name))
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            return {key: held[key] for key in held.files}

    def keep(self, experiment: Experiment, name: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep how far something has come that is no table of cells and pairs."""
        file = io.BytesIO()
        np.savez(file, **cast(dict[str, Any], dict(arrays)))
        self.run.keep(self._state(experiment, name), file.getvalue())
        self.journal.tell("kept", what=dict(name))

    @staticmethod
    def _state(experiment: Experiment, name: Mapping[str, Any]) -> str:
        context = context_of(experiment, Setting.of(experiment))
        return content_hash(
            {**context, "pairs": experiment.pairs.content_hash, "seed": experiment.seed, "of": dict(name)}
        )

    def _wanted(self, experiment: Experiment, work: Work) -> list[_Wanted]:
        setting = Setting.of(experiment)
        context, texts = context_of(experiment, setting), work.texts()
        parts: dict[tuple[int, int], Any] = {}
        wanted = []
        asked = work.interventions if isinstance(work, Patched) else ()
        pieces = cut(experiment, work, self.shards, asked)
        others = _one_for_each_place(asked) if pieces[0].cells[1] < len(asked) else ()
        for piece in pieces:
            if piece.pairs not in parts:
                is_all = piece.pairs == (0, len(experiment.pairs))
                parts[piece.pairs] = experiment.pairs if is_all else experiment.pairs[slice(*piece.pairs)]
            pairs, (first, stop) = parts[piece.pairs], piece.cells
            some = work if (first, stop) == (0, work.n_cells) else work.take(np.arange(first, stop))
            key = key_of(context, pairs, texts[first:stop])
            wanted.append(_Wanted(piece, Request(key, pairs, some, setting, others)))
        return wanted

    def _read(self, key: str) -> Measured | None:
        held = self.run.read(key)
        return None if held is None else decode(key, *held)

    def _fill(self, missing: list[_Wanted]) -> None:
        """Measure what is missing, or wait for whoever does."""
        by_key: dict[str, list[_Wanted]] = {}
        for each in missing:
            by_key.setdefault(each.request.key, []).append(each)
        left, wait = set(by_key), _POLL_S[0]

        def settle(key: str, found: Measured | None, by: str) -> None:
            if found is None:
                return
            for each in by_key[key]:
                each.found = found
            left.discard(key)
            request = by_key[key][0].request
            self.journal.tell("shard", key=key, by=by, runs=request.n_runs, cost=dict(found.record["cost"]))

        def requests() -> Iterator[Request]:
            for key in sorted(left, key=list(by_key).index):
                if not self.leases.take(key):
                    continue
                there = self._read(key)  # by another run, since we looked
                if there is not None:
                    self.leases.release(key)
                    settle(key, there, "another run")
                    continue
                yield by_key[key][0].request

        while left:
            n_before = len(left)
            for done in self.executor.measure(requests()):
                self.leases.release(done.request.key)
                settle(done.request.key, self._just_written(done.request.key), "this run")
            if len(left) < n_before:
                wait = _POLL_S[0]
                continue
            time.sleep(wait)
            wait = min(1.5 * wait, _POLL_S[1])
            for key in sorted(left):
                settle(key, self._read(key), "another run")

    def _just_written(self, key: str) -> Measured | None:
        """Return a shard that was stored a moment ago; None where it is damaged, the first time.

        Raises:
            StoreCorrupt: It is damaged again: this store does not keep what is written.
        """
        found = self._read(key)
        if found is not None:
            return found
        self.journal.tell("damaged", shards={key: self.run.damage.get(key, "it is gone")})
        if key in self._damaged:
            raise StoreCorrupt(
                f"the store '{self.run.store.address}' does not give back what was written",
                facts=[("shard", key), ("found", self.run.damage.get(key, "nothing"))],
                fix="name another store: --set store=FOLDER",
            )
        self._damaged.add(key)
        return None

    def _note(self, experiment: Experiment, work: Work, wanted: Sequence[_Wanted]) -> None:
        """Keep what was asked for, and which shards hold it."""
        shards = [
            {
                "key": each.request.key,
                "cells": list(each.piece.cells),
                "pairs": list(each.piece.pairs),
                "runs": each.request.n_runs,
            }
            for each in wanted
        ]
        setting = asdict(wanted[0].request.setting)
        self.calls.append(self.noted.note(work, experiment.pairs, shards, setting))


def _one_for_each_place(asked: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """Return one intervention for each place in the model that is patched: its units are alike, and so are positions.

    Nothing is returned where there are more places than layers and sites of a model.
    """
    found: dict[Any, Intervention] = {}
    for each in asked:
        place = tuple(_place_of(patch) for patch in each.patches)
        found.setdefault(place, each)
        if len(found) > _MOST_PLACES:
            return ()
    return tuple(found.values())


def _place_of(patch: Patch) -> tuple[Any, ...]:
    site = patch.site
    is_whole = patch.column is None and site.position in (None, -1)
    return site.name, str(site.layer), site.module, site.dictionary, site.stream, is_whole
