"""Causal tracing by noise and by pairs, in one figure: what carries the number of the subject to the verb?

"The harbors near the bowl" goes on with " are". The run is corrupted at the subject, by noise on its embeddings (as in
ROME) or by the other number ("The harbor …"), and one clean state at a time is put back.

    python examples/causal_trace.py [FOLDER for the figure]
"""

import sys
from pathlib import Path

import causalpatch as cp
from causalpatch.pairs.tasks import generate


def main(folder: Path) -> None:
    model = cp.open_model("zoo:stories")
    # One template: a position then means the same in every pair.
    rows = generate("agreement", n=40, templates=["near"])
    pairs = cp.load_pairs(rows, model, name="agreement, one template")
    experiment = cp.Experiment(model, pairs, metric=cp.probability)
    traced = cp.trace(experiment, span="subject", window=2, draws=3)
    print(traced)
    for by in ("noise", "pairs"):
        share = traced[by, "resid"].over_draws().recovered()
        print(f"{by}: the stream behind layer 0 restores {float(share[0, 2]):.2f} at the subject's last token")
        print(f"{by}: the stream behind layer 3 restores {float(share[3, -1]):.2f} at the last token")
    print("figure:", traced.plot().save(folder / "causal_trace.svg"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-output"))
