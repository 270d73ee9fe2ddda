"""The page that says which sites each family has: every cell tried on a tiny random model, none of it written by hand.

``python -m causalpatch.testing.support docs/support.md`` (``make support``) writes it anew.

1. For each family a tiny model in float32, of the unmodified modules of transformers, is opened, and every site tried
   by ``prove``. A small sweep shows which engine makes its runs.
2. The default configuration of each kind of model, mostly a large one, is opened on the ``meta`` device: modules and
   shapes without weights. Nothing runs there; it shows that the tables find heads and neurons in models of full size.

Cost: about a second for each family; some hundred megabytes.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from causalpatch.engine import prove
from causalpatch.experiment import Experiment
from causalpatch.models import FAMILIES, Model, open_model
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import NAMES
from causalpatch.sites.names import CROSS_SITES, FEATURE_SITES
from causalpatch.testing.pictures import TABLES, class_of, tiny_seer
from causalpatch.testing.tiny import ENCODER_DECODERS, ENCODERS, FAMILY_NAMES, tiny_model

CROSS = tuple(name for name in NAMES if name in CROSS_SITES)
SITES = tuple(name for name in NAMES if name not in (*CROSS, *FEATURE_SITES, "module"))
_CROSS = """\
## Cross-attention

Models with an encoder and a decoder have the sites above once in each of them, and once these, in the decoder.
"""
_HEAD = """\
# Which families have which sites

Every cell is the outcome of a trial, none is written by hand: `make support` opens a tiny random model of each family
and tries every site by the proofs that the library makes when it first uses a model. A value written back changes no
bit; another value changes the answer; where all must flow through a site, the source's value gives the source's
answer; and the sums and products hold that the site's definition claims. A site that has no place in a family is
*refused*, with a reason: see below the table. `causalpatch doctor MODEL` makes the same trials on a model of yours.
Whether projections have biases is often a matter of the configuration; here it is that of the tiny model.

*engine* is the fastest that makes runs of the family, after its check against full forwards: `wavefront` (tokens that
can have changed), `restart` (whole prompts from the first patched layer on) or `rows` (full forwards). Models of no
family have `module(PATH)` sites. Models that are given pictures are tried tower by tower; in CLIP, SigLIP and language
models that see, towers are the streams `vision` and `text`: [Pictures](pictures.md).
"""
_LARGE = """\
## Models of full size

The default configuration of each kind of model in transformers, opened by its table without weights: nothing runs.
Widths are those of the stream and of a head (queries and keys/values, where they differ).
"""


@dataclass(frozen=True)
class Tried:
    """What came of one family.

    Args:
        family: Its name.
        model_types: The names by which configurations call it.
        engine: The engine that made its runs.
        outcomes: For each site None where it was proved, else the reason.
        stream: The stream that they stand in, of a model with an encoder and a decoder.
    """

    family: str
    model_types: tuple[str, ...]
    engine: str
    outcomes: dict[str, str | None]
    stream: str = ""

    @property
    def title(self) -> str:
        """The family, with the stream."""
        return f"{self.family} {self.stream}".strip()


def try_family(name: str) -> list[Tried]:
    """Try every site of a tiny model of a family; of an encoder and its decoder by themselves.

    Args:
        name: One of ``FAMILY_NAMES``, ``ENCODER_DECODERS`` or ``TABLES``.
    """
    model = open_model((tiny_seer if name in TABLES else tiny_model)(name, dtype=torch.float32))
    kinds = next((family.model_types for family in FAMILIES if family.name == name), (name,))
    if model.streams is None or name in TABLES:
        outcomes = {site: prove(model, site).failure for site in SITES}
        return [Tried(name, kinds, _engine_of(model), outcomes)]
    engine = _engine_of(model)
    read = {site: prove(model, f"encoder/{site}").failure for site in SITES if site != "logits"}
    written = {site: prove(model, site if site == "logits" else f"decoder/{site}").failure for site in SITES}
    written |= {site: prove(model, site).failure for site in CROSS}
    return [
        Tried(name, kinds, engine, {**read, "logits": "only the decoder gives logits"}, "encoder"),
        Tried(name, kinds, engine, written, "decoder"),
    ]


def make_page(tried: Sequence[Tried], shapes: Sequence[Sequence[str]]) -> str:
    """Return the page in Markdown.

    Args:
        tried: Families.
        shapes: Rows of the table of large models.
    """
    tried = sorted(tried, key=lambda each: each.title)
    reasons = list(dict.fromkeys(why for each in tried for why in each.outcomes.values() if why is not None))
    number = {reason: place for place, reason in enumerate(reasons, 1)}

    def cell(why: str | None) -> str:
        return "proved" if why is None else f"refused: {number[why]}"

    rows = [[f"**{each.title}**", each.engine, *(cell(each.outcomes[site]) for site in SITES)] for each in tried]
    across = [each for each in tried if set(CROSS) <= set(each.outcomes)]
    crossing = [[f"**{each.family}**", *(cell(each.outcomes[site]) for site in CROSS)] for each in across]
    kinds = dict(sorted({each.family: each.model_types for each in tried}.items()))
    called = [[family, ", ".join(f"`{name}`" for name in names)] for family, names in kinds.items()]
    parts = [
        _HEAD,
        _table(["family", "engine", *(f"`{site}`" for site in SITES)], rows),
        *([_CROSS, _table(["family", *(f"`{site}`" for site in CROSS)], crossing)] if crossing else []),
        "## Why a site is refused\n",
        "\n".join(f"{place}. {reason}" for reason, place in number.items()) + "\n",
        "## How configurations call them\n\nVariants of one `model_type` are told apart by further entries.\n",
        _table(["family", "`model_type`"], called),
        _LARGE,
        _table(["`model_type`", "family", "layers", "width", "heads", "kv_heads", "head width", "neurons"], shapes),
    ]
    return "\n".join(parts)


def shapes_of_large_models() -> list[list[str]]:
    """Return the counts of each kind of model's default configuration, found without weights."""
    tried = [family for family in FAMILIES if family.encoder or family.name in (*FAMILY_NAMES, *TABLES)]
    kinds = sorted({kind for family in tried for kind in family.model_types})
    return [row for kind in kinds for row in _shapes_of(kind)]


