"""A checkpoint's model without its weights, and where each of these stands in the safetensors files.

1. The architecture is built as ever, but what ``torch.empty`` would make room for gets none (the device ``meta``).
   Tables that a model computes for itself are real, and so are buffers of the checkpoint, which are small.
2. The names in the files are brought to those of the model by the renamings that transformers would apply. Weights that
   it would compute from several of them (experts stored one by one) are refused: they cannot be read layer by layer.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from causalpatch.base.errors import ModelUnsupported
from causalpatch.base.extras import lazy
from causalpatch.models.sources import Source, said
from causalpatch.models.stores import DiskStore, Stored, open_file

# Rooms that transformers itself may not have loaded yet.
mapping_room, loading_room = lazy("transformers.conversion_mapping"), lazy("transformers.core_model_loading")
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def build_hollow(source: Source, dtype: torch.dtype | None) -> tuple[nn.Module, DiskStore]:
    """Build a checkpoint's model without its weights.

    Args:
        source: The checkpoint.
        dtype: The floating-point type of the model, or None for the checkpoint's own.

    Returns:
        The module in eval mode, its parameters without data, and where they can be read.

    Raises:
        ModelUnsupported: The checkpoint has no safetensors files, is quantised, or holds its weights otherwise than the
            model does; or the model cannot be built without weights.
    """
    files = safetensors_files(source)
    config = transformers.AutoConfig.from_pretrained(source.place, local_files_only=source.is_local)
    if getattr(config, "quantization_config", None) is not None:
        raise _unreadable(source, "problem", "its weights are quantised", "open it whole: leave out weights=")
    module = _built(source, config, dtype or _dtype_of(config, files))
    found, converted = _index(module, files)
    state = module.state_dict()
    _require_complete(source, module, state, found, converted)
    store = DiskStore({name: Stored(*found[name], tensor.dtype) for name, tensor in state.items() if name in found})
    _fill_buffers(source, module, store)
    return module.eval().requires_grad_(requires_grad=False), store


def safetensors_files(source: Source) -> Sequence[str]:
    """Return the safetensors files of a checkpoint.

    Raises:
        ModelUnsupported: There are none; the message says how to make them.
    """
    folder = Path(source.place)
    if not source.is_folder:
        wanted = ["*.safetensors", "*.safetensors.index.json", "*.json"]
        folder = Path(snapshot_download(source.place, allow_patterns=wanted, local_files_only=source.is_local))
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return [str(folder / name) for name in sorted(set(index["weight_map"].values()))]
    if (folder / _ONE).exists():
        return [str(folder / _ONE)]
    there = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".safetensors", ".pt", ".pth"))
    raise _unreadable(
        source,
        "there",
        f"{'  '.join(there) or 'no weights'}, where {_ONE} is needed",
        "write it anew, once: open_model(…).module.save_pretrained(FOLDER)",
    )


def without_data(module: nn.Module) -> dict[str, Tensor]:
    """Take the parameters out of a module, leaving tensors without data; return them by their names in its state."""
    taken = dict(module.named_parameters(remove_duplicate=False))
    stubs = {id(parameter): _stub(parameter) for parameter in taken.values()}  # what is tied stays so
    for part in module.modules():
        part._parameters.update({n: stubs[id(held)] for n, held in part._parameters.items() if held is not None})
    once = {id(parameter): parameter.detach() for parameter in taken.values()}
    return {name: once[id(parameter)] for name, parameter in taken.items()}


class _NoRoom(TorchFunctionMode):
    """Let ``torch.empty`` make tensors without data."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        named = dict(kwargs or {})
        return function(*args, **(named | {"device": "meta"} if function is torch.empty else named))


def _built(source: Source, config: Any, dtype: torch.dtype) -> nn.Module:
    named = getattr(transformers, next(iter(config.architectures or []), ""), None)
    make = transformers.AutoModelForCausalLM.from_config if named is None else named._from_config
    try:
        with torch.random.fork_rng(devices=[]), _NoRoom():
            module: nn.Module = make(config, dtype=dtype)
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        why = f"{transformers.__version__}: {said(error)}"
        raise _unreadable(source, "transformers", why, "open it whole: leave out weights=") from error
    full = [*getattr(module, "_keep_in_fp32_modules_strict", ()), *getattr(module, "_keep_in_fp32_modules", ())]
    if full and dtype in (torch.float16, torch.bfloat16):
        raise _unreadable(source, "problem", f"parts of it stay in float32: {', '.join(full)}", 'dtype="float32"')
    without_data(module)  # what was not made by torch.empty, such as the scales of norms
    can_write = getattr(module, "can_generate", None)
    if can_write and can_write():
        with suppress(OSError):  # without a file the settings of the configuration stay
            module.generation_config = transformers.GenerationConfig.from_pretrained(
                source.place, local_files_only=source.is_local
            )
    return module


