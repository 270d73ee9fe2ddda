"""Ways of changing parts of a model: what is trained, how the model runs with it, and how it is written into weights.

==========  ==========================================================================================================
way         is
==========  ==========================================================================================================
``slice``   differences of the located rows and columns, added to what their projections return: ``y += x @ D``
``offset``  a vector at each located head's or neuron's output, the same at all tokens: ``y += W d``
``lora``    low-rank adapters of PEFT on exactly the located projections (``low_rank``)
``full``    every weight (``whole``)
==========  ==========================================================================================================

The model's own weights are never trained where they stand: they are frozen, so that neither weight decay nor the
moments of an optimizer can move a weight outside the parts, and what is trained is small. ``write_into`` adds it to the
weights of a copy, and touches no other element.

References:
    Yin et al. 2024, "LoFiT: Localized Fine-tuning on LLM Representations", 2406.01563 (offsets).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.added import AtInput, AtOutput, added
from causalpatch.engine.stack import layer_of
from causalpatch.models import Model, projection_rows
from causalpatch.tuning.parts import Parts, Places, require_plain


class Way(ABC):
    """What is trained at some parts of a model.

    Args:
        model: The model; its own weights stay as they are.
        parts: What may change.
    """

    name: ClassVar[str]

    def __init__(self, model: Model, parts: Parts) -> None:
        self.model = model
        self.parts = parts
        self.entry = 0
        """The first layer that what is trained acts in: the stream into it is the base model's."""

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""

    @abstractmethod
    def sizes(self) -> dict[str, float]:
        """Return the size of what each trained thing is added to: a step of the optimizer is a share of it."""

    @abstractmethod
    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Give the module to run, with what is trained in effect."""
        yield self.model.module  # pragma: no cover - overridden

    @abstractmethod
    def write_into(self, module: nn.Module) -> None:
        """Add what was trained to the weights of a copy of the model.

        Raises:
            ModelUnsupported: There is no weight or bias that could hold it.
        """

    @property
    def n_trained(self) -> int:
        """How many numbers are trained."""
        return sum(each.numel() for each in self.trained().values())

    def state(self) -> dict[str, Tensor]:
        """Return a copy of what is trained."""
        return {name: each.detach().clone() for name, each in self.trained().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` returned."""
        with torch.no_grad():
            for name, each in self.trained().items():
                each.copy_(state[name])


class Added(Way):
    """A change by terms that are added to what modules of the model take or return."""

    @abstractmethod
    def terms(self) -> tuple[dict[str, AtInput], dict[str, AtOutput]]:
        """Return, by the path of a module, what is made of its first argument, and of its output."""

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Run the model with the terms."""
        with added(self.model.module, *self.terms()):
            yield self.model.module


class Slices(Added):
    """Differences of rows and columns.

    Args:
        model: The model.
        parts: The rows and columns.

    Raises:
        ModelUnsupported: A weight cannot be changed, as where it is quantised.
    """

    name = "slice"

    def __init__(self, model: Model, parts: Parts) -> None:
        super().__init__(model, parts)
        self.entry = first_layer(model, parts)
        require_plain(parts, model, self.name)
        self._held: dict[str, nn.Parameter] = {}
        self._at: dict[str, Int[Tensor, " place"]] = {}
        for kind, places in (("rows", parts.rows), ("columns", parts.columns)):
            for path, numbers in places.items():
                weight = weight_rows(model.module, path)
                width = weight.shape[0] if kind == "rows" else weight.shape[1]
                self._at[f"{path}.{kind}"] = _index(numbers, weight.device)
                self._held[f"{path}.{kind}"] = _zeros((len(numbers), width), weight)
                if kind == "rows" and model.module.get_submodule(path).bias is not None:
                    self._held[f"{path}.row_bias"] = _zeros((len(numbers),), weight)
        for path in parts.biases:
            bias = bias_of(model.module, path)
            self._held[f"{path}.bias"] = _zeros(tuple(bias.shape), bias)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the differences, by projection: rows ``(place, input)``, columns ``(place, output)``, biases."""
        return self._held

    def sizes(self) -> dict[str, float]:
        """Return the usual size of a weight of each projection."""
        return {name: usual_size(weight_rows(self.model.module, name.rpartition(".")[0])) for name in self._held}

    def terms(self) -> tuple[dict[str, AtInput], dict[str, AtOutput]]:
        """Return the differences, times what its projections are given, as terms of what these return."""
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in self._held))
        return {}, {path: partial(self._changed, path) for path in paths}

    def write_into(self, module: nn.Module) -> None:
        """Add the differences to the rows and columns of a copy."""
        with torch.no_grad():
            for name, difference in self._held.items():
                path, _, kind = name.rpartition(".")
                weight = weight_rows(module, path)
                if kind == "rows":
                    at = self._at[name]
                    weight[:, at] = weight[:, at] + difference.T.to(weight)
                elif kind == "columns":
                    at = self._at[name]
                    weight[at] = weight[at] + difference.to(weight)
                elif kind == "row_bias":
                    at, bias = self._at[f"{path}.rows"], bias_of(module, path)
                    bias[at] = bias[at] + difference.to(bias)
                else:
                    bias_of(module, path).add_(difference.to(weight))

    def _changed(
        self, path: str, x: Float[Tensor, "*lead input"], y: Float[Tensor, "*lead output"]
    ) -> Float[Tensor, "*lead output"]:
        rows, columns = self._held.get(f"{path}.rows"), self._held.get(f"{path}.columns")
        if rows is not None:
            bias = self._held.get(f"{path}.row_bias")
            more = functional.linear(x, rows.to(x.dtype), None if bias is None else bias.to(x.dtype))
            y = y.index_add(-1, self._at[f"{path}.rows"], more)
        if columns is not None:
            y = y + x.index_select(-1, self._at[f"{path}.columns"]) @ columns.to(x.dtype)
        whole = self._held.get(f"{path}.bias")
        return y if whole is None else y + whole.to(y.dtype)


