"""Where a patched site's new value comes from: plain data, computed by the engine, and its spelling as text.

The classes stand in ``fixed`` (source, identity, interpolation, zero, constant, function), ``sampled`` (mean, resample,
noise, optimal, fitted), ``direction`` (steering, projection), ``elsewhere`` (another site, token or run), ``given``
(known before) and ``subspace``. Most can be written as text wherever a value is asked for:

==============================  =========================================================
text                            value
==============================  =========================================================
``source`` ``identity``         ``Source()``, ``Identity()``
``zero`` ``0.5``                ``Zero()``, ``Constant(0.5)``
``interpolate(0.25)``           ``Interpolate(0.25)``
``mean`` ``mean(positions)``    ``Mean()``, ``Mean("positions")``
``mean(per_group=true)``        ``Mean(per_group=True)``
``noise`` ``noise(draw=3)``     ``Noise()``, ``Noise(draw=3)``
``resample(seed=1)``            ``Resample(seed=1)``
``optimal(steps=50)``           ``Optimal(steps=50)``
``from(resid_post.5@-1)``       ``From("resid_post.5@-1")``, of the source run
``constant(FILE.npz:NAME)``     ``Constant(array)``, the array read from the file
``steer(FILE.npz:NAME, -2)``    ``Steer(array, -2)``
``project_out(FILE.npz:NAME)``  ``ProjectOut(array)``
``subspace(FILE.npz:NAME)``     ``Subspace(array)``, of the source
==============================  =========================================================
"""

import dataclasses
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from causalpatch.base.errors import PatchError
from causalpatch.base.suggest import closest
from causalpatch.patches.direction import ProjectOut, Steer
from causalpatch.patches.elsewhere import From
from causalpatch.patches.fixed import Constant, Identity, Interpolate, Source, Zero
from causalpatch.patches.sampled import Mean, Noise, Optimal, Resample
from causalpatch.patches.subspace import Subspace, Whole

Value = Whole | Subspace
NAMED: dict[str, Callable[..., Value]] = {
    "source": Source,
    "identity": Identity,
    "interpolate": Interpolate,
    "zero": Zero,
    "mean": Mean,
    "resample": Resample,
    "noise": Noise,
    "optimal": Optimal,
    "from": From,
    "constant": Constant,
    "steer": Steer,
    "project_out": ProjectOut,
    "subspace": Subspace,
}
"""Values by the name under which they are spelt."""

_BARE = ("source", "identity", "zero", "mean", "resample", "noise", "optimal")
_SPELT = re.compile(r"\s*(?P<name>[a-z_]+)\s*(?:\((?P<arguments>.*)\))?\s*", re.DOTALL)
_ARRAY = re.compile(r"(?P<file>.+\.npz):(?P<name>[^:]+)")
_WORDS = {"true": True, "false": False, "none": None}


def as_value(value: object) -> Value:
    """Accept a value, its text (``"zero"``, ``"interpolate(0.5)"``), a number or an array.

    Raises:
        PatchError: It is none of these.
    """
    if isinstance(value, Value):
        return value
    if isinstance(value, str):
        return _spelt(value)
    if isinstance(value, int | float | np.ndarray) and not isinstance(value, bool):
        return Constant(value)
    raise _unknown(value)


def needs_fitting(value: Value) -> bool:
    """Tell whether something of a value is fitted on the pairs that it is measured on, unless it was before."""
    held = value.of if isinstance(value, Subspace) else value
    return isinstance(held, Mean | Optimal) or (isinstance(held, Noise) and held.sigma is None)


def spell(value: Value) -> str:
    """Return a text that ``as_value`` reads as this very value; an empty one where no text says it, such as of arrays.

    Examples:
        >>> spell(Mean("positions")), spell(Constant(0.5)), spell(Zero()), as_value(spell(Noise(0.1))) == Noise(0.1)
        ('mean(over=positions, side=corrupt, per_group=False)', '0.5', 'zero', True)
    """
    if isinstance(value, Constant):
        return repr(float(value.array)) if np.ndim(value.array) == 0 else ""
    name = next((name for name, kind in NAMED.items() if type(value) is kind), "")
    held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not name or not all(each is None or isinstance(each, str | int | float) for each in held.values()):
        return ""
    return name if not held else f"{name}({', '.join(f'{key}={each}' for key, each in held.items())})"


