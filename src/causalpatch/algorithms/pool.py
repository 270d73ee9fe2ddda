"""The pool: inputs of an algorithm beside their prompts, from which bases, sources and other inputs are drawn.

Two ways to one:

- *from the algorithm*: its inputs are listed (or drawn) from the values that they can take, and ``encode`` writes the
  prompts. The pool is then the whole population that numbers speak of, and each draw from it is a unit of its own.
- *from pairs*: prompts that are there already, clean and corrupted, whose inputs ``inputs`` reads. They are a sample,
  so the unit is the independent component of pairs that hang together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from causalpatch.algorithms.hypothesis import Hypothesis
from causalpatch.base.errors import AlgorithmError
from causalpatch.base.seeds import generator
from causalpatch.base.tokens import Tokenizer
from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs, load_pairs
from causalpatch.pairs.pair import Answers
from causalpatch.pairs.placed import Kind
from causalpatch.pairs.role import ROLES, Role

Data = Pairs | Sequence[Mapping[str, Any]] | None
MOST_INPUTS = 2_000
"""Most inputs in a pool made from the algorithm; of more, so many are drawn."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Inputs of an algorithm with their prompts.

    Args:
        name: How results call it.
        values: The values of all inputs and variables at each input.
        prompts: The prompt (or array) of each, and the tokens of its spans.
        spans: Name to half-open range of tokens, for each.
        components: Number of the independent component of each, ``(input,)``.
        unit: What counts as one observation: a ``"draw"`` from this pool, or a ``"component"`` of its pairs.
        kind: Whether these are prompts of tokens or arrays.
        texts: The text of each prompt, where there is one.
        tokenizer: What turns ids into labels.
        beside: Further arguments of the network's forward at each input, by name.
        common: Further arguments that are the same at all inputs.
    """

    name: str
    values: tuple[Mapping[str, Any], ...]
    prompts: tuple[np.ndarray, ...]
    spans: tuple[Mapping[str, tuple[int, int]], ...]
    components: np.ndarray
    unit: Literal["draw", "component"]
    kind: Kind
    texts: tuple[str | None, ...]
    tokenizer: Tokenizer | None
    beside: tuple[Mapping[str, np.ndarray], ...]
    common: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt; 1 for arrays, ``(input,)``."""
        return np.array([len(each) if self.kind == "tokens" else 1 for each in self.prompts])

    def pairs(
        self,
        base: Sequence[int] | np.ndarray,
        source: Sequence[int] | np.ndarray,
        answer: Sequence[Answers] | None = None,
        wrong_answer: Sequence[Answers] | None = None,
    ) -> Pairs:
        """Lay inputs side by side: bases as the corrupted, sources as the clean inputs of pairs.

        Denoising then puts values of the sources into runs of the bases. Each pair has a group of its own.

        Args:
            base: Number of the base of each pair.
            source: Number of its source.
            answer: The answers of each pair.
            wrong_answer: The wrong answers of each pair.
        """
        made = []
        for number, (one, other) in enumerate(zip(map(int, base), map(int, source), strict=True)):
            shared = [name for name in self.spans[other] if name in self.spans[one]]
            made.append(
                Pair(
                    self.prompts[other],
                    self.prompts[one],
                    answer=() if answer is None else answer[number],
                    wrong_answer=() if wrong_answer is None else wrong_answer[number],
                    id=f"{number}: {one} <- {other}",
                    group=str(number),
                    spans={name: (self.spans[other][name], self.spans[one][name]) for name in shared},
                    clean_text=self.texts[other],
                    corrupt_text=self.texts[one],
                    beside={name: (array, self.beside[one][name]) for name, array in self.beside[other].items()},
                )
            )
        return Pairs(made, name=self.name, kind=self.kind, tokenizer=self.tokenizer, common=self.common)

    def outputs(self, hypothesis: Hypothesis) -> list[Any]:
        """Return the algorithm's output at each input."""
        return [values[hypothesis.algorithm.output] for values in self.values]


def make_pool(model: Model, hypothesis: Hypothesis, data: Data, seed: int) -> Pool:
    """Make the pool of a hypothesis.

    Args:
        model: The network, for its tokenizer.
        hypothesis: The algorithm, and how its inputs are written or read.
        data: Pairs whose inputs the hypothesis reads, a list of inputs that it writes, or None for all inputs.
        seed: Seed of the draw where there are too many to list.

    Raises:
        AlgorithmError: The hypothesis cannot write (or read) inputs, or there are fewer than two.
    """
    pool = _of_pairs(hypothesis, data) if isinstance(data, Pairs) else _of_inputs(model, hypothesis, data, seed)
    if len(pool) < 2:
        raise AlgorithmError(
            f"{len(pool)} input of '{hypothesis.algorithm.name}' leaves nothing to interchange",
            facts=[("needed", "two different prompts or more")],
            fix="give more inputs",
        )
    return pool


