"""From a job to its plan: what the plan's arithmetic needs, read from the model, the pairs and the interventions.

1. Every cell is laid out as a run would lay it out; nothing runs.
2. Cells of one pair that enter at the same place and write the same tokens cost the same and are counted together.
3. Each kind of cell's cone is counted, and with it what every engine needs.

An intervention with several patches counts as one that writes all their tokens where the first of them stands; that
may be a little more than it takes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from causalpatch.engine.calibrate import remembered
from causalpatch.engine.cone import ModelNumbers, Point, cone, full_flops
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import Job, lay_rows, most_rows
from causalpatch.engine.memory import row_cost
from causalpatch.engine.plan import ModelCost, Plan, for_tier, make_plan, whole_flops
from causalpatch.engine.planned_wave import Cells, LaidOut, plan_wave, reads_of
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.screen_cost import Pass
from causalpatch.engine.values import Row
from causalpatch.models import Model
from causalpatch.patches import From, Mean, Noise, Resample
from causalpatch.sites import Site

_POINTS = {
    "embed": Point.STREAM,
    "pos_embed": Point.STREAM,
    "resid_pre": Point.STREAM,
    "resid_post": Point.STREAM,
    "final_norm": Point.STREAM,
    "q": Point.QUERY,
    "k": Point.KEY_VALUE,
    "v": Point.KEY_VALUE,
    "q_bias": Point.QUERY,
    "k_bias": Point.KEY_VALUE,
    "v_bias": Point.KEY_VALUE,
    "q_rot": Point.QUERY,
    "k_rot": Point.KEY_VALUE,
    # A row of scores or weights changes what its query attends to, and no more, as another query would.
    "scores": Point.QUERY,
    "pattern": Point.QUERY,
    "z": Point.ATTENDED,
    "head_out": Point.MIDDLE,
    "attn_out": Point.MIDDLE,
    "resid_mid": Point.MIDDLE,
    "attn_bias": Point.MIDDLE,
    "router": Point.MIDDLE,
    "expert_out": Point.ADDED,
    # The activation function is no matrix product, so that what is before it costs what is behind it.
    "mlp_pre": Point.ACTIVATED,
    "mlp_gate": Point.ACTIVATED,
    "mlp_post": Point.ACTIVATED,
    "mlp_bias": Point.ADDED,
    "mlp_out": Point.ADDED,
    "logits": Point.LOGITS,
}


def plan_job(job: Job, n_forks: int, *, gauge: Gauge | None = None, tier: str = "", rate: float | None = None) -> Plan:
    """Count what a job would cost; nothing runs.

    Args:
        job: The job.
        n_forks: Forwards per row beyond the first.
        gauge: The metrics, for what they read; without them only whole forwards are counted.
        tier: The engine that is planned for, or "" where that is open.
        rate: Floating-point operations per second that the device reaches; by default what was found earlier, if
            anything.

    Raises:
        MetricError: A prompt does not have a token that a metric reads.
    """
    pairs = job.pairs
    numbers = numbers_of(job.model) if pairs.kind == "tokens" else None
    layout = None if numbers is None or gauge is None else LaidOut.of(job, gauge, numbers)
    laid = layout.laid if layout else [lay_rows(job, Placer(pairs, job.base), np.arange(len(pairs)))[0]]
    asked = [row.pair for rows in laid for row in rows if row.intervention < job.n_asked]
    # Each mean, each width of noise and each resampled value takes a run of every prompt.
    values = [target.value for group in job.interventions for target in group]
    n_means = len({value for value in values if isinstance(value, Mean | Noise | Resample)})
    n_means += len({(value.run, value.prompts) for value in values if isinstance(value, From)})  # read together
    lengths = np.maximum(pairs.sizes("clean"), pairs.sizes("corrupt"))
    cost = _cost_of(job, int(lengths.max()))
    sites = dict.fromkeys(str(target.site) for group in job.interventions for target in group)
    shown = pairs.of("encoder")
    first = [
        " ".join(map(repr, shown.tokens(role, 0))) if shown.kind == "tokens" else f"array {shown[0].input(role).shape}"
        for role in ("clean", "corrupt")
    ]
    plan = make_plan(
        cost,
        lengths.tolist(),
        np.bincount(np.array(asked, dtype=np.int64), minlength=len(pairs)).tolist(),
        n_interventions=job.n_asked,
        n_more=2 + job.n_controls + n_means,
        n_forks=n_forks,
        shown=((first[0], first[1]), tuple(sites)),
    )
    n_untouched = (2 + n_means) * (1 + n_forks)
    untouched = whole_flops(cost, lengths.tolist(), [n_untouched] * len(pairs))
    if numbers is None or gauge is None or layout is None:
        return for_tier(plan, tier, patched_flops={}, wave=None, n_derived=0, untouched_flops=untouched, rate=rate)
    cells = _cells_of(job, numbers, laid)
    if rate is None:
        found = remembered(numbers, job.model.device, job.model.dtype)
        rate = found.rate if found else None
    # The means are fitted once; the base and the source run are made by every pass.
    once_more = whole_flops(cost, lengths.tolist(), [2 * (1 + n_forks)] * len(pairs))
    return _plan_cells(job, gauge, plan, (layout, cells), numbers, (tier, untouched, once_more, rate))


def numbers_of(model: Model) -> ModelNumbers | None:
    """Return the numbers of a model's arithmetic; None without a family, or where heads or neurons have no names."""
    known = not {"resid_pre", "z", "mlp_post"} & set(model.shape.refused)
    if model.family is None or model.streams or not model.shape.n_layers or not known:
        return None
    layer, down = (model.tap(site).port.path for site in (Site("resid_pre", 0), Site("mlp_post", 0, 0)))
    path, n_neurons = down.rpartition(".")[0], model.shape.units["neuron"]
    mlp = model.module.get_submodule(path)
    # Where the layer itself holds the MLP's matrices, those of attention are among them: see below.
    matrices = 0 if path == layer else sum(p.numel() for p in mlp.parameters() if p.ndim == 2)
    up = matrices - model.width * n_neurons
    return ModelNumbers(
        n_layers=model.shape.n_layers,
        width=model.width,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        head_width=model.head_width,
        n_neurons=n_neurons,
        # Packed or compressed weights do not show their shape; an MLP without a gate is the least there can be.
        up=max(up, model.width * n_neurons),
        vocab=model.vocab_size,
        is_parallel="resid_mid" in model.shape.refused,
        number_bytes=torch.finfo(model.dtype).bits // 8 if model.dtype.is_floating_point else 4,
        windows=_windows(model),
    )


