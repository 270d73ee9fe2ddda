"""Values of another site, token, run or prompt: patchscopes, back-patching, cross-layer patches.

``Patch("resid_pre.2@3", From("resid_post.5@-1"))`` writes at token 3, into layer 2, what the stream behind layer 5 is
at the last token of the source's prompt. Whose run that is, is said by ``run`` and ``prompts``:

=======================================  =========================================================
value                                    read in
=======================================  =========================================================
``From("resid_post.5")``                 the source run (of the source model, where there is one)
``From("resid_post.5", run="base")``     the base run, which is also the one that is changed
``From("resid_post.5", prompts=other)``  runs of other prompts, ``OtherPrompts``
=======================================  =========================================================

All are plain data: sites are texts, prompts are token ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from causalpatch.base.errors import PairError, PatchError
from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.prompts import Prompts
from causalpatch.pairs.role import ROLES, Role, as_role
from causalpatch.sites import Every, Site, SiteSet, parse

SpanOf = tuple[str, int, int]


@dataclass(frozen=True)
class OtherPrompts:
    """Prompts besides those of the pairs: one for all pairs, or one for each.

    Args:
        ids: The token ids of each prompt, special ones included.
        spans: For each prompt its spans: name, first token, and one past the last.
        pairs: The hash of the pair that each prompt belongs to; empty for one prompt that serves all pairs.
        name: What results call them.

    Raises:
        PatchError: There is no prompt, one is empty, or prompts and pairs are not equally many.
    """

    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    spans: tuple[tuple[SpanOf, ...], ...] = field(default=(), repr=False)
    pairs: tuple[str, ...] = field(default=(), repr=False)
    name: str = "another prompt"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(tuple(int(token) for token in row) for row in self.ids))
        object.__setattr__(self, "spans", self.spans or tuple(() for _ in self.ids))
        wanted = len(self.pairs) or 1
        if len(self.ids) != wanted or len(self.spans) != wanted or not all(self.ids):
            raise PatchError(
                "other prompts are one for all pairs, or one for each",
                facts=[("prompts", len(self.ids)), ("pairs", len(self.pairs) or "all"), ("empty", not all(self.ids))],
                fix="OtherPrompts.of(pairs, others), or OtherPrompts.one([1, 5, 9])",
            )

    @classmethod
    def one(
        cls,
        prompt: str | Sequence[int],
        tokenizer: Tokenizer | None = None,
        *,
        spans: Mapping[str, tuple[int, int]] | None = None,
    ) -> "OtherPrompts":
        """Return one prompt that serves all pairs.

        Args:
            prompt: Its text, or its token ids.
            tokenizer: The model's tokenizer, for a text: ``model.tokenizer``.
            spans: Half-open ranges of its tokens by name.

        Raises:
            PatchError: A text is given without a tokenizer.

        Examples:
            >>> OtherPrompts.one([1, 5, 9]).ids
            ((1, 5, 9),)
        """
        if isinstance(prompt, str) and tokenizer is None:
            raise PatchError(
                f"the prompt {prompt[:40]!r} cannot be read without a tokenizer",
                fix="OtherPrompts.one(text, model.tokenizer), or give its token ids",
            )
        ids = Prompts(tokenizer).ids(prompt) if isinstance(prompt, str) and tokenizer is not None else prompt
        name = repr(prompt if len(prompt) < 30 else prompt[:29] + "…") if isinstance(prompt, str) else "another prompt"
        made = tuple((span, *ends) for span, ends in (spans or {}).items())
        return cls((tuple(ids),), (made,), name=name)  # type: ignore[arg-type]  # a text has been read by now

    @classmethod
    def of(cls, pairs: Pairs, others: Pairs, side: Role = "clean") -> "OtherPrompts":
        """Return for each pair the prompt of another one, the one at the same place of ``others``.

        Args:
            pairs: The pairs that are measured; any part of them may be.
            others: As many pairs, of which one side's prompts are read.
            side: Which side.

        Raises:
            PairError: They are not equally many, or hold arrays.
        """
        if len(pairs) != len(others) or others.kind != "tokens":
            raise PairError(
                f"'{others.name}' does not give one prompt for each pair of '{pairs.name}'",
                facts=[(pairs.name, f"{len(pairs)} pairs"), (others.name, f"{len(others)} pairs of {others.kind}")],
                fix="give as many pairs of prompts, or one prompt for all: OtherPrompts.one(ids)",
            )
        if others[0].beside or others.common:
            raise PairError(
                f"'{others.name}' has more than prompts, and other prompts are read by themselves",
                facts=[("beside", ", ".join([*others[0].beside, *others.common]))],
                fix="read the pairs' own runs: From(site), From(site, run=…)",
            )
        number = ROLES.index(as_role(side))
        spans = tuple(tuple((name, *both[number]) for name, both in pair.spans.items()) for pair in others)
        ids = tuple(tuple(pair.input(side).tolist()) for pair in others)
        return cls(ids, spans, tuple(pair.content_hash for pair in pairs), f"{side} prompts of {others.name!r}")

    def number(self, pair: Pair) -> int | None:
        """Return the number of a pair's prompt, or None where it has none."""
        if not self.pairs:
            return 0
        return self.pairs.index(pair.content_hash) if pair.content_hash in self.pairs else None

    def as_pair(self, number: int) -> Pair:
        """Return a prompt as both sides of a pair, so that positions and spans are found as everywhere."""
        ids = np.array(self.ids[number], dtype=np.int64)
        spans = {name: ((first, stop), (first, stop)) for name, first, stop in self.spans[number]}
        return Pair(ids, ids, spans=spans)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class From:
    """The value of another site, token, run or prompt.

    It is read before anything is patched, in runs that nothing else changes, and has to have the axes of the site that
    is written. A layer or unit that is left out, or ``*``, is that of the written site. A position that is left out is
    the one of the written site, counted in the prompt that is read; of aligned columns the aligned token.

    Args:
        site: What is read, such as ``"resid_post.5@-1"``; a site or its text.
        run: Whose run is read: ``"source"`` is the source run (of ``source_model`` where the experiment has one),
            ``"base"`` the base run.
        prompts: Other prompts, whose runs are read instead: of the model that ``run`` says.

    Raises:
        PatchError: The run is neither, or the prompts are not ``OtherPrompts``.

    Examples:
        >>> str(From("resid_post.5@-1"))
        'resid_post.5@-1 of the source run'
        >>> str(From("resid_post@3", run="base"))
        'resid_post.*@3 of the base run'

    References:
        Ghandeharioun et al. 2024, "Patchscopes", 2401.06102; Biran et al. 2024, "Hopping Too Late", 2406.12775
        (back-patching: a later layer's value of the same run, put into an earlier layer).
    """

    site: str
    run: Literal["source", "base"] = "source"
    prompts: OtherPrompts | None = None

    def __init__(
        self,
        site: str | Site | SiteSet,
        run: Literal["source", "base"] = "source",
        prompts: OtherPrompts | None = None,
    ) -> None:
        object.__setattr__(self, "site", str(parse(site)))
        object.__setattr__(self, "run", run)
        object.__setattr__(self, "prompts", prompts)
        if self.run not in ("source", "base"):
            raise PatchError(
                f"values cannot be read in the run {self.run!r}",
                facts=[("known", "source, base")],
                fix='From("resid_post.5@-1", run="base")',
            )
        if self.prompts is not None and not isinstance(self.prompts, OtherPrompts):
            raise PatchError(
                f"{repr(self.prompts)[:40]} are not prompts to read values of",
                facts=[("type", type(self.prompts).__name__)],
                fix="OtherPrompts.one(text, model.tokenizer), or OtherPrompts.of(pairs, others)",
            )

    @property
    def parsed(self) -> Site | SiteSet:
        """What is read."""
        return parse(self.site)

    @property
    def moves_to_source(self) -> bool:
        """Whether the value is one of the source run, so that a share refers to the gap between the two runs."""
        return self.run == "source" and self.prompts is None

    def into(self, site: Site) -> "From":
        """Return the value with what it leaves open taken from the site that is written.

        Args:
            site: The site that is written.

        Raises:
            PatchError: Several sites would be read, or what is open is not there in the written site.
        """
        wanted = self.parsed
        if isinstance(wanted, Site):
            return self
        filled: dict[str, int | None] = {}
        for name, axis in (("layer", "layer"), ("unit", wanted.unit_axis)):
            index = getattr(wanted, name)
            own = getattr(site, name) if name == "layer" or site.unit_axis == axis else None
            if isinstance(index, Every) and own is not None:
                index = own
            if not isinstance(index, int | None) or wanted.module is not None:
                raise PatchError(
                    f"'{site}' cannot be given all of '{self.site}'",
                    facts=[(axis or name, f"'{wanted}' leaves it open" if isinstance(index, Every) else "several")],
                    fix=f'name one, or walk along them: sweep(…, value=From("{wanted}"), over="source_layer,layer")'
                    if name == "layer"
                    else "name one site, such as z.3.1@-1",
                )
            filled[name] = index
        made = Site(
            wanted.name,
            filled["layer"],
            filled["unit"],
            wanted.position,
            wanted.stream,
            dictionary=wanted.dictionary,
        )
        return From(str(made), self.run, self.prompts)

    def __str__(self) -> str:
        return f"{self.site} of {f'the {self.run} run' if self.prompts is None else self.prompts}"
