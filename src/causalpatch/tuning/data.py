"""What is to change and what must not: target pairs, a retain set, neighbours, other behaviours; split by components.

All of it is ``Pairs`` with one prompt on both sides, so that independent components, splits, hashes and batches are
those of the rest of the library. *Target* pairs have ``answer`` (wanted) and perhaps ``wrong_answer`` (unwanted). A
*document* of the retain set is cut into windows that belong to one group. Whole components go to one of three sides:
training, validation (where to stop, how fast to learn), test (what is reported).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np

from causalpatch.base.errors import ModelUnsupported, PairError, SettingError
from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs, load_pairs
from causalpatch.pairs.failures import rows_of
from causalpatch.pairs.role import Role
from causalpatch.results.words import counted

Given: TypeAlias = Pairs | str | Path | Sequence[Any]
Evaluate: TypeAlias = Callable[[Model], Any]
_ALONE: Final = "evaluation"  # the name of a user's only one
Side = Literal["train", "validation", "test"]
SIDES: Final = ("train", "validation", "test")
_WANTED: Final = {"prompt": "clean", "wanted": "answer", "unwanted": "wrong_answer"}


@dataclass(frozen=True, eq=False)
class TuningData:
    """The behaviour to change and what must not change, divided.

    Args:
        target: Target pairs by side: ``train``, ``validation``, ``test``.
        retain: What must stay as it is, by side.
        neighbours: Prompts near the target ones that must keep their answers; only tested.
        others: Other behaviours, pairs with answers by name; only tested.
        paraphrases: The target behaviour in other words; only tested.
        evaluate: A function of the model that gives one number, or one for each of its items: larger is better. Several
            by name.
    """

    target: Mapping[Side, Pairs]
    retain: Mapping[Side, Pairs]
    neighbours: Pairs | None = None
    others: Mapping[str, Pairs] = field(default_factory=dict)
    paraphrases: Pairs | None = None
    evaluate: Evaluate | Mapping[str, Evaluate] | None = None

    @classmethod
    def of(  # noqa: PLR0913 - everything that a tuning is held to meets here; all but two have a default
        cls,
        model: Model,
        target: Given,
        retain: Given,
        *,
        neighbours: Given | None = None,
        others: Mapping[str, Given] | None = None,
        paraphrases: Given | None = None,
        evaluate: Evaluate | Mapping[str, Evaluate] | None = None,
        side: Role = "clean",
        window: int = 64,
        seed: int = 0,
    ) -> "TuningData":
        """Read and divide data.

        Args:
            model: The model, for its tokenizer.
            target: Rows with ``prompt``, ``wanted`` and perhaps ``unwanted`` (texts or lists of texts) and
                ``entities``, a file of these, or ``Pairs``.
            retain: Texts (one for each document), a text file (documents between empty lines), or ``Pairs``, of which
                the prompts count.
            neighbours: As ``target``; the wanted answer is the one that must stay.
            others: The same by name.
            paraphrases: As ``target``.
            evaluate: The user's own function of a model, or several by name; ``lm_eval_task`` makes such functions.
            side: Of ``Pairs``, whose prompts are meant: ``"corrupt"`` for those of ``debug``, which fail.
            window: Tokens of a document that are seen at once.
            seed: Seed of the split.

        Raises:
            PairError: Retain and target data overlap, there are too few components for three sides, or a target pair
                has no wanted answer.
            ModelUnsupported: The model is none that goes on writing text.

        Examples:
            >>> import causalpatch as cp
            >>> model = cp.open_model("zoo:stories")
            >>> target, retain = cp.load_pairs("agreement", model), cp.load_pairs("induction", model)
            >>> data = TuningData.of(model, target, retain, side="corrupt")
            >>> {side: len(pairs) for side, pairs in data.target.items()}
            {'train': 19, 'validation': 10, 'test': 19}
        """
        if model.kind != "tokens" or model.sees_ahead or model.streams is not None:
            raise ModelUnsupported(
                f"'{model.name}' cannot be tuned to say something else",
                facts=[("needed", "a model of text in which tokens see earlier ones alone")],
                fix="open a causal language model",
            )
        wanted = read_target(target, model, side, "target")
        kept = read_retain(retain, model, side, window)
        require_apart(kept, wanted, model)
        more = {name: read_target(each, model, side, name) for name, each in (others or {}).items()}
        near = None if neighbours is None else read_target(neighbours, model, side, "neighbours")
        said = None if paraphrases is None else read_target(paraphrases, model, side, "paraphrases")
        return cls(_divided(wanted, seed), _divided(kept, seed), near, more, said, evaluate)

    def seen_before(self) -> Iterator[tuple[str, int, int]]:
        """Yield of what is only tested what was trained or validated on all the same: name, prompts, prompts in all."""
        sides: tuple[Side, ...] = ("train", "validation")
        seen = {pair.clean.tobytes() for held in (self.target, self.retain) for side in sides for pair in held[side]}
        tested = {"neighbours": self.neighbours, "paraphrases": self.paraphrases, **self.others}
        for name, pairs in tested.items():
            n_seen = sum(pair.clean.tobytes() in seen for pair in pairs or ())
            if pairs is not None and n_seen:
                yield name, n_seen, len(pairs)

    @property
    def evaluations(self) -> dict[str, Evaluate]:
        """The user's own functions of a model, by name."""
        if self.evaluate is None:
            return {}
        return dict(self.evaluate) if isinstance(self.evaluate, Mapping) else {_ALONE: self.evaluate}

    def __str__(self) -> str:
        sides = "; ".join(
            f"{side}: {counted(len(self.target[side]), 'pair')}, {counted(len(self.retain[side]), 'retain prompt')}"
            for side in SIDES
        )
        return f"{sides}"

    def record(self) -> dict[str, Any]:
        """Return what they are, as plain data: names, numbers and hashes."""

        def told(pairs: Pairs | None) -> Any:
            if pairs is None:
                return None
            n = len(set(pairs.components.tolist()))
            return {"name": pairs.name, "hash": pairs.content_hash, "n": len(pairs), "n_components": n}

        return {
            "target": {side: told(pairs) for side, pairs in self.target.items()},
            "retain": {side: told(pairs) for side, pairs in self.retain.items()},
            "neighbours": told(self.neighbours),
            "others": {name: told(pairs) for name, pairs in self.others.items()},
            "paraphrases": told(self.paraphrases),
            "evaluate": {name: getattr(each, "__name__", "a function") for name, each in self.evaluations.items()},
        }


