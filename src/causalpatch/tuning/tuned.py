"""What a tuning gives: the change, how training went, and models and files with the change in them."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from causalpatch.base.errors import IntegrityError, ModelUnsupported, ResultsNotFound, SettingError, StoreCorrupt
from causalpatch.models import Model, open_model, projection_rows
from causalpatch.results.provenance import describe_program
from causalpatch.results.words import counted, joined
from causalpatch.sites import Site
from causalpatch.tuning.low_rank import LowRank
from causalpatch.tuning.parts import Parts, parts_of
from causalpatch.tuning.train import Training
from causalpatch.tuning.ways import Offsets, Slices, Way

FORMAT: Final = "causalpatch change"
CHANGE: Final = "change.safetensors"
# Switches by which configurations give biases to projections that have none (Llama, Granite, …).
_BIAS_SWITCHES: Final = ("attention_bias", "mlp_bias")


@dataclass(frozen=True, eq=False)
class Tuned:
    """A model with located parts changed.

    Args:
        base: The model as it is; it was not changed.
        way: The change.
        training: How the training went whose checkpoint this is.
        searched: All trainings that were made to choose its rate, by validation alone.
        record: The data and settings, as plain data.
    """

    base: Model
    way: Way
    training: Training
    searched: tuple[Training, ...]
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether no training diverged or was stopped."""
        return all(each.is_whole for each in self.searched)

    def model(self) -> Model:
        """Return a model with the change written into its weights (or, of offsets, its biases).

        Raises:
            ModelUnsupported: Offsets cannot be folded into weights; ``save_change`` keeps them.
            IntegrityError: A weight outside the located parts changed.
        """
        merged = merged_module(self.way)
        require_untouched(self.way, merged)
        return open_model(merged, tokenizer=self.base.tokenizer)

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint that ``transformers`` reads, with the change in its weights and the tokenizer beside it.

        Args:
            folder: Where to.

        Raises:
            ModelUnsupported: The change cannot be written into weights, or the model is none of transformers.
        """
        folder = Path(folder)
        module: Any = self.model().module
        if not hasattr(module, "save_pretrained"):
            raise ModelUnsupported(
                f"'{self.base.name}' cannot be saved as a checkpoint",
                facts=[("type", type(module).__name__)],
                fix="keep the change beside it: tuned.save_change(folder)",
            )
        module.save_pretrained(str(folder))
        own: Any = getattr(self.base.tokenizer, "tokenizer", self.base.tokenizer)  # the one of transformers inside
        keep = getattr(own, "save_pretrained", None)
        if keep is not None:
            keep(str(folder))
        self._write_record(folder)
        return folder

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapter of ``way="lora"`` as PEFT does.

        Args:
            folder: Where to.

        Raises:
            SettingError: The change is no adapter.
        """
        if not isinstance(self.way, LowRank):
            raise SettingError(
                f"a change of way='{self.way.name}' is no adapter of PEFT",
                fix="tuned.save(folder) for a checkpoint, tuned.save_change(folder) for the change alone",
            )
        made = self.way.save(Path(folder))
        self._write_record(made)
        return made

    def save_change(self, folder: str | Path) -> Path:
        """Write the change alone, for ``load_change``.

        Args:
            folder: Where to.

        Raises:
            SettingError: All weights were trained, or an adapter was, which PEFT saves.
        """
        if not isinstance(self.way, Slices | Offsets):
            raise SettingError(
                f"a change of way='{self.way.name}' is not kept by itself",
                fix="tuned.save_adapter(folder)" if isinstance(self.way, LowRank) else "tuned.save(folder)",
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "way": self.way.name,
            "sites": json.dumps([str(site) for site in self.way.parts.sites]),
            "base": self.base.content_hash,
            "name": self.base.name,
            "shared": str(self.record.get("shared", "leave")),
        }
        held = {name: each.contiguous() for name, each in self.way.state().items()}
        safetensors.torch.save_file(held, str(folder / CHANGE), metadata=about)
        self._write_record(folder)
        return folder

    def __str__(self) -> str:
        best, parts = self.training.best, self.way.parts
        first = self.training.looks[0]
        lines = [
            f"{self.way.name}: {counted(self.way.n_trained, 'number')} trained at "
            f"{joined([str(site) for site in parts.sites[:6]]) or 'every weight'}",
            f"validation: target {first.success:.0%} to {best.success:.0%}; retain KL {best.moved:.2g} nat a token",
            f"rate {self.training.rate:g} of {counted(len(self.searched), 'training')}; {self.training.ended}",
        ]
        others = [each for each in self.searched if each is not self.training and not each.is_whole]
        lines += [f"rate {each.rate:g} was not chosen: {each.ended}" for each in others]
        return "\n".join([*lines, *(f"note: {note}" for note in parts.notes)])

    def __repr__(self) -> str:
        return f"Tuned({self.base.name!r}, {self.way.name}, {', '.join(map(str, self.way.parts.sites))})"

    def _write_record(self, folder: Path) -> None:
        plain = {
            **describe_program(),
            **self.record,
            "base": {"name": self.base.name, "hash": self.base.content_hash},
            "way": self.way.name,
            "sites": [str(site) for site in self.way.parts.sites],
            "training": self.training.to_plain(),
            "searched": [each.to_plain() for each in self.searched],
        }
        (folder / "tuning.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def load_change(folder: str | Path, model: Model) -> Way:
    """Read what ``Tuned.save_change`` wrote: a change that runs on its model (``way.running()``).

    Args:
        folder: The folder.
        model: The model that it was trained on.

    Raises:
        ResultsNotFound: There is none.
        StoreCorrupt: It is something else.
        ModelUnsupported: It is of another model.
    """
    path = Path(folder) / CHANGE
    if not path.is_file():
        raise ResultsNotFound(f"no saved change in '{folder}'", fix="name the folder of tuned.save_change(folder)")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        kinds: dict[str, type[Slices] | type[Offsets]] = {"slice": Slices, "offset": Offsets}
        kind = kinds[about["way"]]
        sites = [Site.parse(text) for text in json.loads(about["sites"])]
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StoreCorrupt(
            f"the change in '{folder}' cannot be read",
            facts=[("why", f"{type(error).__name__}: {error}")],
            fix="write it again: tuned.save_change(folder)",
        ) from error
    if about["base"] != model.content_hash:
        raise ModelUnsupported(
            f"the change in '{folder}' is of another model than '{model.name}'",
            facts=[("of", f"'{about['name']}', weights {about['base'][:12]}"), ("given", model.content_hash[:12])],
            fix="open the model that it was trained on",
        )
    way = kind(model, parts_of(sites, model, shared=about["shared"], outputs_alone=kind is Offsets))
    way.restore(held)
    return way


def merged_module(way: Way) -> nn.Module:
    """Return a copy of the model with a change written into it."""
    made = copy.deepcopy(way.model.module)
    if isinstance(way, Offsets) and any(made.get_submodule(path).bias is None for path in way.parts.modules):
        made = _with_biases(made, way)
    way.write_into(made)
    return made


def _with_biases(module: nn.Module, way: Offsets) -> nn.Module:
    """Return the same model with biases of 0, where its configuration has a switch for them."""
    config = copy.deepcopy(getattr(module, "config", None))
    off = [name for name in _BIAS_SWITCHES if getattr(config, name, None) is False]
    for name in off:
        setattr(config, name, True)
    if off:
        kind: Any = type(module)
        with torch.random.fork_rng():  # its weights are drawn first, to be written over
            made: nn.Module = kind(config)
        made.to(device=way.model.device, dtype=way.model.dtype)
        missing, more = made.load_state_dict(module.state_dict(), strict=False)
        if not more and all(name.endswith(".bias") for name in missing):
            with torch.no_grad():
                for name in missing:
                    made.get_parameter(name).zero_()
            module = made.train(module.training)
    way.require_biases(module)
    return module


def require_untouched(way: Way, merged: nn.Module) -> None:
    """Make sure, by hash, that no weight outside the parts of a change differs from what it was.

    Raises:
        IntegrityError: One does.
    """
    if not isinstance(way, Slices | LowRank | Offsets):
        return
    before, after = digests_outside(way, way.model.module), digests_outside(way, merged)
    wrong = [name for name, digest in before.items() if after.get(name) != digest]
    if wrong:
        raise IntegrityError(
            f"{counted(len(wrong), 'weight')} outside the located parts changed, the first is '{wrong[0]}'",
            facts=[("way", way.name), ("parts", joined([str(site) for site in way.parts.sites[:6]]))],
            fix="this is a fault of the library; please report it with the model's name",
        )


def digests_outside(way: Way, module: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a module's state, without the elements that a way may change.

    Args:
        way: Whose parts do not count.
        module: The model, or one of its shape.
    """
    state = way.model.module.state_dict()
    own = module.state_dict()
    return {name: _digest(each) for name, each in _without_parts(way, module, {key: own[key] for key in state})}


def _without_parts(way: Way, module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    parts: Parts = way.parts
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        rows, columns = parts.rows.get(path), parts.columns.get(path)
        is_weight = kind == "weight"
        if isinstance(way, Offsets):
            kept = tensor[:0] if columns is not None else _less(tensor, rows, 0)
            yield name, (kept if kind == "bias" and path in parts.modules else tensor)
        elif isinstance(way, LowRank):
            yield name, (tensor[:0] if is_weight and path in parts.modules else tensor)
        elif is_weight and (rows is not None or columns is not None):
            held = projection_rows(module.get_submodule(path))  # as (input, output)
            yield name, _less(_less(held, columns, 0), rows, 1)
        elif kind == "bias" and (path in parts.biases or rows is not None):
            yield name, (tensor[:0] if path in parts.biases else _less(tensor, rows, 0))
        else:
            yield name, tensor


def _less(tensor: Tensor, places: Any, axis: int) -> Tensor:
    """Return a tensor without some places of an axis."""
    if places is None:
        return tensor
    keep = torch.ones(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
    keep[torch.as_tensor(places, device=tensor.device)] = False
    return tensor[keep] if axis == 0 else tensor[:, keep]


def _digest(tensor: Tensor) -> str:
    held = tensor.detach().cpu().contiguous()
    if held.numel() == 0:
        return ""
    return hashlib.sha256(held.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
