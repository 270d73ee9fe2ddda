"""What a search for a subspace came to: the subspace, how well it does, against what, and of what it is made."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from causalpatch.base.errors import CausalPatchError, PatchError, ResultsNotFound, StoreCorrupt
from causalpatch.engine import Epoch
from causalpatch.experiment import Experiment
from causalpatch.patches import FittedOn, Patch, Subspace
from causalpatch.sites import Site, SiteSet, parse
from causalpatch.subspaces.interchange import Accuracy, patched_accuracy, refuse_shared
from causalpatch.subspaces.parts import Part, Parts

FORMAT = "causalpatch subspace"
SCHEMA = "1"
_ENTRY = "causalpatch"
_CONTROLS = {
    "whole site": "the whole site is interchanged",
    "random subspaces": "mean of {n}, of the same dimension",
    "best random": "the best of these",
    "shuffled": "learnt anew, wanted answers shuffled",
}


@dataclass(frozen=True, eq=False)
class Alignment:
    """A subspace that was learnt, and what is known of it.

    ``alignment.value`` is a value like any other: ``Patch(site, alignment.value)``.

    Args:
        site: Where it lies.
        value: The subspace.
        model: Name of the model.
        direction: ``"denoise"`` or ``"noise"``.
        wanted: Column of the wanted answers; empty for the source's own.
        accuracy: Interchange accuracy on held-out pairs.
        controls: Accuracies on the same pairs of the whole site, of random subspaces of the same dimension, and of a
            subspace that was learnt from shuffled wanted answers and is held to such.
        parts: Its row-space and null-space parts, and whether it is an illusion, on the held-out pairs.
        epochs: What each epoch of the search came to.
        settings: How it was searched for.
        marks: A mark of each prompt, entity and group that it was learnt on.
    """

    site: Site | SiteSet
    value: Subspace
    model: str
    direction: str
    wanted: str
    accuracy: Accuracy
    controls: Mapping[str, float]
    parts: Parts
    epochs: tuple[Epoch, ...]
    settings: Mapping[str, Any]
    marks: UInt8[np.ndarray, "mark 8"] = field(repr=False)

    @property
    def dimension(self) -> int:
        """Dimensions of the subspace."""
        return self.value.dimension

    @property
    def basis(self) -> np.ndarray:
        """Orthonormal directions, axes (dimension, the site's value axes)."""
        return self.value.basis

    @property
    def patch(self) -> Patch:
        """The interchange as a patch."""
        return Patch(self.site, self.value)

    def confirm(self, experiment: Experiment) -> Accuracy:
        """Measure the interchange on other pairs.

        Args:
            experiment: The model, in the direction of the search, with pairs that share no prompt, entity or group with
                those that the subspace was learnt on.

        Raises:
            PairError: They share one.
            PatchError: The experiment has the other direction.
        """
        if experiment.direction != self.direction:
            raise PatchError(
                f"the subspace of '{self.site}' was learnt to {self.direction}, not to {experiment.direction}",
                fix=f'experiment.turned("{self.direction}")',
            )
        refuse_shared(self.marks, self.value.on.name if self.value.on else "", experiment.pairs)
        return patched_accuracy(experiment, self.patch, self.wanted or None)

    def __str__(self) -> str:
        on = self.value.on
        learnt = f"learnt on {on.n_pairs} pairs of '{on.name}'" if on else "learnt"
        losses = f"loss {self.epochs[0].loss:.3f} at the start, {self.epochs[-1].loss:.3f} at the end"
        lines = [
            f"subspace of '{self.site}' in '{self.model}', dimension {self.dimension}, {learnt}, {self.direction}",
            f"interchange accuracy {self.accuracy}",
            f"  {'chance':16}  {self.accuracy.chance:.3f}  share of the commonest wanted answer",
            f"  {'unpatched':16}  {self.accuracy.unpatched:.3f}  the base run gives the wanted answer",
        ]
        n = self.settings.get("n_random", 0)
        there = [(name, words, self.controls[name]) for name, words in _CONTROLS.items() if name in self.controls]
        lines += [f"  {name:16}  {share:.3f}  {words.format(n=n)}" for name, words, share in there]
        return "\n".join([*lines, str(self.parts), f"{len(self.epochs) - 1} epochs; {losses}"])

    def save(self, path: str | Path) -> Path:
        """Write the subspace as safetensors, everything else in its metadata.

        Args:
            path: Ends in ``.safetensors``; folders are made where they are missing.

        Raises:
            PatchError: The path has another ending.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise PatchError(
                f"a subspace is saved as safetensors, not as '{path.name}'", fix=f"{path.stem}.safetensors"
            )
        plain = {
            each.name: _plain(getattr(self, each.name)) for each in dataclasses.fields(self) if each.name != "marks"
        }
        content = json.dumps(plain, sort_keys=True)
        tensors = {"basis": np.ascontiguousarray(self.value.basis), "marks": np.ascontiguousarray(self.marks)}
        about = {"format": FORMAT, "schema": SCHEMA, "content": content, "sha256": _digest(content, tensors)}
        # One entry: safetensors writes several in any order, and equal subspaces are to be equal files.
        entry = {_ENTRY: json.dumps(about, sort_keys=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=entry)
        return path


def load_subspace(path: str | Path) -> Alignment:
    """Read a subspace that ``Alignment.save`` wrote.

    Raises:
        ResultsNotFound: There is no such file.
        StoreCorrupt: It is not of this format, or was changed since.
    """
    path = Path(path)
    if not path.is_file():
        raise ResultsNotFound(f"no saved subspace in '{path}'", fix="name the file that Alignment.save wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
            if about.get("format") != FORMAT or about.get("schema") != SCHEMA:
                raise _corrupt(path, f"it is no file of the format {FORMAT!r}, schema {SCHEMA}")
            tensors = {name: file.get_tensor(name) for name in ("basis", "marks")}
        if _digest(about["content"], tensors) != about["sha256"]:
            raise _corrupt(path, "it was changed after it was written")
        return _read(json.loads(about["content"]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError, CausalPatchError) as error:
        if isinstance(error, StoreCorrupt):
            raise
        raise _corrupt(path, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}") from error


def _plain(value: Any) -> Any:
    """Return a field as JSON knows it; the basis stands beside it as a tensor."""
    if isinstance(value, Subspace):
        return {"on": None if value.on is None else dataclasses.asdict(value.on)}
    if isinstance(value, Site | SiteSet):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return value


def _read(plain: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> Alignment:
    on = plain["value"]["on"]
    parts = plain["parts"]
    return Alignment(
        **{name: plain[name] for name in ("model", "direction", "wanted", "controls", "settings")},
        site=parse(plain["site"]),
        value=Subspace(tensors["basis"], on=None if on is None else FittedOn(**on)),
        accuracy=Accuracy(**plain["accuracy"]),
        parts=Parts(**{**parts, "of": {name: Part(**part) for name, part in parts["of"].items()}}),
        epochs=tuple(Epoch(**epoch) for epoch in plain["epochs"]),
        marks=tensors["marks"],
    )


def _digest(content: str, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype.str} {tensors[name].shape}".encode() + tensors[name].tobytes())
    return digest.hexdigest()


def _corrupt(path: Path, why: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"the subspace in '{path}' cannot be read", facts=[("why", why)], fix="write it again: alignment.save(path)"
    )
