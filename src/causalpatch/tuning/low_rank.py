"""Low-rank adapters of PEFT on exactly the located projections, saved as any adapter of PEFT is.

A located projection changes as a whole, by a product of two thin matrices; its rank follows how many of the located
heads or neurons lie in it. The adapters stand in a copy of the modules that shares all weights with the model.

References:
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", 2106.09685.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from causalpatch.base.extras import lazy
from causalpatch.models import Model, input_width, output_width
from causalpatch.tuning.parts import Parts, require_plain
from causalpatch.tuning.ways import Way, usual_size, weight_rows

if TYPE_CHECKING:
    import peft
else:
    peft = lazy("peft")


class LowRank(Way):
    """Adapters on the projections of some parts.

    Args:
        model: The model.
        parts: Whose projections get an adapter.
        rank: Rank of the adapter of the projection in which most was located.
        seed: Seed of the first matrices; the second ones are 0, so that training begins at the model as it is.

    Raises:
        MissingExtra: PEFT is not installed.
        ModelUnsupported: A weight cannot be changed.
    """

    name = "lora"

    def __init__(self, model: Model, parts: Parts, *, rank: int = 4, seed: int = 0) -> None:
        super().__init__(model, parts)
        require_plain(parts, model, self.name)
        self.ranks = ranks_of(parts, rank)
        self.config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules="|".join(re.escape(path) for path in self.ranks),
            rank_pattern={re.escape(path): each for path, each in self.ranks.items()},
            alpha_pattern={re.escape(path): each for path, each in self.ranks.items()},
            task_type="CAUSAL_LM",
            fan_in_fan_out=_is_transposed(model.module, parts),
        )
        flags = {each: each.requires_grad for each in model.module.parameters()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.adapted: Any = peft.get_peft_model(sharing(model.module), self.config)
        for each, flag in flags.items():
            each.requires_grad = flag
        self.adapted.eval()
        self._held = {name: each for name, each in self.adapted.named_parameters() if "lora_" in name}

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the adapters' matrices, by PEFT's names."""
        return self._held

    def sizes(self) -> dict[str, float]:
        """Return of the first matrices their own size, of the second ones what moves the product like a weight."""
        found = {}
        for name in self._held:
            path = name.removeprefix("base_model.model.").partition(".lora_")[0]
            first = (3 * (input_width(self.model.module.get_submodule(path)) or 1)) ** -0.5  # as PEFT draws them
            second = usual_size(weight_rows(self.model.module, path)) / (first * self.ranks[path] ** 0.5)
            found[name] = first if ".lora_A." in name else second
        return found

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Run the model with its adapters."""
        yield self.adapted.get_base_model()

    def write_into(self, module: nn.Module) -> None:
        """Add the products to the weights of a copy."""
        with torch.no_grad():
            for path in self.ranks:
                layer: Any = self.adapted.get_base_model().get_submodule(path)
                weight = module.get_submodule(path).get_parameter("weight")
                weight.add_(layer.get_delta_weight("default").to(weight))

    def save(self, folder: Path) -> Path:
        """Write the adapter as PEFT does."""
        self.adapted.save_pretrained(str(folder))
        return folder


def ranks_of(parts: Parts, rank: int) -> dict[str, int]:
    """Return the rank of the adapter of each projection of some parts: by how many rows and columns lie in it.

    Args:
        parts: The parts.
        rank: Of the projection in which most lie.
    """
    located = {path: len(parts.rows.get(path, ())) + len(parts.columns.get(path, ())) for path in parts.modules}
    most = max(located.values())
    return {path: max(1, round(rank * n / most)) for path, n in located.items()}


def sharing(module: nn.Module) -> nn.Module:
    """Return a copy of all modules that shares all weights and buffers with them."""
    held = [*module.parameters(), *module.buffers()]
    made: nn.Module = copy.deepcopy(module, {id(each): each for each in held})
    return made


def _is_transposed(root: nn.Module, parts: Parts) -> bool:
    """Say whether weights lie as (input, output), as in GPT-2."""
    module = root.get_submodule(parts.modules[0])
    return not isinstance(module, nn.Linear) and module.weight.shape == (input_width(module), output_width(module))
