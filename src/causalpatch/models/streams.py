"""Models with an encoder and a decoder: which of the two a site stands in, and how both are called.

The decoder is what answers, so that what is said of such a model without naming a stream (its layers, its logits, its
prompts) is said of the decoder. Positions of a site count the tokens of its stream; keys and values of cross-attention
stand in the decoder's layers, and count the encoder's.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.models.table import FamilyTable, fact_modules, join
from causalpatch.sites.names import OF_ENCODER_TOKENS
from causalpatch.sites.site import Site

Stream = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Sound:
    """The array that an encoder is given instead of tokens.

    Args:
        argument: The forward's argument that takes it.
        shape: Its shape for one pair: channels, and steps in time.
        n_frames: How many positions the encoder makes of it.
    """

    argument: str
    shape: tuple[int, int]
    n_frames: int

    @classmethod
    def of(cls, table: FamilyTable, module: nn.Module) -> "Sound":
        """Read it off an encoder's convolutions."""
        paths = [join(table.place.base, path) for path in table.family.convolutions]
        convolutions = [module.get_submodule(path) for path in paths]
        n_frames = int(module.get_submodule(table.place.base).max_source_positions)  # type: ignore[arg-type]  # module attributes are typed as tensors
        strides = [int(each.stride[0]) for each in convolutions]  # type: ignore[index]  # likewise
        shape = (int(convolutions[0].in_channels), n_frames * math.prod(strides))  # type: ignore[arg-type]  # likewise
        return cls(str(module.main_input_name), shape, n_frames)


class Streams:
    """The two halves of a model.

    Args:
        decoder: The decoder's table.
        encoder: The encoder's.
        module: The model.
    """

    def __init__(self, decoder: FamilyTable, encoder: FamilyTable, module: nn.Module) -> None:
        self.decoder = decoder
        self.encoder = encoder
        facts = [decoder.family.sites[name] for name in sorted(OF_ENCODER_TOKENS)]
        paths = [path for fact in facts for path in fact_modules(fact)]
        layers = [decoder.layer_path(layer) for layer in range(decoder.numbers.n_layers)]
        self._of_encoder = {join(layer, path) for layer in layers for path in paths}
        whole = module.get_submodule(decoder.place.base.rpartition(".")[0])
        self._takes_positions = "decoder_position_ids" in inspect.signature(whole.forward).parameters
        self._name = type(whole).__name__
        self.sound = Sound.of(encoder, module) if encoder.family.convolutions else None

    def table(self, stream: str | None) -> FamilyTable:
        """Return the table of a stream; the decoder's where none is named."""
        return self.encoder if stream == "encoder" else self.decoder

    def of(self, site: Site) -> Stream:
        """Return the stream whose tokens a site's positions count."""
        if site.module is None:
            is_encoder = site.stream == "encoder" or site.name in OF_ENCODER_TOKENS
            return "encoder" if is_encoder else "decoder"
        path, base = site.module.path, self.encoder.place.base
        is_encoder = path == base or path.startswith(f"{base}.") or path in self._of_encoder
        return "encoder" if is_encoder else "decoder"

    def call(
        self,
        *,
        ids: Tensor,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Return the keyword arguments to call the model with.

        Args:
            ids: The decoder's token ids; axes (row, position).
            mask: True at real tokens; axes (row, position).
            position_ids: Each token's place in its own prompt; axes (row, position).
            encoder: The encoder's token ids and their mask; axes (row, position) of its own.

        Raises:
            ModelUnsupported: There is no prompt for the encoder; or one does not begin at the first column, and the
                model numbers columns.
        """
        if encoder is None:
            raise ModelUnsupported(
                f"'{self._name}' needs a prompt for its encoder beside that of its decoder",
                facts=[("given", "one prompt")],
                fix="read the pairs for this model: load_pairs(…, model)",
            )
        of_encoder, of_encoder_mask = encoder
        mask = torch.ones_like(ids) if mask is None else mask
        if self.decoder.family.counts_columns and not bool(mask[:, 0].all() and of_encoder_mask[:, 0].all()):
            raise ModelUnsupported(
                f"'{self._name}' cannot run prompts that are padded on the left",
                facts=[("positions", "it numbers the columns of a batch, padding included")],
                fix='pad on the right: Experiment(…, padding_side="right")',
            )
        call: dict[str, Any] = {}
        if self.sound is None:  # sound stands beside the prompts
            call |= {"input_ids": of_encoder.long(), "attention_mask": of_encoder_mask.long()}
        call |= {"decoder_input_ids": ids.long(), "decoder_attention_mask": mask.long()}
        if self._takes_positions and position_ids is not None:
            call["decoder_position_ids"] = position_ids.long()
        return call | {"use_cache": False}
