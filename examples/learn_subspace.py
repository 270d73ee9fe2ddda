"""In which direction is the number of the subject? Distributed alignment search on the embedded model.

"The harbors near the bowl" goes on with " are", "The harbor near the bowl" with " is". One direction of the residual
stream at the subject is learnt on some sentences, and interchanged in others.

    python examples/learn_subspace.py [FOLDER for the subspace]
"""

import sys
from pathlib import Path

import causalpatch as cp
from causalpatch.pairs.tasks import generate


def main(folder: Path) -> None:
    model = cp.open_model("zoo:stories")
    pairs = cp.load_pairs(generate("agreement", n=80, templates=["near"]), model, name="agreement")
    learning, held_out = pairs.split(0.5, seed=0)
    experiment = cp.Experiment(model, learning)
    found = cp.learn_subspace(experiment, "resid_post.0@2", held_out, search=cp.RotationSearch(epochs=12))
    print(found)
    path = found.save(folder / "number.safetensors")
    same = cp.load_subspace(path)
    effects = cp.Experiment(model, held_out).run([cp.Patch(same.site, same.value)])
    print(f"\nsaved to {path}; read again, it restores {float(effects.recovered()[0]):.2f} of the gap")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-output"))
