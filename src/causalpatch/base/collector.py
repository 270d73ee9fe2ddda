"""Garbage collection that does not look through everything again and again while very many small objects are made."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_GUARD = threading.Lock()


@dataclass
class _State:
    """How many threads stand in ``undisturbed``, and whether the objects set aside are ours to bring back."""

    n_inside: int = 0
    is_ours: bool = False


_STATE = _State()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Set aside all objects that are there already, so that the collector passes over them; bring them back afterwards.

    Millions of objects of imported libraries are otherwise looked through each time that some ten thousand runs have
    been laid out. What is made inside is collected as ever. Where someone has set objects aside before,
    nothing is done.
    """
    with _GUARD:
        if not _STATE.n_inside and not gc.get_freeze_count():
            gc.freeze()
            _STATE.is_ours = True
        _STATE.n_inside += 1
    try:
        yield
    finally:
        with _GUARD:
            _STATE.n_inside -= 1
            if not _STATE.n_inside and _STATE.is_ours:
                gc.unfreeze()
                _STATE.is_ours = False