def _windows(model: Model) -> tuple[int | None, ...]:
    """Return each layer's window, as the configuration tells it."""
    for part in model.module.modules():
        config = getattr(part, "config", None)
        window = getattr(config, "sliding_window", None)
        if isinstance(window, int) and getattr(config, "use_sliding_window", True):
            kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * model.shape.n_layers
            return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return ()


def _cost_of(job: Job, longest: int) -> ModelCost:
    model = job.model
    tables = {id(p) for m in model.module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    unembedding = model.vocab_size * model.width
    weights = sum(p.numel() for p in model.module.parameters() if id(p) not in tables)
    is_tied = not any(p.shape[0] == model.vocab_size and id(p) not in tables for p in model.module.parameters())
    return ModelCost(
        weights + (unembedding if is_tied else 0),
        model.shape.n_layers * model.shape.units.get("head", 0) * model.head_width,
        row_cost(model, longest).total,
        most_rows(job, longest),
    )


def _cells_of(job: Job, numbers: ModelNumbers, laid: Sequence[Sequence[Row]]) -> Cells:
    """Find the kinds of cells in rows."""
    layers = _Layers(job.model, numbers)
    entries: dict[int | tuple[Target, ...], tuple[int, int, int]] = {}
    asked: Counter[tuple[int, int, int, int, int, bytes]] = Counter()
    count: Counter[tuple[int, int, int, int, int, bytes]] = Counter()
    lengths = job.pairs.lengths(job.base).tolist()
    for portion, row in ((number, row) for number, rows in enumerate(laid) for row in rows if row.targets):
        is_asked = row.intervention < job.n_asked
        # A control leaves out what a pair lacks, so that it may enter elsewhere in each pair.
        same = row.intervention if is_asked else tuple(target for target, _ in row.targets)
        if same not in entries:
            entries[same] = layers.entry([target for target, _ in row.targets])
        key = (*entries[same], row.pair, portion, _written(row, lengths[row.pair]).tobytes())
        count[key] += 1
        asked[key] += is_asked
    integers = np.array([key[:5] for key in count], dtype=np.int64).reshape(-1, 5)
    return Cells(
        layer=integers[:, 0],
        point=integers[:, 1],
        columns=integers[:, 2],
        written=[np.frombuffer(key[5], dtype=np.int64) for key in count],
        pair=integers[:, 3],
        portion=integers[:, 4],
        n_asked=np.array([asked[key] for key in count], dtype=np.int64),
        count=np.array(list(count.values()), dtype=np.int64),
    )


def _written(row: Row, length: int) -> np.ndarray:
    """Return the tokens that a run writes, each once."""
    # A patch in front of the layers moves what all tokens may be given.
    tokens = [np.arange(length) if place is None or t.is_ahead else place.base for t, place in row.targets]
    return np.asarray(tokens[0] if len(tokens) == 1 else np.unique(np.concatenate(tokens)), dtype=np.int64)


class _Layers:
    """Where targets enter a model's layers.

    Args:
        model: The model.
        numbers: Its numbers.
    """

    def __init__(self, model: Model, numbers: ModelNumbers) -> None:
        self.numbers = numbers
        self.paths = [model.tap(Site("resid_pre", layer)).port.path for layer in range(numbers.n_layers)]

    def entry(self, targets: Sequence[Target]) -> tuple[int, int, int]:
        """Return the first layer that targets write in, where in it, and how many columns, or 0 for all."""
        places = [(0, int(Point.STREAM)) if t.is_ahead else self._place(t.site, t.anchor) for t in targets]
        first = min(places)
        sites = {target.site for target, place in zip(targets, places, strict=True) if place == first}
        numbers, (layer, point) = self.numbers, first
        group = numbers.n_heads // max(1, numbers.n_kv_heads)
        width = {
            Point.QUERY: numbers.head_width,
            Point.KEY_VALUE: numbers.head_width * group,
            Point.ATTENDED: numbers.head_width,
            Point.ACTIVATED: 1,
        }.get(Point(point), 0)
        units = {site.unit for site in sites}
        full = numbers.n_neurons if point == Point.ACTIVATED else numbers.n_heads * numbers.head_width
        # Where further points of the layer are written too, whole rows are the safe count.
        is_alone = all(place == first or place[0] != layer for place in places)
        is_alone = is_alone and not any(target.anchor for target in targets)  # a feature moves all columns
        columns = width * len(units)
        return layer, point, columns if is_alone and columns < full else 0

    def _place(self, site: Site, anchor: str) -> tuple[int, int]:
        if site.module is not None:
            path = site.module.path
            inside = (n for n, own in enumerate(self.paths) if path == own or path.startswith(f"{own}."))
            return next(inside, 0), int(Point.STREAM)
        # What leaves a layer is written by its features where it leaves, so that the whole layer is run.
        point = Point.STREAM if anchor == "resid_post" else _POINTS[anchor or site.name]
        if site.name in ("final_norm", "logits"):
            return self.numbers.n_layers, int(point)
        layer = site.layer if isinstance(site.layer, int) else 0
        return layer + (site.name == "resid_post"), int(point)


def _plan_cells(
    job: Job,
    gauge: Gauge,
    plan: Plan,
    laid: tuple[LaidOut, Cells],
    numbers: ModelNumbers,
    given: tuple[str, float, float, float | None],
) -> Plan:
    """Return a plan with what the engines need for its cells.

    Given are the tier, the arithmetic of all untouched runs, that of one pass, and the rate.
    """
    tier, untouched_flops, once_more, rate = given
    layout, cells = laid
    lengths = job.pairs.lengths(job.base)
    columns = numbers.vocab if gauge.needs_vocabulary else len(gauge.answer_columns)
    made = cone(numbers, cells.runs(reads_of(gauge, lengths, job.base)), columns)
    # What leads to nothing that is read is not run, and its answers are not spelt out.
    spelt = _spelling_flops(gauge, cells, numbers, lengths, columns) * ~made.is_derived
    whole = full_flops(numbers, lengths[cells.pair], from_layer=cells.layer) * (1 + plan.n_forks)
    one_pass = Pass(
        token_layers=int((made.rows * cells.n_asked).sum()),
        flops=float(((made.flops + spelt) * cells.n_asked).sum()),
        linear_flops=float(((made.linear + spelt) * cells.n_asked).sum()),
        untouched_flops=once_more,
    )
    return for_tier(
        replace(plan, one_pass=one_pass),
        tier,
        patched_flops={
            "wavefront": float(((made.flops + spelt) * cells.count).sum()),
            "restart": float((whole * cells.count).sum()),
        },
        wave=plan_wave(job, gauge, layout, cells, made, numbers),
        n_derived=int((cells.n_asked * made.is_derived).sum()),
        untouched_flops=untouched_flops,
        rate=rate,
    )


def _spelling_flops(
    gauge: Gauge, cells: Cells, numbers: ModelNumbers, lengths: np.ndarray, n_columns: int
) -> np.ndarray:
    """Return the arithmetic of the answers' tokens behind the prompt, for one cell of each kind."""
    n_pairs = len(lengths)
    tokens = np.zeros(n_pairs)
    for side, number in gauge.forks:
        tokens += [len(more) for more in gauge.continuations(side, number, np.arange(n_pairs))]
    per_layer = numbers.layer + 2 * numbers.n_heads * numbers.head_width * lengths[cells.pair]
    depth = np.maximum(0, numbers.n_layers - cells.layer)
    found: np.ndarray = 2.0 * tokens[cells.pair] * (depth * per_layer + numbers.width * n_columns)
    return found
