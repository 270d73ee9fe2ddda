"""What a family's table can say: kinds of facts about where a site is found, and the table itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

Side = Literal["input", "output"]


@dataclass(frozen=True)
class At:
    """The site is the whole tensor on one side of a module.

    Args:
        module: Path below the layer (or below the base, for a site without layer); ``""`` is the layer itself.
        side: ``"input"`` or ``"output"``.
        times: Attribute of the layer by which the model multiplies the tensor before it adds it to the stream.
        is_folded: The tensor does not have rows and positions as its first two axes, but as one, or an axis between.
    """

    module: str
    side: Side
    times: str = ""
    is_folded: bool = False


@dataclass(frozen=True)
class Parted:
    """The site's units (heads or neurons) lie side by side on the last axis of a tensor.

    Args:
        module: Path below the layer.
        side: ``"input"`` or ``"output"``.
        part: Which part of a fused tensor, counted from 0.
        parts: Number of parts that are fused in the tensor: three are queries, keys and values, of as many heads each
            as there are.
        by_unit: The parts alternate (q, k, v of head 0, then of head 1) rather than one part of all units standing
            before the next part of all units. Where heads share keys and values, the queries of all heads of a group
            stand before the key and the value that they share.
        is_folded: The tensor does not have rows and positions as its first two axes, but as one, or an axis between.
    """

    module: str
    side: Side
    part: int = 0
    parts: int = 1
    by_unit: bool = False
    is_folded: bool = False


@dataclass(frozen=True)
class SumOf:
    """The site is the sum of two tensors; a new value is written through the first.

    Args:
        changed: The tensor that is changed.
        kept: The tensor that stays as it is; it passes first.
    """

    changed: At
    kept: At


@dataclass(frozen=True)
class ShareOf:
    """The site is one head's term of an output projection.

    Args:
        module: Path of the projection below the layer.
    """

    module: str


@dataclass(frozen=True)
class RoutedBy:
    """The site is the weights that a router gives experts: it returns logits, and each token's weights and experts.

    Args:
        module: Path of the router below the layer. A layer without it has no experts.
    """

    module: str


@dataclass(frozen=True)
class TermOf:
    """The site is what one of a layer's experts adds to the sum of them all.

    Args:
        module: Path below the layer of the module of all experts: it takes tokens, each token's experts and their
            weights, and returns the sum.
        router: Path of the router below the layer. A layer without either has no experts.
    """

    module: str
    router: str


@dataclass(frozen=True)
class Absent:
    """The family has no such site.

    Args:
        reason: Why, and what to use instead.
    """

    reason: str


@dataclass(frozen=True)
class Positional:
    """The site is a parameter with a row for each token that a module adds at its end, or what it adds it to.

    Args:
        module: Path below the base.
        parameter: Name of the parameter below the module; its last two axes are tokens and width.
        is_without: The site is the module's output without that term.
    """

    module: str
    parameter: str
    is_without: bool = False


@dataclass(frozen=True)
class Pictures:
    """How a family makes tokens of a picture: special ones, registers, and a token for each patch, row by row.

    Args:
        patches: Path below the base of the module that cuts pictures into patches.
        specials: What the tokens in front of the patches are called.
        registers: Name of the configuration's number of register tokens, which stand behind the first token and have
            no position; empty where there are none.
    """

    patches: str
    specials: tuple[str, ...]
    registers: str = ""


Fact = At | Parted | SumOf | ShareOf | RoutedBy | TermOf | Positional | Absent

# What several families say alike.
ROTARY: Final = Absent("positions enter inside attention, by rotary embeddings; use q_rot or k_rot")
SLOPES: Final = Absent("positions enter inside attention, as slopes of the scores (ALiBi); use scores")
NOT_TURNED: Final = Absent("nothing turns the queries and keys of this family; use q and k")
NOT_MET: Final = Absent(
    "attention is computed by the model's own module, which shows no queries and keys as it compares them; "
    "use q, k or scores"
)
NO_GATE: Final = Absent("its MLP has no gate; use mlp_pre")
NO_CROSS: Final = Absent("it reads no encoder, so that it has no cross-attention; use z")
BIASED: Final = Absent("positions enter inside attention, as a bias of the scores; use scores")
PARALLEL: Final = Absent("attention and MLP read the same stream (parallel blocks); use resid_pre or resid_post")


@dataclass(frozen=True)
class Family:
    """The table of facts of one family of models.

    Sites inside attention (``q_rot``, ``k_rot``, ``scores``, ``pattern``) and biases follow from the others unless the
    table names them: attention is the module around the projection that ``z`` goes into, and a bias is that of a
    projection which is named already.

    Args:
        name: Name of the family.
        model_types: The ``model_type`` of the configurations that it covers.
        base: Attribute of the whole model that holds everything but the head.
        layers: Path of the list of layers, below the base.
        head: Path of the head, below the whole model.
        other_heads: Paths of heads that models of the family have instead, such as a classifier's.
        sites: For each site name, where it is found.
        norms: Each layer's norms, below the layer, in the order in which they are applied.
        extras: Further direct children of a layer which add nothing to the stream.
        attention: Path of the module that attends, where it is not the one around the projection that ``z`` goes into.
        sees_ahead: Tokens see later ones of their prompt.
        positions_behind: Name of the configuration's id after which it numbers positions; empty where they begin at 0.
        when: Values that the configuration must have (or leave out), for variants that share a ``model_type``.
        heads: Name of the configuration's number of heads; empty where there are none.
        kv_heads: Name of the configuration's number of key and value heads, or that number.
        width: Name of the configuration's width of the stream.
        query_width: Names of the configuration's entries that add up to the width of a query, where that is not the
            width of a value.
        post_norms: Norms through which the sum of the stream and what attention adds goes, and then the sum with what
            the MLP adds; between the two that with what cross-attention adds, where there is any. Empty where the
            stream is the plain sum.
        thins_gates: What a gate gives may be thinned out on its way to the activation function.
        reads_ids: Layers are given something of each token's id besides the stream.
        needs_config: Taken over only where the configuration says so: other models have these names too, and do
            something else.
        stream: ``"encoder"`` or ``"decoder"`` for the one half of a model that has both, else empty.
        cross: Path of the module that attends to the encoder's tokens, below the layer; empty where there is none.
        encoder: For a decoder that reads an encoder, the table of that; ``base`` is then the decoder's.
        counts_columns: Tokens are numbered by the column that they stand in, padding included.
        convolutions: Paths of the convolutions, below the base, by which an encoder makes its positions of an array:
            frames, of which there are always as many.
        pictures: How it makes tokens of a picture, where that is what it is given.
        is_compared: What it makes of texts is compared with what another tower makes of pictures.
        answers: Names of the output that is the answer of a model without logits, in the order in which they are tried.
    """

    name: str
    model_types: tuple[str, ...]
    base: str
    layers: str
    head: str
    sites: Mapping[str, Fact]
    norms: tuple[str, ...]
    extras: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()
    attention: str = ""
    positions_behind: str = ""
    sees_ahead: bool = False
    when: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    heads: str = "num_attention_heads"
    kv_heads: str | int = "num_attention_heads"
    width: str = "hidden_size"
    query_width: tuple[str, ...] = ()
    post_norms: tuple[str, ...] = ()
    thins_gates: bool = False
    reads_ids: bool = False
    needs_config: bool = False
    stream: str = ""
    cross: str = ""
    encoder: "Family | None" = None
    counts_columns: bool = False
    convolutions: tuple[str, ...] = ()
    pictures: Pictures | None = None
    is_compared: bool = False
    answers: tuple[str, ...] = ()
