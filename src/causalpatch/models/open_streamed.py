"""Opening a model whose weights are fetched layer by layer, from safetensors files or from the host's memory."""

import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn

from causalpatch.base.errors import ModelUnsupported, SettingError
from causalpatch.base.suggest import closest
from causalpatch.base.tokens import Tokenizer
from causalpatch.models.adapter import Model
from causalpatch.models.hollow import build_hollow, without_data
from causalpatch.models.sources import Source
from causalpatch.models.stores import DiskStore, HostStore
from causalpatch.models.streamed import GIB, StreamedWeights
from causalpatch.sites.select import ModelShape
from causalpatch.sites.site import Site

WeightsPlace = Literal["host", "disk"]
_WHOLE = 0.5
"""Share of the memory that the weights may take if they are to stay in it."""


def check_weights(weights: str | None, memory_gib: float | None) -> bool:
    """Say whether weights may have to be fetched, making sure that the settings are such.

    Raises:
        SettingError: They are not.
    """
    if weights is not None and weights not in get_args(WeightsPlace):
        near = closest(str(weights), get_args(WeightsPlace), 1)
        raise SettingError(
            f"weights cannot be {weights!r}",
            facts=[("known", "host (CPU memory), disk (safetensors files); leave it out to hold them all")],
            fix=f'weights="{near[0] if near else "disk"}"',
        )
    if memory_gib is not None and not memory_gib > 0:
        raise SettingError(f"memory_gib={memory_gib!r} is no amount of memory", fix="memory_gib=8")
    return weights is not None or memory_gib is not None


def open_streamed(
    source: Source,
    load: Callable[[], nn.Module],
    tokenizer: Tokenizer | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    weights: str | None,
    memory_gib: float | None,
) -> Model:
    """Open a checkpoint so that its weights and its activations together stay within some memory.

    Args:
        source: The checkpoint.
        load: Loads it whole, into the host's memory.
        tokenizer: The tokenizer beside it.
        dtype: The model's floating-point type, or None for the checkpoint's own.
        device: Where it runs.
        weights: Where its weights lie between runs; by default in the module if half of the memory holds them, else in
            the host's memory beside a GPU if that has room, else on disk.
        memory_gib: Memory of the device for weights and activations, in GiB, or None for no limit.

    Raises:
        ModelUnsupported: The checkpoint cannot be read layer by layer, or its layers are not known by name.
        SettingError: The memory does not suffice for the largest part.
    """
    memory = None if memory_gib is None else int(memory_gib * GIB)
    store: DiskStore | HostStore
    if weights == "host":
        module = load()
    else:
        module, store = build_hollow(source, dtype)
        if weights is None and memory is not None:
            n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
            if n_bytes <= _WHOLE * memory:
                return Model(load().to(device), name=source.name, tokenizer=tokenizer)
            weights = "host" if device.type == "cuda" and n_bytes <= _WHOLE * _host_bytes() else "disk"
            module = load() if weights == "host" else module
    if weights == "host":
        store = HostStore(without_data(module), pinned=device.type == "cuda")
    for part in module.modules():
        part._buffers.update({name: held.to(device) for name, held in part._buffers.items() if held is not None})
    model = Model(module, name=source.name, tokenizer=tokenizer)
    StreamedWeights(module, _layers_of(model), store, device, memory=memory, name=source.name)
    return model


def _layers_of(model: Model) -> list[str]:
    """Return the paths of a model's layers.

    Raises:
        ModelUnsupported: It is no stack of layers that are known by name.
    """
    parts: list[tuple[str | None, ModelShape]] = [*model.shape.halves.items()] or [(None, model.shape)]
    if model.family is None or any("resid_pre" in part.refused or not part.n_layers for _, part in parts):
        why = model.family_note if model.family is None else "its layers are not given the stream by name"
        raise ModelUnsupported(
            f"'{model.name}' cannot be run layer by layer: it is no stack of layers that are known by name",
            facts=[("reason", why)],
            fix="open it whole: leave out weights= and memory_gib=",
        )
    sites = [Site("resid_pre", layer, stream=name) for name, part in parts for layer in range(part.n_layers)]
    return [model.tap(site).port.path for site in sites]


def _host_bytes() -> int:
    """Return the host's free memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
