"""From a job to its plan: what the plan's arithmetic needs, read from the model, the pairs and the interventions."""

import numpy as np
import torch

from causalpatch.engine.job import Job, lay_rows, most_rows
from causalpatch.engine.memory import row_cost
from causalpatch.engine.plan import ModelCost, Plan, make_plan
from causalpatch.engine.resolve import Placer
from causalpatch.patches import Mean


def plan_job(job: Job, n_forks: int) -> Plan:
    """Count what a job would cost; nothing runs.

    Args:
        job: The job.
        n_forks: Forwards per row beyond the first.
    """
    model, pairs = job.model, job.pairs
    placer = Placer(pairs, job.base)
    laid = [lay_rows(job, placer, np.array([pair]))[0] for pair in range(len(pairs))]
    n_means = len({target.value for group in job.interventions for target in group if isinstance(target.value, Mean)})
    lengths = np.maximum(pairs.lengths("clean"), pairs.lengths("corrupt"))
    longest = int(lengths.max())
    tables = {id(p) for m in model.module.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    head_width = model.head_width
    unembedding = model.vocab_size * model.width
    weights = sum(p.numel() for p in model.module.parameters() if id(p) not in tables)
    is_tied = not any(p.shape[0] == model.vocab_size and id(p) not in tables for p in model.module.parameters())
    cost = ModelCost(
        weights + (unembedding if is_tied else 0),
        model.shape.n_layers * model.shape.units.get("head", 0) * head_width,
        row_cost(model, longest).total,
        most_rows(job, longest),
    )
    sites = dict.fromkeys(str(target.site) for group in job.interventions for target in group)
    first = [
        " ".join(map(repr, pairs.tokens(role, 0))) if pairs.kind == "tokens" else f"array {pairs[0].input(role).shape}"
        for role in ("clean", "corrupt")
    ]
    return make_plan(
        cost,
        lengths.tolist(),
        [sum(row.intervention < job.n_asked for row in rows) for rows in laid],
        n_interventions=job.n_asked,
        n_more=2 + job.n_controls + n_means,
        n_forks=n_forks,
        shown=((first[0], first[1]), tuple(sites)),
    )
