"""Planted faults, each located and tuned against all else: the data of a fault, and one comparison.

1. A fault of ``causalpatch.testing.faults`` is planted, and looked for against the model as it was, with the defaults
   of ``debug``. Tuned is the one component that restores most among those that were confirmed, or where none was,
   among all: of more there would be no matched sets to compare with.
2. Target: the failing prompts, with their right answers wanted. Those of the test side share no entity with any that is
   trained or validated on. Retain: prompts of the same behaviour that work, and of the other tasks; no prompt stands on
   two sides.
3. ``compare_tuning`` trains all arms: how many trainings that takes is counted first.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

import causalpatch as cp
from causalpatch.base.seeds import generator
from causalpatch.experiment.judging import comparing
from causalpatch.pairs import Pair, Pairs
from causalpatch.results.tuning import Arm
from causalpatch.testing.faults import Fault, Planted, plant
from causalpatch.testing.faults.prompts import prompts_of
from causalpatch.tuning.data import SIDES, TuningData, read_target, require_apart

# What only just gets there on validation pairs does not on all others: hence "ahead".
SCHEDULE: Final = cp.Schedule(
    steps=200, batch=8, retain_batch=6, every=5, patience=6, rates=(0.003, 0.01, 0.03), ahead=2.0
)
COMPARISON: Final = cp.Comparison(schedule=SCHEDULE)
_TRAIN, _VALIDATE = 64, 20  # target prompts
_RETAIN: Final = {"train": 16, "validation": 4, "test": 10}  # prompts of each behaviour
_LONGEST: Final = 24  # tokens of a retain prompt: lists of words go on like this
_OTHERS: Final = 24  # prompts of each other behaviour that are tested


@dataclass(frozen=True)
class Case:
    """A fault, tuned.

    Args:
        fault: Its name.
        place: Where it was planted.
        located: What was tuned.
        how: ``confirmed``, ``largest``, or why nothing could be tuned.
        report: The report as plain rows; empty where there is none.
        seconds: Processor seconds of all of it.
        rules: By which it was compared, as plain data.
    """

    fault: str
    place: str
    located: tuple[str, ...]
    how: str
    report: Mapping[str, Any]
    seconds: float
    rules: Mapping[str, Any]


def tuned(fault: Fault, comparison: cp.Comparison = COMPARISON) -> Case:
    """Plant, find and tune a fault."""
    started = time.process_time()
    planted = plant(fault)
    place, rules = " + ".join(planted.place), asdict(comparison)
    sites, found = located_in(planted)
    if not sites:
        why = f"nothing was located: {found.outcome}"
        return Case(fault.name, place, (), why, {}, time.process_time() - started, rules)
    data, pairs = tuning_data(planted), found.discovery
    how = "confirmed" if found.supported else "largest"
    experiment = cp.Experiment(
        planted.model, pairs, metric=comparing(pairs), source_model=planted.base, show_progress=False
    )
    plan = cp.plan_tuning(experiment, sites, data, comparison)
    print(f"{fault.name} in {place}, {how} {', '.join(sites)}: {data}\n{plan}", flush=True)
    report = cp.compare_tuning(experiment, sites, data, comparison)
    return Case(fault.name, place, tuple(sites), how, plain_report(report), time.process_time() - started, rules)


def located_in(planted: Planted) -> tuple[list[str], cp.Debugging]:
    """Return the one component that is tuned, and the search for it; none where nothing was found."""
    found = cp.debug(planted.model, list(planted.failing), against=planted.base, checks=cp.Checks.none())
    confirmed = [name for name in found.found if name in found.supported] or list(found.supported)
    return [str(cp.Site.parse(name).at(None)) for name in (confirmed or list(found.found))[:1]], found


def tuning_data(planted: Planted) -> TuningData:
    """Return target, retain and other data of a fault, divided."""
    fault, model = planted.fault, planted.model
    broken = list(planted.broken)
    order = generator(fault.seed, "tuning", "sides").permutation(len(broken)).tolist()
    test = [broken[k] for k in order[: len(broken) // 2]]
    seen = {name for row in test for name in row["entities"]}
    pool = [row for row in prompts_of(fault, "tuned on").failing if not seen & set(row["entities"])]
    pool = pool or [broken[k] for k in order[len(broken) // 2 :]]
    n_validate = min(_VALIDATE, max(len(pool) // 4, 2))
    target = {"test": test, "validation": pool[:n_validate], "train": pool[n_validate : n_validate + _TRAIN]}
    others = prompts_of(fault, "other", _OTHERS).others
    retain = _retained(planted, {row["prompt"] for rows in (planted.works, *others.values()) for row in rows})
    data = TuningData(
        {side: _targets(rows, model, f"{fault.name}/{side}") for side, rows in target.items()},
        retain,
        neighbours=_answered(planted.works, model, "neighbours") if planted.works else None,
        others={task: _answered(rows, model, task) for task, rows in others.items()},
    )
    for kept in data.retain.values():
        for wanted in data.target.values():
            require_apart(kept, wanted, model)
    return data


def _targets(rows: Sequence[Mapping[str, Any]], model: cp.Model, name: str) -> Pairs:
    made = [{"prompt": row["prompt"], "wanted": row["answer"], "unwanted": row["wrong_answer"]} for row in rows]
    with_names = [{**row, "entities": list(each["entities"])} for row, each in zip(made, rows, strict=True)]
    return read_target(with_names, model, "clean", name)


def _answered(rows: Sequence[Mapping[str, Any]], model: cp.Model, name: str) -> Pairs:
    made = [{"prompt": row["prompt"], "wanted": row["answer"], "entities": list(row["entities"])} for row in rows]
    return read_target(made, model, "clean", name)


def _retained(planted: Planted, tested: set[str]) -> dict[str, Pairs]:
    """Return prompts that must go on as they do, each a document of its own and on one side alone.

    Args:
        planted: The fault.
        tested: Prompts that neighbours and other behaviours are tested on: they are not trained on.
    """
    fault, model, found = planted.fault, planted.model, {}
    taken = {row["prompt"] for row in planted.broken}
    for side in reversed(SIDES):
        held = prompts_of(fault, f"retained/{side}")
        texts: list[str] = []
        for listed in (held.kept, *held.others.values()):
            own = dict.fromkeys(row["prompt"] for row in listed)
            texts += [text for text in own if text not in taken][: _RETAIN[side]]
        taken |= {*texts, *tested}
        ids = [np.array(model.tokenizer.encode(text)[:_LONGEST]) for text in texts]
        pairs = [Pair(one, one, id=f"{side}/{k}", group=f"{side}/{k}") for k, one in enumerate(ids)]
        found[side] = Pairs(pairs, name="retain")
    return found


def plain_report(report: cp.TuningReport) -> dict[str, Any]:
    """Return what the page needs of a report."""
    contrast = {name: vars(report.contrast(name)) for name in ("random", "full") if report.of_kind(name)}
    return {
        "verdict": report.verdict,
        "p": report.p_better,
        "smallest_p": report.smallest_p,
        "n_trainings": report.spec["n_trainings"],
        "contrast": contrast,
        "arms": [_plain_arm(arm) for arm in report.arms],
        "reasons": report.reasons,
        "mechanism": report.mechanism,
        "notes": report.notes,
    }


def _plain_arm(arm: Arm) -> dict[str, Any]:
    """Return an arm without the numbers of each document."""
    plain = arm.to_plain()
    del plain["documents"]
    return {**plain, "damage": arm.damage, "verdict": arm.verdict}
