"""How a module's forward is called: which arguments it takes, and which of them may stand beside an input."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported

# What the library itself fills, stands in for its input, or is no input.
_OURS: Final = frozenset(
    {
        *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "logits_to_keep"),
        *("use_cache", "cache", "cache_params", "cache_position", "past_key_values"),
    }
)
_TEXTS: Final = frozenset({"input_ids", "attention_mask", "position_ids"})
# Settings, and what is said of the second prompt of a model with an encoder and a decoder.
_SETTINGS: Final = ("return_", "output_", "decoder_", "encoder_")


class Forward:
    """The signature of a module's forward.

    Args:
        module: The module.
        name: What the reader calls it.
        passes_on: Whether arguments that it does not name reach the modules within, as in a wrapper of a known family.
    """

    def __init__(self, module: nn.Module, name: str, *, passes_on: bool) -> None:
        self._signature = inspect.signature(module.forward)
        parameters = self._signature.parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.names = tuple(parameter.name for parameter in parameters if parameter.kind in named)
        self.needed = frozenset(p.name for p in parameters if p.default is inspect.Parameter.empty)
        self._name = name
        # Tokens of a picture have places in rows and columns (Qwen2-VL), which the model finds from ids, mask and grid.
        scaled = (getattr(getattr(part, "config", None), "rope_parameters", None) for part in module.modules())
        self.places_itself = any(isinstance(held, Mapping) and "mrope_section" in held for held in scaled)
        self._takes_any = passes_on and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def takes(self, argument: str) -> bool:
        """Tell whether the forward takes an argument; a wrapper of a known family passes any on."""
        return argument in self.names or self._takes_any

    def main(self, preferred: str | None) -> str:
        """Return the name of the argument that takes the input: the preferred one, else the first.

        Raises:
            ModelUnsupported: The forward names no argument.
        """
        if preferred is not None and self.takes(preferred):
            return preferred
        if not self.names:
            raise ModelUnsupported(
                f"the forward of {self._name!r} names no argument for the input",
                facts=[("forward", str(self._signature))],
                fix="wrap it in a module whose forward takes the input as its first argument",
            )
        return self.names[0]

    def further(self, main: str | None = None) -> tuple[str, ...]:
        """Return the names of the arguments that may stand beside prompts or arrays.

        Args:
            main: The argument that takes the input where this is a picture, so that texts may stand beside it.
        """
        free = _TEXTS if main is not None else frozenset()
        own = {*(_OURS - free), self.names[0] if main is None and self.names else main}
        return tuple(name for name in self.names if name not in own and not name.startswith(_SETTINGS))


def as_arguments(values: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return further arguments as tensors on a device, fractions in a dtype, whole numbers whole."""
    # Arrays of pairs are read-only, which torch does not know of: it is given copies.
    tensors = {name: torch.tensor(x) if isinstance(x, np.ndarray) else torch.as_tensor(x) for name, x in values.items()}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {
        name: tensor.to(dtype)
        if tensor.is_floating_point()
        else tensor
        if tensor.dtype == torch.bool
        else tensor.long()
        for name, tensor in tensors.items()
    }


def answer_in(output: Any, names: Sequence[str], model: str) -> Tensor:
    """Return the answer in a module's output.

    Args:
        output: What the module returned.
        names: Names under which it may stand, in the order in which they are tried, before those that are usual.
        model: What the reader calls the model.

    Raises:
        ModelUnsupported: There is no tensor in the output.
    """
    found = output
    for name in (*names, "logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            found = getattr(output, name)
            break
        if isinstance(output, dict) and name in output:
            found = output[name]
            break
    while isinstance(found, tuple | list) and found:
        found = found[0]
    if isinstance(found, Tensor):
        return found
    raise ModelUnsupported(
        f"the output of {model!r} holds no logits",
        facts=[("output", type(output).__name__), ("looked for", "a tensor, .logits, ['logits'], item 0")],
        fix="wrap the model in a module whose forward returns the tensor",
    )
