"""Located parts tuned against all else, on planted faults and on children's stories: ``python -m benchmarks.tuning``.

For each fault of ``causalpatch.testing.faults``:

1. It is planted, and looked for against the model as it was, with the defaults of ``debug``. What was confirmed is
   tuned, or where nothing was, the component that restores most.
2. Target: the failing prompts, with their right answers wanted. Those of the test side share no entity with any that is
   trained or validated on. Retain: prompts of the same behaviour that work, and of the other tasks.
3. ``compare_tuning`` trains all arms: how many trainings that takes is printed first.

``--stories`` changes the pronoun of stories260k at each head of layer 4 in turn. ``--memory`` trains 1 % of the weights
of the GPT-2-small shape, and all of them, each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import causalpatch as cp
from benchmarks.machine import MIB, describe, versions
from benchmarks.shapes import SHAPES, build
from causalpatch.base.seeds import generator
from causalpatch.experiment.judging import comparing
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import Site
from causalpatch.statistics.intervals import mean_interval
from causalpatch.testing.faults import FAULTS, Fault, Planted, plant
from causalpatch.testing.faults.prompts import prompts_of
from causalpatch.testing.stories import BOYS, GIRLS, NAME_COPY, PRONOUN
from causalpatch.tuning.checks import Bench
from causalpatch.tuning.data import SIDES, TuningData, read_target
from causalpatch.tuning.parts import parts_of
from causalpatch.tuning.ways import Slices

OUT: Final = Path(__file__).parent / "TUNING.md"
STORIES: Final = Path(__file__).resolve().parents[1] / "../shared/models/stories260k"
GOAL: Final = 0.95  # of the held-out pairs of a fault, and of the faults
_TRAIN, _VALIDATE, _RETAIN = 64, 24, 48  # prompts
_HEADS: Final = 8  # of a layer of stories260k


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
    """

    fault: str
    place: str
    located: tuple[str, ...]
    how: str
    report: Mapping[str, Any]
    seconds: float


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
    return TuningData(
        {side: _targets(rows, model, f"{fault.name}/{side}") for side, rows in target.items()},
        {side: _retained(fault, model, side) for side in SIDES},
        neighbours=_answered(planted.works, model, "neighbours") if planted.works else None,
        others={task: _answered(rows, model, task) for task, rows in prompts_of(fault, "other", 48).others.items()},
    )


def _targets(rows: Sequence[Mapping[str, Any]], model: cp.Model, name: str) -> Pairs:
    made = [{"prompt": row["prompt"], "wanted": row["answer"], "unwanted": row["wrong_answer"]} for row in rows]
    with_names = [{**row, "entities": list(each["entities"])} for row, each in zip(made, rows, strict=True)]
    return read_target(with_names, model, "clean", name)


def _answered(rows: Sequence[Mapping[str, Any]], model: cp.Model, name: str) -> Pairs:
    made = [{"prompt": row["prompt"], "wanted": row["answer"], "entities": list(row["entities"])} for row in rows]
    return read_target(made, model, "clean", name)


