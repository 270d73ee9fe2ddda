"""Reading a study file, so that every mistake is answered with its line and the nearest thing that is known.

1. YAML is read into nodes, which know their lines; a key that stands twice is refused.
2. ``--set a.b=c`` replaces values; a step is named by its name or its number.
3. The model of ``study`` checks the rest. Its complaints are turned into the house's form, with the line of what they
   are about.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import pydantic
import yaml

from causalpatch.base.errors import StudyError, UnsupportedError
from causalpatch.base.suggest import closest
from causalpatch.studies.study import SCHEMA, AnyStep, Study

Place = tuple[str | int, ...]
_SET: Final = "--set direction=noise, or --set steps.0.site=z@-1"
_SCHEMA: Final = "causalpatch schema says what each key may be"
_SHOWN: Final = 60  # characters of a value in a message
_STEPS: Final = {kind.model_fields["kind"].annotation.__args__[0]: kind for kind in get_args(get_args(AnyStep)[0])}


def read_study(path: str | Path, changes: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        path: The file.
        changes: ``a.b=c`` each, as after ``--set``; values are read as YAML.

    Raises:
        StudyError: There is no such file, it is no YAML, a key is not known, or a value does not fit.
        UnsupportedError: It was written for a later version.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise StudyError(
            f"the study file '{file}' cannot be read",
            facts=[("error", f"{type(error).__name__}: {why}")],
            fix=f"causalpatch init {file} writes one",
        ) from error
    return parse_study(text, file.name, changes)


def parse_study(text: str, name: str, changes: Sequence[str] = ()) -> Study:
    """Read a study from its text.

    Args:
        text: YAML.
        name: What messages call it.
        changes: ``a.b=c`` each.

    Raises:
        StudyError: As for ``read_study``.
        UnsupportedError: Likewise.
    """
    source = _Source(name)
    given = source.read(text)
    if not isinstance(given, dict):
        raise StudyError(
            f"'{name}' is no study",
            facts=[("found", _shown(given)), ("needed", "keys and values: schema, model, pairs, steps")],
            fix=f"causalpatch init {name} writes one",
        )
    for change in changes:
        source.change(given, change)
    _check_version(given, source)
    try:
        study = Study.model_validate(given)
    except pydantic.ValidationError as error:
        raise _first_problem(error, given, source) from error
    for place, why in study.problems():
        raise _wrong(source, place, why, given)
    return study


class _Loader(yaml.SafeLoader):
    """Reads ``true`` and ``false`` alone as truth values, as YAML 1.2 does: in YAML 1.1 the key ``on`` is one, too."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