def _spelt(text: str) -> Value:
    try:
        return Constant(float(text))
    except ValueError:
        pass
    found = _SPELT.fullmatch(text)
    if found is None or found["name"] not in NAMED:
        raise _unknown(text)
    name, make = found["name"], NAMED[found["name"]]
    if found["arguments"] is None and name not in _BARE:
        raise PatchError(f"{text!r} says nothing of the value", fix=f"write for example {_example(name)}")
    given: list[Any] = []
    named: dict[str, Any] = {}
    for part in filter(str.strip, (found["arguments"] or "").split(",")):
        key, equals, word = part.partition("=")
        if equals:
            named[key.strip()] = _read(word.strip())
        else:
            given.append(_read(part.strip()))
    return _make(text, name, make, given, named)


def _make(text: str, name: str, make: Callable[..., Value], given: list[Any], named: dict[str, Any]) -> Value:
    fields = [field.name for field in dataclasses.fields(make)]  # type: ignore[arg-type]  # all are dataclasses
    strange = next((key for key in named if key not in fields), None)
    if strange is not None or len(given) > len(fields) or set(fields[: len(given)]) & set(named):
        near = closest(strange, fields, 1) if strange else []
        raise PatchError(
            f"{text!r} cannot be read as a value" + (f": '{name}' has no {strange!r}" if strange else ""),
            facts=[(name, ", ".join(fields) or "takes nothing")],
            fix=f"{near[0]}=…" if near else f"write for example {_example(name)}",
        )
    if isinstance(named.get("of"), str):
        named["of"] = as_value(named["of"])
    try:
        return make(*given, **named)
    except (TypeError, ValueError) as error:
        raise PatchError(
            f"{text!r} cannot be read as a value",
            facts=[(name, ", ".join(fields) or "takes nothing"), ("error", str(error).splitlines()[0][:80])],
            fix=f"write for example {_example(name)}",
        ) from error


def _read(word: str) -> Any:
    """Return a word as a number, a truth value, an array of a file, or itself."""
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    found = _ARRAY.fullmatch(word)
    return _load(Path(found["file"]), found["name"]) if found else word


def _load(path: Path, name: str) -> np.ndarray:
    """Return an array of an .npz file; nothing is unpickled.

    Raises:
        PatchError: There is no such file or array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if name not in file.files:
                raise PatchError(
                    f"'{path}' holds no array {name!r}",
                    facts=[("arrays", ", ".join(file.files) or "none")],
                    fix=f"{path}:{file.files[0]}" if file.files else "save one: numpy.savez(path, name=array)",
                )
            return np.asarray(file[name])
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise PatchError(
            f"'{path}' cannot be read as a file of arrays",
            facts=[("error", f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")],
            fix="write it with numpy.savez(path, name=array)",
        ) from error


def _unknown(value: object) -> PatchError:
    names = [*_BARE, "interpolate(0.5)", "a number", "Constant(array)", "Steer(array)", "ProjectOut(array)"]
    names += ["Subspace(basis)", 'From("resid_post.5@-1")']
    near = closest(value.partition("(")[0].strip(), NAMED, 1) if isinstance(value, str) else []
    return PatchError(
        f"{value!r} is not a value to patch in",
        facts=[("known", ", ".join([*names, "Function(…)", "Fitted(…)", "Given(…)"]))],
        fix=f'write for example Patch("z.9.6", "{_example(near[0] if near else "zero")}")',
    )


def _example(name: str) -> str:
    arguments = {"interpolate": "(0.5)", "from": "(resid_post.5@-1)", "steer": "(vectors.npz:name, 2)"}
    return name + arguments.get(name, "(vectors.npz:name)" if name in ("constant", "project_out", "subspace") else "")
