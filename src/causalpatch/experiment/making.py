"""From failing prompts to pairs: partners are made, and the model says which of them work.

1. Every prompt that is said to fail is run. Those that do not fail are dropped.
2. Partners are made for the others: prompts that work, words put in their place, templates, replacements of as
   many tokens (``pairs/candidates.py``).
3. Each partner is run beside its failing prompt. Kept are pairs in which the partner prefers its answer to the wrong
   one and the failing prompt prefers the wrong one to it: the gap that patching then explains.
4. On request pairs are chosen so that no two share a prompt or an entity.

Whatever is dropped is counted by its reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from causalpatch.base.errors import ModelUnsupported, PairError, SettingError
from causalpatch.experiment.judging import Judge
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.candidates import WAYS, Candidate, Material, PromptTemplate, candidates, prompts_of
from causalpatch.pairs.failures import Failure, Given, read_failures, read_working, rows_of
from causalpatch.pairs.made import MadePairs, account


def make_pairs(  # noqa: PLR0913 - what pairs can be made of, each with a default
    failures: Given | None,
    model: Model,
    *,
    works: Given | Sequence[str] = (),
    templates: Given | Mapping[str, Any] = (),
    vocabulary: Sequence[str] | None = None,
    ways: Sequence[str] | None = None,
    against: Model | None = None,
    tries: int = 16,
    entity_disjoint: bool = False,
    equal_length: bool = False,
    strict: bool = False,
    first_token: bool = False,
    at: int | str = -1,
    seed: int = 0,
    name: str | None = None,
) -> MadePairs:
    """Make pairs of failing prompts and partners that work.

    A pair's corrupted prompt is the failing one, its ``wrong_answer`` what the model says there; its clean prompt is
    the partner, its ``answer`` what is right there. ``denoise`` then asks which of the partner's activations mend the
    failure.

    A failing prompt is a row with ``prompt`` (a text or a list of messages) and ``answer`` or ``answer_id`` (what is
    wanted), and perhaps ``wrong_answer`` or ``wrong_answer_id`` (what the model says; by default its first choice),
    ``works`` (prompts that work: texts, or rows with ``prompt`` and, where it is another one, ``answer``), ``spans``
    (name to text), ``replacements`` (name of a span to texts that may stand there), ``entities``, ``group``, ``id``.
    Other columns are kept.

    Args:
        failures: Rows, or a file that ends in ``.jsonl``. None makes counterfactual pairs of the templates alone: both
            prompts are then answered right, each by its own answer.
        model: The model.
        works: Prompts that work, beside every failing prompt; the nearest are tried.
        templates: A file of them, or one or more of ``{"prompt": "{name} ran to", "fillers": …, "answer": …}``.
            ``fillers`` is a list of mappings from slot to text, or a mapping from slots to lists, all combinations of
            which are made. Without ``answer``, which may hold slots, a partner is to be answered as the failing prompt.
        vocabulary: Words for replacements of as many tokens; by default those of all prompts.
        ways: Which of ``works``, ``substitution``, ``template`` and ``length``, in this order of preference. By default
            those that something is given for; ``length`` where a vocabulary is given, or nothing else.
        against: Another checkpoint, of the same shape, that answers the failing prompts right. No partners are made: a
            pair is then one prompt on both sides, for ``Experiment(model, pairs, source_model=against)``.
        tries: The most partners of each way for each failing prompt.
        entity_disjoint: Keep pairs of which no two share a prompt, an entity that rows name, or a word in which the two
            prompts of a pair differ; these become the pairs' ``entities``.
        equal_length: Take only partners of as many tokens, so that pairs align by position.
        strict: The answers must also be the first choices of all.
        first_token: Cut answers of several tokens to their first one.
        at: The real token whose outputs are read, or the name of a span of one token, such as ``"mask"``.
        seed: Seed of the draw where there are more partners than tries.
        name: How messages and results call the pairs; by default the name of the file.

    Returns:
        The pairs and the account of what was dropped; print it. Pairs have the columns ``failure`` and ``way``, and the
        span ``changed``; of chats ``system``, ``user``, ``assistant`` too.

    Raises:
        ModelUnsupported: The model has no tokenizer.
        PairFileError: A file cannot be read, or a row lacks its prompt or answer.
        PairError: No prompt fails, no partner works, a template cannot be filled, or a span does not stand once in its
            prompt.
        SettingError: A way is not known, or partners are to be made of something where another model is the partner.

    Examples:
        >>> import causalpatch as cp
        >>> names = [{"a": "Mary", "b": "John", "giver": "John"}, {"a": "Mary", "b": "John", "giver": "Mary"}]
        >>> template = {"prompt": "{a} and {b} met. {giver} gave the key to", "fillers": names}
        >>> failing = [{"prompt": "Mary and John met. Mary gave the key to", "answer": " Mary"}]
        >>> made = make_pairs(failing, cp.open_model("zoo:stories"), templates=template)
        >>> made.pairs[0].clean_text, made.pairs[0].extra["way"]
        ('Mary and John met. John gave the key to', 'template')

    Cost:
        Two runs of each prompt that is said to fail, and two of each partner that is tried.
    """
    if model.tokenizer is None:
        raise ModelUnsupported(
            f"'{model.name}' has no tokenizer, so no prompts can be made for it",
            fix="open_model(…, tokenizer=…), or pair token ids yourself: load_pairs(rows, model)",
        )
    if against is not None and (failures is None or works or templates or vocabulary or ways):
        raise SettingError(
            "no partners are made of other prompts where another model is the partner",
            facts=[("against", f"'{against.name}' runs the failing prompts themselves")],
            fix="give failing prompts and against= alone, or leave against= out",
        )
    given = [templates] if isinstance(templates, Mapping) else templates
    rows = rows_of(given, "templates")[0] if given else []
    if failures is None and not rows:
        raise SettingError(
            "pairs are to be made of nothing",
            fix="give failing prompts, or templates with answers: make_pairs(None, …)",
        )
    read = [PromptTemplate.of(row.values, number) for number, row in enumerate(rows)]
    listed, found_name = (prompts_of(read), "templates") if failures is None else read_failures(failures)
    working = read_working(works) if works else []
    rules: dict[str, Any] = {"strict": strict, "first_token": first_token, "at": at, "against": against}
    judge = Judge(model, name or found_name, **rules)
    chosen = (
        [AGAINST]
        if against is not None
        else _ways(ways, listed, working=bool(working), templates=bool(read), vocabulary=vocabulary is not None)
    )
    failing = judge.failing(listed)
    material = Material.of(listed, working, read, vocabulary)
    made: list[Candidate] = []
    untried: Counter[str] = Counter()
    for failure in failing:
        if against is not None:
            spans = {name: (text, text) for name, text in failure.spans.items()}
            made.append(Candidate(failure, failure.prompt, AGAINST, failure.answer, spans=spans))
            continue
        equally = chosen if equal_length else ["length"]
        found, beyond = candidates(failure, chosen, material, judge.length, tries, seed, equally)
        made += found
        untried.update(beyond)
    tried = {way: sum(one.way == way for one in made) for way in chosen}
    kept = judge.working(made, entity_disjoint=entity_disjoint)
    if not kept:
        raise _none_works(judge, len(failing), chosen, tried)
    return MadePairs(
        Pairs([one.pair for one in kept], name=judge.name, tokenizer=model.tokenizer),
        tuple(one.row for one in kept),
        model.name,
        len(listed),
        tuple(failure.id for failure in failing),
        tried,
        tuple(judge.dropped),
        dict(untried),
        is_of_templates=failures is None,
    )


AGAINST: Final = "against"
"""The way of pairs whose partner is the same prompt in another model."""


def _ways(
    asked: Sequence[str] | None, failures: Sequence[Failure], *, working: bool, templates: bool, vocabulary: bool
) -> list[str]:
    """Return the ways that are asked for, or those that something is given for."""
    unknown = [way for way in asked or () if way not in WAYS]
    if unknown or (asked is not None and not asked):
        raise SettingError(
            f"{unknown[0]!r} is no way to make a partner" if unknown else "no way to make partners is asked for",
            facts=[("known", ", ".join(WAYS))],
            fix='ways=["template"]',
        )
    if asked is not None:
        return list(dict.fromkeys(asked))
    works = working or any(failure.works for failure in failures)
    has = {"works": works, "substitution": works or any(failure.spans for failure in failures), "template": templates}
    return [way for way in WAYS if has.get(way, vocabulary or not any(has.values()))]


def _none_works(judge: Judge, n_failing: int, ways: Sequence[str], tried: Mapping[str, int]) -> PairError:
    if judge.against is not None:
        return PairError(
            f"'{judge.against.name}' answers none of the {n_failing} failing prompts of '{judge.name}' right",
            facts=account(judge.dropped),
            fix="take a checkpoint that worked, or make partners in the model itself: leave against= out",
        )
    lacking = [("partners", ", ".join(f"{way} {tried.get(way, 0)}" for way in ways))]
    if "template" in ways and not tried.get("template"):
        lacking.append(("templates", "no failing prompt fits one"))
    return PairError(
        f"no partner of the {n_failing} failing prompts of '{judge.name}' works in '{judge.model.name}'",
        facts=[*lacking, *account(judge.dropped)],
        fix='give similar prompts that the model answers right: make_pairs(…, works=[{"prompt": "…", "answer": " …"}])',
    )
