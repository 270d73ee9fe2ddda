"""Two arms without training: words before the prompt, and a vector added to the stream.

*Prefix*: training pairs written out with their wanted answers stand before each prompt, also before those that must
stay as they are. *Steering*: the mean difference of the stream behind a layer, at the last token of the wanted and of
the unwanted answer, times a strength, is added behind that layer at every token. How many examples, which layer and how
strong is chosen on validation, as rates are.

References:
    Rimsky et al. 2024, "Steering Llama 2 via Contrastive Activation Addition", 2312.06681.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.added import AtInput, AtOutput
from causalpatch.engine.capture import capture
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.results.words import counted
from causalpatch.sites import Site
from causalpatch.tuning.data import TuningData, beginning
from causalpatch.tuning.ways import Added, Way
from causalpatch.tuning.whole import NOTHING

EXAMPLES: Final = (1, 2, 4)
STRENGTHS: Final = (0.5, 1.0, 2.0, 4.0)
_MOST_LAYERS: Final = 6
_MOST_PAIRS: Final = 64


class Untrained(Way):
    """A change in which nothing is trained, and which no weight can hold."""

    name: ClassVar[str] = "untrained"
    told: str = ""

    def trained(self) -> dict[str, nn.Parameter]:
        """Return nothing."""
        return {}

    def sizes(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def write_into(self, module: nn.Module) -> None:
        """Refuse: this is no change of weights.

        Raises:
            ModelUnsupported: Always.
        """
        raise ModelUnsupported(f"{self.told} cannot be written into weights", fix="use it as it is")


class Prefixed(Untrained):
    """A prefix before every prompt.

    Args:
        model: The model.
        ids: Its tokens.
        told: What it is.
    """

    def __init__(self, model: Model, ids: Sequence[int], told: str) -> None:
        super().__init__(model, NOTHING)
        self.told = told
        self._wrapped = _Prefixing(model, ids)

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Run the model with the prefix; what is returned is of the prompt's own tokens."""
        yield self._wrapped


class Steered(Untrained, Added):
    """A vector added behind a layer.

    Args:
        model: The model.
        layer: The layer.
        vector: The vector, ``(width,)``.
        told: What it is.
    """

    def __init__(self, model: Model, layer: int, vector: Float[Tensor, " width"], told: str) -> None:
        super().__init__(model, NOTHING)
        self.told = told
        self.entry = layer
        self._path = model.tap(Site("resid_post", layer)).port.path
        self._vector = vector

    def terms(self) -> tuple[dict[str, AtInput], dict[str, AtOutput]]:
        """Return the vector, as a term of what the layer returns."""
        return {}, {self._path: lambda x, y: y + self._vector.to(y.dtype)}


class _Prefixing(nn.Module):
    """Calls a model with tokens put before each prompt, behind the token that every prompt begins with."""

    def __init__(self, model: Model, ids: Sequence[int]) -> None:
        super().__init__()
        self._held = (model,)  # in a tuple, so that its weights are not taken for ours
        self._ids = torch.tensor(list(ids), device=model.device)
        self._lead = len(beginning(model))

    def forward(self, input_ids: Tensor, **named: Any) -> dict[str, Tensor]:
        """Return the logits of the prompts' own tokens."""
        (model,) = self._held
        n, lead, rows = len(self._ids), self._lead, len(input_ids)
        given = torch.cat([input_ids[:, :lead], self._ids.expand(rows, n), input_ids[:, lead:]], 1)
        if named.get("attention_mask") is not None:
            mask = named["attention_mask"]
            named["attention_mask"] = torch.cat([mask.new_ones(rows, n), mask], 1)
        if named.get("position_ids") is not None:
            own = named["position_ids"]
            first = own[:, :1] + lead + torch.arange(n, device=own.device)
            named["position_ids"] = torch.cat([own[:, :lead], first, own[:, lead:] + n], 1)
        columns = named.pop("logits_to_keep", None)
        logits = model.logits(model.module(input_ids=given, **named))[:, n:]
        return {"logits": logits if columns is None else logits[:, columns]}


def prefixes(model: Model, data: TuningData, given: str | None) -> list[Prefixed]:
    """Return the prefixes that are tried: the user's, or examples of the training pairs."""
    lead = len(beginning(model))
    if given is not None and model.tokenizer is not None:
        return [Prefixed(model, model.tokenizer.encode(given)[lead:], f"the prefix {given!r}")]
    pairs, made = data.target["train"], []
    for n in EXAMPLES:
        some = [pairs[k] for k in range(min(n, len(pairs)))]
        ids = [token for pair in some for token in [*pair.clean[lead:].tolist(), *pair.answer[0]]]
        made.append(Prefixed(model, ids, f"{counted(len(some), 'example')} before the prompt"))
    return made


def steering(model: Model, data: TuningData) -> list[Steered]:
    """Return the vectors that are tried; none where a pair has no unwanted answer, or the stream is not known."""
    pairs = data.target["train"]
    if "resid_post" in model.shape.refused or not all(pair.wrong_answer for pair in pairs):
        return []
    layers = np.unique(np.linspace(0, model.shape.n_layers - 1, min(_MOST_LAYERS, model.shape.n_layers)).astype(int))
    sites = [Site("resid_post", int(layer)) for layer in layers]
    wanted, unwanted = (_behind(model, pairs, sites, side) for side in ("answer", "wrong_answer"))
    return [
        Steered(model, site.layer or 0, strength * (wanted[k] - unwanted[k]), f"{strength:g} times a vector at {site}")
        for k, site in enumerate(sites)
        for strength in STRENGTHS
    ]


def _behind(model: Model, pairs: Pairs, sites: Sequence[Site], side: str) -> list[Float[Tensor, " width"]]:
    """Return the mean of the stream at the last token of an answer, by site."""
    numbers = range(min(len(pairs), _MOST_PAIRS))
    batch = pairs.batch("clean", numbers, continuations=[list(getattr(pairs[k], side)[0]) for k in numbers])
    held = capture(model, batch, sites)
    last = torch.as_tensor(batch.start + batch.mask.sum(1) - 1, device=model.device)
    rows = torch.arange(len(last), device=model.device)
    return [held.value(site)[rows, last].mean(0) for site in sites]
