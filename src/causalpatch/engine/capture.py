"""Values of sites in a run: one forward keeps the tensors of all ports, sites read their part when asked."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.engine.memory import exhausted, is_out_of_memory
from causalpatch.models import Model, Port, Tap
from causalpatch.models.views import bound, take
from causalpatch.pairs import Batch, Pairs
from causalpatch.pairs.role import Role
from causalpatch.sites import Site
from causalpatch.sites.names import CROSS_SITES


@dataclass(frozen=True)
class Captured:
    """Tensors kept at ports in one run of a batch.

    Args:
        model: The model that was run.
        batch: Its inputs.
        output: Its output.
        tensors: The tensor at each port, ``[row, …]``.
        slots: The row of each pair, where pairs share rows.
    """

    model: Model
    batch: Batch
    output: Any
    tensors: Mapping[Port, Tensor]
    slots: np.ndarray | None = None

    def value(self, site: Site) -> Shaped[Tensor, "row *axes"]:
        """Return the value of a site, ``[row, position, *value_axes]`` or, without positions, ``[row, *value_axes]``.

        Padded columns are included; ``batch_of(site).mask`` says which they are. Keys count real tokens of each row's
        prompt.

        Raises:
            SiteUnsupported: The site's tensor has no row for each prompt.
        """
        tap = self.model.tap(site)
        tensor = self.tensors[tap.port]
        self._require_rows(site, tensor)
        view = in_batch(self.model, tap, self.batch).view
        return view.read(tensor, tuple(self.tensors[port] for port in tap.companions)).detach()

    def at(self, tap: Tap, local: np.ndarray, tokens: np.ndarray) -> Shaped[Tensor, "element *axes"]:
        """Return the values of a tap at elements.

        Args:
            tap: The tap.
            local: The pair of each element, in the batch of pairs.
            tokens: The real token of each element.

        Raises:
            SiteUnsupported: The site's tensor has no row for each prompt.
        """
        tensor = self.tensors[tap.port]
        self._require_rows(tap.site, tensor)
        rows = local if self.slots is None else self.slots[local]
        columns = self.batch_of(tap.site).start[rows] + tokens
        places = tuple(torch.as_tensor(at, device=tensor.device) for at in (rows, columns))
        view = in_batch(self.model, tap, self.batch).view
        return take(view, tensor, tuple(self.tensors[port] for port in tap.companions), places).detach()

    def batch_of(self, site: Site) -> Batch:
        """Return the prompts whose tokens a site's positions count."""
        return self.batch.of(self.model.stream_of(site))

    def _require_rows(self, site: Site, tensor: Tensor) -> None:
        if tensor.shape[0] != len(self.batch.lengths):
            raise SiteUnsupported(
                f"site '{site}' has no row for each prompt in this model",
                facts=[("its tensor", f"shape {tuple(tensor.shape)}"), ("prompts", len(self.batch.lengths))],
                fix="patch a site further down, whose first axis is the batch",
            )


def capture(
    model: Model,
    batch: Batch,
    sites: Iterable[Site],
    *,
    opens_attention: bool = False,
    columns: range | None = None,
) -> Captured:
    """Run a batch once and keep what the sites need.

    Args:
        model: The model.
        batch: Its inputs.
        sites: The sites whose values will be asked for.
        opens_attention: Whether attention is computed step by step, also where no site stands inside it.
        columns: The columns whose logits are computed, by a model that can be asked for some (``few_logits``).

    Raises:
        PatchDidNotFire: The module of a site did not run.
    """
    ports = ports_of(model, sites)
    output, tensors = run_with_hooks(
        model, inputs_of(model, batch, columns), keep=ports, opens_attention=opens_attention
    )
    return Captured(model, batch, output, tensors)


def ports_of(model: Model, sites: Iterable[Site]) -> set[Port]:
    """Return the ports that the values of sites are read from."""
    return {port for tap in map(model.tap, sites) for port in (tap.port, *tap.companions)}


def in_batch(model: Model, tap: Tap, batch: Batch) -> Tap:
    """Return a tap for a padded batch, where values over keys are counted in real tokens.

    Args:
        model: The model.
        tap: The tap.
        batch: The prompts; keys of cross-attention are the encoder's tokens.
    """
    stream = "encoder" if tap.site.name in CROSS_SITES else model.stream_of(tap.site)
    return replace(tap, view=bound(tap.view, batch.of(stream).start))


def probe(model: Model, pairs: Pairs, role: Role, pair: int, sites: Collection[Site]) -> Captured:
    """Run one prompt or array by itself, to see what its tensors are like.

    Raises:
        MemoryExhausted: The run does not fit into memory.
        PatchDidNotFire: The module of a site did not run.
    """
    try:
        return capture(model, pairs.batch(role, [pair]), sites)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise exhausted(model, pairs, pair) from error


def require_positions(model: Model, pairs: Pairs, role: Role, sites: Collection[Site]) -> None:
    """Make sure that tensors which are patched token by token have a column for each token.

    A module says nothing of its axes, so what comes after the row is taken for positions. The shortest and the longest
    prompt show whether it is.

    Args:
        model: The model.
        pairs: The pairs.
        role: Which side's prompts are run.
        sites: Sites with positions.

    Raises:
        SiteUnsupported: The tensor of a site does not grow with the prompt, or has more axes than can be guessed.
    """
    sizes = pairs.sizes(role)
    for pair in dict.fromkeys((int(sizes.argmin()), int(sizes.argmax()))) if sites else ():
        captured = probe(model, pairs, role, pair, sites)
        for site in sites:
            shape, lengths = tuple(captured.value(site).shape), captured.batch_of(site).lengths
            # Four axes may be heads by queries by keys: as many heads as tokens would look like positions.
            is_unclear = len(shape) > 3 and model.tap(site).assumes_position
            if len(shape) < 2 or shape[1] != lengths[0] or is_unclear:
                raise SiteUnsupported(
                    f"'{site}' has no column for each token",
                    facts=[("its tensor", f"shape {shape}"), ("prompt", f"{lengths[0]} tokens")],
                    fix="name its axes, such as axes=(width), and all of it is patched",
                )


def inputs_of(model: Model, batch: Batch, columns: range | None = None) -> Mapping[str, Any]:
    """Return the arguments of the model's forward for a batch.

    Args:
        model: The model.
        batch: The inputs.
        columns: The columns whose logits are computed, or None for what the model does by itself.
    """
    further = {**batch.beside, **batch.common}
    if batch.values is not None:
        return model.inputs_of_arrays(batch.values, further)
    encoder = None if batch.encoder is None else (batch.encoder.ids, batch.encoder.mask)
    call = model.inputs(batch.ids, batch.mask, batch.position_ids, further, encoder)
    if columns is None:
        return call
    return {**call, "logits_to_keep": torch.arange(columns.start, columns.stop, device=model.device)}
