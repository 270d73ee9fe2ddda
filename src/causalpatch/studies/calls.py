"""Calls: what a study's steps asked for, and which shards hold it, so that all can be read without a model.

    calls/NAME.json     the shards with their cells and pairs, the work as plain data, the digest of its arrays
    calls/NAME.npz      its arrays, where it has some
    pairs/HASH.json     the pairs themselves, where they are plain prompts

Each part carries a checksum. What is torn, changed or missing is written anew by the next run that asks for the same.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np

from causalpatch.base.spec import content_hash
from causalpatch.base.tokens import Tokenizer
from causalpatch.experiment.measured import Work
from causalpatch.pairs import Pairs
from causalpatch.pairs.plain import pairs_of_plain, plain_pairs
from causalpatch.studies.sealed import checksum, seal, unseal
from causalpatch.studies.store import Run
from causalpatch.studies.works import work_of_plain

_CALL: Final = "causalpatch call"
_PAIRS: Final = "causalpatch pairs"


@dataclass
class Calls:
    """The calls of a run.

    Args:
        run: The run.
    """

    run: Run
    _known: set[str] = field(default_factory=set)  # names that were found whole, or written, by this object

    def names(self) -> list[str]:
        """Return the names of all calls, whole or not."""
        files = self.run.objects.names(self.run.name("calls"))
        return [file.removesuffix(".json") for file in files if file.endswith(".json")]

    def note(self, work: Work, pairs: Pairs, shards: Sequence[Mapping[str, Any]], setting: Mapping[str, Any]) -> str:
        """Keep what was asked for, where it is not kept already, and return its name.

        Args:
            work: What was asked for.
            pairs: On which pairs.
            shards: Which shards hold it: keys, cells, pairs and runs.
            setting: How it was measured.
        """
        name = content_hash(shards)
        if name in self._known or not self.problems(name):
            self._known.add(name)
            return name
        told, arrays = work.plain()
        digest = None
        if arrays:
            file = io.BytesIO()
            np.savez(file, **cast(dict[str, Any], arrays))
            self.run.objects.put(self._place(name, "npz"), file.getvalue())
            digest = checksum(file.getvalue())
        content = {"shards": shards, "pairs": self._note_pairs(pairs), "work": told, "setting": setting}
        self.run.objects.put(self._place(name), seal(_CALL, {**content, "arrays": digest}))
        self._known.add(name)
        return name

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what was asked for in a call; None where that is missing, torn or changed."""
        return unseal(_CALL, self.run.objects.get(self._place(name)))

    def work(self, name: str, call: Mapping[str, Any]) -> Work | None:
        """Return what a call was of; None where its arrays are missing, torn or changed.

        Args:
            name: Its name.
            call: What ``read`` returned.
        """
        data = self._arrays(name, call)
        if data is None:
            has_none = "arrays" in call and call["arrays"] is None
            return work_of_plain(call["work"], {}) if has_none else None
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return work_of_plain(call["work"], {key: arrays[key] for key in arrays.files})

    def pairs(self, name: str, tokenizer: Tokenizer | None = None) -> Pairs | None:
        """Return pairs that are kept; None where they are missing, torn or changed.

        Args:
            name: Their hash.
            tokenizer: What turns ids into labels.
        """
        said = unseal(_PAIRS, self.run.objects.get(self._place_of_pairs(name)))
        return pairs_of_plain(said, tokenizer) if said is not None else None

    def problems(self, name: str) -> dict[str, str]:
        """Return what is wrong with a call's own parts, by their names; its shards are looked at elsewhere."""
        call = self.read(name)
        if call is None:
            return {f"calls/{name}.json": "missing, torn or changed"}
        found = {}
        if call.get("arrays", "unknown") is not None and self._arrays(name, call) is None:
            found[f"calls/{name}.npz"] = "missing, torn or changed"
        if call["pairs"] is not None and self.pairs(call["pairs"]) is None:
            found[f"pairs/{call['pairs']}.json"] = "missing, torn or changed"
        return found

    def damaged(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with any call's own parts."""
        for name in self.names():
            yield from self.problems(name).items()

    def _arrays(self, name: str, call: Mapping[str, Any]) -> bytes | None:
        digest = call.get("arrays")
        data = None if digest is None else self.run.objects.get(self._place(name, "npz"))
        return data if data is not None and checksum(data) == digest else None

    def _note_pairs(self, pairs: Pairs) -> str | None:
        """Keep pairs, and return their name; None where they are no plain prompts."""
        name = pairs.content_hash
        if self.pairs(name) is None:
            plain = plain_pairs(pairs)
            if plain is None:
                return None
            self.run.objects.put(self._place_of_pairs(name), seal(_PAIRS, plain))
        return name

    def _place(self, name: str, ending: str = "json") -> str:
        return self.run.name("calls", f"{name}.{ending}")

    def _place_of_pairs(self, name: str) -> str:
        return self.run.name("pairs", f"{name}.json")
