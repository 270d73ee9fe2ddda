"""Models that are given pictures: their towers, which inputs they answer, and what their tokens are called.

===========================  ================  =======================================================================
model                        streams           answers
===========================  ================  =======================================================================
for pictures (ViT)           vision            pictures; a site needs no stream
compares both (CLIP)         vision, text      pictures by their likeness to texts that all runs share, or the reverse
language of pictures (LLaVA) vision            prompts; a site without a stream stands in the language model
===========================  ================  =======================================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal

from torch import nn

from causalpatch.models.pictures import Grid
from causalpatch.models.table import FamilyTable
from causalpatch.sites.names import NAMES
from causalpatch.sites.select import ModelShape
from causalpatch.sites.site import Site

PIXELS: Final = "pixel_values"
"""The argument by which models of transformers are given pictures."""

_SHARED = {
    "text": "the texts are the same in all runs; give pairs of prompts, and pictures with_common(pixel_values=…)",
    "vision": "the pictures are the same in all runs; give pairs of pictures, and texts with_common(input_ids=…)",
}


class Towers:
    """The parts of a model that have streams of tokens of their own, by the names of these.

    Args:
        tables: The tables, by stream.
        module: The model.
    """

    def __init__(self, tables: Mapping[str, FamilyTable], module: nn.Module) -> None:
        self.tables = tables
        self._module = module
        self._grid: Grid | None = tables["vision"].numbers.grid if "vision" in tables else None

    @property
    def are_compared(self) -> bool:
        """Whether pictures are compared with texts, so that either may be answered."""
        return "text" in self.tables

    @property
    def picture(self) -> tuple[int, int, int] | None:
        """Channels, height and width of the pictures that the model was made for."""
        return None if self._grid is None else self._grid.picture

    @property
    def token(self) -> tuple[int, int] | None:
        """Id of the token in prompts whose place a picture takes, and how many of them a picture takes."""
        return None if self._grid is None else find_token(self._module, self._grid)

    def reading(self, kind: Literal["tokens", "arrays"]) -> FamilyTable:
        """Return the table of the tower that reads inputs of a kind."""
        return self.tables["text" if kind == "tokens" else "vision"]

    def places(self, shape: Sequence[int] | None = None) -> tuple[str, ...]:
        """Return what a person calls the tokens of a picture; none where that is not known."""
        return () if self._grid is None else self._grid.labels(shape)

    def of(self, site: Site, main: FamilyTable | None) -> Literal["vision"] | None:
        """Return the stream whose tokens a site counts; None where they are those of the inputs.

        Args:
            site: The site.
            main: The table of what answers.
        """
        vision = self.tables.get("vision")
        if vision is None or main is vision:
            return None
        base = vision.place.base
        path = "" if site.module is None else site.module.path
        is_inside = path == base or path.startswith(f"{base}.")
        return "vision" if site.stream == "vision" or (site.module is not None and is_inside) else None

    def answers(self, main: FamilyTable | None) -> tuple[str, ...]:
        """Return the names under which an output holds the answer, in the order in which they are tried."""
        if self.are_compared:
            return ("logits_per_text" if main is self.tables["text"] else "logits_per_image",)
        return () if main is None else ("logits", *main.family.answers)

    def shape(self, main: FamilyTable, own: ModelShape, parts: Mapping[str, ModelShape]) -> ModelShape:
        """Return the shape of the model with those of its streams.

        Args:
            main: The table of what answers.
            own: Its shape.
            parts: The shapes of all streams.
        """
        name = next((name for name, table in self.tables.items() if table is main), None)
        made = dict(parts)
        if self.are_compared:
            made |= {
                other: replace(part, refused=dict.fromkeys(_names(), _SHARED[other]))
                for other, part in parts.items()
                if other != name
            }
        return replace(own, parts=made, main=name) if made else own

    def at_other_size(self, shape: ModelShape) -> ModelShape:
        """Return the shape of the model where pictures are of another size than those that it was made for."""
        lost = dict.fromkeys(
            ("embed", "pos_embed"), "positions are computed anew for pictures of this size; use resid_pre"
        )
        parts = {
            name: replace(part, refused={**lost, **part.refused}) if name == "vision" else part
            for name, part in shape.parts.items()
        }
        own = {**lost, **shape.refused} if shape.main == "vision" else shape.refused
        return replace(shape, parts=parts, refused=own)


def find_token(module: nn.Module, grid: Grid) -> tuple[int, int] | None:
    """Return the token whose place a picture takes in prompts, and how many of them it takes; None where it takes none.

    Args:
        module: The model.
        grid: The tokens that its vision tower makes of a picture.
    """
    config = getattr(module, "config", None)
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    token = next((each for each in found if isinstance(each, int)), None)
    if token is None:
        return None
    n_patches = len(grid.labels()) - len(grid.names)
    pooled = getattr(config, "mm_tokens_per_image", None)  # Gemma 3
    is_full = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return token, pooled if isinstance(pooled, int) else n_patches + (len(grid.names) if is_full else 0)


def _names() -> list[str]:
    return [name for name in NAMES if name != "module"]
