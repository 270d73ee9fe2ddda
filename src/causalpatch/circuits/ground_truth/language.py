"""A small language of programs on sequences, as RASP: what attention selects and averages, what MLPs look up.

A variable has a value at every position of a prompt: a *category* (one of so many, held one-hot) or a *number*.

==================  ==========================================================  =====================
variable            its value at a position                                     computed by
==================  ==========================================================  =====================
``Tokens``          the token                                                   the token embedding
``Positions``       the position                                                the position embedding
``Aggregate``       the mean of a variable over the positions that are selected  one attention head
``Is``              whether a variable is of a category, as a number            nobody: one column of it
``Lookup``          any function of categories at the same position             neurons of one MLP
``Interpolate``     a piecewise linear function of numbers at the same position  neurons of one MLP
==================  ==========================================================  =====================

A position sees itself and what stands before it, and position 0 holds the token 0, which begins every prompt.

References:
    Weiss, Goldberg & Yahav 2021, "Thinking Like Transformers", 2106.06981 (RASP); Lindner et al. 2023, "Tracr",
    2301.05062 (compiled to weights).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Redundant = Literal["or", "and", "cancelling"]
Begin = Literal["as any", "if none", "always"]


@dataclass(frozen=True)
class Tokens:
    """The token at each position.

    Args:
        size: Number of token ids.
    """

    size: int


@dataclass(frozen=True)
class Positions:
    """The number of each position, from 0.

    Args:
        size: Length of the longest prompt.
    """

    size: int


@dataclass(frozen=True, eq=False)
class Is:
    """The number 1 where a variable is of a category, else 0.

    Args:
        source: The variable.
        category: The category.
    """

    source: "Variable"
    category: int

    @property
    def size(self) -> int:
        """Columns of a number."""
        return 1


@dataclass(frozen=True, eq=False)
class Select:
    """Which positions each position reads.

    Args:
        match: Takes the category of the query and of the key. None: not selected; a number: selected unless another key
            of a higher number is.
        keys: The variable that keys show; None shows nothing, so that all are alike.
        queries: The variable that queries show; None shows nothing.
        prefer: Which of the selected positions count: ``"all"`` of them alike, the ``"latest"`` or the ``"earliest"``.
        begin: Whether position 0 is selected ``"as any"`` other, ``"if none"`` else is, or ``"always"``, as one of the
            selected.
    """

    match: Callable[[int, int], float | None]
    keys: "Variable | None" = None
    queries: "Variable | None" = None
    prefer: Literal["all", "latest", "earliest"] = "all"
    begin: Begin = "as any"


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The mean of a variable over the selected positions: one attention head.

    Args:
        select: Which positions.
        values: What is averaged; several of one size are added up.
    """

    select: Select
    values: "Sequence[Variable]"

    @property
    def size(self) -> int:
        """Columns in the stream."""
        return self.values[0].size


@dataclass(frozen=True, eq=False)
class Lookup:
    """A function of categories at the same position: a table, one neuron for each combination.

    Args:
        sources: What it reads, at most three.
        function: From a category of each to a category, or to the number where ``size`` is 1; None gives all zeros.
        size: Number of its categories; 1 makes it a number.
    """

    sources: "Sequence[Variable]"
    function: Callable[..., float | None]
    size: int = 1


@dataclass(frozen=True, eq=False)
class Interpolate:
    """A piecewise linear function of a sum of numbers at the same position, flat outside of its points.

    Args:
        sources: The numbers that are added up.
        points: From sums to categories, or to numbers where ``size`` is 1. Between two points it is linear.
        size: Number of its categories; 1 makes it a number.
    """

    sources: "Sequence[Variable]"
    points: Mapping[float, float]
    size: int = 1


Variable = Tokens | Positions | Is | Aggregate | Lookup | Interpolate


@dataclass(frozen=True, eq=False)
class Program:
    """A behaviour, and the algorithm that has it.

    Args:
        name: Its name.
        about: What it does, in one line.
        vocabulary: What each token id stands for; id 0 begins every prompt.
        n_symbols: How many symbols a prompt of full size has.
        prompts: All prompts of a number of symbols, as token ids, each of the same length.
        answers: Takes a prompt; returns what is expected at each position that counts: a token id for categories, else
            a number. The last position is one of them.
        output: The variables that are added up into the logits.
        tokens: For each category of the output the token id that stands for it; one id for a number.
        signs: What each output is multiplied by; 1 by default.
        reads: Which answers the behaviour is measured by: the ``"last"``, or ``"all"``.
        redundant: Why single patches do not tell all, if so: one of two that are on suffices (``"or"``), one of two
            alone does nothing (``"and"``), or two undo each other (``"cancelling"``).
        chosen: Clean and corrupted prompts, where they are not to be drawn from all.
    """

    name: str
    about: str
    vocabulary: tuple[str, ...]
    n_symbols: int
    prompts: Callable[[int], Iterator[list[int]]]
    answers: Callable[[Sequence[int]], Mapping[int, float]]
    output: Sequence[Variable]
    tokens: Sequence[int]
    signs: Sequence[float] = ()
    reads: Literal["last", "all"] = "last"
    redundant: Redundant | None = None
    chosen: Sequence[tuple[Sequence[int], Sequence[int]]] = field(default=())

    @property
    def is_number(self) -> bool:
        """Whether the answer is a number rather than a token."""
        return self.output[0].size == 1

    def inputs(self) -> list[list[int]]:
        """Return every prompt of full size."""
        return list(self.prompts(self.n_symbols))

    def variables(self) -> tuple[Variable, ...]:
        """Return every variable, each behind those that it reads."""
        found: dict[Variable, None] = {}

        def visit(variable: Variable) -> None:
            if variable not in found:
                for source in sources_of(variable):
                    visit(source)
                found[variable] = None

        for each in self.output:
            visit(each)
        return tuple(found)


def sources_of(variable: Variable) -> tuple[Variable, ...]:
    """Return the variables that a variable reads."""
    if isinstance(variable, Lookup | Interpolate):
        return tuple(variable.sources)
    if isinstance(variable, Is):
        return (variable.source,)
    if isinstance(variable, Aggregate):
        shown = (variable.select.queries, variable.select.keys)
        return (*(each for each in shown if each is not None), *variable.values)
    return ()
