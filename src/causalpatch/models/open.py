"""Opening a model: an embedded one by ``zoo:NAME``, a folder, a name on the hub, or any ``nn.Module``."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from causalpatch.base.errors import CausalPatchWarning, ModelNotFound, ModelUnsupported, SettingError
from causalpatch.base.extras import require
from causalpatch.base.tokens import Tokenizer
from causalpatch.models.adapted import adapted, base_of
from causalpatch.models.adapter import Model
from causalpatch.models.interop import taken_from
from causalpatch.models.open_streamed import check_weights, open_streamed
from causalpatch.models.sources import Source, find_source, require_config, said
from causalpatch.models.tokens import WrappedTokenizer

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def open_model(
    x: Any,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | None = None,
    weights: str | None = None,
    memory_gib: float | None = None,
) -> Model:
    """Open a model, with names for its activations.

    Args:
        x: ``"zoo:NAME"`` for a model that comes with the library, a folder with ``config.json`` and weights, a name
            on the Hugging Face hub, or any module. A module is used as it is and not copied. Of a model of nnsight,
            pyvene or TransformerLens the Hugging Face module inside is taken, and its tokenizer. Of a folder with an
            adapter of PEFT the model that it names is opened, and the adapter put on it.
        tokenizer: A tokenizer of transformers, a ``causalpatch.base.tokens.Tokenizer``, or the folder or hub name of
            one. By default the one beside the model; a model without one takes ids or arrays only.
        dtype: The model's floating-point type, such as ``"float32"``; by default that of the checkpoint, or the
            module's own.
        device: Where to run; by default a GPU if there is one, or where the module is.
        device_map: How a checkpoint that is larger than one device is spread over several, as accelerate names it:
            ``"auto"``, ``"balanced"``, ``"sequential"``, or one device. Instead of ``device``.
        weights: Where a checkpoint's weights lie while the model does not run, if they are to be fetched layer by
            layer: ``"disk"``, in its safetensors files, or ``"host"``, in CPU memory beside a GPU. Sweeps then go
            breadth-first, so that each layer is fetched once for many runs. By default all are held, unless
            ``memory_gib`` is too small for that.
        memory_gib: Memory of the device for weights and activations together, in GiB.

    Returns:
        The model. A module of unknown kind opens as generic, with ``module(PATH)`` sites only.

    Raises:
        ModelNotFound: The name or folder does not hold a model. Where the hub does not answer, only its cache is read.
        ModelUnsupported: The checkpoint lacks weights of its model, or cannot be built; the module is compiled, so
            that what runs is not the modules that sites name, or puts virtual tokens before each prompt; or another
            library's model has no weights yet, or other ones than the module inside. Or its weights are to be fetched,
            but it has no safetensors files, or is no stack of layers.
        SettingError: The dtype or the device does not exist, or the model or the tokenizer is not one; or a device map
            is given beside a device, beside weights that are fetched, or for a module; or the memory does not hold the
            largest layer.
        MissingExtra: A device map is given, and accelerate is not installed.

    Examples:
        >>> from torch import nn
        >>> model = open_model(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> model.kind, model.shape.module_paths
        ('arrays', ('', '0', '1', '2'))
    """
    wanted_dtype, is_fetched = _read_dtype(dtype), check_weights(weights, memory_gib)
    taken = taken_from(x)
    if taken is not None:
        x, tokenizer = taken.module, tokenizer if tokenizer is not None else taken.tokenizer
    if device_map is not None:
        _require_spreadable(x, device, device_map, is_fetched=is_fetched)
    if isinstance(x, nn.Module):
        if is_fetched:
            raise SettingError(
                f"the weights of a {type(x).__name__} are there already",
                facts=[("weights, memory_gib", "are for a folder or a name on the hub, whose weights can stay there")],
                fix="write it and open that: module.save_pretrained(FOLDER), open_model(FOLDER, …)",
            )
        _require_eager(x)
        _require_own_tokens(x)
        module = x if wanted_dtype is None else x.to(wanted_dtype)
        module = module if device is None else module.to(_read_device(device))
        return Model(module, name=type(x).__name__, tokenizer=_read_tokenizer(tokenizer))
    source = find_source(x)
    wanted_device = _read_device(device)
    below = base_of(source)
    require_config(below or source)
    if is_fetched:
        if below is not None:
            raise ModelUnsupported(
                f"the weights of {source.name!r} cannot be read layer by layer",
                facts=[("problem", f"it is an adapter on {below.name!r}")],
                fix="merge it first: open_model(…).module.merge_and_unload().save_pretrained(FOLDER)",
            )
        found = _read_tokenizer(tokenizer) if tokenizer is not None else _tokenizer_beside(source)
        load = partial(_load, source, wanted_dtype)
        how: dict[str, Any] = {"device": wanted_device, "weights": weights, "memory_gib": memory_gib}
        return open_streamed(source, load, found, dtype=wanted_dtype, **how)
    module = _load(below or source, wanted_dtype, device_map)
    if below is not None:
        module = adapted(module, source)
        module = module if wanted_dtype is None else module.to(wanted_dtype)
        _require_own_tokens(module)
    found = _read_tokenizer(tokenizer) if tokenizer is not None else _tokenizer_beside(below or source)
    placed = module.to(wanted_device) if device_map is None else module
    return Model(placed, name=source.name, tokenizer=found)


def _require_eager(module: nn.Module) -> None:
    """Refuse compiled code, which passes by the modules within it and what is done at them."""
    for path, part in module.named_modules():
        is_wrapped = "_orig_mod" in part._modules  # as torch.compile(model) returns it
        if is_wrapped or getattr(part, "_compiled_call_impl", None) is not None:
            raise ModelUnsupported(
                f"'{type(module).__name__}' is compiled: {f'its part {path!r}' if path else 'the module'}",
                facts=[("compiled", "code of torch.compile passes by the modules within, where patches are made")],
                fix="open model._orig_mod" if is_wrapped else "open the module as it was before .compile()",
            )


def _require_own_tokens(module: nn.Module) -> None:
    """Refuse adapters that put virtual tokens before a prompt: its positions would not be the model's."""
    for path, part in module.named_modules():
        adapters = getattr(part, "peft_config", None)
        for name, config in adapters.items() if isinstance(adapters, dict) else ():
            if getattr(config, "is_prompt_learning", False):
                raise ModelUnsupported(
                    f"adapter {name!r} of '{type(part).__name__}' puts virtual tokens before each prompt",
                    facts=[
                        ("adapter", getattr(config.peft_type, "value", config.peft_type)),
                        ("tokens", config.num_virtual_tokens),
                        ("module", path or "the model itself"),
                    ],
                    fix="open the model below it, with the prompt written out",
                )


def _require_spreadable(x: Any, device: Any, device_map: str, *, is_fetched: bool) -> None:
    """Make sure that a device map can be followed."""
    if is_fetched:
        raise SettingError(
            f"device_map={device_map!r} cannot be followed",
            facts=[("given", "weights or memory_gib, by which one device fetches one layer after the other")],
            fix="leave either out",
        )
    if device is not None or isinstance(x, nn.Module):
        raise SettingError(
            f"device_map={device_map!r} cannot be followed",
            facts=[("given", f"device={device!r}" if device is not None else "a module, which is where it is")],
            fix="leave device out" if device is not None else "give the checkpoint's folder or name instead",
        )
    require("accelerate")


def _load(source: Source, dtype: torch.dtype | None, device_map: str | None = None) -> nn.Module:
    """Build the checkpoint's own architecture and fill it, leaving no weight to chance."""
    config = transformers.AutoConfig.from_pretrained(source.place, local_files_only=source.is_local)
    named = getattr(transformers, next(iter(config.architectures or []), ""), None)
    builders = [named] if named is not None else [transformers.AutoModelForCausalLM, transformers.AutoModel]
    problems: list[Exception] = []
    for builder in builders:
        try:
            with _quietly():
                module, info = builder.from_pretrained(
                    source.place,
                    dtype=dtype or "auto",
                    output_loading_info=True,
                    local_files_only=source.is_local,
                    **({} if device_map is None else {"device_map": device_map}),
                )
        except (OSError, ValueError, RuntimeError) as error:
            problems.append(error)
            continue
        _require_complete(module, info, source.name)
        loaded: nn.Module = module
        return loaded
    raise ModelUnsupported(
        f"the checkpoint {source.name!r} cannot be read",
        facts=[("transformers", f"{transformers.__version__}: {said(problems[0])}")],
        fix="build the module yourself and open_model(module)",
    ) from problems[0]


def _require_complete(module: nn.Module, info: dict[str, Any], name: str) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelUnsupported(
            f"the checkpoint {name!r} lacks weights of {type(module).__name__}",
            facts=[("missing", f"{len(missing)} tensors, the first is {missing[0]}"), ("else", "they would be random")],
            fix="give the complete checkpoint",
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' progress bar for reading weights off the screen."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _tokenizer_beside(source: Source) -> Tokenizer | None:
    """Return the tokenizer that comes with a model, or None where there is none."""
    if source.is_folder and not any((Path(source.place) / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return WrappedTokenizer(_load_tokenizer(source))
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = f"the tokenizer of {source.name!r} cannot be read, so the model takes ids only ({said(error)})"
        warnings.warn(message, CausalPatchWarning, stacklevel=3)
        return None


def _read_tokenizer(given: Any) -> Tokenizer | None:
    """Return a given tokenizer in the form that the library uses."""
    if given is None:
        return None
    if isinstance(given, transformers.PreTrainedTokenizerBase):
        return WrappedTokenizer(given)
    if isinstance(given, str | Path):
        try:
            return WrappedTokenizer(_load_tokenizer(find_source(given, wanted="tokenizer")))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelNotFound(
                f"{str(given)!r} does not hold a tokenizer",
                facts=[("transformers", said(error))],
                fix="give a folder with tokenizer.json, a hub name, or a tokenizer",
            ) from error
    if isinstance(given, Tokenizer):
        return given
    raise SettingError(
        f"{given!r} is not a tokenizer",
        facts=[("allowed", "a folder, a hub name, a tokenizer of transformers, a causalpatch.base.tokens.Tokenizer")],
        fix="leave it out for the tokenizer beside the model",
    )


def _load_tokenizer(source: Source) -> transformers.PreTrainedTokenizerBase:
    # Without its configuration transformers would choose a class by the model's type and rebuild the tokenizer's steps
    # (seen in 5.23 with Llama), so that a bare tokenizer.json is read as it stands.
    alone = Path(source.place) / "tokenizer.json"
    if alone.exists() and not alone.with_name("tokenizer_config.json").exists():
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(alone))
    return transformers.AutoTokenizer.from_pretrained(source.place, local_files_only=source.is_local)


def _read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise SettingError(
            f"{dtype!r} is not a dtype of models",
            facts=[("allowed", "float64 float32 bfloat16 float16")],
            fix='dtype="float32"',
        )
    return found


def _read_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SettingError(
            f"{device!r} is not a device", facts=[("there", " ".join(there))], fix='device="cpu"'
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            f"there is no device {str(device)!r} here", facts=[("there", " ".join(there))], fix='device="cpu"'
        )
    return found
