"""The model as the rest of the library sees it: which sites it has, where each is tapped, how it is called.

A ``Model`` wraps an unmodified module. It never runs it and registers no hook: ``tap`` says where a site stands,
``inputs`` what to call the module with, ``logits`` which part of the output is the answer; the engine does the rest.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.base.tokens import Tokenizer
from causalpatch.models.attention import kernel_of
from causalpatch.models.detect import find_family
from causalpatch.models.dictionaries import Anatomy, Dictionary, Registry, Wanted
from causalpatch.models.families import Family
from causalpatch.models.forward import Forward, answer_in, as_arguments
from causalpatch.models.generic import module_tap
from causalpatch.models.offload import Content, execution_device
from causalpatch.models.seeing import Seeing
from causalpatch.models.site_rows import SiteRow, shape_by, site_rows
from causalpatch.models.streamed import StreamedWeights, weights_of
from causalpatch.models.streams import Sound, Stream, Streams
from causalpatch.models.table import FamilyTable
from causalpatch.models.taps import Port, Tap
from causalpatch.models.tokens import find_decoder_prompt, find_stop_ids
from causalpatch.models.towers import PIXELS, Towers
from causalpatch.models.views import View
from causalpatch.pairs.placed import Kind
from causalpatch.sites.names import CROSS_SITES, NAMES
from causalpatch.sites.select import ModelShape, check
from causalpatch.sites.site import Site

__all__ = ["Model", "Port", "SiteRow", "Tap", "View"]

Ids = Int[Tensor, " row position"] | Int[np.ndarray, " row position"]
Mask = Shaped[Tensor, " row position"] | Shaped[np.ndarray, " row position"]
ReadIds = Int[Tensor, " row read"] | Int[np.ndarray, " row read"]
ReadMask = Shaped[Tensor, " row read"] | Shaped[np.ndarray, " row read"]
Arrays = Shaped[Tensor, " row *axes"] | Shaped[np.ndarray, " row *axes"]


class Model(Seeing):
    """A module with names for its activations.

    Args:
        module: Any module; it is used as it is, where it is.
        name: What the reader calls it; used in messages and records.
        tokenizer: What turns text into ids, or None for ids and arrays only.
    """

    def __init__(self, module: nn.Module, *, name: str, tokenizer: Tokenizer | None = None) -> None:
        self.module = module
        self.name = name
        self.tokenizer = tokenizer
        self._content = Content(module)
        finding = find_family(module)
        self._table = table = finding.table
        self._towers = Towers(finding.towers, module)
        self.streams = Streams(table, table.encoder, module) if table and table.encoder else None
        self.family_source = finding.source
        self.family_note = finding.note
        self.dictionaries = Registry()
        self.shape = self._make_shape()
        reads_tokens = table is not None or tokenizer is not None or self._has_embedding
        self.kind: Kind = "tokens" if reads_tokens and not self._reads_pictures else "arrays"

    def __repr__(self) -> str:
        family = self.family.name if self.family else "generic"
        return f"Model({self.name!r}, {family}, {self.shape.n_layers} layers, {self.dtype}, {self.device})"

    @property
    def sees_ahead(self) -> bool:
        """Whether tokens see later ones of their prompt, so far as the family says."""
        return self.family is not None and self.family.sees_ahead

    def sees_ahead_at(self, site: Site) -> bool:
        """Say whether at a site queries see keys behind them: of the encoder, and of cross-attention, always."""
        stream = self.family_of(site.stream)
        return site.name in CROSS_SITES or (stream is not None and stream.sees_ahead)

    @property
    def is_assumed(self) -> bool:
        """Whether the family was taken over because all names match, without the configuration saying so."""
        return self.family_source == "structure"

    @property
    def device(self) -> torch.device:
        """Where the model is, or its first part; where it runs, if its weights are elsewhere between runs."""
        return (execution_device(self.module) if self._first.is_meta else None) or self._first.device

    @property
    def weights(self) -> StreamedWeights | None:
        """The weights of a model that fetches them when it runs; None where they are in the module."""
        return weights_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point type."""
        return self._first.dtype

    @property
    def width(self) -> int:
        """Width of the residual stream; 0 for a generic model."""
        return self._table.numbers.width if self._table else 0

    @property
    def n_heads(self) -> int:
        """Number of query heads in a layer; 0 for a generic model."""
        return self._table.numbers.n_heads if self._table else 0

    @property
    def n_kv_heads(self) -> int:
        """Number of key and value heads in a layer; 0 for a generic model."""
        return self._table.numbers.n_kv_heads if self._table else 0

    @property
    def head_width(self) -> int:
        """Width of one head's value and output; 0 for a generic model. Queries and keys may be wider."""
        return self._table.numbers.head_width if self._table else 0

    def sizes(self, name: str, stream: str | None = None) -> dict[str, int]:
        """Return the sizes of the axes of a site's value, so far as they are known.

        Args:
            name: The site's name.
            stream: The stream that it stands in, of a model that has two.
        """
        table = self._table_of(stream)
        if table is None:
            return {}
        return table.numbers.sizes(name) | {"vocab": self.vocab_size, "expert": table.n_experts}

    def _table_of(self, stream: str | None) -> FamilyTable | None:
        return self.streams.table(stream) if self.streams else self._towers.tables.get(stream or "", self._table)

    @property
    def main_stream(self) -> Stream | None:
        """The stream that answers, of a model with an encoder and a decoder; None for any other model."""
        return "decoder" if self.streams else None

    def family_of(self, stream: str | None) -> Family | None:
        """Return the table of facts of a stream, or of the model where none is named; None for a generic model."""
        table = self._table_of(stream)
        return None if table is None else table.family

    def stream_of(self, site: Site) -> str | None:
        """Return the stream whose tokens a site's positions count; None where the model has one stream of tokens.

        Args:
            site: The site.
        """
        return self.streams.of(site) if self.streams else self._towers.of(site, self._table)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids that the model's embedding takes; 0 where that is not known, or it takes none."""
        if self._reads_pictures:
            return 0
        if self._table:
            embedding = self.module.get_submodule(self._table.tap(Site("embed")).port.path)
            return int(embedding.get_parameter("weight").shape[0])
        size = getattr(getattr(self.module, "config", None), "vocab_size", None)
        return size if isinstance(size, int) else 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a text, as the model's generation settings or its configuration say; else none."""
        return find_stop_ids(self.module)

    @property
    def decoder_prompt(self) -> tuple[int, ...] | None:
        """Token ids that a decoder begins with, as the settings say; None where no decoder stands beside an encoder."""
        return find_decoder_prompt(self.module) if self.streams else None

    @property
    def attention(self) -> str:
        """Name of the attention kernel, such as ``sdpa``; ``"unknown"`` where the model does not say."""
        return kernel_of(self.module)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the names, types, shapes and bytes of the state, computed when it is first asked for.

        It is computed again after a tensor of the state was changed in place or replaced.
        """
        return self._content.hash

    def tap(self, site: Site) -> Tap:
        """Return where and how a site is read and written.

        Args:
            site: One site; its position does not matter here.

        Raises:
            SiteNotFound: The model has no such layer, head or module; the message says what it has.
            SiteUnsupported: The model does not have this kind of site; the message says why.
        """
        check(site, self.shape)
        if site.module is not None:
            rows = self._table.rows_of(site.module.path) if self._table else None
            return module_tap(site, site.module, counts_positions=self.kind == "tokens", rows=rows)
        if self._table is None:
            raise LookupError(site.name)  # `check` has refused every named site of a generic model
        if site.dictionary is not None:
            return self.dictionaries.of(site.dictionary, site.layer or 0).tap(site)
        table = self._table_of(site.stream)
        return (table or self._table).tap(site)

    def add_dictionary(
        self,
        name: str,
        source: str | Path | nn.Module,
        site: str | None = None,
        *,
        reads: str | None = None,
        processed: bool | None = None,
        scale: float | None = None,
    ) -> list[Dictionary]:
        """Add a sparse dictionary, so that ``feature(NAME).LAYER.FEATURE`` and ``feature_error(NAME).LAYER`` are sites.

        Args:
            name: The name that its features go by. Further layers, each with a file of its own, go by one name.
            source: A folder or file as SAELens, sparsify, circuit-tracer or Gemma Scope publish it, a folder of such
                folders, or a module with ``encode`` and ``decode``. Weights are loaded when they are first used.
            site: The site that it describes, such as ``"resid_pre.3"``; by default what its files say.
            reads: What it encodes, where that is another site: ``"mlp_in"`` is what goes into the MLP. By default what
                its files say, and the MLP's input for transcoders.
            processed: Whether it was trained on weights that TransformerLens had processed (its default), so that the
                mean over the width was taken from the stream. By default what its files say.
            scale: What vectors were multiplied by in training (``expected_average_only_in``).

        Returns:
            What was added, one for each layer.

        Raises:
            SettingError: The site is missing or is not what the files say, a width does not fit, or the name is taken.
            ModelNotFound: There is no dictionary of a known layout.
            ModelUnsupported: A setting of it is not applied here, or the model's layers are not known by name.

        Cost:
            Reads shapes alone; in a run, the weights of the layers that are patched.
        """
        if self._table is None or self.streams:
            raise ModelUnsupported(
                f"'{self.name}' takes no dictionaries",
                facts=[("reason", "it has an encoder and a decoder" if self.streams else self.family_note)],
                fix="patch its modules: module(PATH).output",
            )
        wanted = Wanted(site, reads, processed, scale)
        made = self.dictionaries.add(name, source, wanted, self._anatomy())
        self.shape = self._make_shape()
        return made

    def remove_dictionary(self, name: str) -> None:
        """Forget a dictionary.

        Raises:
            SettingError: There is none of this name.
        """
        self.dictionaries.remove(name)
        self.shape = self._make_shape()

    def anchor(self, site: Site) -> str:
        """Return the name of the site in whose tensor a site is written: for a feature that of its dictionary.

        Args:
            site: The site.
        """
        if site.dictionary is None:
            return site.name
        return self.dictionaries.of(site.dictionary, site.layer or 0).writes

    @property
    def further(self) -> tuple[str, ...]:
        """Names of the forward's arguments that may stand beside prompts or arrays, such as ``pixel_values``."""
        heard = (self.sound.argument,) if self.sound else ()
        return (*self._forward.further(PIXELS if self._reads_pictures else None), *heard)

    @property
    def sound(self) -> Sound | None:
        """The array that an encoder is given instead of tokens; None for any other model."""
        return self.streams.sound if self.streams else None

    def inputs(
        self,
        ids: Ids,
        mask: Mask | None = None,
        position_ids: Ids | None = None,
        further: Mapping[str, Any] | None = None,
        encoder: tuple[ReadIds, ReadMask] | None = None,
    ) -> dict[str, Any]:
        """Return the keyword arguments to call the module with on token ids.

        Args:
            ids: Token ids; axes (row, position).
            mask: True at real tokens; axes (row, position).
            position_ids: Each token's place in its own prompt; axes (row, position).
            further: Further arguments of the forward by name; fractions are given in the model's dtype.
            encoder: The encoder's token ids and their mask, of a model that has one, axes (row, read); what stands
                above is then the decoder's.

        Returns:
            What the module's forward takes of these, as tensors on the model's device, and ``use_cache=False`` where
            it takes that.

        Raises:
            ModelUnsupported: Rows are padded, but the forward takes no mask or no position ids, so that padding would
                change the answer.
        """
        if self.streams:
            own = {"ids": ids, "mask": mask, "position_ids": position_ids}
            given = {name: self._tensor(each) for name, each in own.items() if each is not None}
            both = None if encoder is None else (self._tensor(encoder[0]), self._tensor(encoder[1]))
            return self.streams.call(**given, encoder=both) | as_arguments(further or {}, self.device, self.dtype)
        call: dict[str, Any] = {self._forward.main("input_ids"): self._tensor(ids).long()}
        is_padded = mask is not None and not bool(self._tensor(mask).all())
        if self._forward.places_itself:
            position_ids = None
        if position_ids is not None and self._table:
            position_ids = self._tensor(position_ids) + self._table.numbers.first_position
        for name, values in (("attention_mask", mask), ("position_ids", position_ids)):
            # Where a model of no known family begins to count positions is not known: unpadded prompts are left to it.
            is_left_out = name == "position_ids" and not (self._table or is_padded or name in self._forward.needed)
            if values is not None and self._forward.takes(name) and not is_left_out:
                call[name] = self._tensor(values).long()
            elif values is not None and is_padded:
                raise ModelUnsupported(
                    f"{self.name!r} cannot run prompts of unequal length together",
                    facts=[("forward", f"takes {', '.join(self._forward.names)}"), ("padding", f"needs {name}")],
                    fix=f"give prompts of one length, or wrap the model in a forward that takes {name}",
                )
        if self._forward.takes("use_cache"):
            call["use_cache"] = False
        return call | as_arguments(further or {}, self.device, self.dtype)

    def inputs_of_arrays(self, values: Arrays, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the keyword arguments to call the module with on arrays.

        Args:
            values: The stacked arrays; axes (row, …).
            further: Further arguments of the forward by name.

        Returns:
            The forward's first argument, on the model's device and in its dtype; whole numbers stay whole where the
            model embeds them.
        """
        tensor, is_seen = self._tensor(values), self._reads_pictures
        keeps = self._has_embedding and not tensor.is_floating_point() and not is_seen
        main = {self._forward.main(PIXELS if is_seen else None): tensor if keeps else tensor.to(self.dtype)}
        return main | as_arguments(further or {}, self.device, self.dtype)

    def logits(self, output: Any) -> Shaped[Tensor, " row *axes"]:
        """Return the answer in a module's output.

        Args:
            output: What the module returned: a tensor, a tuple, a mapping or an output of transformers.

        Returns:
            For a language model the logits, axes (row, position, vocab); otherwise the output's first tensor.

        Raises:
            ModelUnsupported: There is no tensor in the output.
        """
        return answer_in(output, self._towers.answers(self._table), self.name)

    def site_rows(self) -> list[SiteRow]:
        """Return the table of sites: every name with its axes and sizes, or why the model does not have it."""
        return site_rows(self.shape, self.sizes)

    def _make_shape(self) -> ModelShape:
        paths = tuple(name for name, _ in self.module.named_modules())
        # A model that was given as a module has its class's name, which no command can look up.
        listing = "model.site_rows()" if self.name == type(self.module).__name__ else ""
        if self._table:
            by = partial(shape_by, name=self.name, dictionaries=self.dictionaries.sizes, paths=paths, listing=listing)
            shape = by(self._table)
            if self._table.encoder is None:
                of_towers = {name: by(table) for name, table in self._towers.tables.items()}
                return self._towers.shape(self._table, shape, of_towers)
            return replace(shape, parts={"encoder": by(self._table.encoder), "decoder": shape})
        reason = f"{self.family_note}; use module(PATH).output, such as module({paths[min(1, len(paths) - 1)]}).output"
        return ModelShape(
            self.name, 0, {}, {name: reason for name in NAMES if name != "module"}, paths, listing=listing
        )

    def _anatomy(self) -> Anatomy:
        """Return what dictionaries must know of the model."""
        units, refused = self.shape.units, self.shape.refused
        widths = dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in"), self.width)
        widths |= {"z": units.get("head", 0) * self.head_width, "mlp_post": units.get("neuron", 0)}
        norm = self.module.get_submodule(self.tap(Site("final_norm")).port.path)
        like = self._first.new_empty(0, device=self.device)
        return Anatomy(self.name, self.tap, widths, like, isinstance(norm, nn.LayerNorm), "v_bias" not in refused)

    @cached_property
    def _first(self) -> Tensor:
        """The first floating-point tensor of the model, which stands for its device and dtype."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return next((x for x in tensors if x.is_floating_point()), tensors[0] if tensors else torch.zeros(()))

    @cached_property
    def _has_embedding(self) -> bool:
        return any(isinstance(part, nn.Embedding) for part in self.module.modules())

    @cached_property
    def _forward(self) -> Forward:
        return Forward(self.module, self.name, passes_on=self._table is not None)

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.device)
