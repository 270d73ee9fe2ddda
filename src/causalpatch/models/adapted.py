"""Folders that hold an adapter of PEFT: the model that it was trained on is opened, and the adapter put on it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from causalpatch.base.errors import ModelNotFound
from causalpatch.base.extras import lazy
from causalpatch.models.sources import Source, find_source, said

if TYPE_CHECKING:
    import peft
else:
    peft = lazy("peft")

_CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"


def base_of(source: Source) -> Source | None:
    """Return the model that an adapter belongs to; None where a place holds no adapter.

    Args:
        source: Where a model is read from.

    Raises:
        ModelNotFound: The adapter names no model, or none is there.
    """
    folder = Path(source.place)
    if not source.is_folder or not (folder / _CONFIG).is_file() or (folder / "config.json").exists():
        return None
    try:
        named = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get(_BASE)
    except (ValueError, AttributeError) as error:
        raise _no_base(source, said(error)) from error
    if not named:
        raise _no_base(source, "none is named")
    # A relative path is one from the adapter, unless something lies at it from here.
    beside = folder / named
    return find_source(beside if beside.is_dir() and not Path(named).is_dir() else str(named))


def adapted(module: nn.Module, source: Source) -> nn.Module:
    """Return a model with an adapter on it; the model is changed in place.

    Args:
        module: The model that the adapter was trained on.
        source: The adapter's folder.

    Raises:
        ModelNotFound: The adapter's weights cannot be read, or are of another model.
        MissingExtra: PEFT is not installed.
    """
    try:
        made: nn.Module = peft.PeftModel.from_pretrained(module, source.place)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelNotFound(
            f"the adapter in {source.name!r} cannot be put on its model",
            facts=[("model", type(module).__name__), ("peft", said(error))],
            fix="give the folder that adapted.save_pretrained wrote, with the model that it was trained on",
        ) from error
    return made


def _no_base(source: Source, why: str) -> ModelNotFound:
    return ModelNotFound(
        f"the adapter in {source.name!r} does not say which model it belongs to",
        facts=[(_BASE, why)],
        fix=f'write the folder or hub name of its model into {_CONFIG}: "{_BASE}"',
    )
