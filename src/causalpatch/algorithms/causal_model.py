"""A causal model: variables that are functions of named parents, in plain Python.

It says *how* an output may come about: which intermediate values there are and what each is computed from. Here it is
only an algorithm; a ``Hypothesis`` says where in a network its variables are. Nothing of torch is needed.

1. Every variable is an ordinary function whose parameter names are its parents: inputs or other variables.
2. ``run`` computes all variables from the inputs, parents first.
3. ``interchange`` runs on one input, the *base*, with some variables held at the values that they have on other inputs,
   their *sources*: the counterfactual output.

References:
    Pearl 2009, Causality (structural causal models); Geiger et al. 2021, "Causal Abstractions of Neural Networks",
    2106.02997 (interchange interventions).
"""

import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from causalpatch.base.errors import AlgorithmError
from causalpatch.base.suggest import closest

Inputs = Mapping[str, Any]
Function = Callable[..., Any]

_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_FAILURES: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class CausalModel:
    """An algorithm of named variables.

    Args:
        inputs: Names of the inputs; or the values that each can take, by name, so that all inputs can be listed.
        variables: The function of each variable by its name, such as ``{"total": lambda a, b: a + b}``; or a list of
            functions that are called by their own names. Parameters are parents; one with a default that is the name
            of nothing keeps its default.
        output: The variable that is the algorithm's answer; by default the one that is nobody's parent.
        name: How messages and results call the algorithm.

    Raises:
        AlgorithmError: A name is used twice, a parent is unknown, variables wait for each other, a function has
            parameters without names, or it is not clear which variable is the output.

    Examples:
        >>> adding = CausalModel(
        ...     inputs={"a": range(3), "b": range(3), "c": range(3)},
        ...     variables={"ab": lambda a, b: a + b, "total": lambda ab, c: ab + c},
        ... )
        >>> adding.run({"a": 1, "b": 2, "c": 0})
        {'a': 1, 'b': 2, 'c': 0, 'ab': 3, 'total': 3}
        >>> adding.interchange({"a": 1, "b": 2, "c": 0}, {"ab": {"a": 0, "b": 0, "c": 2}})
        0
    """

    def __init__(
        self,
        variables: Mapping[str, Function] | Sequence[Function],
        inputs: Mapping[str, Sequence[Any]] | Sequence[str],
        *,
        output: str | None = None,
        name: str = "algorithm",
    ) -> None:
        self.name = name
        self.functions = _functions(variables, name)
        self.inputs = _inputs(inputs, self.functions, name)
        self.values: Mapping[str, tuple[Any, ...]] | None = (
            {key: tuple(inputs[key]) for key in self.inputs} if isinstance(inputs, Mapping) else None
        )
        self.parents: Mapping[str, tuple[str, ...]] = {
            variable: _parents(variable, function, (*self.inputs, *self.functions), name)
            for variable, function in self.functions.items()
        }
        self.order = _order(self.parents, name)
        self.output = _output(output, self.parents, name)

    def __repr__(self) -> str:
        steps = ", ".join(f"{name}({', '.join(self.parents[name])})" for name in self.order)
        return f"CausalModel({self.name!r}, {steps} -> {self.output})"

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables, parents before their children."""
        return self.order

    def run(self, inputs: Inputs) -> dict[str, Any]:
        """Compute every variable.

        Args:
            inputs: The value of each input.

        Returns:
            The values of all inputs and variables, by name.

        Raises:
            AlgorithmError: An input is missing or unknown, or a function fails.
        """
        return self.run_with(inputs, {})

    def run_with(self, inputs: Inputs, held: Inputs) -> dict[str, Any]:
        """Compute every variable with some of them, or some inputs, held at given values.

        Args:
            inputs: The value of each input.
            held: Values by name of what is held.

        Raises:
            AlgorithmError: A name is unknown, an input is missing, or a function fails.
        """
        self._check_inputs(inputs)
        for key in held:
            self.require(key)
        found = {key: held.get(key, inputs[key]) for key in self.inputs}
        for variable in self.order:
            found[variable] = held[variable] if variable in held else self._compute(variable, found)
        return found

    def interchange(self, base: Inputs, sources: Mapping[str, Inputs]) -> Any:
        """Return the output on one input when some variables have the values that they have on other inputs.

        Args:
            base: The inputs of the run that is changed.
            sources: For each variable (or input) that is changed, the inputs of the run that its value is taken from.

        Returns:
            The counterfactual output.

        Raises:
            AlgorithmError: A name is unknown, an input is missing, or a function fails.
        """
        for key in sources:
            self.require(key)
        held = {key: self.run(inputs)[key] for key, inputs in sources.items()}
        return self.run_with(base, held)[self.output]

    def require(self, name: str) -> None:
        """Make sure that a name is an input or a variable.

        Raises:
            AlgorithmError: It is not.
        """
        if name not in self.parents and name not in self.inputs:
            near = closest(str(name), (*self.inputs, *self.order), 1)
            raise AlgorithmError(
                f"'{self.name}' has no variable {name!r}",
                facts=[("inputs", ", ".join(self.inputs)), ("variables", ", ".join(self.order))],
                fix=f"write {near[0]!r}" if near else "name one of these",
            )

    @cached_property
    def n_inputs(self) -> int:
        """Number of different inputs; 0 where the values that inputs can take were not given."""
        sizes = [len(values) for values in (self.values or {}).values()]
        count = 1 if sizes else 0
        for size in sizes:
            count *= size
        return count

    def every_input(self) -> Iterator[dict[str, Any]]:
        """Yield all inputs, the last one changing fastest.

        Raises:
            AlgorithmError: The values that inputs can take were not given.
        """
        if self.values is None:
            raise AlgorithmError(
                f"'{self.name}' does not say which values its inputs can take",
                facts=[("inputs", ", ".join(self.inputs))],
                fix=f'give them: CausalModel(…, inputs={{"{self.inputs[0]}": range(10), …}})',
            )
        for chosen in itertools.product(*self.values.values()):
            yield dict(zip(self.values, chosen, strict=True))

    def depends_on(self, name: str, through: Sequence[str] = ()) -> tuple[str, ...]:
        """Return what a variable is computed from when some variables count as known and all others are seen through.

        Args:
            name: The variable.
            through: What counts as known, such as the variables that a hypothesis maps to sites.

        Returns:
            The nearest of these above the variable, and the inputs that reach it around them; inputs first.

        Examples:
            >>> steps = {"ab": lambda a, b: a + b, "carry": lambda ab: ab > 9, "total": lambda carry, c: carry + c}
            >>> CausalModel(steps, ["a", "b", "c"]).depends_on("total", through=["ab"])
            ('c', 'ab')
        """
        found: set[str] = set()
        waiting = list(self.parents.get(name, ()))
        while waiting:
            parent = waiting.pop()
            if parent in through or parent in self.inputs:
                found.add(parent)
            else:
                waiting += self.parents[parent]
        return tuple(key for key in (*self.inputs, *self.order) if key in found)

    def _check_inputs(self, inputs: Inputs) -> None:
        missing = [key for key in self.inputs if key not in inputs]
        strange = [key for key in inputs if key not in self.inputs]
        if missing or strange:
            what = f"without input {missing[0]!r}" if missing else f"on {strange[0]!r}, which is no input"
            raise AlgorithmError(
                f"'{self.name}' cannot run {what}",
                facts=[("inputs", ", ".join(self.inputs)), ("given", ", ".join(map(str, inputs)) or "none")],
                fix="give a value for each input, and nothing else",
            )

    def _compute(self, variable: str, found: Mapping[str, Any]) -> Any:
        given = {parent: found[parent] for parent in self.parents[variable]}
        try:
            value = self.functions[variable](**given)
        except _FAILURES as error:
            raise AlgorithmError(
                f"variable {variable!r} of '{self.name}' cannot be computed",
                facts=[("given", repr(given)[:88]), ("error", f"{type(error).__name__}: {str(error)[:80]}")],
                fix="let the function return a value for every input",
            ) from error
        if not isinstance(value, Hashable):
            raise AlgorithmError(
                f"variable {variable!r} of '{self.name}' is a {type(value).__name__}, which cannot be compared",
                facts=[("given", repr(given)[:88])],
                fix="return a number, a text, a truth value or a tuple of these",
            )
        return value


def _functions(variables: Mapping[str, Function] | Sequence[Function], name: str) -> dict[str, Function]:
    pairs = (
        list(variables.items())
        if isinstance(variables, Mapping)
        else [(getattr(each, "__name__", "?"), each) for each in variables]
    )
    names = [key for key, _ in pairs]
    twice = next((key for key in names if names.count(key) > 1), None)
    if twice is not None:
        raise AlgorithmError(
            f"'{name}' has two variables named {twice!r}",
            facts=[("variables", ", ".join(names))],
            fix='give names: variables={"first": …, "second": …}',
        )
    for key, function in pairs:
        if not callable(function):
            raise AlgorithmError(
                f"variable {key!r} of '{name}' is {function!r}, not a function",
                fix=f'give a function of its parents, such as {{"{key}": lambda a, b: a + b}}',
            )
    if not pairs:
        raise AlgorithmError(f"'{name}' has no variables", fix='variables={"total": lambda a, b: a + b}')
    return dict(pairs)


def _inputs(
    inputs: Mapping[str, Sequence[Any]] | Sequence[str], functions: Mapping[str, Function], name: str
) -> tuple[str, ...]:
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    twice = next((key for key in names if names.count(key) > 1 or key in functions), None)
    if twice is not None:
        raise AlgorithmError(
            f"{twice!r} of '{name}' is defined twice",
            facts=[("inputs", ", ".join(names)), ("variables", ", ".join(functions))],
            fix="rename one of them",
        )
    empty = next((key for key in names if isinstance(inputs, Mapping) and not len(inputs[key])), None)
    if empty is not None or not names:
        what = f"input {empty!r} of '{name}' can take no value" if names else f"'{name}' has no inputs"
        raise AlgorithmError(what, fix='inputs={"a": range(10), "b": range(10)}, or their names: ["a", "b"]')
    return tuple(names)


def _parents(variable: str, function: Function, known: Sequence[str], name: str) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise AlgorithmError(
            f"the parents of variable {variable!r} of '{name}' cannot be read off its function",
            facts=[("function", repr(function))],
            fix=f"wrap it: lambda a: {getattr(function, '__name__', 'function')}(a)",
        ) from error
    for parameter in parameters:
        if parameter.kind not in _NAMED:
            raise AlgorithmError(
                f"variable {variable!r} of '{name}' takes {parameter}, which names no parent",
                facts=[("known", ", ".join(known))],
                fix="name each parent as a parameter, such as lambda a, b: a + b",
            )
        if parameter.name not in known and parameter.default is inspect.Parameter.empty:
            near = closest(parameter.name, known, 1)
            raise AlgorithmError(
                f"variable {variable!r} of '{name}' has an unknown parent {parameter.name!r}",
                facts=[("known", ", ".join(known))],
                fix=f"write {near[0]!r}, or add it to the inputs" if near else "add it to the inputs or variables",
            )
    return tuple(parameter.name for parameter in parameters if parameter.name in known)


def _order(parents: Mapping[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    """Return the variables, parents first; of those that could come next the first that was named."""
    order: list[str] = []
    waiting = list(parents)
    while waiting:
        ready = [key for key in waiting if not set(parents[key]) & set(waiting)]
        if not ready:
            raise AlgorithmError(
                f"variables of '{name}' wait for each other",
                facts=[("cycle", " <- ".join(_cycle(parents, waiting)))],
                fix="leave one of these parents out",
            )
        order.append(ready[0])
        waiting.remove(ready[0])
    return tuple(order)


def _cycle(parents: Mapping[str, tuple[str, ...]], waiting: Sequence[str]) -> list[str]:
    path = [waiting[0]]
    while path.count(path[-1]) == 1:
        path.append(next(parent for parent in parents[path[-1]] if parent in waiting))
    return path[path.index(path[-1]) :]


def _output(output: str | None, parents: Mapping[str, tuple[str, ...]], name: str) -> str:
    used = {parent for each in parents.values() for parent in each}
    last = [variable for variable in parents if variable not in used]
    if output is None and len(last) == 1:
        return last[0]
    if output is None:
        raise AlgorithmError(
            f"'{name}' has {len(last)} variables that could be its output",
            facts=[("nobody's parent", ", ".join(last))],
            fix=f'output="{last[-1]}"',
        )
    if output not in parents:
        raise AlgorithmError(
            f"{output!r} is no variable of '{name}'",
            facts=[("variables", ", ".join(parents))],
            fix=f'output="{last[-1]}"',
        )
    return output
