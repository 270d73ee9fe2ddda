"""Made-up effects with known shares."""

import numpy as np
import pytest

from causalpatch.results.effects import Effects


def made_up(axes, share, *, n_pairs=40, groups=None, status=None, direction="denoise", noise=0.05, seed=0, **more):
    """Return effects whose recovered shares are ``share`` up to a little noise per pair."""
    rng = np.random.default_rng(seed)
    share = np.asarray(share, dtype=float)
    clean, corrupt = rng.normal(3, 0.5, n_pairs), rng.normal(-2, 0.5, n_pairs)
    spread = rng.normal(0, noise, (*share.shape, n_pairs)) if noise else 0.0
    base, sign = (corrupt, 1) if direction == "denoise" else (clean, -1)
    values = base + sign * (share[..., None] + spread) * (clean - corrupt)
    provenance = {"direction": direction, "site": "resid_pre", "value": "source", "seed": 0}
    provenance |= {"model": {"name": "gpt2"}, "pairs": {"name": "ioi.jsonl", "n": n_pairs}}
    provenance |= more.pop("provenance", {})
    return Effects.build(
        axes=axes,
        pair_ids=[f"p{i}" for i in range(n_pairs)],
        groups=np.arange(n_pairs) if groups is None else groups,
        metrics=["logit_difference"],
        values=values[None],
        status=np.zeros((*share.shape, n_pairs), int) if status is None else status,
        baselines={"clean": clean[None], "corrupt": corrupt[None]},
        provenance=provenance,
        **more,
    )


@pytest.fixture(scope="session")
def make():
    return made_up
