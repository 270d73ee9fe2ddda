"""What a run would cost, before anything runs: pure arithmetic on counts, tested without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from causalpatch.engine.screen_cost import Pass, ScreenCost
from causalpatch.engine.shelf import Where

GIB = 2**30


@dataclass(frozen=True)
class ModelCost:
    """The few numbers of a model that its cost follows from.

    Args:
        weights: Weights that every token meets: all but the embedding tables, the unembedding included.
        attention: Heads x head_width x layers: what one query pays per key, for scores and for values.
        bytes_per_row: Bytes of activations and logits of one row of the longest prompt.
        rows_per_forward: Rows that go into one forward.
    """

    weights: int
    attention: int
    bytes_per_row: int
    rows_per_forward: int


_AWAY = {"host": "in the host's memory", "disk": "on disk"}


@dataclass(frozen=True)
class Fetches:
    """Weights that are fetched layer by layer, for all passes and the untouched runs.

    Args:
        place: Where they lie: in the host's memory or on disk.
        n_layers: Layers of the model.
        layer_bytes: Bytes of the largest layer.
        loads: How often a layer is fetched, summed over layers.
        n_bytes: Bytes that are fetched, with the unembedding once per pass.
    """

    place: Where
    n_layers: int
    layer_bytes: int
    loads: int
    n_bytes: int

    def __str__(self) -> str:
        size = f"{self.n_layers} layers of {self.layer_bytes / 2**20:,.1f} MiB {_FROM[self.place]}"
        n_bytes = f"{self.n_bytes / GIB:,.2f} GiB" if self.n_bytes >= GIB else f"{self.n_bytes / 2**20:,.1f} MiB"
        return f"{size}: {self.loads:,} fetches of a layer, {n_bytes} with the unembedding"


_FROM = {"host": "from the host's memory", "disk": "from disk", "device": "from the device"}


@dataclass(frozen=True)
class Wave:
    """What the wavefront engine needs for the patched runs of a job.

    Args:
        token_layers: Tokens that are computed in a layer, summed over layers.
        chunk_rows: Tokens that go through a layer together, at most.
        chunk_bytes: Bytes of a chunk at its peak, or of logits that are measured together, where these take more.
        base_bytes: Bytes that are kept of the untouched runs: keys, values and inputs of all layers, patched sites, and
            what rows that are patched nowhere take from there.
        base_place: Where they are kept.
        logits_bytes: Bytes of the untouched runs' logits, which stay on the device.
        held_bytes: Bytes of the patched streams between two layers that are held at once.
        passes: How often the layers' weights are gone through, such that no more is held than the budget allows.
        fetches: What is fetched for that, where the weights are not held; None where they are.
    """

    token_layers: int
    chunk_rows: int
    chunk_bytes: int
    base_bytes: int
    base_place: Where
    logits_bytes: int
    held_bytes: int
    passes: int
    fetches: Fetches | None = None


@dataclass(frozen=True)
class Plan:
    """What a run would cost.

    Args:
        n_interventions: Interventions, the untouched runs not counted.
        n_pairs: Pairs.
        n_forks: Forwards per row beyond the first, for answers of several tokens and for what is written.
        rows: Runs of one prompt, the untouched ones and the controls included.
        rows_per_forward: Rows stacked into one call of the model.
        forwards: Calls of the model, at least.
        tokens: Tokens that go through the model.
        flops: Floating-point operations by whole forwards, two per multiplication and addition.
        gib: Memory of one forward's activations, in GiB.
        n_unaligned: Cells that will not be run because the pair lacks the position.
        first_pair: Tokens of the first pair, clean and corrupted, to see that they are what was meant.
        sites: Names of the patched sites.
        tier: The engine that is planned for, or "" where that is open.
        flops_of: Floating-point operations by engine, as far as they are known beforehand.
        n_derived: Cells whose effect is known to be 0, because nothing leads from them to what is read.
        wave: What the wavefront engine needs, where the model and the patches allow it.
        rate: Floating-point operations per second that the device was measured to reach, or None.
        one_pass: What the wavefront engine needs for the interventions that were asked for, and nothing else.
        screen: What a screen would cost, where one would be made; ``flops_of`` does not count it.
        not_screened: Why all is measured in float32 though a screen was asked for, or an empty text.
    """

    n_interventions: int
    n_pairs: int
    n_forks: int
    rows: int
    rows_per_forward: int
    forwards: int
    tokens: int
    flops: float
    gib: float
    n_unaligned: int
    first_pair: tuple[str, str]
    sites: tuple[str, ...]
    tier: str = ""
    flops_of: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    n_derived: int = 0
    wave: Wave | None = None
    rate: float | None = None
    one_pass: Pass | None = None
    screen: ScreenCost | None = None
    not_screened: str = ""

    @property
    def tier_flops(self) -> float | None:
        """Floating-point operations of the planned engine, with a screen the least; None where they are not known."""
        if self.screen is not None:
            return self.screen.total_flops[0]
        return self.flops_of.get(self.tier, None if self.tier else self.flops)

    @property
    def most_flops(self) -> float | None:
        """Floating-point operations where a screen has to measure everything again; ``tier_flops`` without a screen."""
        return self.tier_flops if self.screen is None else self.screen.total_flops[1]

    @property
    def saved(self) -> float | None:
        """Share of the arithmetic of whole forwards that the planned engine does without, with a screen at best."""
        return self._saved(self.tier_flops)

    @property
    def seconds(self) -> float | None:
        """Seconds that the arithmetic takes at the measured rate: the least that the run can take."""
        return self._seconds[0] if self._seconds else None

    @property
    def most_seconds(self) -> float | None:
        """The same where a screen has to measure everything again; ``seconds`` without a screen."""
        return self._seconds[1] if self._seconds else None

    @property
    def _seconds(self) -> tuple[float, float] | None:
        if self.tier_flops is None or not self.rate:
            return None
        least = self.tier_flops / self.rate
        return (least, least) if self.screen is None else self.screen.seconds(self.rate)

    def _saved(self, flops: float | None) -> float | None:
        return None if flops is None or not self.flops else 1 - flops / self.flops

    def __str__(self) -> str:
        shown = ", ".join(self.sites[:4]) + (f" … ({len(self.sites)} sites)" if len(self.sites) > 4 else "")
        lines = [
            ("patch", shown or "nothing"),
            ("interventions", f"{self.n_interventions:,} on {self.n_pairs:,} pairs"),
        ]
        if self.n_forks:
            lines.append(("forks", f"{self.n_forks} more forwards per row, through answers or what is written"))
        if self.n_unaligned:
            lines.append(("not run", f"{self.n_unaligned:,} cells whose pair lacks the position"))
        if self.n_derived:
            lines.append(("known", f"{self.n_derived:,} cells that lead to nothing that is read: their effect is 0"))
        if self.tier:
            lines.append(("engine", self.tier))
        if self.not_screened:
            lines.append(("screen", f"none, all in float32: {self.not_screened}"))
        if self.screen is not None:
            lines += self.screen.lines()
        lines += self._work()
        if self.seconds is not None and self.most_seconds is not None:
            is_open = self.screen is not None and self.screen.is_open
            more = f", or {_duration(self.most_seconds)} with everything again" if is_open else ""
            lines.append(("time", f"at least {_duration(self.seconds)}{more}"))
        lines += [("clean", self.first_pair[0]), ("corrupted", self.first_pair[1])]
        return "\n".join(f"{name:<13}  {text}" for name, text in lines)

    def _work(self) -> list[tuple[str, str]]:
        """Return the lines that say what is run, how much arithmetic that is and how much memory it takes."""
        rows = f"{self.rows:,} rows"
        weights: list[tuple[str, str]] = []
        if self.tier == "wavefront" and self.wave is not None:
            wave = self.wave
            again = f", then {self.screen.tokens_again} again" if self.screen else ""
            runs = f"{wave.token_layers:,} tokens through single layers{again}, up to {wave.chunk_rows:,} at once"
            passes = f"{wave.passes:,} passes over the layers" if wave.passes > 1 else "one pass over the layers"
            passes += " and one for the untouched runs" if wave.fetches else ""
            kept = self.screen.record_bytes if self.screen else 0
            is_here = wave.base_place == "device"
            held = wave.base_bytes * is_here + wave.logits_bytes + wave.held_bytes
            gib = (held + wave.chunk_bytes + kept) / GIB
            away = "" if is_here else f" and {wave.base_bytes / GIB:.2f} {_AWAY[wave.base_place]}"
            casts = f" and {self.screen.cast_bytes / GIB:.2f} of weights in few bits" if self.screen else ""
            memory = f"about {gib:.2f} GiB of activations{away}{casts}, in {passes}"
            weights = [] if wave.fetches is None else [("weights", str(wave.fetches))]
        else:
            runs = f"{rows} in {self.forwards:,} forwards of up to {self.rows_per_forward:,} rows"
            memory = f"about {self.gib:.2f} GiB of activations"
        arithmetic = f"{self.tokens:,} tokens, {self.flops / 1e9:,.1f} GFLOP"
        if self.tier in ("wavefront", "restart") and self.tier_flops is not None and self.saved is not None:
            whole = f"{self.flops / 1e9:,.1f} by {rows} in whole forwards"
            own = self.screen.arithmetic if self.screen else f"{self.tier_flops / 1e9:,.1f} GFLOP"
            shares = dict.fromkeys(
                f"{max(0.0, self._saved(flops) or 0.0):.0%}" for flops in (self.most_flops, self.tier_flops)
            )
            arithmetic = f"{own} instead of {whole} (saves {' to '.join(shares)})"
        return [("runs", runs), ("arithmetic", arithmetic), ("memory", memory), *weights]


def make_plan(
    cost: ModelCost,
    lengths: Sequence[int],
    cells_per_pair: Sequence[int],
    *,
    n_interventions: int,
    n_more: int,
    n_forks: int,
    shown: tuple[tuple[str, str], tuple[str, ...]],
) -> Plan:
    """Count what a run would cost.

    Args:
        cost: Numbers of the model.
        lengths: Tokens of each pair's longer prompt, pads not counted, ``(pair,)``.
        cells_per_pair: Interventions that will run on each pair, ``(pair,)``.
        n_interventions: Interventions asked for.
        n_more: Further runs of each pair: untouched, controls, and those that means are taken over.
        n_forks: Forwards per row beyond the first.
        shown: Tokens of the first pair, and names of the sites.
    """
    rows_of_pair = [(n_more + cells) * (1 + n_forks) for cells in cells_per_pair]
    rows = sum(rows_of_pair)
    tokens = sum(n * length for n, length in zip(rows_of_pair, lengths, strict=True))
    return Plan(
        n_interventions=n_interventions,
        n_pairs=len(lengths),
        n_forks=n_forks,
        rows=rows,
        rows_per_forward=cost.rows_per_forward,
        forwards=-(-rows // cost.rows_per_forward),
        tokens=tokens,
        flops=whole_flops(cost, lengths, rows_of_pair),
        gib=min(rows, cost.rows_per_forward) * cost.bytes_per_row / GIB,
        n_unaligned=n_interventions * len(lengths) - sum(cells_per_pair),
        first_pair=shown[0],
        sites=shown[1],
    )


def whole_flops(cost: ModelCost, lengths: Sequence[int], rows_of_pair: Sequence[int]) -> float:
    """Return the floating-point operations of whole forwards.

    Args:
        cost: Numbers of the model.
        lengths: Tokens of each pair's prompt.
        rows_of_pair: How often each is run.
    """
    tokens = sum(n * length for n, length in zip(rows_of_pair, lengths, strict=True))
    # Causal attention meets half of the keys on average; a multiplication and an addition for scores and for values.
    attention = sum(n * length * length * 2 for n, length in zip(rows_of_pair, lengths, strict=True)) * cost.attention
    return 2.0 * tokens * cost.weights + attention


def for_tier(
    plan: Plan,
    tier: str,
    *,
    patched_flops: Mapping[str, float],
    wave: Wave | None,
    n_derived: int,
    untouched_flops: float,
    rate: float | None,
) -> Plan:
    """Return a plan with what each engine would need.

    Args:
        plan: The plan by whole forwards.
        tier: The engine that is planned for, or "" where that is open.
        patched_flops: Floating-point operations of the patched runs by engine.
        wave: What the wavefront engine needs.
        n_derived: Cells whose effect is known to be 0.
        untouched_flops: Those of the untouched runs, which every engine makes.
        rate: Floating-point operations per second that the device was measured to reach.
    """
    flops_of = {name: flops + untouched_flops for name, flops in patched_flops.items()}
    flops_of |= {"rows": plan.flops, "reference": plan.flops}
    return replace(plan, tier=tier, flops_of=MappingProxyType(flops_of), wave=wave, n_derived=n_derived, rate=rate)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
