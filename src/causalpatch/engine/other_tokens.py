"""Which site and tokens a value that is read elsewhere is read at: of the source's prompt, the base's, or another."""

import numpy as np
from jaxtyping import Int

from causalpatch.base.errors import PairError, PatchError
from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.positions import resolve
from causalpatch.pairs.role import ROLES, Role, other
from causalpatch.patches import From
from causalpatch.sites import Every, Position, Site, expand

Tokens = Int[np.ndarray, " written"]


def tokens_elsewhere(
    pairs: Pairs, number: int, base: Role, value: From, position: Position | None, column: int | None, written: Tokens
) -> tuple[Int[np.ndarray, " written"], Int[np.ndarray, " read"]]:
    """Return the base's tokens that are written, and those that are read.

    Args:
        pairs: The pairs.
        number: The pair.
        base: Which side is the base run's.
        value: What is read; its own position counts in the prompt that is read.
        position: The position that is written, which holds there too where the value names none.
        column: The aligned column that is written, or None.
        written: The base's tokens at that position or column.

    Returns:
        Two arrays, which may differ in length; of tokens without a partner both are empty.

    Raises:
        PairError: The prompt that is read has no such token or span, or does not meet the base prompt token by token.
    """
    pair, role, where = prompt_of(pairs, number, base, value)
    named = value.parsed.position
    if named is not None and not isinstance(named, Every):
        return written, resolve(pair, named, role, where)
    is_everywhere = position is None or isinstance(position, Every)
    if value.prompts is None and value.run == "base":
        return written, written
    if value.prompts is None and column is not None:
        there = pairs.aligned().columns[number, column, ROLES.index(role)]
        return (written, np.array([there])) if there >= 0 else (written[:0], written[:0])
    if value.prompts is None and is_everywhere:
        return pairs.positions(number, None, base)
    if column is None and not is_everywhere and position is not None and not isinstance(position, Every):
        return written, resolve(pair, position, role, where)
    n_there, n_here = len(pair.input(role)), len(pairs[number].input(base))
    if column is not None or n_there != n_here:
        raise PairError(
            f"{where} does not meet pair {number} of '{pairs.name}' token by token",
            facts=[("its prompt", f"{n_there} tokens"), ("the base prompt", f"{n_here} tokens")],
            fix=f'say which token is read: From("{value.parsed.at(None)}@-1", prompts=…)',
        )
    return written, np.arange(n_there)


def prompt_of(pairs: Pairs, number: int, base: Role, value: From) -> tuple[Pair, Role, str]:
    """Return the pair that holds the prompt which is read, its side, and how errors call it.

    Raises:
        PairError: There is no other prompt for the pair.
    """
    where = f"pair {number} of '{pairs.name}'"
    if value.prompts is None:
        return pairs[number], base if value.run == "base" else other(base), where
    row = value.prompts.number(pairs[number])
    if row is None:
        raise PairError(
            f"{where} has no prompt among {value.prompts}",
            facts=[("prompts", f"{len(value.prompts.ids)}, for pairs that were given with them")],
            fix="make them for these pairs: OtherPrompts.of(pairs, others)",
        )
    return value.prompts.as_pair(row), "clean", f"the other prompt of {where}"


def value_elsewhere(model: Model, site: Site, value: From) -> From:
    """Return a value with the one site that it reads, which has to have tokens and the axes of the written site.

    Args:
        model: The model.
        site: The site that is written.
        value: The value.

    Raises:
        SiteNotFound: The model has no such layer or unit.
        SiteUnsupported: The model does not have such sites.
        PatchError: Several sites are read, or values of the one do not fit into the other.
    """
    filled = value.into(site)
    (read,) = expand(filled.parsed, model.shape)
    if model.stream_of(read) != model.stream_of(site):
        raise PatchError(
            f"'{site}' cannot be given '{read.at(None)}'",
            facts=[("why not", "one has the encoder's tokens, the other the decoder's")],
            fix="read a site of the same stream",
        )
    if read.info.has_keys or not model.tap(read).has_position:
        why = "is a row over keys, of which each query has another number" if read.info.has_keys else "has no tokens"
        raise PatchError(
            f"'{site}' cannot be given '{read}'",
            facts=[("why not", f"'{read.at(None)}' {why}")],
            fix='read a site with tokens and a width, such as From("resid_post.5@-1")',
        )
    shapes = {str(one.at(None)): _shape(model, one) for one in (site, read)}
    if None not in shapes.values() and len(set(shapes.values())) > 1:
        raise PatchError(
            f"'{site.at(None)}' cannot be given '{read.at(None)}': their axes differ",
            facts=[(name, shape or "one number per token") for name, shape in shapes.items()],
            fix="read a site of the same axes",
        )
    return filled


def _shape(model: Model, site: Site) -> str | None:
    """Return the axes of a site's value with their sizes; None where they are known only in a run."""
    if site.module is not None:
        return None
    sizes = model.sizes(site.name, site.stream)
    return " x ".join(f"{axis} {sizes[axis]}" if axis in sizes else axis for axis in site.info.value_axes)
