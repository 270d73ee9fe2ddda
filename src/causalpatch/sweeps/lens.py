"""What the stream says of the answer layer by layer, and who wrote it: logit lens and direct logit attribution.

Neither is causal evidence. Both read untouched runs, beside what patching measures; ``direct_effect`` is the causal
counterpart: it changes what a component sends straight to the logits, and lets the final norm follow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from torch import nn

from causalpatch.base.errors import AnswerError, ModelUnsupported
from causalpatch.base.extras import lazy
from causalpatch.experiment import Experiment, read_values
from causalpatch.experiment.requests import one_of
from causalpatch.models import Model
from causalpatch.pairs.role import Role
from causalpatch.patches import From, Patch
from causalpatch.sites import Site
from causalpatch.sweeps.paths import TWO_STREAMS

if TYPE_CHECKING:
    import xarray as xr
else:
    xr = lazy("xarray")

CONSTANT = "constant"
"""What no component writes: the biases of the final norm and of the unembedding."""
_TIMES_EPS = 2_000.0
"""Sums of many terms may be off by so many units in the last place of the largest."""

Rows = Float[np.ndarray, "pair width"]


def logit_lens(experiment: Experiment) -> "xr.Dataset":
    """Read the metrics behind every layer, as if the later ones were not there.

    The stream behind the last layer is replaced by the one behind each layer of the same run, at all tokens. What comes
    out went through the model's own final norm, unembedding, scales and soft-caps.

    Args:
        experiment: Model, pairs and metrics; of both sides the untouched runs are read.

    Returns:
        ``clean`` and ``corrupt``, with axes (layer, pair), and ``metric_name`` in front where there are several
        metrics, in the metric's unit. The last layer's are the metrics of the runs themselves.

    Raises:
        SiteUnsupported: The model has no ``resid_post``.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> lens = logit_lens(cp.Experiment(model, cp.load_pairs("ioi", model)))
        >>> dict(lens["clean"].sizes) == {"layer": 4, "pair": 48}
        True

    Cost:
        Three runs per pair and side; the patched ones begin behind the last layer.

    References:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    layers = range(experiment.model.shape.n_layers)
    last = Site("resid_post", layers[-1] if layers else 0, stream=experiment.model.main_stream)
    asked = [Patch(last, From(replace(last, layer=layer), run="base")) for layer in layers] or [Patch(last)]
    found = {}
    for side in ("clean", "corrupt"):
        turned = experiment.turned("noise" if side == "clean" else "denoise")
        data = turned.run(asked, axes={"layer": list(layers)}, title="logit lens").to_xarray()
        found[side] = data["metric"].drop_vars("component", errors="ignore")
    return xr.Dataset(found)


def direct_logit_attribution(
    experiment: Experiment, by: Literal["layer", "head"] = "layer", *, side: Role = "clean"
) -> "xr.DataArray":
    """Divide the logit difference at the last token among the components that wrote the stream.

    The final norm's scale is **frozen** at what it is in the run, so that the norm is a linear map, and what each
    component added to the stream has a share: ``contribution = (U_answer - U_wrong) . norm(component)``. The sum over
    all of them is the logit difference, to rounding; that is checked.

    Args:
        experiment: Model and pairs.
        by: ``"layer"``: attention and MLP of each layer. ``"head"``: each head by itself, and the bias of attention's
            projection. A norm behind attention is frozen too, and multipliers are applied.
        side: Whose runs are read.

    Returns:
        Logits, axes (sender, pair); a sender is a site's name, ``attn_bias.LAYER`` or ``constant`` (biases of the final
        norm and the unembedding). Coordinates ``layer`` and ``head`` are -1 where there is none.

    Raises:
        AnswerError: Pairs do not have one answer and one wrong answer of one token each.
        SettingError: There is no such way to divide.
        ModelUnsupported: The stream is not the sum of what its components add, the logits are no linear map of the
            final norm (a soft-cap), or a norm is of an unknown kind; the message says which.
        SiteUnsupported: The model does not have a site that is needed.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
        >>> parts = direct_logit_attribution(experiment)
        >>> bool(abs(parts.sum("sender") - experiment.baseline.clean[0]).max() < 1e-3)
        True

    Cost:
        One full forward per pair.

    References:
        Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022, 2211.00593.
    """
    one_of("by", by, ("layer", "head"))
    one_of("side", side, ("clean", "corrupt"))
    answers = _answers(experiment)
    run = _Read(experiment.turned("noise" if side == "clean" else "denoise"), by)
    head = _Head.of(run, answers)
    senders: list[tuple[str, int, int]] = []
    values: list[np.ndarray] = []
    for (name, layer, unit), added in run.parts():
        senders.append((name, layer, unit))
        values.append(head.contribution(added))
    senders.append((CONSTANT, -1, -1))
    values.append(head.constant)
    names, layers, heads = zip(*senders, strict=True)
    return xr.DataArray(
        np.stack(values),
        dims=("sender", "pair"),
        coords={
            "sender": list(names),
            "pair": list(experiment.pairs.ids),
            "layer": ("sender", list(layers)),
            "head": ("sender", list(heads)),
        },
        name="logits",
        attrs={"side": side, "scale": "of the final norm, frozen", "model": experiment.model.name},
    )