# A number such as 1e-3, which YAML 1.1 takes for a word.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Source:
    """Where the parts of a study stand.

    Args:
        name: What messages call the file.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lines: dict[Place, int] = {}
        self._set: dict[Place, str] = {}

    def read(self, text: str) -> Any:
        """Return the values of a text, and note their lines."""
        try:
            loader = _Loader(text)
            root = loader.get_single_node()
        except yaml.YAMLError as error:
            raise self._no_yaml(error) from error
        if root is None:
            return None
        self._note(root, ())
        try:
            return loader.construct_document(root)
        except (yaml.YAMLError, ValueError) as error:  # tags, keys that are lists; dates that no calendar has
            raise self._no_yaml(error) from error

    def where(self, place: Place) -> str:
        """Return what messages call a place: its line, or the ``--set`` that put it there."""
        for end in range(len(place), -1, -1):
            if place[:end] in self._set:
                return f"'--set {self._set[place[:end]]}'"
            if place[:end] in self._lines:
                return f"'{self.name}' line {self._lines[place[:end]]}"
        return f"'{self.name}'"

    def change(self, given: dict[str, Any], change: str) -> None:
        """Put another value in a place.

        Raises:
            StudyError: There is no such place, or no value.
        """
        dotted, equals, text = change.partition("=")
        words = dotted.strip().split(".")
        if not equals or not all(words):
            raise StudyError(f"'--set {change}' names no value", fix=_SET)
        held: Any = given
        place: Place = ()
        for word, following in zip(words, [*words[1:], None], strict=True):
            key = _key_in(held, word, change)
            place = (*place, key)
            if following is None:
                try:
                    held[key] = _Loader(text).get_single_data()
                except (yaml.YAMLError, ValueError) as error:
                    raise StudyError(
                        f"the value of '--set {change}' is no YAML", fix="quote it: --set 'a.b=\"text\"'"
                    ) from error
                self._set[place] = change
            elif isinstance(held, dict):
                if isinstance(held.get(key), str) and place in (("model",), ("pairs",)):
                    held[key] = {"name": held[key]}
                held = held.setdefault(key, {})
            else:
                held = held[key]

    def _no_yaml(self, error: Exception) -> StudyError:
        mark = getattr(error, "problem_mark", None)
        return StudyError(
            f"'{self.name}'{f' line {mark.line + 1}' if mark else ''} is no YAML",
            facts=[("error", " ".join(str(getattr(error, "problem", None) or error).split()))],
            fix="mend the line; values with a colon or a bracket want quotes",
        )

    def _note(self, node: yaml.Node, place: Place, around: tuple[yaml.Node, ...] = ()) -> None:
        if node in around:
            raise StudyError(
                f"'{self.name}' line {node.start_mark.line + 1}: what '&' names here holds itself",
                fix="write out what is meant in place of the '*' inside of it",
            )
        around = (*around, node)
        self._lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*place, str(key.value))
                if inner in self._lines:
                    raise StudyError(
                        f"'{self.name}' line {key.start_mark.line + 1}: the key '{key.value}' stands twice",
                        facts=[("first in", f"line {self._lines[inner]}")],
                        fix="take one of them out",
                    )
                self._lines[inner] = key.start_mark.line + 1
                self._note(value, inner, around)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                self._note(value, (*place, number), around)


def _key_in(held: Any, word: str, change: str) -> str | int:
    """Return the key that a word of ``--set`` stands for."""
    if isinstance(held, dict):
        return word
    names = [str(one.get("name") or one.get("kind")) for one in held if isinstance(one, dict)] if held else []
    if isinstance(held, list):
        if word in names:
            return names.index(word)
        if word.isdigit() and int(word) < len(held):
            return int(word)
    raise StudyError(
        f"'--set {change}' names no place of the study",
        facts=[("not found", f"'{word}'"), ("there", ", ".join(names) or _shown(held))],
        fix=_SET,
    )


def _check_version(given: Mapping[str, Any], source: _Source) -> None:
    version = given.get("schema")
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA:
        raise UnsupportedError(
            f"{source.where(('schema',))}: the study was written for a later version",
            facts=[("schema", version), ("this version reads", SCHEMA)],
            fix="pip install --upgrade causalpatch",
        )


def _first_problem(error: pydantic.ValidationError, given: Any, source: _Source) -> StudyError:
    """Return the complaint that stands first in the file, unknown keys before what follows from them."""
    ordered = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    found = ordered[0]
    place = tuple(_without_tags(found["loc"], given))
    kind = found["type"]
    if kind == "extra_forbidden":
        *inside, key = place
        known = _keys_of(tuple(inside), given)
        near = closest(str(key), known, 1)
        return StudyError(
            f"{source.where(place)}: unknown key '{key}'",
            facts=[("in", _dotted(inside) or "the study"), ("known", ", ".join(known))],
            fix=f"did you mean '{near[0]}'?" if near else "take it out",
        )
    if kind == "missing":
        *inside, key = place
        return StudyError(
            f"{source.where(tuple(inside))}: the key '{key}' is missing",
            facts=[("in", _dotted(inside) or "the study"), ("known", ", ".join(_keys_of(tuple(inside), given)))],
            fix=f"add '{key}:'; causalpatch init shows how",
        )
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        named = _value_at(given, place)
        said = named.get("kind") if isinstance(named, dict) else named
        near = closest(str(said), _STEPS, 1)
        return StudyError(
            f"{source.where((*place, 'kind'))}: {_dotted(place)} is no known kind of step",
            facts=[("kind", _shown(said)), ("known", ", ".join(_STEPS))],
            fix=f"kind: {near[0]}" if near else "kind: sweep",
        )
    known = re.findall(r"'([^']+)'", str(found.get("ctx", {}).get("expected", ""))) if kind == "literal_error" else []
    near = closest(str(_value_at(given, place)), known, 1)
    fix = f"{place[-1]}: {near[0]}" if near else _SCHEMA
    return _wrong(source, place, found["msg"].removeprefix("Value error, "), given, fix)


def _wrong(source: _Source, place: Place, why: str, given: Any, fix: str = _SCHEMA) -> StudyError:
    value = _value_at(given, place)
    facts: list[tuple[str, object]] = [("because", why[:1].lower() + why[1:])]
    if not isinstance(value, dict | list):
        facts.insert(0, ("given", _shown(value)))
    return StudyError(
        f"{source.where(place)}: '{_dotted(place)}' does not fit",
        facts=facts,
        fix=fix,
    )


def _without_tags(loc: Sequence[str | int], given: Any) -> Iterator[str | int]:
    """Yield a place without what names the kind of a step, and without members of unions."""
    held = given
    for number, key in enumerate(loc):
        is_last = number == len(loc) - 1
        if isinstance(held, list) and isinstance(key, int):
            yield key
            held = held[key] if key < len(held) else None
        elif isinstance(held, dict) and (key in held or (is_last and key != held.get("kind"))):
            yield key
            held = held.get(key)


def _keys_of(place: Place, given: Any) -> list[str]:
    """Return the keys that a part of a study may have."""
    kind: type[pydantic.BaseModel] = Study
    if place[:1] == ("steps",) and len(place) > 1:
        kind = _STEPS[_value_at(given, place)["kind"]]
    elif place:
        kind = next(
            each
            for each in (Study.model_fields[str(place[0])].annotation, *get_args(_annotation(str(place[0]))))
            if isinstance(each, type) and issubclass(each, pydantic.BaseModel)
        )
    return [field.alias or name for name, field in kind.model_fields.items()]


def _annotation(name: str) -> Any:
    return Study.model_fields[name].annotation


def _value_at(given: Any, place: Place) -> Any:
    for key in place:
        if isinstance(given, dict):
            given = given.get(str(key))
        elif isinstance(given, list) and isinstance(key, int) and key < len(given):
            given = given[key]
        else:
            return None
    return given


def _dotted(place: Sequence[str | int]) -> str:
    return ".".join(map(str, place))


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