def _shapes_of(kind: str) -> list[list[str]]:
    """Return the counts of a kind of model; of an encoder and its decoder by themselves."""
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = open_model(_built(kind, config))
    family = model.family.name if model.family else model.family_note
    rows = []
    for stream, part in model.shape.parts.items() or [(None, model.shape)]:
        n_heads, n_kv_heads = part.units.get("head", 0), part.units.get("kv_head", 0)
        widths = [str(model.sizes(name, stream)["head_width"]) for name in ("q", "v") if n_heads]
        counts = [part.n_layers, model.width, n_heads, n_kv_heads]
        shown = [f"{count:,}" if count else "none" for count in counts]
        neurons = part.units.get("neuron")
        sizes = ["/".join(dict.fromkeys(widths)) or "none", f"{neurons:,}" if neurons else "none"]
        rows.append([kind, f"{family} {stream or ''}".strip(), *shown, *sizes])
    return rows


def _built(kind: str, config: Any) -> Any:
    """Build a kind of model of transformers, with its head where it has one."""
    families = [family for family in FAMILIES if kind in family.model_types]
    if families[0].name in TABLES:
        return class_of(families[0].name)(config)
    if any(family.name in ENCODERS for family in families):
        return AutoModelForMaskedLM.from_config(config)
    if any(family.encoder is not None and family.encoder.convolutions for family in families):
        return AutoModelForSpeechSeq2Seq.from_config(config)
    causal = not any(family.encoder for family in families)
    return (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_config(config)


def _engine_of(model: Model) -> str:
    """Return the engine that makes most runs of a small sweep."""
    rng = np.random.default_rng(0)
    if model.kind == "arrays" and model.picture is not None:
        clean, corrupt = rng.normal(size=(2, 2, *model.picture))
        pairs = Pairs.from_arrays(clean, corrupt, answer=[0, 1], wrong_answer=[1, 2])
    else:
        prompts = [rng.integers(3, 36, n) for n in (5, 7)]
        pairs = Pairs([_pair_for(model, ids, rng) for ids in prompts], name="random")
    known = [name for name in ("resid_pre", "z", "mlp_out", "mlp_post") if name not in model.shape.refused]
    streams = [f"{name}/" for name in model.shape.parts] or [""]
    where = [f"{name}.0.0@1" if NAMES[name].unit_axis else f"{name}.0@1" for name in known]
    sites = [f"{stream}{site}" for stream in streams for site in where]
    effects = Experiment(model, pairs, show_progress=False).run(sites)
    return str(effects.provenance["engine"]["tier"])


def _pair_for(model: Model, ids: np.ndarray, rng: np.random.Generator) -> Pair:
    """Return a random pair for a model."""
    pair = Pair(ids, np.roll(ids, 1), ((3,),), ((4,),))
    if model.sound is not None:
        frames = np.arange(model.sound.n_frames)
        clean, corrupt = rng.normal(size=(2, *model.sound.shape))
        encoder = Pair(frames, frames, is_called="sound")
        return replace(pair, encoder=encoder, beside={model.sound.argument: (clean, corrupt)})
    return replace(pair, encoder=Pair(pair.clean, pair.corrupt)) if model.streams else pair


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Write the page to a file.

    Args:
        arguments: The file.
    """
    (path,) = arguments
    names = (*FAMILY_NAMES, *ENCODER_DECODERS, *TABLES)
    tried = [each for name in names for each in try_family(name)]
    Path(path).write_text(make_page(tried, shapes_of_large_models()))


if __name__ == "__main__":
    main(sys.argv[1:])