def _stub(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _dtype_of(config: Any, files: Sequence[str]) -> torch.dtype:
    """Return the type of a checkpoint's weights: as its configuration says, else that of its first tensor."""
    said_so = getattr(config, "dtype", None)
    found = getattr(torch, said_so) if isinstance(said_so, str) else said_so
    if isinstance(found, torch.dtype):
        return found
    first = open_file(files[0])
    kept: torch.dtype = first.get_tensor(next(iter(first.keys()))).dtype
    return kept if kept.is_floating_point else torch.float32


def _index(module: nn.Module, files: Sequence[str]) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """Return file and key of each tensor of the state, and names that transformers would compute from several."""
    state, prefix = module.state_dict(), getattr(module, "base_model_prefix", "")
    transforms = mapping_room.get_model_conversion_mapping(module)
    renamings = [each for each in transforms if isinstance(each, loading_room.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading_room.WeightConverter)]
    found: dict[str, tuple[str, str]] = {}
    converted: set[str] = set()
    keys = [(file, key) for file in files for key in open_file(file).keys()]  # noqa: SIM118 - it is no mapping
    for file, key in keys:
        name, pattern = loading_room.rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = loading_room.rename_source_key(key, [], [], prefix, state)
        if name in state and pattern is None:
            found[name] = (file, key)
        elif pattern is not None:
            converted.add(name)
    by_tensor: dict[int, str] = {}
    named = [(name, id(tensor)) for name, tensor in module.named_parameters(remove_duplicate=False)]
    for name, number in named:
        if name in found:
            by_tensor.setdefault(number, name)
    for name, number in named:
        if name not in found and number in by_tensor:
            found[name] = found[by_tensor[number]]  # tied weights are stored once
    return found, converted


def _require_complete(
    source: Source,
    module: nn.Module,
    state: Mapping[str, Tensor],
    found: Mapping[str, tuple[str, str]],
    converted: set[str],
) -> None:
    made = sorted(converted & set(state)) or sorted(converted)
    missing = sorted(name for name in state if name not in found)
    if made:
        raise _unreadable(
            source,
            "stored",
            f"{len(made)} tensors otherwise than {type(module).__name__} holds them, the first is {made[0]}",
            "write it anew, once: open_model(…).module.save_pretrained(FOLDER, save_original_format=False)",
        )
    if missing:
        raise ModelUnsupported(
            f"the checkpoint {source.name!r} lacks weights of {type(module).__name__}",
            facts=[("missing", f"{len(missing)} tensors, the first is {missing[0]}"), ("else", "they would be random")],
            fix="give the complete checkpoint",
        )
    files = {file: open_file(file) for file, _ in found.values()}
    shapes = {name: tuple(files[file].get_slice(key).get_shape()) for name, (file, key) in found.items()}
    other = [name for name, shape in shapes.items() if shape != tuple(state[name].shape)]
    if other:
        wanted = tuple(state[other[0]].shape)
        raise _unreadable(
            source, other[0], f"stored as {shapes[other[0]]}, expected as {wanted}", "give the model's own checkpoint"
        )


def _fill_buffers(source: Source, module: nn.Module, store: DiskStore) -> None:
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            full = f"{path}.{name}" if path else name
            if full in store:
                part._buffers[name] = store.read(full)
            elif buffer is not None and buffer.is_meta:
                raise _unreadable(
                    source,
                    "problem",
                    f"its buffer {full} is not in the checkpoint",
                    "open it whole: leave out weights=",
                )


def _unreadable(source: Source, name: str, fact: str, fix: str) -> ModelUnsupported:
    return ModelUnsupported(
        f"the weights of {source.name!r} cannot be read layer by layer", facts=[(name, fact)], fix=fix
    )