def _of_inputs(model: Model, hypothesis: Hypothesis, data: Sequence[Mapping[str, Any]] | None, seed: int) -> Pool:
    algorithm = hypothesis.algorithm
    if hypothesis.encode is None:
        raise AlgorithmError(
            f"the hypothesis does not say how inputs of '{algorithm.name}' are written as prompts",
            facts=[("inputs", ", ".join(algorithm.inputs))],
            fix="Hypothesis(…, encode=function), or give pairs and Hypothesis(…, inputs=function)",
        )
    listed = _listed(hypothesis, seed) if data is None else [dict(each) for each in data]
    values = tuple(algorithm.run(each) for each in listed)
    rows = [_row(hypothesis, each) for each in listed]
    if model.kind == "tokens":
        pairs = load_pairs(rows, model, name=algorithm.name) if rows else None
    else:
        inputs = [row["clean"] for row in rows]
        pairs = Pairs.from_arrays(inputs, inputs, name=algorithm.name) if rows else None
    found = tuple(pairs) if pairs is not None else ()
    return Pool(
        algorithm.name,
        values,
        tuple(pair.clean for pair in found),
        tuple({name: held[0] for name, held in pair.spans.items()} for pair in found),
        np.arange(len(found)),
        "draw",
        "tokens" if pairs is None else pairs.kind,
        tuple(pair.clean_text for pair in found),
        None if pairs is None else pairs.tokenizer,
        tuple(pair.besides("clean") for pair in found),
    )


def _listed(hypothesis: Hypothesis, seed: int) -> list[dict[str, Any]]:
    """Return all inputs, or as many different ones as a pool holds."""
    algorithm = hypothesis.algorithm
    if algorithm.n_inputs <= MOST_INPUTS:
        return list(algorithm.every_input())
    stream = generator(seed, "inputs", algorithm.name)
    held = list((algorithm.values or {}).items())
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < MOST_INPUTS:
        drawn[tuple(int(stream.integers(len(values))) for _, values in held)] = None
    return [{name: values[i] for (name, values), i in zip(held, places, strict=True)} for places in drawn]


def _row(hypothesis: Hypothesis, inputs: Mapping[str, Any]) -> dict[str, Any]:
    encode = hypothesis.encode
    if encode is None:
        raise AlgorithmError("there is no way to write inputs", fix="Hypothesis(…, encode=function)")
    try:
        made = encode(**inputs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise AlgorithmError(
            f"encode cannot write an input of '{hypothesis.algorithm.name}'",
            facts=[("input", repr(dict(inputs))[:88]), ("error", f"{type(error).__name__}: {str(error)[:80]}")],
            fix="let it take the inputs by name, such as def encode(a, b): …",
        ) from error
    prompt, spans = (made["prompt"], made.get("spans", {})) if isinstance(made, Mapping) else (made, {})
    return {"clean": prompt, "corrupt": prompt, "spans": spans}


def _of_pairs(hypothesis: Hypothesis, pairs: Pairs) -> Pool:
    read = hypothesis.inputs
    if read is None:
        raise AlgorithmError(
            f"the hypothesis does not say how inputs of '{hypothesis.algorithm.name}' are read off prompts",
            facts=[("pairs", f"'{pairs.name}'"), ("inputs", ", ".join(hypothesis.algorithm.inputs))],
            fix='Hypothesis(…, inputs=lambda pair, side: {"a": …})',
        )
    seen: dict[str, tuple[int, Role]] = {}
    for number, pair in enumerate(pairs):
        for role, name in zip(ROLES, pair.digests, strict=True):
            seen.setdefault(name, (number, role))
    values, prompts, spans, texts, beside = [], [], [], [], []
    for number, role in seen.values():
        pair = pairs[number]
        given = read(pair, role)
        if not isinstance(given, Mapping):
            raise AlgorithmError(
                f"the inputs of the {role} side of pair {number} of '{pairs.name}' are {type(given).__name__}",
                fix='return them by name: lambda pair, side: {"a": …}',
            )
        values.append(hypothesis.algorithm.run(given))
        prompts.append(pair.input(role))
        spans.append({name: held[ROLES.index(role)] for name, held in pair.spans.items()})
        texts.append(pair.text(role))
        beside.append(pair.besides(role))
    components = pairs.components[[number for number, _ in seen.values()]]
    kept = (tuple(values), tuple(prompts), tuple(spans), components)
    more = (tuple(texts), pairs.tokenizer, tuple(beside), pairs.common)
    return Pool(pairs.name, *kept, "component", pairs.kind, *more)
