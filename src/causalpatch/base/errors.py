"""Every exception of the library, on three branches with an exit code each.

A message has three parts: what happened, with the value quoted; the facts, as aligned ``name  value`` lines that
include what would have been valid; and ``fix:``, one thing to type.

=====================  =========================================================  ====
branch                 meaning                                                    exit
=====================  =========================================================  ====
``RequestError``       the request cannot be understood                           2
``UnsupportedError``   understood, but this model or machine cannot do it         3
``IntegrityError``     the answer would be wrong, so none is given                4
=====================  =========================================================  ====
"""

import textwrap
from collections.abc import Iterable, Mapping

# Long lists go on in a further line, so that a message stays whole in a terminal; words and paths are never cut.
_FACT = textwrap.TextWrapper(width=88, break_long_words=False, break_on_hyphens=False)


class CausalPatchError(Exception):
    """Root of every error that the library raises on purpose.

    Args:
        what: What happened, in one line, with the offending value quoted.
        facts: Names and values that let the reader see why, including what would have been valid.
        fix: One thing to type or change.
    """

    exit_code = 1

    def __init__(
        self, what: str, facts: Mapping[str, object] | Iterable[tuple[str, object]] = (), fix: str = ""
    ) -> None:
        self.what = what
        self.facts = tuple(facts.items()) if isinstance(facts, Mapping) else tuple(facts)
        self.fix = fix
        super().__init__(self.what)

    def __str__(self) -> str:
        names = max((len(name) for name, _ in self.facts), default=0)
        lines = [self.what]
        for name, value in self.facts:
            first, *rest = _FACT.wrap(str(value)) or [""]
            lines += [f"  {name:<{names}}  {first}", *(f"  {'':<{names}}  {part}" for part in rest)]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.what, self.facts, self.fix))


class RequestError(CausalPatchError):
    """The request cannot be understood."""

    exit_code = 2


class UnsupportedError(CausalPatchError):
    """The request is understood, but this model or machine cannot do it."""

    exit_code = 3


class IntegrityError(CausalPatchError):
    """The answer would be wrong, so none is given."""

    exit_code = 4


class SiteSyntaxError(RequestError):
    """A text is not a site."""


class SiteNotFound(RequestError):
    """A well-formed site names nothing in this model."""


class PairError(RequestError):
    """A pair, or a set of pairs, cannot be used as asked."""


class PairFileError(RequestError):
    """A file of pairs cannot be read."""


class AnswerError(PairError):
    """An answer does not fit the metric or the vocabulary."""


class TaskNotFound(RequestError):
    """No built-in task has this name."""


class PatchError(RequestError):
    """A patch or an intervention is not well formed."""


class PathError(RequestError):
    """A path is not well formed, or nothing can go along it."""


class MetricError(RequestError):
    """A metric does not fit the outputs or returned something that is not one number per pair."""


class AlgorithmError(RequestError):
    """A causal model, or a hypothesis of where its variables are, is not well formed."""


class SettingError(RequestError):
    """An argument or option has a value that is not allowed."""


class ModelNotFound(RequestError):
    """A name or folder does not hold a model."""


class StudyError(RequestError):
    """A study file cannot be read, or its parts do not fit together."""


class ResultsNotFound(RequestError):
    """A folder does not hold saved effects, or a name in them does not exist."""


class SiteUnsupported(UnsupportedError):
    """The site exists in the grammar, but this model does not have it or failed its proof."""


class ModelUnsupported(UnsupportedError):
    """The model cannot be used as asked."""


class MissingExtra(UnsupportedError):
    """An optional package is not installed."""


class MemoryExhausted(UnsupportedError):
    """Not even the smallest piece of the work fits into memory."""


class StoreFull(UnsupportedError):
    """Nothing more can be written into a store."""


class StoreUnreachable(UnsupportedError):
    """A store does not answer, or may not be read or written."""


class ClusterUnreachable(UnsupportedError):
    """A cluster does not answer, or has no room for a worker."""


class WorkerLost(UnsupportedError):
    """A piece of work ends every process that takes it up."""


class PatchDidNotFire(IntegrityError):
    """A patch was asked for and nothing was written."""


class NoGap(IntegrityError):
    """The clean and the reference runs do not differ, so a share of their gap means nothing."""


class NoGradient(IntegrityError):
    """Scores are asked for where the metric has no slope, so that all of them would be 0."""


class NotFinite(IntegrityError):
    """The model or a metric produced NaN or infinity."""


class StoreCorrupt(IntegrityError):
    """Saved results do not match their manifest."""


class CausalPatchWarning(UserWarning):
    """Something the reader should know, though the numbers are right."""


class IllusionWarning(CausalPatchWarning):
    """A subspace has its effect by way of something that the model itself does not use."""


class EnoughError(Exception):
    """What was wanted of a call is known; a signal inside the engine that never reaches a user."""
