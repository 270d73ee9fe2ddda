"""Models that other libraries wrap: the module inside is taken, and none of these libraries is imported.

==========================  ===================================================================================
given                       what is taken
==========================  ===================================================================================
nnsight ``NNsight``         the module that it wraps, ``_module``, and its tokenizer
pyvene ``IntervenableModel``  its ``model``
TransformerLens bridge      its Hugging Face model. The bridge has put wrappers around its parts, in place; the parts
                            are taken out of them into a copy that shares all weights, and the bridge stays as it is
``HookedTransformer``       itself: it computes by code and weights of its own, so that it opens as generic
==========================  ===================================================================================

They are known by the package that their class, or a class that it is derived from, was defined in.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from causalpatch.base.errors import CausalPatchWarning, ModelUnsupported

_WRAPPED = "_original_component"
"""The child that holds what a wrapper of TransformerLens stands around (seen in 4.3)."""
_WITHIN = {"nnsight": "_module", "pyvene": "model", "transformer_lens": "original_model"}
"""Where each library keeps the module that it was given."""


@dataclass(frozen=True)
class Taken:
    """What was found in another library's model.

    Args:
        module: The module.
        tokenizer: Its tokenizer, or None.
    """

    module: nn.Module
    tokenizer: Any


def taken_from(x: object) -> Taken | None:
    """Return the module and the tokenizer inside another library's model; None where it is no such model.

    Args:
        x: Anything.

    Raises:
        ModelUnsupported: The module inside has no weights yet, or other ones than its forward says.
    """
    peer = peer_of(x)
    if peer is None:
        return None
    found = getattr(x, _WITHIN[peer], None)
    if not isinstance(found, nn.Module):
        if not isinstance(x, nn.Module):
            raise ModelUnsupported(
                f"'{type(x).__name__}' of {peer} holds no module",
                facts=[("looked for", f".{_WITHIN[peer]}"), ("found", type(found).__name__)],
                fix="open the module that it was made from: open_model(module)",
            )
        warnings.warn(
            CausalPatchWarning(
                f"'{type(x).__name__}' of {peer} holds no Hugging Face module: it computes by code of its own, on "
                "weights that may be folded. It opens with module(PATH) sites alone; open the checkpoint for others"
            ),
            stacklevel=3,
        )
        return Taken(x, getattr(x, "tokenizer", None))
    if getattr(x, "_weights_processed", getattr(x, "compatibility_mode", False)):
        raise ModelUnsupported(
            f"the weights of this '{type(x).__name__}' were processed",
            facts=[("why", "its bridge has folded norms into weights, which the module inside computes again")],
            fix="make the bridge without enable_compatibility_mode(), or open the checkpoint itself",
        )
    if any(parameter.is_meta for parameter in found.parameters()):
        raise ModelUnsupported(
            f"'{type(found).__name__}' inside the {peer} model has no weights yet",
            facts=[("its parameters", "are on the device 'meta'")],
            fix="load it first, such as LanguageModel(…, dispatch=True)",
        )
    return Taken(unwrapped(found) if peer == "transformer_lens" else found, getattr(x, "tokenizer", None))


def peer_of(x: object) -> str | None:
    """Return the library that an object's class comes from, or None."""
    packages = (kind.__module__.partition(".")[0] for kind in type(x).__mro__)
    return next((package for package in packages if package in _WITHIN), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return a module whose parts stand without the wrappers around them; weights are shared, the original stays.

    Args:
        module: A module among whose parts are wrappers, each holding what it stands around.
    """
    return _without_wrappers(module, {})


def _without_wrappers(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    while isinstance(module._modules.get(_WRAPPED), nn.Module):
        module = module.get_submodule(_WRAPPED)
    if id(module) not in known:
        made = copy.copy(module)
        # A copy of a module shares the tables of its parts and hooks with it: each gets its own, with what is in them.
        for name, value in vars(module).items():
            if isinstance(value, dict):
                made.__dict__[name] = copy.copy(value)
        known[id(module)] = made
        for name, part in module._modules.items():
            made._modules[name] = None if part is None else _without_wrappers(part, known)
    return known[id(module)]
