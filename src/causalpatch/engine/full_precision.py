"""Full float32 while a model runs, whatever the process has set for its own products."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_GUARD = threading.Lock()


@dataclass
class _Precision:
    """Forwards that run in full float32, in whatever thread, and the setting from before the first of them."""

    n_running: int = 0
    before: str = "highest"


_PRECISION = _Precision()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 in full; the setting is the process's, so the last thread to leave puts it back."""
    with _GUARD:
        if not _PRECISION.n_running:
            _PRECISION.before = torch.get_float32_matmul_precision()
        _PRECISION.n_running += 1
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _GUARD:
            _PRECISION.n_running -= 1
            if not _PRECISION.n_running:
                torch.set_float32_matmul_precision(_PRECISION.before)
