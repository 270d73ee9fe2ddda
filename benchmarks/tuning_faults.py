"""Planted faults, each located and tuned against all else: the data of a fault, and one comparison.

1. A fault of ``causalpatch.testing.faults`` is planted, and looked for against the model as it was, with the defaults
   of ``debug``, on all prompts that fail: those that are tested below among them, so that held out is what is trained,
   not the place. Tuned is the one component that restores most among those that were confirmed, or where none was,
   among all: of more there would be no matched sets to compare with.
2. Target: the failing prompts, with the answers wanted that were right before the fault was planted. No entity stands
   on two of the sides that are trained on, validated on and tested on. One sentence of eight, drawn, is kept for *other
   words*: it is neither trained, validated nor tested on. Retain: prompts of the same behaviour that work, and of the
   other tasks; no prompt stands on two sides.
3. ``compare_tuning`` trains all arms: how many trainings that takes is counted first.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import causalpatch as cp
from causalpatch.base.seeds import generator
from causalpatch.experiment.judging import comparing
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.tasks import TASKS
from causalpatch.results.tuning import Arm
from causalpatch.testing.faults import Fault, Planted, plant
from causalpatch.testing.faults.plant import ahead
from causalpatch.testing.faults.prompts import Row, apart, prompts_of
from causalpatch.tuning.data import SIDES, Side, TuningData, read_target, require_apart

# What only just gets there on validation pairs does not on all others: hence "ahead".
SCHEDULE: Final = cp.Schedule(
    steps=200, batch=8, retain_batch=6, every=5, patience=6, rates=(0.003, 0.01, 0.03, 0.1), ahead=4.0
)
COMPARISON: Final = cp.Comparison(schedule=SCHEDULE)
_DRAWN: Final = 40_000  # prompts that target ones are taken from: few share no entity with those of other sides
_LOOKED_AT: Final = 4_096  # of these, whether they fail
_TRAIN, _VALIDATE, _OTHER_WORDS = 512, 40, 24  # target prompts
_RETAIN: Final = {"train": 16, "validation": 4, "test": 10}  # prompts of each behaviour
_LONGEST: Final = 24  # tokens of a retain prompt: lists of words go on like this
_OTHERS: Final = 80  # prompts of each other behaviour that are tested, where so many share no entity


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
    with tempfile.TemporaryDirectory() as folder:  # else the second time would find its pairs opened by the first
        ledger = Path(folder) / "openings.jsonl"
        found = cp.debug(
            planted.model, list(planted.failing), against=planted.base, checks=cp.Checks.none(), ledger=ledger
        )
    confirmed = [name for name in found.found if name in found.supported] or list(found.supported)
    return [str(cp.Site.parse(name).at(None)) for name in (confirmed or list(found.found))[:1]], found


def tuning_data(planted: Planted) -> TuningData:
    """Return target, retain and other data of a fault, divided."""
    fault, model = planted.fault, planted.model
    sides, other_words = _sides(planted)
    others = prompts_of(fault, "other", _OTHERS).others
    retain = _retained(planted, {row["prompt"] for rows in (planted.works, *others.values()) for row in rows})
    data = TuningData(
        {side: _targets(rows, model, f"{fault.name}/{side}") for side, rows in sides.items()},
        retain,
        neighbours=_answered(planted.works, model, "neighbours") if planted.works else None,
        others={task: _answered(rows, model, task) for task, rows in others.items()},
        paraphrases=_targets(other_words, model, "in other words") if other_words else None,
    )
    for kept in data.retain.values():
        for wanted in (*data.target.values(), data.paraphrases):
            if wanted is not None:
                require_apart(kept, wanted, model)
    return data


def _sides(planted: Planted) -> tuple[dict[Side, list[Row]], list[Row]]:
    """Return the target prompts of each side, and those in other words: a sentence that is neither learnt nor tested.

    No entity stands on two sides; those in other words share none with what is trained or validated on. Half of the
    prompts that failed are tested on, and of a fault of some names a third: most are left to learn from.
    """
    fault, broken = planted.fault, list(planted.broken)
    draw = generator(fault.seed, "tuning", "sides")
    order = draw.permutation(len(broken)).tolist()
    sentences = TASKS[fault.task].templates
    other = "" if fault.kind == "template" else sentences[int(draw.integers(len(sentences)))]
    test = [broken[k] for k in order if broken[k]["template"] != other][
        : len(broken) // (3 if fault.kind == "entity" else 2)
    ]
    drawn = _without(_entities(test), prompts_of(fault, "tuned on", n_drawn=_DRAWN).failing)
    learnt = _failing([row for row in drawn if row["template"] != other][:_LOOKED_AT], planted)
    validation = _validated(learnt)
    train = _without(_entities(validation), learnt)[:_TRAIN]
    used = _entities([*validation, *train])
    said = _without(used, [*broken, *prompts_of(fault, "in other words", n_drawn=_DRAWN).failing])
    in_other_words = _failing([row for row in said if row["template"] == other][:_LOOKED_AT], planted)
    return {"test": test, "validation": validation, "train": train}, in_other_words[:_OTHER_WORDS]


def _validated(rows: Sequence[Row]) -> list[Row]:
    """Return prompts to validate on: about a quarter of what is independent, with a third of all entities at most."""
    independent = list(apart(rows, len(rows)))
    firsts = {row["entities"][0] for row in independent[: max(2, len(independent) // 4)]}
    n_entities = len(_entities(rows))
    held: set[str] = set()
    found: list[Row] = []
    for row in rows:
        more = held | set(row["entities"])
        if row["entities"][0] in firsts and 3 * len(more) <= n_entities and len(found) < _VALIDATE:
            held = more
            found.append(row)
    return found


def _failing(rows: Sequence[Row], planted: Planted) -> list[Row]:
    """Return the prompts that the model answered right and does not any more."""
    if not rows:
        return []
    before, after = (ahead(rows, planted.base, model.module) for model in (planted.base, planted.model))
    return [row for row, was, is_now in zip(rows, before, after, strict=True) if was > 0 > is_now]


def _entities(rows: Sequence[Row]) -> set[str]:
    return {name for row in rows for name in row["entities"]}


def _without(names: set[str], rows: Sequence[Row]) -> list[Row]:
    """Return the prompts in which none of some entities stands."""
    return [row for row in rows if not names & set(row["entities"])]


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
    begun: set[tuple[int, ...]] = set()

    def cut(text: str) -> tuple[int, ...]:
        return tuple(model.tokenizer.encode(text)[:_LONGEST])

    for side in reversed(SIDES):
        held = prompts_of(fault, f"retained/{side}")
        texts: list[str] = []
        for listed in (held.kept, *held.others.values()):
            own = dict.fromkeys(row["prompt"] for row in listed)
            texts += [text for text in own if text not in taken and cut(text) not in begun][: _RETAIN[side]]
        taken |= {*texts, *tested}
        begun |= {cut(text) for text in texts}
        ids = [np.array(cut(text)) for text in texts]
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
