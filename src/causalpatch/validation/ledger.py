"""The ledger of opened pairs: which held-out pairs have shown their effects in which model.

Held-out pairs can confirm a claim once. What is confirmed on them again was chosen by one who has seen them, so that it
is no confirmation. Each opening is a line of JSON in one file, for all projects of a user:

    $XDG_STATE_HOME/causalpatch/openings.jsonl, or ~/.local/state/causalpatch/openings.jsonl

A line holds the claim's spec hash, the time, the model, the name of the pairs and a hash of every input. A pair counts
as opened where one of its inputs was opened with the same model; other models show other effects.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from causalpatch.base.errors import SettingError, StoreCorrupt
from causalpatch.experiment import Experiment
from causalpatch.pairs import Pair, Pairs

FORMAT: Final = "causalpatch opening"
_DIGITS: Final = 16  # of each hash: two of a billion inputs are alike with probability .03


def default_path() -> Path:
    """Return where the user's ledger is."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "causalpatch" / "openings.jsonl"


class Ledger:
    """A file of openings.

    Args:
        path: The file; the user's own by default. It is made with the first opening.
    """

    place: str
    """What a claim calls the ledger that it was entered in."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = default_path() if path is None else Path(path)
        self.place = str(self.path)

    def opened(self, experiment: Experiment) -> dict[str, list[int]]:
        """Return which pairs were opened before: their indices by the spec hash of the claim that opened them first.

        Args:
            experiment: Model and pairs.

        Raises:
            StoreCorrupt: The file cannot be read.
        """
        model = model_hash(experiment)
        inputs = [set(_inputs(pair)) for pair in experiment.pairs]
        found: dict[str, list[int]] = {}
        left = set(range(len(inputs)))
        for record in self._records():
            if record["model"] != model:
                continue
            held = set(record["inputs"])
            again = sorted(number for number in left if inputs[number] & held)
            if again:
                found[str(record["spec"])] = sorted([*found.get(str(record["spec"]), []), *again])
                left -= set(again)
        return found

    def write(self, experiment: Experiment, spec: str) -> None:
        """Record that a claim opens pairs; done before anyone sees a number.

        Args:
            experiment: Model and pairs.
            spec: The claim's spec hash.

        Raises:
            SettingError: The file cannot be written.
        """
        record = {
            "format": FORMAT,
            "spec": spec,
            "opened": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model_hash(experiment),
            "pairs": experiment.pairs.name,
            "inputs": _all_inputs(experiment.pairs),
        }
        self._append(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
        except OSError as error:
            raise SettingError(
                f"the ledger of opened pairs cannot be written: '{self.path}'",
                facts=[("error", f"{type(error).__name__}: {error.strerror}")],
                fix='name a file that can be: confirm(…, ledger="openings.jsonl")',
            ) from error

    def _records(self) -> Iterator[Mapping[str, Any]]:
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                known = record["format"] == FORMAT and all(name in record for name in ("spec", "model", "inputs"))
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise StoreCorrupt(
                    f"the ledger of opened pairs cannot be read: '{self.path}'",
                    facts=[("line", number), ("needed", f"a JSON object of the format '{FORMAT}'")],
                    fix=f"mend or take out line {number}: without the ledger nothing can be confirmed",
                )
            yield record


def model_hash(experiment: Experiment) -> str:
    """Return the hash of the model whose effects are seen, with that of the source runs where this is another."""
    source = experiment.source_model
    return experiment.model.content_hash + ("" if source is None else f"+{source.content_hash}")


def _inputs(pair: Pair) -> list[str]:
    """Return a hash of everything that the pair's runs are given; of an encoder's model that of its encoder."""
    hashes = {name: both for name, both in pair.hashes.items() if name or pair.encoder is None}
    return [f"{name}:{each[:_DIGITS]}" for name, both in hashes.items() for each in both]


def _all_inputs(pairs: Pairs) -> list[str]:
    return sorted({each for pair in pairs for each in _inputs(pair)})
