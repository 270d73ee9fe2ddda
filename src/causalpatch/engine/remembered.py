"""Untouched runs that outlive a request, so that the next one on the same pairs does not make them again.

A work may be asked for piece by piece: some cells on some pairs, then other cells on the same pairs. Each piece needs
the base and source runs of its pairs, and other tensors of them. So whoever asks says what later pieces will patch
(``beside``), and the first piece keeps that too.

1. A run is known by its prompts and by all that its arithmetic depends on (a key). It serves where it kept everything
   that is asked for, or else it is made again, with what it kept before.
2. Who asks is given the tensors that he asked for and no others: what he computes must not depend on what came before.
3. No more is kept than one batch of pairs may take; a run of more is made each time.

Assumes that the model is the same from piece to piece, as it is where nobody else has it.

Cost: the memory of one batch of untouched runs between two pieces.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from causalpatch.engine.resolve import Target

Made = TypeVar("Made")
Asked = TypeVar("Asked", bound=Hashable)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A run with what was asked for."""

    run: Any
    asked: frozenset[Hashable]
    n_bytes: int


class Remembered:
    """Untouched runs of the pairs that were asked for last."""

    def __init__(self) -> None:
        self.beside: Sequence[tuple[Target, ...]] = ()
        """Targets of other pieces on the same pairs, one intervention for each place that they patch."""
        self._group: Hashable = None
        self._runs: dict[Hashable, _Kept] = {}

    def turn_to(self, group: Hashable, beside: Sequence[tuple[Target, ...]] = ()) -> None:
        """Begin a piece of work; what is held of other pairs is let go.

        Args:
            group: What tells its pairs, and how they are run, from others.
            beside: Targets of other pieces on them.
        """
        if group != self._group:
            self.forget()
        self._group, self.beside = group, beside

    def forget(self) -> None:
        """Let all runs go."""
        self._group, self._runs, self.beside = None, {}, ()

    def run(
        self,
        key: Hashable,
        asked: Collection[Asked],
        make: Callable[[Collection[Asked]], Made],
        *,
        beside: Collection[Asked],
        bytes_of: Callable[[Made], int],
        allowed: int,
    ) -> tuple[Made, bool]:
        """Return a run that kept what is asked for at least, and whether it was made now.

        Args:
            key: What tells it from others.
            asked: What is asked for.
            make: Makes it, keeping what it is told.
            beside: What had better be kept, too.
            bytes_of: Bytes of what it holds.
            allowed: Bytes that may be held in all.
        """
        held = self._runs.pop(key, None)
        if held is not None and held.asked.issuperset(asked):
            self._runs[key] = held
            return held.run, False
        before: Collection[Any] = () if held is None else held.asked
        wanted = dict.fromkeys([*asked, *before, *beside])  # in this order: what is first does not depend on hashes
        held = None  # its tensors go before those of the next are made
        try:
            made = make(wanted)
        except BaseException:
            self._runs.clear()  # perhaps there was no room for it beside them
            raise
        n_bytes = bytes_of(made)
        if n_bytes + sum(each.n_bytes for each in self._runs.values()) <= allowed:
            self._runs[key] = _Kept(made, frozenset(wanted), n_bytes)
        return made, True
