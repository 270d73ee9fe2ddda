"""Queries and keys by what they change of the attention weights, times the slope there (the QK-fix of AtP*).

A softmax saturates, so that the slope at a query or key says little of what another one would do. Instead, with A the
weights of the base run, g the slope there and A(q'), A(k') the weights with one query or one key of the source run,

    score(q_t) = sum_s (A(q'_t) - A)_ts g_ts            score(k_s) = sum_t sum_j (A(k'_s) - A)_tj g_tj

Another key changes one score of each row. With r = exp(score'_ts) / Z_t, Z_t being what the row is divided by, and
d = 1 - A_ts + r, the row's weights become r / d at s and A_tj / d elsewhere, so that

    sum_j (A(k'_s) - A)_tj g_tj = (1 / d - 1) (sum_j A_tj g_tj - A_ts g_ts) + (r / d - A_ts) g_ts,

which costs no more than the scores themselves. Keys are summed over the queries and heads that see them. Scores with
other queries, and with other keys, are computed by the model's own attention in one forward each, in which the queries
and keys of all layers are put back but for the ones that are exchanged.

References:
    Kramár et al. 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to components",
    2403.00745, section 3.1.1 and appendix C.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import PairError
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.hooks import Write, run_with_hooks
from causalpatch.engine.job import Job
from causalpatch.engine.meeting import Meeting
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.untouched import Untouched
from causalpatch.models import Port, Tap
from causalpatch.models.views import Whole
from causalpatch.sites import Site

QUERIES, KEYS = ("q", "q_rot"), ("k", "k_rot")


class QKFix:
    """The layers whose queries or keys are scored.

    Args:
        job: The job.
        sites: One site of each group that is scored.
    """

    def __init__(self, job: Job, sites: Sequence[Site]) -> None:
        self.job = job
        asked = [site for site in sites if site.name in (*QUERIES, *KEYS)]
        self.layers = sorted({site.layer for site in asked if site.layer is not None})
        self.paths = {layer: job.model.tap(Site("pattern", layer, 0)).port.path for layer in self.layers}
        self.asked = asked

    @property
    def ports(self) -> tuple[Port, ...]:
        """Where slopes are needed."""
        return tuple(Port(path, "pattern") for path in self.paths.values())

    def prepare(self, batch: Untouched, placer: Placer) -> "Weights | None":
        """Return the weights of the base run, and scores with other queries and keys; None where none are asked for.

        Raises:
            PairError: Queries or keys would come from another place of the prompt.
        """
        if not self.asked:
            return None
        job = self.job
        targets = {t.site: t for t in job.interventions[0] if t.site in self.asked}
        first = targets[self.asked[0]]
        meeting = Meeting.of(job, batch, first, placer)
        self._require_same_place(batch, first, placer)
        qk = [Port(path, side) for path in self.paths.values() for side in ("query", "key")]
        more = [Port(path, side) for path in self.paths.values() for side in ("scores", "pattern", "visible")]
        base = self._run("base", batch, [], [*qk, *more])
        source = self._run("source", batch, [], qk)
        changed = {port: base[port] + meeting.difference(base[port], source[port]).to(base[port]) for port in qk}
        scores: dict[str, dict[Port, Tensor]] = {}
        for side in ("query", "key"):
            put = {port: (changed if port.side == side else base)[port] for port in qk}
            scores[side] = self._run("base", batch, self._writes(put), [p for p in more if p.side == "scores"])
        placed = torch.zeros(base[qk[0]].shape[:2], dtype=torch.bool, device=meeting.row.device)
        placed[meeting.row, meeting.base] = True
        return Weights(job, self.paths, base, scores, placed)

    def _run(self, which: str, batch: Untouched, writes: Sequence[Write], keep: Sequence[Port]) -> dict[Port, Tensor]:
        job, role = self.job, self.job.base if which == "base" else self.job.source
        inputs = job.pairs.batch(role, batch.indices, padding_side=job.padding_side)
        _, kept = run_with_hooks(job.model, inputs_of(job.model, inputs), writes, keep, opens_attention=True)
        return kept

    def _writes(self, put: Mapping[Port, Tensor]) -> list[Write]:
        return [
            Write(Tap(Site("logits"), port, Whole()), (torch.arange(len(value), device=value.device),), value)
            for port, value in put.items()
        ]

    def _require_same_place(self, batch: Untouched, target: Target, placer: Placer) -> None:
        for place in placer.places(target, batch.indices.tolist()):
            if place is not None and (place.start != place.base).any():
                raise PairError(
                    f"'{target.site}' cannot be scored by attention weights: tokens meet at other places",
                    facts=[("why", "a query or key brings its place along")],
                    fix='take pairs that meet position by position, or method="atp"',
                )


@dataclass(frozen=True, eq=False)
class Weights:
    """What attention does in the base run, and with other queries and keys.

    Args:
        job: The job.
        paths: The module that attends, by layer.
        base: Weights, scores and which keys are seen in the base run.
        changed: Scores with other queries, and with other keys, by side.
        placed: Which tokens are exchanged.
    """

    job: Job
    paths: Mapping[int, str]
    base: Mapping[Port, Tensor]
    changed: Mapping[str, Mapping[Port, Tensor]]
    placed: Tensor

    def scores(self, site: Site, units: Sequence[int], slopes: Mapping[Port, Tensor]) -> Float[Tensor, "R U T"]:
        """Return the scores of queries or keys of a layer, token by token.

        Args:
            site: One of them.
            units: Which heads, or kv_heads.
            slopes: The slope at the weights.
        """
        layer = site.layer or 0
        port = Port(self.paths[layer], "pattern")
        slope = slopes[port].transpose(1, 2).double() if port in slopes else None
        if slope is None:
            return self.placed.new_zeros(len(self.placed), len(units), self.placed.shape[1], dtype=torch.float64)
        side = "query" if site.name in QUERIES else "key"
        weights, divided, new = self._rows(side, port.path)
        if side == "query":
            # Sinks keep their share of what a row is divided by: exp of the scores does not hold all of it.
            before = weights.sum(-1, keepdim=True)
            sink = (1 - before).clamp(min=0) * divided.exp()
            other = torch.logaddexp(new.logsumexp(-1, keepdim=True), sink.log())
            found = (((new - other).exp() - weights) * slope).sum(-1)
        else:
            ratio = (new - divided).exp()
            d = 1 - weights + ratio
            whole = (weights * slope).sum(-1, keepdim=True) - weights * slope
            found = ((1 / d - 1) * whole + (ratio / d - weights) * slope).sum(-2)
            found = found.reshape(len(found), self.job.model.n_kv_heads, -1, found.shape[-1]).sum(2)
        return (found * self.placed[:, None])[:, list(units)]

    def _rows(self, side: str, path: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, the logarithm of what rows are divided by, and the changed scores; ``[R, H, Q, S]``."""
        pattern, scores, seen = (
            self.base[Port(path, name)].transpose(1, 2) for name in ("pattern", "scores", "visible")
        )
        seen = seen.expand(pattern.shape)
        weights = pattern.double() * seen
        largest, place = weights.max(-1, keepdim=True)
        divided = scores.double().gather(-1, place) - largest.log()
        new = self.changed[side][Port(path, "scores")].transpose(1, 2).double()
        return weights, divided, new.masked_fill(~seen, -torch.inf)