def read_target(given: Given, model: Model, side: Role, name: str) -> Pairs:
    """Return prompts with wanted and unwanted answers, the prompt on both sides.

    Raises:
        PairError: A pair has no wanted answer.
        PairFileError: Rows lack a prompt.
    """
    if isinstance(given, Pairs):
        pairs = given.one_sided(side)
    else:
        rows, name = rows_of(cast("Any", given), name)
        renamed = [{_WANTED.get(key, key): value for key, value in row.values.items()} for row in rows]
        loaded = load_pairs([{**row, "corrupt": row.get("clean")} for row in renamed], model)
        pairs = Pairs(list(loaded), name=name, tokenizer=loaded.tokenizer)
    lacking = next((number for number, pair in enumerate(pairs) if not pair.answer), None)
    if lacking is not None:
        raise PairError(
            f"pair {lacking} of '{pairs.name}' does not say what is wanted",
            facts=[("pair", pairs[lacking].id)],
            fix='give rows {"prompt": "…", "wanted": " …", "unwanted": " …"}',
        )
    return pairs


def read_retain(given: Given, model: Model, side: Role, window: int) -> Pairs:
    """Return prompts whose every token must be followed by what it was; windows of a document are one group.

    Raises:
        SettingError: There is no document, or the model has no tokenizer for texts.
    """
    if isinstance(given, Pairs):
        return given.one_sided(side)
    if isinstance(given, str | Path):
        texts: list[Any] = [part.strip() for part in Path(given).read_text(encoding="utf-8").split("\n\n")]
    else:
        texts = list(given)
    texts = [text for text in texts if not isinstance(text, str) or text]
    if not texts or (model.tokenizer is None and any(isinstance(text, str) for text in texts)):
        raise SettingError(
            "there is no text that must stay as it is" if not texts else f"'{model.name}' has no tokenizer for texts",
            facts=[("given", counted(len(texts), "document"))],
            fix='give a list of texts, or lists of token ids: retain=["…", "…"]',
        )
    made = []
    for number, text in enumerate(texts):
        ids = model.tokenizer.encode(text) if isinstance(text, str) and model.tokenizer else list(text)
        for first in range(0, len(ids), window):
            part = np.array(ids[first : first + window], dtype=np.int64)
            if len(part) > 1 or first == 0:
                made.append(Pair(part, part, id=f"{number}/{first}", group=f"document {number}"))
    return Pairs(made, name="retain", tokenizer=model.tokenizer)


