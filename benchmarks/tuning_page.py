"""The page of what tuning was measured to do: ``benchmarks/TUNING.md``."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

import benchmarks.tuning_evidence as evidence
import benchmarks.tuning_faults as of_faults
from benchmarks.machine import describe, versions
from benchmarks.tuning_evidence import KINDS, Contrast, arms_of, contrast, damage, located_of, rank_test
from benchmarks.tuning_faults import Case
from causalpatch.statistics.intervals import Interval
from causalpatch.testing.faults import FAULTS

GOAL: Final = 0.95  # of the held-out pairs of a fault, and of the faults
_MARGIN: Final = 0.02  # of other answers that may be lost


def page(held: Mapping[str, Any], command: str) -> str:
    """Return the page of all that was measured."""
    machine, used = describe(), versions()
    cases = [Case(**one) for one in held.get("cases", [])]
    lines = [
        "# Tuning: located parts against all else",
        "",
        f"Last part made by `{command}` on {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in used.items())
        + ". Seconds are processor seconds: other work ran beside.",
        "",
        *(of_faults.__doc__ or "").partition("\n\n")[2].splitlines(),
        "",
        *_rules(cases),
        "",
        *_in_short(cases),
        *_faults(cases),
        *_stories(held.get("stories", [])),
        *_memory(held.get("memory", {})),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rules(cases: Sequence[Case]) -> Iterator[str]:
    made = [case for case in cases if case.report]
    for rules, n in Counter(_told(case) for case in made).items():
        yield f"Rules ({n} faults): {rules}"
    total = sum(case.report["n_trainings"] for case in made)
    seconds = sum(case.seconds for case in cases)
    yield ""
    yield f"{total:,} trainings in {seconds / 60:.0f} processor minutes, planting and searching among them."


def _told(case: Case) -> str:
    rules, schedule = case.rules, case.rules["schedule"]
    rates = ", ".join(f"{rate:g}" for rate in schedule["rates"])
    return (
        f"rates {rates}, each tried once, then {rules['n_seeds'] - 1} more seeds at the one that validation chose; at "
        f"most {schedule['steps']} steps of {schedule['batch']} target pairs and {schedule['retain_batch']} retain "
        "prompts; "
        f"validation looked at every {schedule['every']} steps, an end after {schedule['patience']} without gain; "
        f"chosen is what moved the retain prompts least where {schedule['enough']:.0%} of the validation pairs succeed "
        f"by {schedule['ahead']:g} nat; the target is reached where {schedule['enough']:.0%} of them succeed at "
        "all, and test pairs do not show otherwise (the one-sided 95% bound of their share); "
        f"{rules['n_random']} random draws, or all matched sets where these are fewer; the "
        "same for every arm."
    )


def _in_short(cases: Sequence[Case]) -> Iterator[str]:
    yield "## In short"
    yield ""
    lacking = [fault.name for fault in FAULTS if fault.name not in {case.fault for case in cases}]
    yield f"Run: {len(cases)} of {len(FAULTS)} faults. Not run: {', '.join(lacking) or 'none'}."
    made = [case for case in cases if case.report]
    if not made:
        return
    misses = [f"{case.fault} {_success(located_of(case)):.1%}" for case in made if _success(located_of(case)) < GOAL]
    n_good = sum(_success(located_of(case)) >= GOAL for case in made)
    yield ""
    yield (
        f"*Repaired* on at least {GOAL:.0%} of the held-out pairs, mean of seeds: {n_good} of {len(cases)} faults "
        f"({n_good / len(cases):.0%}; goal {GOAL:.0%}). Misses: " + ("; ".join(misses) or "none") + "."
    )
    yield ""
    verdicts = Counter(case.report["verdict"] for case in made)
    yield "*Verdicts*: " + ", ".join(f"{n} x {verdict}" for verdict, n in verdicts.items()) + "."
    yield ""
    others = Counter(located_of(case)["verdict"] for case in made)
    yield (
        "*Other behaviour and text* of the located arms: "
        + ", ".join(f"{n} x {told}" for told, n in others.items())
        + ". Of each other behaviour as many prompts are tested as share no entity, at most 80, where 149 without a "
        "loss would show that it is at most 2 points: *not disrupted* is out of reach here, even for the base model."
    )
    yield ""
    in_words = [float(np.mean(own["paraphrased"])) for own in map(located_of, made) if own["paraphrased"]]
    if in_words:
        n_good = sum(each >= GOAL for each in in_words)
        yield (
            f"*In other words*, in a sentence that was not trained on: {np.mean(in_words):.0%} of the prompts are "
            f"right, mean of {len(in_words)} faults, at least {GOAL:.0%} in {n_good} of them. "
            "A fault of one sentence has no other; of lists few prompts share no word with those that were trained on."
        )
    yield ""
    n_hashed = sum(bool(case.report["mechanism"].get("weights outside")) for case in made)
    yield f"*Weights outside the located parts* bit for bit as they were, by SHA-256: {n_hashed} of {len(made)} faults."
    yield ""
    yield from (evidence.__doc__ or "").partition("\n\n")[2].splitlines()
    yield ""
    yield "| located against | faults | it got there | d, nat per token | ratio | less, more damage | sign test p |"
    yield "|---|---|---|---|---|---|---|"
    for kind in KINDS:
        yield _contrast_row(contrast(made, kind))
    mean, p, least = rank_test(made)
    yield ""
    yield (
        f"Rank test: mean rank p of located among its random draws {mean:.3f} over {len(made)} faults (.5 and a little "
        f"more by chance), p {p:.2g} of so small a mean; the smallest that is attainable is {least:.1g}."
    )


def _contrast_row(found: Contrast) -> str:
    p = "-" if found.p is None else f"{found.p:.2g}"
    return (
        f"| {found.kind} | {found.n_made} | {found.n_reached} | {_interval(found.difference)} | "
        f"{_ratio(found.ratio)} | {found.n_less}, {found.n_more} | {p} |"
    )


def _interval(found: Interval | None) -> str:
    if found is None:
        return "-"
    ends = f"[{found.low:+.4f}, {found.high:+.4f}]" if found.is_bounded else found.note
    return f"{found.estimate:+.4f} {ends}"


def _ratio(found: Interval | None) -> str:
    if found is None:
        return "-"
    ends = f"[{math.exp(found.low):.2f}, {math.exp(found.high):.2f}]" if found.is_bounded else found.note
    return f"{math.exp(found.estimate):.2f} {ends}"


def _faults(cases: Sequence[Case]) -> Iterator[str]:
    yield ""
    yield "## Faults"
    yield ""
    yield (
        "| fault | planted in | tuned | repaired (of) | in other words | KL | located - random | located - full | "
        "rank p (smallest) | verdict | other behaviour | trainings | s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        if not case.report:
            yield f"| {case.fault} | {case.place} | {case.how} |{' - |' * 9} {case.seconds:.0f} |"
            continue
        own = located_of(case)
        yield (
            f"| {case.fault} | {case.place} | {', '.join(case.located)} ({case.how}) | {_success(own):.1%} "
            f"({own['n_tested']}) | {_in_words(own)} | "
            f"{_number(damage(own))} | {_one_contrast(case, 'random')} | {_one_contrast(case, 'full')} | "
            f"{case.report['p']:.3g} ({case.report['smallest_p']:.3g}) | {case.report['verdict']} | {own['verdict']} | "
            f"{case.report['n_trainings']} | {case.seconds:.0f} |"
        )
    for case in cases:
        if case.report:
            yield from _fault(case)


def _fault(case: Case) -> Iterator[str]:
    yield ""
    yield f"### {case.fault}"
    yield ""
    yield "| arm | changed | numbers | rate | success | in other words | seeds that reached it | KL | other behaviour |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for kind in ("base", "located"):
        yield from map(_arm_row, arms_of(case, kind))
    draws = arms_of(case, "random")
    if draws:
        yield _draws_row(draws)
    for kind in KINDS[1:]:
        yield from map(_arm_row, arms_of(case, kind))
    yield ""
    yield "| what must not change | estimate | one-sided 95 % | margin | |"
    yield "|---|---|---|---|---|"
    for one in located_of(case)["endpoints"]:
        yield (
            f"| {one['name']} | {_number(one['estimate'])} | {_number(one['high'])} | {one['margin']:g} | "
            f"{_verdict(one)} |"
        )
    yield ""
    for reason in case.report["reasons"]:
        yield f"- no evidence because {reason}"
    for rows in (case.report["mechanism"].get("carried from the tuned model", []),):
        for row in rows[:1]:
            if "share" in row:
                yield f"- carried by {row['put in']}: {row['share']:.0%} of the change; {row['said']}"
    for row in case.report["mechanism"].get("relearning", []):
        if "steps until half fail again" in row:
            yield f"- {row['arm']}: steps of relearning until half fail again: {row['steps until half fail again']}"


def _arm_row(arm: Mapping[str, Any]) -> str:
    names = " + ".join(arm["components"])
    names = names if len(names) < 60 else names[:57] + "..."
    rate = "-" if arm["rate"] is None else f"{arm['rate']:g}"
    return (
        f"| {arm['name']} | {names} | {arm['n_trained']:,} | {rate} | {_success(arm):.0%} | {_in_words(arm)} | "
        f"{sum(arm['reached'])}/{len(arm['reached'])} | {np.mean(arm['moved']):.4f} | {arm['verdict']} |"
    )


def _draws_row(draws: Sequence[Mapping[str, Any]]) -> str:
    success, moved = [_success(arm) for arm in draws], [float(np.mean(arm["moved"])) for arm in draws]
    n_reached = sum(arm["damage"] is not None for arm in draws)
    n_trained = int(np.median([arm["n_trained"] for arm in draws]))
    return (
        f"| {len(draws)} random draws | median (least to most) | {n_trained:,} | - | "
        f"{np.median(success):.0%} ({min(success):.0%} to {max(success):.0%}) | "
        f"{_draws_in_words(draws)} | {n_reached} draws of {len(draws)} | "
        f"{np.median(moved):.4f} ({min(moved):.4f} to {max(moved):.4f}) | "
        f"{sum(arm['verdict'] == 'not disrupted' for arm in draws)} not disrupted |"
    )


def _stories(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ""
    yield "## Stories"
    yield ""
    if not rows:
        yield "Not run."
        return
    yield (
        "The pronoun that stories260k says of boys is made *She* by slices of one head; name copying must stay. All "
        "heads of the layer are "
        f"tuned alike. Of {rows[0]['names']} names, *lost* are those that were copied before and are not afterwards."
    )
    yield ""
    yield "| head | wanted pronoun before | after | KL per retain token | copied before | after | lost, at most | s |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['head']} | {row['success before']:.0%} | {row['success']:.0%} | {row['KL']:.4f} | "
            f"{row['copied before']:.0%} | {row['copied']:.0%} | {row['lost']:.1%}, {row['lost at most']:.1%} | "
            f"{row['seconds']:.0f} |"
        )


def _memory(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    yield ""
    yield "## Memory and time"
    yield ""
    if not found:
        yield "Not run."
        return
    own = found["located"]
    yield (
        f"GPT-2-small shape in float32, Adam, one thread, 2 target and 2 retain prompts of 32 tokens. *located*: "
        f"{own['share']:.2%} of the weights, as slices of six heads; *full*: all, in a second set of weights, as the "
        "arm does; *by hand*: all, in place, without a retain set. Peak of the process, without the libraries."
    )
    yield ""
    yield "| | model, MiB | peak, MiB | processor s a step | located needs, of its peak | of its time |"
    yield "|---|---|---|---|---|---|"
    for name, one in found.items():
        shares = "- | -"
        if one is not own:
            shares = f"{own['peak'] / one['peak']:.0%} | {own['seconds'] / one['seconds']:.0%}"
        yield f"| {name} | {one['weights']:,.0f} | {one['peak']:,.0f} | {one['seconds']:.3f} | {shares} |"
    yield ""
    yield "Goals: 60 % of the peak of full fine-tuning at most, and no more time a step."


def _success(arm: Mapping[str, Any]) -> float:
    return float(np.mean(arm["success"]))


def _in_words(arm: Mapping[str, Any]) -> str:
    """Return the share of the prompts in other words that are right, mean of seeds."""
    return f"{np.mean(arm['paraphrased']):.0%}" if arm["paraphrased"] else "-"


def _draws_in_words(draws: Sequence[Mapping[str, Any]]) -> str:
    found = [float(np.mean(arm["paraphrased"])) for arm in draws if arm["paraphrased"]]
    return f"{np.median(found):.0%} ({min(found):.0%} to {max(found):.0%})" if found else "-"


def _one_contrast(case: Case, name: str) -> str:
    held = case.report["contrast"].get(name)
    if held is None or held["estimate"] is None or not np.isfinite(held["estimate"]):
        return "-" if held is None else held["note"]
    return f"{held['estimate']:+.4f} [{held['low']:+.4f}, {held['high']:+.4f}]"


def _verdict(endpoint: Mapping[str, Any]) -> str:
    low, high, margin = endpoint["low"], endpoint["high"], endpoint["margin"]
    if high is not None and high <= margin:
        return "within"
    return "beyond" if low is not None and low > margin else "not shown"


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else "inf" if np.isinf(value) else f"{value:.4f}"
