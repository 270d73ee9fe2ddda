"""Coders: the arithmetic of sparse dictionaries, from activations to features and back.

A coder reads vectors ``x`` (what it encodes) and gives features ``f``; ``decode`` makes vectors ``y`` of them (what it
describes). An autoencoder describes what it encodes; a transcoder reads the input of an MLP and describes its output.

==============  ===================================================================================================
``standard``    f = relu(p),  p = W_enc (x - b_dec) + b_enc
``jumprelu``    f = relu(p) where p > threshold, else 0
``topk``        f = relu(p) for the k largest p of each vector, else 0
``gated``       f = relu(exp(r_mag) W_enc (x - b_dec) + b_mag) where W_enc (x - b_dec) + b_gate > 0, else 0
decoding        y = W_dec f + b_dec
==============  ===================================================================================================

Each feature has a direction: what ``y`` gains when the feature grows by 1. Single features are computed from their own
columns of the weights, by a sum over each vector alone, so that a feature has the same bits in whatever batch.

References:
    Bricken et al. 2023, "Towards Monosemanticity" (standard); Rajamanoharan et al. 2024, 2404.16014 (gated) and
    2407.14435 (JumpReLU); Gao et al. 2024, 2406.04093 (top-k); Dunefsky et al. 2024, 2406.11944 (transcoders); Paulo
    et al. 2025, 2501.18823 (skip transcoders). The settings and their order are those of SAELens 6, ``saes/sae.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.models.dictionaries.weights import Weights

Activation = Literal["relu", "tanh-relu", "jumprelu", "topk", "gated"]
Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]

NUMBERS_AT_ONCE = 1 << 25
"""Pre-activations that are held together where all features are needed to know one."""
EPS = 1e-5  # of ``layer_norm`` in SAELens


class Coder(ABC):
    """What features need of a dictionary; ``element`` counts vectors.

    Args:
        n_features: Number of features.
        width_in: Width of the vectors that are encoded.
        width_out: Width of the vectors that are described.
    """

    n_features: int
    width_in: int
    width_out: int

    @abstractmethod
    def encode(self, x: Float[Tensor, "element width"]) -> Float[Tensor, "element feature"]:
        """Return all features of vectors."""

    @abstractmethod
    def decode(
        self, features: Float[Tensor, "element feature"], x: Float[Tensor, "element width"]
    ) -> Float[Tensor, "element width_out"]:
        """Return what features describe.

        Args:
            features: The features.
            x: The vectors that they were encoded from, for what is normalised vector by vector.
        """

    @abstractmethod
    def at(
        self, x: Float[Tensor, "vector width"], which: Int[Tensor, " element"], units: Int[Tensor, " element"]
    ) -> Float[Tensor, " element"]:
        """Return single features.

        Args:
            x: Vectors.
            which: The vector of each element.
            units: The feature of each element.
        """

    @abstractmethod
    def directions(
        self, x: Float[Tensor, "vector width"], which: Int[Tensor, " element"], units: Int[Tensor, " element"]
    ) -> Float[Tensor, "element width_out"]:
        """Return what the description gains where a feature grows by 1; arguments as of ``at``."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a coder.

    Args:
        activation: What makes features of pre-activations.
        k: How many features are active, for ``topk``.
        clamps: Whether what is active and below 0 becomes 0.
        takes_bias: Whether ``b_dec`` is taken from the input.
        normalization: What is done to each vector before it is encoded.
        restores: Whether a description is brought back to the size and mean of its vector.
        scale: What vectors are multiplied by before they are encoded, and descriptions divided by.
        by_decoder_norm: Whether features count in lengths of their direction.
        centers: Whether each vector's mean over its width is taken away before it is encoded.
    """

    activation: Activation
    k: int = 0
    clamps: bool = True
    takes_bias: bool = False
    normalization: Normalization = "none"
    restores: bool = True
    scale: float = 1.0
    by_decoder_norm: bool = False
    centers: bool = False


@dataclass(frozen=True)
class _Prepared:
    """Vectors as the encoder takes them.

    Args:
        x: The vectors.
        size: What descriptions are multiplied by, ``(vector, 1)``, or None for 1.
        mean: What is added to descriptions then, ``(vector, 1)``, or None for 0.
    """

    x: Tensor
    size: Tensor | None = None
    mean: Tensor | None = None


class WeightCoder(Coder):
    """A coder by published weights, read when they are first used.

    Args:
        recipe: The settings.
        weights: ``encoder`` (feature, width), ``decoder`` (feature, width_out), ``b_dec``; ``b_enc``, or for gated ones
            ``b_gate``, ``r_mag`` and ``b_mag``; ``threshold`` for JumpReLU; ``finetuned``, factors of features when
            they are decoded; ``skip`` (width_out, width), a linear map from the input to the description.
        dtype: In which numbers are computed: that of the model, float32 at least.
        device: Where.
    """

    def __init__(self, recipe: Recipe, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        self.recipe = recipe
        self.weights = weights
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.device = device
        self.n_features, self.width_in = weights.shapes["encoder"]
        self.width_out = weights.shapes["decoder"][1]
        self._known: dict[str, Tensor] = {}

    def encode(self, x: Float[Tensor, "element width"]) -> Float[Tensor, "element feature"]:
        """Return all features of vectors."""
        given = self._prepare(x).x
        biases = {name: self._get(name) for name in ("b_enc", "threshold", "r_mag", "b_gate", "b_mag") if name in self}
        product = given @ self._get("encoder").T
        if self.recipe.activation != "topk":
            return self._scaled(self._activated(product, biases), None)
        pre = self._scaled(product + biases["b_enc"], None)
        top = pre.topk(min(self.recipe.k, pre.shape[-1]), dim=-1)
        values = top.values.relu() if self.recipe.clamps else top.values
        return torch.zeros_like(pre).scatter_(-1, top.indices, values)

    def decode(
        self, features: Float[Tensor, "element feature"], x: Float[Tensor, "element width"]
    ) -> Float[Tensor, "element width_out"]:
        """Return what features describe."""
        recipe, prepared = self.recipe, self._prepare(x)
        features = features.to(self.dtype)
        if "finetuned" in self:
            features = features * self._get("finetuned")
        if recipe.by_decoder_norm:
            features = features / self._norms()
        found = features @ self._get("decoder") + self._get("b_dec")
        if prepared.size is not None:
            found = found * prepared.size
        if prepared.mean is not None:
            found = found + prepared.mean
        found = found / recipe.scale
        return found + x.to(self.dtype) @ self._get("skip").T if "skip" in self else found

    def at(
        self, x: Float[Tensor, "vector width"], which: Int[Tensor, " element"], units: Int[Tensor, " element"]
    ) -> Float[Tensor, " element"]:
        """Return single features, from their own columns of the weights."""
        given = self._prepare(x).x
        product = (given[which] * self._get("encoder")[units]).sum(-1)
        names = ("b_enc", "threshold", "r_mag", "b_gate", "b_mag")
        biases = {name: self._get(name)[units] for name in names if name in self}
        if self.recipe.activation != "topk":
            return self._scaled(self._activated(product, biases), units)
        pre = self._scaled(product + biases["b_enc"], units)
        values = pre.relu() if self.recipe.clamps else pre
        return torch.where(self._among_largest(given, which, units), values, torch.zeros_like(values))

    def directions(
        self, x: Float[Tensor, "vector width"], which: Int[Tensor, " element"], units: Int[Tensor, " element"]
    ) -> Float[Tensor, "element width_out"]:
        """Return what the description gains where a feature grows by 1."""
        found = self._get("decoder")[units]
        if "finetuned" in self:
            found = found * self._get("finetuned")[units][:, None]
        if self.recipe.by_decoder_norm:
            found = found / self._norms()[units][:, None]
        size = self._prepare(x).size
        found = found if size is None else found * size[which]
        return found / self.recipe.scale

    def __contains__(self, name: str) -> bool:
        return name in self.weights.shapes

    def _get(self, name: str) -> Tensor:
        if name not in self._known:
            self._known[name] = self.weights.load(name).to(self.device, self.dtype)
        return self._known[name]

    def _norms(self) -> Float[Tensor, " feature"]:
        if "norms" not in self._known:
            self._known["norms"] = self._get("decoder").norm(dim=-1)
        return self._known["norms"]

    def _prepare(self, x: Float[Tensor, "vector width"]) -> _Prepared:
        recipe = self.recipe
        x = x.to(self.dtype)
        if recipe.centers:
            x = x - x.mean(-1, keepdim=True)
        x = x * recipe.scale if recipe.scale != 1.0 else x
        size, mean = None, None
        if recipe.normalization == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            size = (x - mean).std(-1, keepdim=True)
            x = (x - mean) / (size + EPS)
        elif recipe.normalization == "constant_norm_rescale":
            size = x.norm(dim=-1, keepdim=True) / self.width_in**0.5
            x = x / size
        x = x - self._get("b_dec") if recipe.takes_bias else x
        return _Prepared(x, size, mean) if recipe.restores else _Prepared(x)

    def _activated(self, product: Tensor, biases: Mapping[str, Tensor]) -> Tensor:
        """Return activations for products of the input with the encoder."""
        if self.recipe.activation == "gated":
            size = (biases["r_mag"].exp() * product + biases["b_mag"]).relu()
            return torch.where(product + biases["b_gate"] > 0, size, torch.zeros_like(size))
        pre = product + biases["b_enc"]
        found = pre.relu() if self.recipe.clamps else pre
        if self.recipe.activation == "jumprelu":
            return torch.where(pre > biases["threshold"], found, torch.zeros_like(found))
        return found.tanh() if self.recipe.activation == "tanh-relu" else found

    def _scaled(self, found: Tensor, units: Int[Tensor, " element"] | None) -> Tensor:
        if not self.recipe.by_decoder_norm:
            return found
        return found * (self._norms() if units is None else self._norms()[units])

    def _among_largest(
        self, given: Float[Tensor, "vector width"], which: Int[Tensor, " element"], units: Int[Tensor, " element"]
    ) -> Tensor:
        """Say which features are among the k largest of their vector."""
        k, most = min(self.recipe.k, self.n_features), max(1, NUMBERS_AT_ONCE // self.n_features)
        parts = []
        for some in torch.split(given, most):
            pre = self._scaled(some @ self._get("encoder").T + self._get("b_enc"), None)
            parts.append(pre.topk(k, dim=-1).indices)
        largest = torch.cat(parts)
        return (largest[which] == units[:, None]).any(-1)


class ModuleCoder(Coder):
    """A coder by a module of the user's, with ``encode`` and ``decode``, whose decoder adds up.

    Args:
        module: The module.
        width: Width of what it encodes.
        like: A tensor of the model, for its dtype and device.
    """

    def __init__(self, module: torch.nn.Module, width: int, like: Tensor) -> None:
        self.module = module
        own = next((x for x in [*module.parameters(), *module.buffers()] if x.is_floating_point()), like)
        self.device, self.own_dtype = own.device, own.dtype
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.outside = like.device
        self.width_in = width
        self.n_features = self.encode(torch.zeros(1, width)).shape[-1]
        self._nothing = self._decode(torch.zeros(1, self.n_features))[0]
        self.width_out = len(self._nothing)
        self._known: dict[int, Tensor] = {}

    def encode(self, x: Float[Tensor, "element width"]) -> Float[Tensor, "element feature"]:
        """Return all features of vectors."""
        found: Tensor = self.module.encode(x.to(self.device, self.own_dtype))  # type: ignore[operator]  # checked when it was added
        return found.to(self.outside, self.dtype)

    def decode(
        self, features: Float[Tensor, "element feature"], x: Float[Tensor, "element width"]
    ) -> Float[Tensor, "element width_out"]:
        """Return what features describe."""
        del x
        return self._decode(features)

    def at(
        self, x: Float[Tensor, "vector width"], which: Int[Tensor, " element"], units: Int[Tensor, " element"]
    ) -> Float[Tensor, " element"]:
        """Return single features; all of a vector are computed for one."""
        most = max(1, NUMBERS_AT_ONCE // self.n_features)
        found = torch.zeros(len(which), dtype=self.dtype, device=x.device)
        for start in range(0, len(x), most):
            mine = ((which >= start) & (which < start + most)).nonzero()[:, 0]
            found[mine] = self.encode(x[start : start + most])[which[mine] - start, units[mine]]
        return found

    def directions(
        self, x: Float[Tensor, "vector width"], which: Int[Tensor, " element"], units: Int[Tensor, " element"]
    ) -> Float[Tensor, "element width_out"]:
        """Return what the description gains where a feature grows by 1."""
        del x, which
        different, place = torch.unique(units, return_inverse=True)
        for unit in different.tolist():
            if unit not in self._known:
                one = torch.zeros(1, self.n_features)
                one[0, unit] = 1.0
                self._known[unit] = self._decode(one)[0] - self._nothing
        return torch.stack([self._known[unit] for unit in different.tolist()])[place]

    def _decode(self, features: Tensor) -> Tensor:
        found: Tensor = self.module.decode(features.to(self.device, self.own_dtype))  # type: ignore[operator]  # checked when it was added
        return found.to(self.outside, self.dtype)