def _answers(experiment: Experiment) -> tuple[list[int], list[int]]:
    """Return the answer and the wrong answer of each pair."""
    found: tuple[list[int], list[int]] = ([], [])
    for number, pair in enumerate(experiment.pairs):
        for side, some in zip(("answer", "wrong_answer"), found, strict=True):
            answers = getattr(pair, side)
            if len(answers) != 1 or len(answers[0]) != 1:
                raise AnswerError(
                    f"pair {number} of '{experiment.pairs.name}' has no single {side} of one token",
                    facts=[(side, answers or "none"), ("why needed", "a set or a longer answer is no linear map")],
                    fix="drop it, or cut answers down: load_pairs(…, first_token=True)",
                )
            some.append(answers[0][0])
    return found


class _Read:
    """What the sites hold at the last token of the base runs, in float64."""

    def __init__(self, experiment: Experiment, by: str) -> None:
        self.model, self.by = experiment.model, by
        shape = self.model.shape
        self.layers = range(shape.n_layers)
        self.heads = range(shape.units.get("head", 0)) if by == "head" else range(0)
        if self.model.family is None or self.model.streams or not self.layers:
            raise ModelUnsupported(
                f"the logits of '{self.model.name}' cannot be attributed",
                facts=[("why", TWO_STREAMS if self.model.streams else self.model.family_note)],
                fix="patch its sites: sweep(…)" if self.model.streams else "patch its modules: module(PATH).output",
            )
        sites = [Site("resid_pre", 0), Site("resid_post", self.layers[-1]), Site("final_norm"), Site("logits")]
        sites += [Site(name, layer) for layer in self.layers for name in ("attn_out", "mlp_out")]
        sites += [Site("head_out", layer, head) for layer in self.layers for head in self.heads]
        found = read_values(experiment, [site.at(-1) for site in sites])
        rows = (np.stack([np.asarray(value)[0] for value in of_pairs]) for of_pairs in found)
        self.values = {site: row.astype(np.float64) for site, row in zip(sites, rows, strict=True)}
        self.eps = float(np.finfo(str(self.model.dtype).removeprefix("torch.")).eps) if _is_wide(self.model) else 2**-8

    def is_close(self, got: np.ndarray, wanted: np.ndarray) -> bool:
        """Say whether two arrays are the same but for rounding."""
        return bool(np.abs(got - wanted).max() <= _TIMES_EPS * self.eps * max(1e-30, float(np.abs(wanted).max())))

    def refuse(self, why: str) -> ModelUnsupported:
        """Return the error that says why the logits cannot be attributed."""
        return ModelUnsupported(
            f"the logits of '{self.model.name}' cannot be attributed by {self.by}",
            facts=[("why", why)],
            fix="measure direct effects instead, which need no linear map: direct_effect(experiment)",
        )

    def parts(self) -> Iterator[tuple[tuple[str, int, int], Rows]]:
        """Yield what was added to the stream, with name, layer and head."""
        stream = self.values[Site("resid_post", self.layers[-1])]
        made: list[tuple[tuple[str, int, int], Rows]] = [(("resid_pre.0", -1, -1), self.values[Site("resid_pre", 0)])]
        for layer in self.layers:
            attention = self.values[Site("attn_out", layer)]
            made += self._heads_of(layer) if self.by == "head" else [((f"attn_out.{layer}", layer, -1), attention)]
            made.append(((f"mlp_out.{layer}", layer, -1), self.values[Site("mlp_out", layer)]))
        total = sum((rows for _, rows in made), np.zeros_like(stream))
        if not self.is_close(total, stream):
            raise self.refuse("the stream into the final norm is not the sum of what its components add")
        yield from made

    def _heads_of(self, layer: int) -> list[tuple[tuple[str, int, int], Rows]]:
        """Return what heads add to the stream: through a multiplier, or a norm whose scale is frozen."""
        added = self.values[Site("attn_out", layer)]
        of_heads = {head: self.values[Site("head_out", layer, head)] for head in self.heads}
        tap = self.model.tap(Site("head_out", layer, 0))
        bias = _array(getattr(self.model.module.get_submodule(tap.port.path), "bias", None))
        bias = np.zeros(added.shape[1]) if bias is None else bias
        whole = sum(of_heads.values(), np.zeros_like(added)) + bias
        times = float((whole * added).sum() / max(1e-300, float((whole * whole).sum())))
        if self.is_close(times * whole, added):
            norm = _Norm(np.full((len(added), 1), times), np.ones(1), np.zeros(1), is_centred=False)
        else:
            port = self.model.tap(Site("attn_out", layer)).port
            found = _Norm.of(self.model.module.get_submodule(port.path), whole, added, self)
            if found is None or port.side != "output":
                raise self.refuse(f"what heads of layer {layer} add goes through something else than a norm")
            norm = found
        parts = [((f"head_out.{layer}.{h}", layer, h), norm.linear(rows)) for h, rows in of_heads.items()]
        rest = norm.linear(np.broadcast_to(bias, added.shape)) + norm.bias
        return [*parts, ((f"attn_bias.{layer}", layer, -1), rest)]


