"""The tree of runs of causal scrubbing: which inputs are drawn, what is put into which run, what is read from it.

``scrubbing`` says what is resampled; the numbers of its list are those of the methods here. Every place in the tree is
a batch of runs, one for each draw, so a tree of ``p`` places costs ``p`` runs per draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from causalpatch.algorithms.setting import Setting, needs_equal_lengths
from causalpatch.base.seeds import generator
from causalpatch.experiment import put_values, read_values
from causalpatch.pairs import Pairs
from causalpatch.patches import Patch
from causalpatch.sites import Site

HOW = "values of scrubbed runs"
Given: TypeAlias = Mapping[str, list[list[np.ndarray]]]
"""For each mapped parent the values of its sites, for each site those of every draw."""


class Ask(NamedTuple):
    """A run that is asked for, once for each draw.

    Args:
        base: Number of the input that it runs on, ``(draw,)``.
        given: What is put in at the sites of mapped parents.
        held: Sites that are held at the values of the base's own run.
    """

    base: np.ndarray
    given: Given
    held: list[Site]


@dataclass
class Tree:
    """The tree of runs of one hypothesis.

    Args:
        asked: The network, the hypothesis, the inputs.
        held: Nodes that are held at each run's base.
        label: Name of the draws.
        n_drawn: Inputs drawn so far, and how many of them were others than those that they stand in for.
    """

    asked: Setting
    held: Sequence[Site]
    label: str
    n_drawn: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        asked = self.asked
        self._stream = generator(asked.seed, "scrubbing", asked.pool.name, self.label)
        sites = [*asked.every_site, *self.held]
        self._by_length = needs_equal_lengths(asked.model, asked.pool, sites)
        self._known: dict[tuple[str, ...], dict[tuple[Any, ...], np.ndarray]] = {}

    def answer_run(self, references: np.ndarray) -> Ask:
        """Return the run of the network's answer to references."""
        output = self.asked.hypothesis.algorithm.output
        if output in self.asked.mapped:
            return self._with_parents((output,), references, reading=())
        return self._run_of(output, references, reading=())

    def values(self, name: str, references: np.ndarray) -> list[list[np.ndarray]]:
        """Return what a variable's sites hold when they are computed in agreement with references.

        Args:
            name: The variable.
            references: An input for each draw.

        Returns:
            For each site the values of each draw.
        """
        asked = self.asked
        sites = asked.mapped[name]
        if name in asked.hypothesis.algorithm.inputs:
            pairs = asked.pool.pairs(references, references)
            return read_values(asked.experiment(pairs), sites)
        run = self._run_of(name, references, reading=sites)
        pairs = asked.pool.pairs(run.base, run.base)
        patches = self.patches(pairs, run)
        return read_values(asked.experiment(pairs), sites, patches or None)

    def patches(self, pairs: Pairs, run: Ask) -> list[Patch]:
        """Return the patches of a run: what is held first, so that given values stand over it."""
        if not run.given:
            return []
        experiment = self.asked.experiment(pairs)
        made = [Patch(site, "identity") for site in run.held]
        for name, values in run.given.items():
            for site, each in zip(self.asked.mapped[name], values, strict=True):
                made.append(put_values(experiment, site, each, HOW))
        return made

    def _run_of(self, name: str, references: np.ndarray, reading: Sequence[Site]) -> Ask:
        algorithm = self.asked.hypothesis.algorithm
        return self._with_parents(algorithm.depends_on(name, tuple(self.asked.mapped)), references, reading)

    def _with_parents(self, parents: Sequence[str], references: np.ndarray, reading: Sequence[Site]) -> Ask:
        mapped = self.asked.mapped
        base = self._agreeing([name for name in parents if name not in mapped], references)
        above = [name for name in parents if name in mapped]
        given = {name: self.values(name, self._agreeing([name], references)) for name in above}
        written = {str(site) for name in above for site in mapped[name]}
        read = {str(site.at(None)) for site in reading}
        others = [site for name, sites in mapped.items() if name not in above for site in sites]
        held = [each for each in [*self.held, *others] if str(each.at(None)) not in read and str(each) not in written]
        return Ask(base, given, list({str(site): site for site in held}.values()))

    def _agreeing(self, names: Sequence[str], references: np.ndarray) -> np.ndarray:
        """Draw for each reference an input that agrees with it on some values; it may be the reference itself."""
        pool = self.asked.pool
        wanted = tuple(names)
        if wanted not in self._known:
            found: dict[tuple[Any, ...], list[int]] = {}
            for number in range(len(pool)):
                found.setdefault(self._key(wanted, number), []).append(number)
            self._known[wanted] = {key: np.array(numbers) for key, numbers in found.items()}
        alike = [self._known[wanted][self._key(wanted, number)] for number in references.tolist()]
        drawn = np.array([int(numbers[self._stream.integers(len(numbers))]) for numbers in alike])
        self.n_drawn[0] += len(drawn)
        self.n_drawn[1] += int((drawn != references).sum())
        return drawn

    def _key(self, names: tuple[str, ...], number: int) -> tuple[Any, ...]:
        values = self.asked.pool.values[number]
        length = int(self.asked.pool.lengths[number]) if self._by_length else 0
        return (length, *(values[name] for name in names))
