"""The pronoun that stories260k says of boys, changed at each head of layer 4 in turn: are names copied as before?"""

import time
from pathlib import Path
from typing import Any, Final

import causalpatch as cp
from causalpatch.base.seeds import generator
from causalpatch.statistics.binomial import share_interval
from causalpatch.testing.stories import BOYS, GIRLS, NAME_COPY, PRONOUN, THINGS
from causalpatch.tuning.checks import Bench, Measured
from causalpatch.tuning.data import TuningData

STORIES: Final = Path(__file__).resolve().parents[1] / "../shared/models/stories260k"
SCHEDULE: Final = cp.Schedule(steps=100, batch=8, retain_batch=8, every=5, patience=4)
_LAYER, _HEADS = 4, 8


def stories(schedule: cp.Schedule = SCHEDULE) -> list[dict[str, Any]]:
    """Change the pronoun that stories260k says, at each head of layer 4 in turn."""
    model = cp.open_model(STORIES, device="cpu")
    data = story_data(model)
    bench, found = Bench(model, data), []
    before = bench.measure(None)
    for head in range(_HEADS):
        started = time.process_time()
        tuning = cp.tune(model, [f"z.{_LAYER}.{head}"], data, schedule=schedule)
        row = {
            "head": f"L{_LAYER}H{head}",
            **_row(bench, before, bench.measure(tuning.way)),
            "reached": tuning.training.best.success >= schedule.enough,
            "rate": tuning.training.rate,
            "seconds": time.process_time() - started,
        }
        print(row, flush=True)
        found.append(row)
    return found


def story_data(model: cp.Model) -> TuningData:
    """Return a pronoun to change, texts that must stay, and the copying of names, of which training sees nothing."""
    order = generator(0, "pronouns").permutation(len(BOYS)).tolist()
    rows = [
        {"prompt": PRONOUN[k % 8].format(name=BOYS[n]), "wanted": " She", "unwanted": " He", "entities": [BOYS[n]]}
        for k, n in enumerate(order)
    ]
    copying = [
        {"prompt": NAME_COPY[k % 8].format(name=name), "wanted": f" {name}", "entities": [name]}
        for k, name in enumerate((*GIRLS, *BOYS))
    ]
    copied = cp.load_pairs(
        [{"clean": row["prompt"], "corrupt": row["prompt"], "answer": row["wanted"]} for row in copying],
        model,
        first_token=True,
    )
    texts = [
        f"One day, a {thing} was in the garden. It was big and red. They played with the {thing}." for thing in THINGS
    ]
    return TuningData.of(model, rows, texts, others={"name copying": copied})


def _row(bench: Bench, before: Measured, after: Measured) -> dict[str, Any]:
    """Return what a change did to the pronoun and to the copying of names."""
    right, lost = bench.right["name copying"], after.lost["name copying"]
    is_lost = share_interval(lost > 0, range(len(lost)), level=0.90)
    return {
        "success before": float(before.success.mean()),
        "success": float(after.success.mean()),
        "KL": after.damage,
        "copied before": float(right.mean()),
        "copied": float((right - lost).mean()),
        "lost": is_lost.estimate,
        "lost at most": is_lost.high,
        "names": len(lost),
    }
