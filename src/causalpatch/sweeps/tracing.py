"""Causal tracing: which states carry a fact from the subject to the answer, token by token and layer by layer.

1. The run is corrupted at the subject: by noise on its embeddings, as in ROME, or by the corrupted prompt of each pair.
2. In the corrupted run one clean state at a time is put back: the stream behind a layer at a token, or what the
   attention or MLP sublayers of a window of layers add at that token.
3. The share of the gap between the clean and the corrupted run that this restores is a cell of the figure.

By noise, everything happens in the clean prompt: the embeddings of the span are noised, the same draws in every cell,
and clean states are those of the untouched run. Each pair is averaged over several draws, whose spread is kept. Nothing
of the corrupted prompts enters but the pairs' answers. By pairs, corrupted and clean prompts meet in aligned columns.

References:
    Meng et al. 2022, "Locating and Editing Factual Associations in GPT", 2202.05262: noise of three standard
    deviations, ten draws, windows of ten layers for sublayers, none for the stream.
    Zhang & Nanda 2024, 2309.16042: noise and pairs can disagree; windows make effects look larger than layers are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import numpy as np

from causalpatch.base.errors import PairError, SettingError
from causalpatch.base.suggest import closest
from causalpatch.experiment import Experiment
from causalpatch.experiment.cells import Grid, grid_of
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import ROLES
from causalpatch.patches import Identity, Intervention, Noise, Patch
from causalpatch.results.effects import Effects
from causalpatch.results.panels import panels
from causalpatch.results.pictures import Picture
from causalpatch.sites import parse
from causalpatch.sweeps.grid import draw_numbers, run_grid, stack_draws, windows_of

By = Literal["noise", "pairs"]
Kind = Literal["resid", "attn", "mlp"]
SITE_OF: Final[Mapping[Kind, str]] = MappingProxyType({"resid": "resid_post", "attn": "attn_out", "mlp": "mlp_out"})
"""What is restored, by kind: the stream behind a layer, or what a sublayer adds to it."""
DRAWS = 10
"""Draws of noise per prompt, as in ROME."""


@dataclass(frozen=True, eq=False)
class Tracing:
    """A causal trace: effects over layers and positions, by protocol and kind of state.

    Args:
        effects: The effects of each protocol and kind.
        span: What was corrupted by noise.
        window: Layers in a window of sublayers.
        columns: Positions at which a pair has a token of the span.
    """

    effects: Mapping[tuple[By, Kind], Effects]
    span: str
    window: int
    columns: tuple[int, ...] = ()

    def __getitem__(self, place: tuple[By, Kind]) -> Effects:
        """Return the effects of a protocol and kind, such as ``("noise", "mlp")``."""
        return self.effects[place]

    def plot(self, *, quantity: str = "recovered") -> Picture:
        """Draw all of it in one figure: a row for each protocol, a column for each kind, one colour scale.

        Args:
            quantity: ``"recovered"``, or ``"effect"`` in the metric's unit, which needs no gap.

        Raises:
            NoGap: A corrupted run does not differ from the clean one, so there is nothing to restore.
        """
        drawn = {(_ROWS[by], self._column(kind)): each for (by, kind), each in self.effects.items()}
        first = next(iter(self.effects.values()))
        model, pairs = (first.provenance[key]["name"] for key in ("model", "pairs"))
        lines = [f"{model} · {pairs}, {len(first.pair_ids)} pairs · metric {first.metrics[0]}"]
        lines += [f"{_ROWS[by]}: {self._gap(by)}" for by in dict.fromkeys(by for by, _ in self.effects)]
        lines += [f"*: token of the span '{self.span}' in some pair"] if self.columns else []
        what = "share of the gap restored" if quantity == "recovered" else "change"
        title = f"Causal trace: {what} by clean states"
        protocols = [by for by, _ in self.effects]
        both = {"noise", "pairs"} <= set(protocols)
        base = "clean (by noise) and the corrupted (by pairs)" if both else _PROMPT[protocols[0]]
        return panels(drawn, title=title, lines=lines, quantity=quantity, starred=self.columns, base=base)

    def save(self, folder: str | Path) -> Path:
        """Write the effects, each into a folder of its own, and the figure; return the folder."""
        folder = Path(folder)
        for (by, kind), each in self.effects.items():
            each.save(folder / f"{by}-{kind}")
        self.plot().save(folder / "trace.svg")
        return folder

    def __repr__(self) -> str:
        lines = [f"Tracing of '{self.span}', windows of {self.window} layers for attn and mlp"]
        for (by, kind), each in self.effects.items():
            lines.append(f"  {by:<5} {kind:<5}  {_largest(each)}")
        return "\n".join(lines)

    def _column(self, kind: Kind) -> str:
        return SITE_OF[kind] if kind == "resid" else f"{SITE_OF[kind]}, windows of {self.window} layers"

    def _gap(self, by: By) -> str:
        data = next(each for (one, _), each in self.effects.items() if one == by).to_xarray()
        clean, corrupt = (float(data[f"baseline_{role}"].mean()) for role in ("clean", "reference"))
        if by == "pairs":
            return f"clean run {clean:.3g}, corrupted run {corrupt:.3g}"
        record = next(each for (one, _), each in self.effects.items() if one == by).over_draws().provenance
        said = f"clean run {clean:.3g}, noised run {corrupt:.3g}; {record['noise']}, {record['draws']['n']} draws"
        spread = record["draws"].get("largest_spread")
        return said if spread is None else f"{said} (standard deviation of an effect over them: up to {spread:.2g})"


_PROMPT: Final[Mapping[By, str]] = MappingProxyType({"noise": "clean", "pairs": "corrupted"})
_ROWS: Final[Mapping[By, str]] = MappingProxyType({"noise": "by noise", "pairs": "by pairs"})


def trace(
    experiment: Experiment,
    span: str = "subject",
    window: int = 10,
    *,
    by: By | Sequence[By] = ("noise", "pairs"),
    kind: Kind | Sequence[Kind] = ("resid", "attn", "mlp"),
    draws: int = DRAWS,
    noise: Noise | None = None,
) -> Tracing:
    """Trace causally: corrupt the subject, restore clean states, and see which of them bring the answer back.

    Args:
        experiment: Model, pairs and metrics; its direction does not matter.
        span: The span of every pair that holds the subject; noise is put on its embeddings.
        window: Layers whose attention or MLP outputs are restored together; the stream is restored layer by layer.
        by: How the run is corrupted: ``"noise"``, ``"pairs"``, or both.
        kind: What is restored: ``"resid"`` (the stream behind a layer), ``"attn"``, ``"mlp"``, or several.
        draws: Draws of noise that each pair is averaged over.
        noise: The noise; by default three standard deviations of the span's embeddings in the clean prompts.

    Returns:
        The effects of each protocol and kind, over layer and position, and over draws by noise. ``.plot()`` draws all
        in one figure.

    Raises:
        PairError: A pair lacks the span, or pairs of unequal lengths have no alignment.
        SettingError: A protocol or kind does not exist, the window holds no layer, or there is to be no draw.
        SiteUnsupported: The model has no such sites.

    Examples:
        >>> import causalpatch as cp
        >>> from causalpatch.pairs.tasks import generate
        >>> model = cp.open_model("zoo:stories")
        >>> rows = generate("agreement", n=12, templates=["near"])
        >>> experiment = cp.Experiment(model, cp.load_pairs(rows, model))
        >>> traced = cp.trace(experiment, span="subject", window=2, kind="mlp", draws=2)
        >>> traced["noise", "mlp"].dims
        ('layer', 'position', 'draw', 'pair')

    Cost:
        By pairs, one run per layer, position, kind and pair; by noise that times the draws, and each of these runs
        begins at the embeddings.

    References:
        Meng et al. 2022, "Locating and Editing Factual Associations in GPT", 2202.05262.
    """
    protocols, kinds = _several("by", by, get_args(By)), _several("kind", kind, get_args(Kind))
    # Of a model with an encoder and a decoder the subject stands in what the encoder reads.
    stream, pairs = "encoder/" if experiment.model.streams else "", experiment.pairs.of("encoder")
    _check_span(pairs, span)
    if "noise" in protocols:
        _check_metrics(experiment)
    made: dict[tuple[By, Kind], Effects] = {}
    for protocol in protocols:
        for each in kinds:
            size = 1 if each == "resid" else window
            wanted = parse(f"{stream}{SITE_OF[each]}")
            grid = windows_of(grid_of(experiment, wanted, ("layer", "position")), size, wanted)
            title = str(wanted) if each == "resid" else f"{wanted} in windows of {size}"
            if protocol == "pairs":
                made[protocol, each] = run_grid(experiment.turned("denoise"), grid, title, None)
            else:
                drawn = Noise(side="clean") if noise is None else noise
                noised = f"{stream}embed@{span}"
                made[protocol, each] = _by_noise(experiment.turned("noise"), grid, title, noised, drawn, draws)
    return Tracing(made, span, window, _columns(pairs, span))


def _columns(pairs: Pairs, span: str) -> tuple[int, ...]:
    """Return the aligned columns in which a pair has a token of the span."""
    places = pairs.aligned().columns[:, :, 0]
    inside = [
        (places[n] >= pair.spans[span][0][0]) & (places[n] < pair.spans[span][0][1]) for n, pair in enumerate(pairs)
    ]
    return tuple(np.flatnonzero(np.any(inside, axis=0)).tolist())


def _by_noise(experiment: Experiment, grid: Grid, title: str, noised: str, noise: Noise, draws: int) -> Effects:
    """Restore states of the clean run in its noised copy, draw by draw."""
    clean = grid.interventions(Identity(), None)
    made: list[Effects] = []
    numbers = draw_numbers(noise, draws)
    for drawn in numbers:
        asked = [Intervention((Patch(noised, drawn), *each.patches), each.label) for each in clean]
        effects = experiment.run(asked, axes=grid.axes, labels=grid.labels, title=title)
        made.append(_as_restored(effects, noised, noise))
        if not effects.is_complete:
            break
    return stack_draws(made, [one.draw for one in numbers])


def _as_restored(effects: Effects, noised: str, noise: Noise) -> Effects:
    """Return effects on the noised run: what restoring adds to it, as a share of what the noise takes away.

    The clean run was the base, and the run with nothing but the noise its reference. Here the noised run is the base.
    """
    data = effects.to_xarray()
    several = "metric_name" in data.dims
    run = {
        role: data[f"baseline_{role}"].values if several else data[f"baseline_{role}"].values[None]
        for role in ("clean", "reference")
    }
    values = data["metric"].values
    record = dict(effects.provenance)
    facts = {**record["facts"], "direction": "denoise", "value": f"clean run, in a run with noise at {noised}"}
    return Effects.build(
        axes={axis: data[axis].values.tolist() for axis in effects.axes},
        pair_ids=effects.pair_ids,
        groups=data["component"].values,
        metrics=effects.metrics,
        values=values if several else values[None],
        status=data["status"].values,
        baselines={"clean": run["clean"], "corrupt": run["reference"], "source": run["clean"]},
        labels={"position": data["token"].values.tolist()} if "token" in data.coords else None,
        positions=np.stack([data["base_position"].values] * 2, axis=-1) if "base_position" in data.coords else None,
        provenance={
            **record,
            "direction": "denoise",
            "value": "source",
            "reference": f"run with noise at {noised}",
            "noise": _noise_text(record, noise),
            "facts": facts,
        },
    )


def _noise_text(record: Mapping[str, Any], noise: Noise) -> str:
    fitted = next((one for one in record.get("fitted", ()) if "sigma_low" in one), None)
    if fitted is None:
        return str(noise)
    return f"noise of {noise.multiple:g} standard deviations of the span's embeddings (sigma {fitted['sigma_low']:.3g})"


def _largest(effects: Effects) -> str:
    """Return the largest cell in words, as effects print it."""
    lines = repr(effects.over_draws()).splitlines()
    return next((line.partition("largest")[2].strip() for line in lines if "  largest" in line), "")


def _several(name: str, asked: Any, known: Sequence[Any]) -> list[Any]:
    """Return what was asked for as a list without repeats."""
    listed = list(dict.fromkeys([asked] if isinstance(asked, str) else asked))
    strange = next((one for one in listed if one not in known), None)
    if strange is not None or not listed:
        raise SettingError(
            f"a trace cannot have {name}={strange!r}" if listed else f"a trace needs at least one {name}",
            facts=[("known", ", ".join(known))],
            fix=f'{name}="{known[0]}"',
        )
    return listed


def _check_metrics(experiment: Experiment) -> None:
    """Make sure that no metric compares with the corrupted prompts' runs, which have no part in a trace by noise."""
    for metric in experiment.metrics:
        if "source" in metric.compares:
            raise SettingError(
                f"a trace by noise has no source run, with which {metric.name!r} compares",
                facts=[("by noise", "clean states go into the noised clean prompt")],
                fix='by="pairs", or a metric of the answer, such as metric="probability"',
            )


def _check_span(pairs: Pairs, span: str) -> None:
    """Make sure that every pair has the span."""
    for number, pair in enumerate(pairs):
        if span in pair.spans:
            continue
        near = [*closest(span, pair.spans), *sorted(pair.spans)]
        tokens = " ".join(map(repr, pairs.tokens("clean", number)[:10])) if pairs.kind == "tokens" else "an array"
        fix = f"name it in the column spans: {{'{span}': [1, 3]}}"
        raise PairError(
            f"pair {number} of '{pairs.name}' has no span '{span}' to trace from",
            facts=[("its spans", ", ".join(dict.fromkeys(near)) or "none"), (ROLES[0], tokens)],
            fix=f'trace(experiment, span="{near[0]}")' if near else fix,
        )