def require_apart(retain: Pairs, target: Pairs, model: Model) -> None:
    """Make sure that no prompt of the target data stands in the retain set: one would forbid what the other asks for.

    Raises:
        PairError: One does.
    """
    start = beginning(model)
    prompts: dict[bytes, str] = {}
    for pair in target:
        prompts[_without(pair.clean, start).tobytes()] = pair.id
    lengths = {len(key) // 8 for key in prompts}
    for windows in _documents(retain):
        parts = [_without(each.clean, start) for each in windows]
        ids = np.concatenate(parts)
        ends = np.cumsum([len(part) for part in parts])
        for length in lengths:
            for first in range(len(ids) - length + 1):
                own = prompts.get(ids[first : first + length].tobytes())
                if own is not None:
                    number = int(np.searchsorted(ends, first, side="right"))
                    kept, place = windows[number], first - int(ends[number]) + len(parts[number])
                    raise PairError(
                        "retain and target data overlap: what must change would have to stay",
                        facts=[("target", f"pair '{own}'"), ("retain", f"'{kept.id}', from token {place}")],
                        fix=f"drop it from the retain set: retain.drop({kept.id!r}), or leave the text out",
                    )


def _documents(pairs: Pairs) -> list[list[Pair]]:
    """Return pairs by the document that they are windows of, in order: a prompt may stand over the end of a window."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.group or pair.id, []).append(pair)
    return list(found.values())


def beginning(model: Model) -> list[int]:
    """Return the tokens that every prompt begins with, such as one for the beginning of a text."""
    if model.tokenizer is None:
        return []
    both = [model.tokenizer.encode(text) for text in ("a", "the")]
    n = next((k for k, (one, other) in enumerate(zip(*both, strict=False)) if one != other), 0)
    return both[0][:n]


def _without(ids: np.ndarray, start: Sequence[int]) -> np.ndarray:
    """Return ids without the tokens that every prompt begins with."""
    n = next((k for k, each in enumerate(ids.tolist()) if each not in start), len(ids))
    return np.ascontiguousarray(ids[n:], dtype=np.int64)


def _divided(pairs: Pairs, seed: int) -> dict[Side, Pairs]:
    """Divide pairs by whole components: two fifths to train, a fifth to validate, two fifths to test."""
    n = len(set(pairs.components.tolist()))
    if n < 2 * len(SIDES):
        raise PairError(
            f"'{pairs.name}' has {n} independent components, too few to train, validate and test on",
            facts=[("needed", f"{2 * len(SIDES)} components: two on each side")],
            fix="give more that share no prompt, entity or group",
        )
    seen, test = pairs.split(0.6 if n >= 10 else 2 / 3, seed)
    train, validation = seen.split(2 / 3 if n >= 10 else 0.5, seed)
    return {"train": train, "validation": validation, "test": test}
