"""Pairs of prompts as plain data, for files that must be able to measure again on the very same pairs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs.align import Alignment
from causalpatch.pairs.collection import Pairs
from causalpatch.pairs.pair import Pair


def plain_pairs(pairs: Pairs) -> dict[str, Any] | None:
    """Return pairs as plain data; None for those that hold more than one prompt of token ids on each side.

    Args:
        pairs: The pairs.

    Examples:
        >>> pairs = Pairs([Pair(np.array([1, 5]), np.array([1, 6]), answer=((7,),))], name="tiny")
        >>> pairs_of_plain(plain_pairs(pairs)).content_hash == pairs.content_hash
        True
    """
    if pairs.kind != "tokens" or pairs.encoder is not None or pairs.common or any(pair.beside for pair in pairs):
        return None
    chosen = (
        pairs._alignment
    )  # what was chosen: it counts for the pairs' hash, the one by position that they have does not
    return {
        "name": pairs.name,
        "tokens": pairs.tokens("clean", 0),
        "alignment": None
        if chosen is None
        else {"how": chosen.how, "columns": chosen.columns.tolist(), "names": chosen.names},
        "rows": [_row(pair) for pair in pairs],
    }


def pairs_of_plain(plain: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> Pairs:
    """Return the pairs that ``plain_pairs`` wrote.

    Args:
        plain: What it returned.
        tokenizer: What turns ids into labels.
    """
    rows = [_pair(row) for row in plain["rows"]]
    held = plain["alignment"]
    alignment = None
    if held is not None:
        inputs = tuple((pair.clean, pair.corrupt) for pair in rows)
        names = None if held["names"] is None else tuple(held["names"])
        alignment = Alignment(held["how"], np.array(held["columns"], dtype=np.int64), inputs, names, tokenizer)
    return Pairs(rows, name=plain["name"], tokenizer=tokenizer, alignment=alignment)


def _row(pair: Pair) -> dict[str, Any]:
    return {
        "id": pair.id,
        "clean": pair.clean.tolist(),
        "corrupt": pair.corrupt.tolist(),
        "dtype": pair.clean.dtype.str,
        "answer": [list(each) for each in pair.answer],
        "wrong_answer": [list(each) for each in pair.wrong_answer],
        "group": pair.group,
        "split": pair.split,
        "spans": {name: [list(side) for side in both] for name, both in pair.spans.items()},
        "entities": list(pair.entities),
        "clean_text": pair.clean_text,
        "corrupt_text": pair.corrupt_text,
    }


def _pair(row: Mapping[str, Any]) -> Pair:
    clean, corrupt = (np.array(row[side], dtype=row["dtype"]) for side in ("clean", "corrupt"))
    return Pair(
        clean,
        corrupt,
        tuple(tuple(each) for each in row["answer"]),
        tuple(tuple(each) for each in row["wrong_answer"]),
        id=row["id"],
        group=row["group"],
        split=row["split"],
        spans={name: (tuple(both[0]), tuple(both[1])) for name, both in row["spans"].items()},
        entities=tuple(row["entities"]),
        clean_text=row["clean_text"],
        corrupt_text=row["corrupt_text"],
    )