class Offsets(Added):
    """Vectors that are added to what located heads and neurons put out, at all tokens alike.

    Args:
        model: The model; its weights may be quantised.
        parts: Columns of the projections behind heads and neurons; rows, where queries, keys, values or what goes into
            a neuron is meant.
        sizes: Usual size of what each vector is added to, by projection; 1 where it is not given.
    """

    name = "offset"

    def __init__(self, model: Model, parts: Parts, sizes: Mapping[str, float] | None = None) -> None:
        super().__init__(model, parts)
        self.entry = first_layer(model, parts)
        self._sizes = dict(sizes or {})
        self._held: dict[str, nn.Parameter] = {}
        self._at: dict[str, Int[Tensor, " place"]] = {}
        like = torch.empty(0, device=model.device, dtype=model.dtype)
        for kind, places in (("rows", parts.rows), ("columns", parts.columns)):
            for path, numbers in places.items():
                self._at[f"{path}.{kind}"] = _index(numbers, model.device)
                self._held[f"{path}.{kind}"] = _zeros((len(numbers),), like)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the vectors, by projection, ``(place,)``."""
        return self._held

    def sizes(self) -> dict[str, float]:
        """Return the usual size of what the vectors are added to."""
        return {name: self._sizes.get(name, 1.0) for name in self._held}

    def terms(self) -> tuple[dict[str, AtInput], dict[str, AtOutput]]:
        """Return the vectors, as terms of what projections are given, or return."""
        kinds = {name: name.rpartition(".")[::2] for name in self._held}
        inputs: dict[str, AtInput] = {
            path: partial(self._plus, name) for name, (path, kind) in kinds.items() if kind == "columns"
        }
        outputs: dict[str, AtOutput] = {
            path: partial(self._behind, name) for name, (path, kind) in kinds.items() if kind == "rows"
        }
        return inputs, outputs

    def write_into(self, module: nn.Module) -> None:
        """Fold the vectors into biases of a copy: ``b += W d``."""
        require_plain(self.parts, self.model, self.name)
        self.require_biases(module)
        with torch.no_grad():
            for name, vector in self._held.items():
                path, _, kind = name.rpartition(".")
                weight, bias, at = weight_rows(module, path), bias_of(module, path), self._at[name]
                if kind == "rows":
                    bias[at] = bias[at] + vector.to(bias)
                else:
                    bias.add_((vector.double() @ weight[at].double()).to(bias))

    def require_biases(self, module: nn.Module) -> None:
        """Make sure that each projection has a bias.

        Raises:
            ModelUnsupported: One has none.
        """
        for path in self.parts.modules:
            if module.get_submodule(path).bias is None:
                raise ModelUnsupported(
                    f"the offsets at '{path}' of '{self.model.name}' cannot be folded into weights",
                    facts=[("reason", "it has no bias, and the configuration has no switch that gives it one")],
                    fix="keep them beside the model: tuned.save_change(folder), load_change(folder, model)",
                )

    def _plus(self, name: str, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        vector = self._held[name].to(x.dtype)
        return x + vector.new_zeros(x.shape[-1]).index_copy(0, self._at[name], vector)

    def _behind(
        self, name: str, x: Float[Tensor, "*lead input"], y: Float[Tensor, "*lead width"]
    ) -> Float[Tensor, "*lead width"]:
        del x
        return self._plus(name, y)


def weight_rows(root: nn.Module, path: str) -> Float[Tensor, "input output"]:
    """Return the weight of a plain projection as ``(input, output)``, a view."""
    return projection_rows(root.get_submodule(path))


def bias_of(root: nn.Module, path: str) -> Tensor:
    """Return the bias of a projection that has one."""
    return root.get_submodule(path).get_parameter("bias")


def first_layer(model: Model, parts: Parts) -> int:
    """Return the first layer that parts lie in; 0 where a part lies outside of the layers."""
    return min((layer_of(model, path) or 0 for path in parts.modules), default=0)


def usual_size(weight: Float[Tensor, "input output"]) -> float:
    """Return the usual size of a weight: the root of the mean square."""
    return float(weight.detach().double().square().mean().sqrt()) or 1.0


def _index(numbers: Places, device: torch.device) -> Int[Tensor, " place"]:
    return torch.as_tensor(numbers, device=device)


def _zeros(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    """Return what is trained, in float32 at least: steps are too small for fewer bits."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=like.device))
