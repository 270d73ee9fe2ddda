"""Where a model is read from: an embedded one, a folder, or the hub, and whether the hub can be asked just now."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import transformers
from huggingface_hub import constants, get_session

from causalpatch.base.errors import ModelNotFound, ModelUnsupported, SettingError
from causalpatch.models.zoo import zoo_folder, zoo_names

_LOOKED_FOR = {
    "model": "a folder with config.json and model.safetensors",
    "tokenizer": "a folder with tokenizer.json",
}
_HUB_NAME = re.compile(r"(?:\w[\w.\-]*/)?\w[\w.\-]*", re.ASCII)  # ORGANISATION/NAME or NAME
_PATIENCE_S = 5.0  # for the hub's first answer; a model that is in the cache must not wait long for it
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class Source:
    """A place to read a model or a tokenizer from.

    Args:
        name: What the reader called it.
        place: The folder, or the name on the hub.
        unreachable: Why the hub is not asked, so that only its cache is read; empty where it is.
    """

    name: str
    place: str
    unreachable: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return Path(self.place).is_dir()

    @property
    def is_local(self) -> bool:
        """Whether only what lies on this machine is read: a folder, or the hub's cache."""
        return self.is_folder or bool(self.unreachable)


def find_source(x: str | Path, wanted: Literal["model", "tokenizer"] = "model") -> Source:
    """Return the place that a name stands for; the hub is asked whether it answers only where it is needed.

    Args:
        x: ``"zoo:NAME"``, a folder, or a name on the hub. A ``Path`` is a folder and never a name on the hub.
        wanted: What it should hold, for messages.

    Raises:
        ModelNotFound: No embedded model has this name, or a path leads to no folder.
        SettingError: The value is neither a text nor a path.
    """
    if not isinstance(x, str | Path):
        raise SettingError(
            f"no model can be opened from a value of type {type(x).__name__}",
            facts=[("known", "zoo:NAME, path of a folder, name on the hub, any nn.Module")],
            fix='give for instance "zoo:stories"',
        )
    name = str(x)
    if name.startswith("zoo:"):
        return Source(name, str(zoo_folder(name.removeprefix("zoo:"))))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, str(folder))
    if folder.exists() or isinstance(x, Path) or not _HUB_NAME.fullmatch(name):
        raise ModelNotFound(
            f"the folder {name!r} {'is a file, not a folder' if folder.exists() else 'does not exist'}",
            facts=[("looked for", _LOOKED_FOR[wanted]), ("at", folder.absolute())],
            fix=f"give the folder that holds the {wanted}",
        )
    return Source(name, name, _why_unreachable())


def require_config(source: Source) -> None:
    """Make sure that there is a model to load, before anything large is read.

    Raises:
        ModelNotFound: The folder holds no model, or none is found under the name.
        ModelUnsupported: There is a configuration, but transformers cannot use it.
    """
    if source.is_folder:
        inside = sorted(entry.name for entry in Path(source.place).iterdir())
        lacks = [] if "config.json" in inside else ["config.json"]
        lacks += [] if any(entry.endswith(_WEIGHT_ENDINGS) for entry in inside) else ["model.safetensors"]
        if lacks:
            raise ModelNotFound(
                f"the folder {source.name!r} does not hold a model",
                facts=[
                    ("missing", "  ".join(lacks)),
                    ("there", "  ".join(inside[:8]) + ("  …" if len(inside) > 8 else "") or "nothing"),
                ],
                fix="give a folder written by save_pretrained, or build the module yourself and open_model(module)",
            )
    try:
        transformers.AutoConfig.from_pretrained(source.place, local_files_only=source.is_local)
    except (OSError, ValueError, KeyError) as error:
        _refuse(source, error)


def said(error: Exception) -> str:
    """Return the beginning of another library's message, on one line."""
    return " ".join(str(error).split())[:110]


def _why_unreachable() -> str:
    """Return why the hub cannot be asked now; empty where it answers.

    Without an answer transformers tries again for half a minute and reports every trial.
    """
    if constants.HF_HUB_OFFLINE:
        return "not asked, because HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception:  # noqa: BLE001 - a failed request raises httpx's classes or httpx2's, by version of huggingface_hub
        return f"{constants.ENDPOINT} cannot be reached"
    return ""


def _refuse(source: Source, error: Exception) -> NoReturn:
    """Say why there is no configuration that can be used."""
    if source.is_folder or not isinstance(error, OSError):
        raise ModelUnsupported(
            f"the configuration in {source.name!r} cannot be used",
            facts=[("transformers", f"{transformers.__version__}: {said(error)}")],
            fix="build the module yourself and open_model(module)",
        ) from error
    embedded = zoo_names()
    hub = f"{source.unreachable}; nothing in its cache" if source.unreachable else said(error)
    raise ModelNotFound(
        f"no model named {source.name!r}",
        facts=[
            ("folder", f"none at {Path(source.place).absolute()}"),
            ("hub", hub),
            ("embedded", "  ".join(f"zoo:{each}" for each in embedded) or "none"),
        ],
        fix=f"use 'zoo:{source.name}'"
        if source.name in embedded
        else "check the name, or give the path of a folder that holds the model",
    ) from error
