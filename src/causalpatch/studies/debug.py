"""From failing prompts to a claim: pairs, a search on some of them, a confirmation on the others.

1. ``pairs``: failing prompts get partners that work (``make_pairs``), in the model itself, or are run in another
   checkpoint that answers them right. Of the pairs that leave a gap each failing prompt keeps one.
2. ``split``: independent components are divided into discovery and held-out pairs, so that the latter suffice for a
   claim.
3. ``search``: ``localize`` on the discovery pairs, coarse to fine, within the budget.
4. ``confirm``: what restores most is tested on the held-out pairs, once.

A stage that cannot go on ends the investigation, which then says where and why; what was found until then is kept. With
a folder every stage writes what it found before the next one begins.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from causalpatch.base.errors import CausalPatchError, PairError, SettingError
from causalpatch.experiment import Experiment
from causalpatch.experiment.judging import comparing
from causalpatch.experiment.making import make_pairs
from causalpatch.metrics import Metric
from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.components import vertices
from causalpatch.pairs.failures import Given
from causalpatch.pairs.made import MadePairs
from causalpatch.pairs.split import LEAST
from causalpatch.results.claim import Claim
from causalpatch.results.localization import Localization
from causalpatch.studies.debugging import Debugging, Stop
from causalpatch.sweeps.localize import localize
from causalpatch.sweeps.localize.parts import Units
from causalpatch.validation.confirm import Checks, confirm
from causalpatch.validation.held_out import components_needed

Level = Literal["layers", "heads", "neurons"]
_UNITS: Final[Mapping[str, Units]] = {"layers": "none", "heads": "heads", "neurons": "all"}
STOPPED: Final = 130  # the exit code of what the user ends
_FRACTIONS: Final = (0.5, 0.4, 0.3, 0.2, 0.1)  # of the pairs for the search, until enough are left to confirm


def debug(  # noqa: PLR0913 - what fails, what works, how far to look; each has a default
    model: Model,
    failures: Given,
    *,
    works: Given | Sequence[str] = (),
    templates: Given | Mapping[str, Any] = (),
    vocabulary: Sequence[str] | None = None,
    against: Model | None = None,
    budget: float | str = "5 min",
    level: Level = "heads",
    positions: str | Sequence[str] | None = None,
    metric: Metric | str | None = None,
    delta: float | None = None,
    alpha: float = 0.05,
    most: int = 5,
    first_token: bool = False,
    checks: Checks | None = None,
    ledger: str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Debugging:
    """Find which components make prompts fail, and confirm them on pairs that the search never saw.

    Args:
        model: The model that fails.
        failures: Prompts that fail with what is wanted of them, as ``make_pairs`` reads them: rows with ``prompt`` and
            ``answer``, or a file. Give ``entities`` too: prompts that speak of the same one are one observation.
        works: Prompts that work, for partners.
        templates: Templates for partners.
        vocabulary: Words for partners in which one word is another; by default, where nothing else is given, those of
            all prompts.
        against: Another checkpoint of the same shape that answers the prompts right, such as the one before a
            fine-tuning. The pairs are then the prompts themselves, run in both models: for behaviours that fail
            altogether, so that no partner works.
        budget: What the search may spend: runs of the model, or ``"5 min"``, or ``"3 TFLOP"``.
        level: How far down it looks: ``"layers"`` (attention and MLPs), ``"heads"``, ``"neurons"``.
        positions: Which positions are told apart, as for ``localize``.
        metric: What is measured; by default the logit difference of right and wrong answer, of answers of several
            tokens that of their log-probabilities.
        delta: Share of the gap that does not count; .1, and .02 of neurons.
        alpha: Probability of even one wrong claim.
        most: Components that are sent to confirmation, at most: those that restore most.
        first_token: Cut answers of several tokens to their first one.
        checks: Controls of the claim; all by default.
        ledger: File of the openings of held-out pairs; the user's own by default.
        seed: Seed of the draws of partners and of the split.
        out: A folder: each stage writes what it found into it.

    Returns:
        What was found, as far as it went; ``print`` it. ``stop`` says where and why it ended before a claim.

    Raises:
        PairFileError: The failing prompts cannot be read.
        SettingError: A setting is impossible.
        ModelUnsupported: The model has no tokenizer, or the other checkpoint has another shape.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> rows = [{"prompt": pair.clean_text, "answer": " Mary"} for pair in cp.load_pairs("ioi", model)[:4]]
        >>> found = cp.debug(model, rows, budget=200, level="layers")
        >>> found.exit_code, found.claim is None  # four prompts are too few to confirm anything
        (1, True)

    Cost:
        Two runs for each failing prompt and each partner that is tried, the budget, and the claim's runs.
    """
    if level not in _UNITS:
        raise SettingError(f"level={level!r} is none", facts=[("known", ", ".join(_UNITS))], fix='level="heads"')
    if most < 1:
        raise SettingError(f"most={most} sends nothing to confirmation", fix="most=5")
    asked = {
        "model": model.name,
        "against": None if against is None else against.name,
        "failures": str(failures) if isinstance(failures, str | Path) else "rows",
        "budget": str(budget),
        "level": level,
        "metric": None if metric is None else str(getattr(metric, "name", metric)),
        "delta": delta,
        "alpha": alpha,
        "most": most,
        "seed": seed,
    }
    study = _Study(Debugging(asked), None if out is None else Path(out))
    needed = components_needed(alpha)

    def experiment(pairs: Pairs) -> Experiment:
        return Experiment(model, pairs, metric=metric or comparing(pairs), source_model=against, seed=seed)

    def pair() -> MadePairs:
        partners: dict[str, Any] = {"works": works, "templates": templates, "vocabulary": vocabulary}
        return make_pairs(failures, model, **partners, against=against, first_token=first_token, seed=seed)

    made = study.stage("pairs", pair, "made")
    if made is None:
        return study.found
    discovery, held_out = study.stage("split", lambda: divided(made, needed, seed), "discovery", "held_out")

    def search() -> Localization:
        return localize(experiment(discovery), budget, positions=positions, units=_UNITS[level], delta=delta)

    localization = study.stage("search", search, "localization")
    if localization is None:
        return study.found
    if localization.provenance["stopped"]:
        return study.stop("search", "the user ended it", fix="run it again: nothing was confirmed yet", code=STOPPED)
    if not study.found.restoring:
        return study.stop("search", *_nothing(localization))
    if held_out is None:
        return study.stop("split", *_too_few(made, discovery, needed))

    def claim() -> Claim:
        sent = study.found.found[:most]
        rules: dict[str, Any] = {"delta": delta, "alpha": alpha, "checks": checks, "ledger": ledger}
        return confirm(experiment(held_out), sent, found_on=discovery, **rules)

    study.stage("confirm", claim, "claim")
    return study.found


def divided(made: MadePairs, needed: int, seed: int) -> tuple[Pairs, Pairs | None]:
    """Divide one pair of each failing prompt into those for the search and those held out.

    Args:
        made: The pairs.
        needed: Independent components that a claim needs.
        seed: Seed of the draw.

    Returns:
        Discovery pairs, and held-out ones; all and None where there are too few components for both.
    """
    pairs = made.pairs.take(one_each(made.pairs))
    if not all(_is_even(pair) for pair in pairs):
        pairs = pairs.align("difference")
    if len(set(pairs.components.tolist())) >= needed + LEAST:
        for fraction in _FRACTIONS:
            discovery, held_out = pairs.split(fraction, seed)
            if len(set(held_out.components.tolist())) >= needed:
                return discovery, held_out
    return pairs, None


def one_each(pairs: Pairs) -> list[int]:
    """Return one pair of each failing prompt: where there is one that shares nothing with others, of equal lengths."""
    by_failure: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_failure.setdefault(str(pair.extra["failure"]), []).append(number)
    seen: set[Any] = set()
    chosen = []
    for numbers in by_failure.values():
        best = min(numbers, key=lambda k: (bool(seen & set(vertices(pairs[k]))), not _is_even(pairs[k])))
        seen |= set(vertices(pairs[best]))
        chosen.append(best)
    return chosen


def _is_even(pair: Pair) -> bool:
    """Say whether both prompts of a pair have as many tokens."""
    return len(pair.clean) == len(pair.corrupt)


class _Study:
    """Makes the stages one after the other, keeps what they found, and writes it down.

    Args:
        found: What is known so far.
        out: Where it is written.
    """

    def __init__(self, found: Debugging, out: Path | None) -> None:
        self.found = found
        self.out = out

    def stage(self, name: str, make: Callable[[], Any], *fields: str) -> Any:
        """Make a stage; None where it could not be made, which is then noted as where the investigation stopped."""
        started = time.perf_counter()
        try:
            made = make()
        except CausalPatchError as error:
            if name == "pairs" and not isinstance(error, PairError):
                raise
            self._keep(name, started, stop=Stop(name, error.what, error.facts, error.fix, error.exit_code))
            return None
        self._keep(name, started, **dict(zip(fields, made if len(fields) > 1 else (made,), strict=True)))
        return made

    def stop(
        self, stage: str, why: str, facts: Sequence[tuple[str, object]] = (), fix: str = "", code: int = 1
    ) -> Debugging:
        """Note that the investigation ends without a claim."""
        self._keep(stage, time.perf_counter(), stop=Stop(stage, why, tuple(facts), fix, code))
        return self.found

    def _keep(self, name: str, started: float, **more: Any) -> None:
        seconds = {**self.found.seconds}
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        self.found = self.found.with_more(seconds=seconds, **more)
        if self.out is not None:
            self.found.save(self.out)


def _nothing(found: Localization) -> tuple[str, list[tuple[str, object]], str]:
    """Say that nothing restores the right answer."""
    measured = sorted(found.cells, key=lambda cell: -cell.effect)[:3]
    largest = ", ".join(f"{cell.name} {cell.effect:+.3f}" for cell in measured) or "nothing was measured"
    facts: list[tuple[str, object]] = [("largest", largest), ("budget", found.provenance["budget"])]
    if found.pending:
        facts.append(("not opened", f"{len(found.pending)} parts, for lack of budget"))
        return "nothing that was measured restores more than delta", facts, "a larger budget"
    against = ", ".join(cell.name for cell in found.found[:3])
    facts += [("against it", against)] if against else []
    return "nothing that was measured restores more than delta", facts, "a smaller delta, or another metric"


def _too_few(made: MadePairs, pairs: Pairs, needed: int) -> tuple[str, list[tuple[str, object]], str]:
    """Say how many independent components are needed for a claim."""
    n = len(set(pairs.components.tolist()))
    total = needed + LEAST
    facts: list[tuple[str, object]] = [
        ("independent", f"{n} components of {len(made.pairs)} pairs: what shares a prompt, entity or group is one"),
        ("needed", f"{total}: {needed} held out for a claim, {LEAST} to search on"),
        ("so far", "the search used all of them: what it found is exploratory, and no claim can be made of it"),
    ]
    return "too few independent components to confirm anything", facts, f"give {total - n} more failing prompts apart"