@dataclass(frozen=True)
class _Norm:
    """A norm whose scale is that of one run: ``linear(x) + bias``.

    Args:
        scale: What each pair's values are multiplied by, ``(pair, 1)``.
        gain: The weights, ``(width,)``.
        bias: What is added, ``(width,)``.
        is_centred: Whether the mean over the width is taken off first (LayerNorm).
    """

    scale: np.ndarray
    gain: np.ndarray
    bias: np.ndarray
    is_centred: bool

    @classmethod
    def of(cls, module: nn.Module, given: Rows, made: Rows, run: _Read) -> "_Norm | None":
        """Return the norm that made some values of others, RMSNorm or LayerNorm; None where it is neither."""
        weight = _array(getattr(module, "weight", None))
        bias = _array(getattr(module, "bias", None))
        weight = np.ones(given.shape[1]) if weight is None else weight
        bias = np.zeros(given.shape[1]) if bias is None else bias
        names = ("variance_epsilon", "eps", "epsilon")
        eps = next((float(e) for e in (getattr(module, name, None) for name in names) if e is not None), 0.0)
        if weight.shape != given.shape[1:]:
            return None
        for is_centred in (False, True):
            flat = given - given.mean(1, keepdims=True) * is_centred
            scale = 1 / np.sqrt((flat**2).mean(1, keepdims=True) + eps)
            for gain in (weight, 1 + weight):  # Gemma's weights are what is added to 1
                if run.is_close(flat * scale * gain + bias, made):
                    return cls(scale, gain, bias, is_centred)
        return None

    def linear(self, rows: Rows) -> Rows:
        """Return what the norm makes of a part of what it is given."""
        found: np.ndarray = (rows - rows.mean(1, keepdims=True) * self.is_centred) * self.scale * self.gain
        return found


@dataclass(frozen=True)
class _Head:
    """From what is in the stream to the logit difference, with the final norm's scale frozen."""

    norm: _Norm
    direction: Rows
    constant: np.ndarray

    @classmethod
    def of(cls, run: _Read, answers: tuple[Sequence[int], Sequence[int]]) -> "_Head":
        """Return it, held against the model's own norm and logits."""
        model = run.model
        stream, normed = run.values[Site("resid_post", run.layers[-1])], run.values[Site("final_norm")]
        norm = _Norm.of(model.module.get_submodule(model.tap(Site("final_norm")).port.path), stream, normed, run)
        if norm is None:
            raise run.refuse("the final norm is neither an RMSNorm nor a LayerNorm")
        unembed = getattr(model.module, "get_output_embeddings", lambda: None)()
        weight = _array(getattr(unembed, "weight", None))
        logits = run.values[Site("logits")]
        if weight is None or weight.shape != (logits.shape[1], normed.shape[1]):
            raise run.refuse("it has no unembedding of one row for each logit")
        bias = _array(getattr(unembed, "bias", None))
        bias = np.zeros(len(weight)) if bias is None else bias
        plain = normed @ weight.T + bias
        times = float((plain * logits).sum() / max(1e-300, float((plain**2).sum())))
        if not run.is_close(times * plain, logits):
            raise run.refuse("its logits are no multiple of the unembedding's, as behind a soft-cap")
        right, wrong = (np.asarray(some) for some in answers)
        direction = times * (weight[right] - weight[wrong])
        return cls(norm, direction, (norm.bias * direction).sum(1) + times * (bias[right] - bias[wrong]))

    def contribution(self, added: Rows) -> Float[np.ndarray, " pair"]:
        """Return what a part of the stream adds to the logit difference."""
        found: np.ndarray = (self.norm.linear(added) * self.direction).sum(1)
        return found


def _array(tensor: object) -> np.ndarray | None:
    """Return a parameter in float64."""
    if not hasattr(tensor, "detach"):
        return None
    found: np.ndarray = tensor.detach().double().cpu().numpy()
    return found


def _is_wide(model: Model) -> bool:
    return str(model.dtype) in ("torch.float32", "torch.float64")