def _retained(fault: Fault, model: cp.Model, side: str) -> Pairs:
    """Return prompts that must go on as they do, each a document of its own."""
    held = prompts_of(fault, f"retained/{side}")
    rows = [row for listed in (held.kept, *held.others.values()) for row in listed[: _RETAIN // 4]]
    ids = [np.array(model.tokenizer.encode(row["prompt"])) for row in rows]
    return Pairs([Pair(one, one, id=f"{side}/{k}", group=f"{side}/{k}") for k, one in enumerate(ids)], name="retain")


def tuned(fault: Fault, comparison: cp.Comparison) -> Case:
    """Plant, find and tune a fault."""
    started = time.process_time()
    planted = plant(fault)
    place = " + ".join(planted.place)
    found = cp.debug(planted.model, list(planted.failing), against=planted.base, checks=cp.Checks.none())
    located = tuple(found.supported) or tuple(found.found[:1])
    if not located:
        return Case(fault.name, place, (), f"nothing was located: {found.outcome}", {}, time.process_time() - started)
    data = tuning_data(planted)
    pairs = found.discovery
    how = "confirmed" if found.supported else "largest"
    experiment = cp.Experiment(
        planted.model, pairs, metric=comparing(pairs), source_model=planted.base, show_progress=False
    )
    sites = [str(cp.Site.parse(name).at(None)) for name in located]
    print(f"{fault.name} in {place}, {how} {', '.join(sites)}: {data}", flush=True)
    print(cp.plan_tuning(experiment, sites, data, comparison), flush=True)
    report = cp.compare_tuning(experiment, sites, data, comparison)
    print(report, flush=True)
    return Case(fault.name, place, tuple(sites), how, plain_report(report), time.process_time() - started)


def plain_report(report: cp.TuningReport) -> dict[str, Any]:
    """Return what the page needs of a report."""
    contrast = {name: vars(report.contrast(name)) for name in ("random", "full") if report.of_kind(name)}
    return {
        "verdict": report.verdict,
        "p": report.p_better,
        "smallest_p": report.smallest_p,
        "n_trainings": report.spec["n_trainings"],
        "contrast": contrast,
        "arms": report.to_dataframe().to_dict("records"),
        "lost": [
            (one.name, one.estimate, one.high, one.verdict)
            for one in report.located.endpoints
            if one.name.startswith("answers")
        ],
        "reasons": report.reasons,
    }


def stories(comparison: cp.Comparison) -> list[dict[str, Any]]:
    """Change the pronoun that stories260k says, at each head of layer 4 in turn."""
    model = cp.open_model(STORIES, device="cpu")
    said = [(name, "She", "He") for name in GIRLS] + [(name, "He", "She") for name in BOYS]
    order = generator(0, "pronouns").permutation(len(said)).tolist()
    rows = [
        {"prompt": PRONOUN[k % 8].format(name=name), "wanted": f" {other}", "unwanted": f" {own}", "entities": [name]}
        for k, (name, own, other) in ((k, said[number]) for k, number in enumerate(order[:96]))
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
    texts = [f"{row['prompt']}{row['wanted']} was happy. They played with the ball." for row in copying]
    data = cp.TuningData.of(model, rows, texts, others={"name copying": copied})
    found = []
    for head in range(_HEADS):
        started = time.process_time()
        tuning = cp.tune(model, [f"z.4.{head}"], data, schedule=comparison.schedule)
        bench = Bench(tuning.way, data)
        before, after = bench.measure(None), bench.measure(tuning.way)
        row = {
            "head": f"L4H{head}",
            "success before": float(before.success.mean()),
            "success": float(after.success.mean()),
            "KL": after.damage,
            "copied before": float(bench._right["name copying"].mean()),
            "copied": float((bench._right["name copying"] - after.lost["name copying"]).mean()),
            "rate": tuning.training.rate,
            "seconds": time.process_time() - started,
        }
        print(row, flush=True)
        found.append(row)
    return found


def train_once(which: str, rows: int = 2, length: int = 32, steps: int = 3) -> dict[str, float]:
    """Train for a few steps; return the peak of memory above what the model alone takes, and seconds a step.

    Args:
        which: ``located`` or ``full``.
        rows: Prompts in a step.
        length: Their tokens.
        steps: Steps after the first one.
    """
    libraries = _held("VmRSS")
    model = cp.Model(build(SHAPES["gpt2"]), name="gpt2-shape")
    module = model.module
    module.requires_grad_(requires_grad=which == "full")
    sites = [Site("z", layer, 3) for layer in range(0, 12, 2)]
    ids = torch.randint(0, 50_000, (rows, length), generator=torch.Generator().manual_seed(0))
    n_all = sum(each.numel() for each in module.parameters())
    if which == "located":
        way = Slices(model, parts_of(sites, model))
        held, n = list(way.trained().values()), way.n_trained
    else:
        way, held, n = None, list(module.parameters()), n_all
    optimizer = torch.optim.Adam(held, lr=1e-5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    seconds = []
    for _ in range(steps + 1):
        started = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        if way is None:
            logits = module(input_ids=ids, use_cache=False).logits
        else:
            with way.running() as running:
                logits = running(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        seconds.append(time.process_time() - started)
    weights = sum(each.numel() * each.element_size() for each in module.parameters()) / MIB
    return {
        "share": n / n_all,
        "peak": _held("VmHWM") - libraries,
        "weights": weights,
        "seconds": float(np.median(seconds[1:])),
    }


def _held(name: str) -> float:
    """Return the memory that this process holds (VmRSS), or the most that it has held (VmHWM), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def memory() -> dict[str, dict[str, float]]:
    """Train both ways, each in a process of its own."""
    found = {}
    for which in ("located", "full"):
        code = f"import json; from benchmarks.tuning import train_once; print(json.dumps(train_once({which!r})))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[which] = json.loads(done.stdout.splitlines()[-1])
        print(which, found[which], flush=True)
    return found


def page(held: Mapping[str, Any], command: str) -> str:
    """Return the page of all that was measured."""
    machine, used = describe(), versions()
    cases = [Case(**one) for one in held.get("cases", [])]
    lines = [
        "# Tuning: located parts against all else",
        "",
        f"Last part made by `{command}` on {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in used.items())
        + ".",
        "",
        *(__doc__ or "").partition("\n\n")[2].splitlines(),
        "",
        *_of_faults(cases),
        *_of_stories(held.get("stories", [])),
        *_of_memory(held.get("memory", {})),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _of_faults(cases: Sequence[Case]) -> Iterator[str]:
    yield "## Faults"
    yield ""
    yield (
        f"Run: {len(cases)} of {len(FAULTS)} faults. Not run: "
        + (", ".join(fault.name for fault in FAULTS if fault.name not in {case.fault for case in cases}) or "none")
        + "."
    )
    yield ""
    made = [case for case in cases if case.report]
    if not made:
        return
    repaired = [_arm(case, "located")["success"] for case in made]
    n_good = sum(each >= GOAL for each in repaired)
    yield (
        f"Repaired on at least {GOAL:.0%} of the held-out pairs: {n_good} of {len(cases)} faults. Verdicts: "
        + ", ".join(
            f"{sum(case.report['verdict'] == verdict for case in made)} x {verdict}"
            for verdict in dict.fromkeys(case.report["verdict"] for case in made)
        )
        + "."
    )
    both = [case.report["contrast"]["full"]["estimate"] for case in made if "full" in case.report["contrast"]]
    known = np.array([each for each in both if each is not None and np.isfinite(each)], dtype=np.float64)
    if len(known):
        found = mean_interval(known, np.arange(len(known)))
        ends = f"{found.low:+.4f} to {found.high:+.4f}" if found.is_bounded else f"none ({found.note})"
        yield ""
        yield (
            f"Contrast located - full over {len(known)} faults in which both reached the target: mean "
            f"{found.estimate:+.4f} nat per retain token, 95 % interval {ends}."
        )
    yield ""
    yield (
        "| fault | planted in | tuned | repaired | KL | located - random | located - full | rank p (smallest) | "
        "verdict | trainings | s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        if not case.report:
            yield f"| {case.fault} | {case.place} | {case.how} | - | - | - | - | - | - | - | {case.seconds:.0f} |"
            continue
        own = _arm(case, "located")
        yield (
            f"| {case.fault} | {case.place} | {', '.join(case.located)} ({case.how}) | {own['success']:.0%} | "
            f"{_number(own['damage'])} | {_contrast(case, 'random')} | {_contrast(case, 'full')} | "
            f"{case.report['p']:.3g} ({case.report['smallest_p']:.3g}) | {case.report['verdict']} | "
            f"{case.report['n_trainings']} | {case.seconds:.0f} |"
        )
    for case in made:
        yield ""
        yield f"### {case.fault}"
        yield ""
        yield "| arm | changed | numbers | trainings | success | reached | KL | damage | other behaviour |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for arm in case.report["arms"]:
            names = arm["components"] if len(arm["components"]) < 60 else arm["components"][:57] + "..."
            yield (
                f"| {arm['arm']} | {names} | {arm['n_trained']:,} | {arm['n_trainings']} | {arm['success']:.0%} | "
                f"{arm['reached']} | {_number(arm['moved'])} | {_number(arm['damage'])} | {arm['verdict']} |"
            )
        yield ""
        for name, estimate, high, verdict in case.report["lost"]:
            upper = "none" if high is None or not np.isfinite(high) else f"{high:.1%}"
            yield f"- {name}: {estimate:.1%}, one-sided 95 % upper end {upper}: {verdict}"
        for reason in case.report["reasons"]:
            yield f"- no evidence because {reason}"


def _of_stories(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ""
    yield "## Stories"
    yield ""
    if not rows:
        yield "Not run."
        return
    yield "Pronouns exchanged in stories260k by slices of one head; name copying must stay. All heads are tuned alike."
    yield ""
    yield "| head | wanted pronoun before | after | KL per retain token | names copied before | after | s |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['head']} | {row['success before']:.0%} | {row['success']:.0%} | {row['KL']:.4f} | "
            f"{row['copied before']:.0%} | {row['copied']:.0%} | {row['seconds']:.0f} |"
        )


def _of_memory(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    yield ""
    yield "## Memory and time"
    yield ""
    if not found:
        yield "Not run."
        return
    own, full = found["located"], found["full"]
    yield (
        f"GPT-2-small shape in float32, Adam, 2 prompts of 32 tokens, {own['share']:.2%} of the weights as slices of "
        "six heads against all of them in place. Peak of the process without the libraries, the model among it."
    )
    yield ""
    yield "| | model, MiB | peak, MiB | processor s a step |"
    yield "|---|---|---|---|"
    for name, one in found.items():
        yield f"| {name} | {one['weights']:,.0f} | {one['peak']:,.0f} | {one['seconds']:.3f} |"
    yield ""
    yield (
        f"Located needs {own['peak'] / full['peak']:.0%} of the peak of full fine-tuning (goal: 60 % at most) and "
        f"{own['seconds'] / full['seconds']:.0%} of its time a step (goal: 100 % at most)."
    )


def _arm(case: Case, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(arm for arm in case.report["arms"] if arm["arm"] == name)
    return found


def _contrast(case: Case, name: str) -> str:
    held = case.report["contrast"].get(name)
    if held is None or held["estimate"] is None or not np.isfinite(held["estimate"]):
        return "-" if held is None else held["note"]
    return f"{held['estimate']:+.4f} [{held['low']:+.4f}, {held['high']:+.4f}]"


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else "inf" if np.isinf(value) else f"{value:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page; what was measured before is kept beside it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="faults whose name holds this, such as trigger or ioi-head")
    parser.add_argument("--stories", action="store_true", help="stories260k alone")
    parser.add_argument("--memory", action="store_true", help="memory and time alone")
    parser.add_argument("--out", type=Path, default=OUT, help="page to write (default: %(default)s)")
    chosen: Any = parser.parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    kept = chosen.out.with_name("tuning.json")
    comparison = cp.Comparison()
    everything = not (chosen.stories or chosen.memory)

    command = " ".join(["python -m benchmarks.tuning", *map(str, sys.argv[1:] if arguments is None else arguments)])

    def known() -> dict[str, Any]:
        return dict(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else {}

    def keep(**more: Any) -> None:
        held = {**known(), **more}
        kept.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        chosen.out.write_text(page(held, command), encoding="utf-8")

    if chosen.memory or (everything and not chosen.only):
        keep(memory=memory())
    if chosen.stories or (everything and not chosen.only):
        keep(stories=stories(comparison))
    faults = [fault for fault in FAULTS if everything and chosen.only in fault.name]
    if everything and not faults:
        parser.error(f"no fault is called like {chosen.only!r}")
    for fault in faults:
        case = tuned(fault, comparison)
        others = [one for one in known().get("cases", []) if one["fault"] != case.fault]
        cases = sorted([*others, vars(case)], key=lambda one: [each.name for each in FAULTS].index(one["fault"]))
        keep(cases=cases)
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()
