"""Numbers that a user gives: whole ones from a least one on, and finite ones above nothing."""

import math
import numbers

from causalpatch.base.errors import SettingError


def require_count(name: str, value: object, least: int = 1, *, usual: int | None = None) -> None:
    """Make sure that a setting is a whole number.

    Args:
        name: What the setting is called.
        value: What was given.
        least: The least that it may be.
        usual: What to offer instead.

    Raises:
        SettingError: It is something else, or too small.

    Examples:
        >>> require_count("n_draws", 200)
        >>> require_count("n_draws", 2.5, usual=200)
        Traceback (most recent call last):
        causalpatch.base.errors.SettingError: n_draws=2.5 is no whole number from 1 on
          fix: n_draws=200
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least:
        return
    raise SettingError(
        f"{name}={value!r} is no whole number from {least} on", fix=f"{name}={least if usual is None else usual}"
    )


def require_positive(name: str, value: object, *, usual: float) -> None:
    """Make sure that a setting is a finite number above 0.

    Args:
        name: What the setting is called.
        value: What was given.
        usual: What to offer instead.

    Raises:
        SettingError: It is something else.

    Examples:
        >>> require_positive("delta", 0.1, usual=0.1)
        >>> require_positive("delta", -1, usual=0.1)
        Traceback (most recent call last):
        causalpatch.base.errors.SettingError: delta=-1 is no number above 0
          fix: delta=0.1
    """
    held = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if isinstance(held, numbers.Real) and not isinstance(held, bool) and math.isfinite(held) and float(held) > 0:
        return
    raise SettingError(f"{name}={value!r} is no number above 0", fix=f"{name}={usual:g}")
