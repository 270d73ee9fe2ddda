"""What a run would cost, before anything runs: pure arithmetic on counts, tested without a model."""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Plan:
    """What a run would cost.

    Args:
        n_interventions: Interventions, the untouched runs not counted.
        n_pairs: Pairs.
        n_forks: Forwards per row beyond the first, for answers of several tokens.
        rows: Runs of one prompt, the untouched ones and the controls included.
        rows_per_forward: Rows stacked into one call of the model.
        forwards: Calls of the model, at least.
        tokens: Tokens that go through the model.
        flops: Floating-point operations, two per multiplication and addition.
        gib: Memory of one forward's activations, in GiB.
        n_unaligned: Cells that will not be run because the pair lacks the position.
        first_pair: Tokens of the first pair, clean and corrupted, to see that they are what was meant.
        sites: Names of the patched sites.
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

    def __str__(self) -> str:
        shown = ", ".join(self.sites[:4]) + (f" … ({len(self.sites)} sites)" if len(self.sites) > 4 else "")
        lines = [
            ("patch", shown or "nothing"),
            ("interventions", f"{self.n_interventions:,} on {self.n_pairs:,} pairs"),
            ("runs", f"{self.rows:,} rows in {self.forwards:,} forwards of up to {self.rows_per_forward:,} rows"),
            ("arithmetic", f"{self.tokens:,} tokens, {self.flops / 1e9:,.1f} GFLOP"),
            ("memory", f"about {self.gib:.2f} GiB of activations"),
            ("clean", self.first_pair[0]),
            ("corrupted", self.first_pair[1]),
        ]
        if self.n_unaligned:
            lines.insert(2, ("not run", f"{self.n_unaligned:,} cells whose pair lacks the position"))
        if self.n_forks:
            lines.insert(2, ("forks", f"{self.n_forks} more forwards per row, to spell answers out"))
        return "\n".join(f"{name:<13}  {text}" for name, text in lines)


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
    # Causal attention meets half of the keys on average; a multiplication and an addition for scores and for values.
    attention = sum(n * length * length * 2 for n, length in zip(rows_of_pair, lengths, strict=True)) * cost.attention
    return Plan(
        n_interventions=n_interventions,
        n_pairs=len(lengths),
        n_forks=n_forks,
        rows=rows,
        rows_per_forward=cost.rows_per_forward,
        forwards=-(-rows // cost.rows_per_forward),
        tokens=tokens,
        flops=2.0 * tokens * cost.weights + attention,
        gib=min(rows, cost.rows_per_forward) * cost.bytes_per_row / GIB,
        n_unaligned=n_interventions * len(lengths) - sum(cells_per_pair),
        first_pair=shown[0],
        sites=shown[1],
    )
