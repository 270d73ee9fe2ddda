"""A first sweep: how does a small model know who is given the book?

"When Mary and John went to the store, John gave a book to" goes on with " Mary": indirect object identification. The
model and the pairs come with the library. In the corrupted prompt the other one gives, so its answer is " John".

    python examples/first_sweep.py [FOLDER for the pictures]
"""

import sys
from pathlib import Path

import causalpatch as cp
from causalpatch.pairs.tasks import generate


def main(folder: Path) -> None:
    model = cp.open_model("zoo:stories")
    pairs = cp.load_pairs("ioi", model)
    experiment = cp.Experiment(model, pairs, metric=cp.logit_difference, direction="denoise")
    print(pairs.check(), experiment.baseline, sep="\n\n")

    # Heads: each layer x head in a run of its own, on every pair.
    heads = cp.sweep(experiment, "z@-1")
    print("\nheads that restore the answer at the last token")
    print(heads.top(5))

    # Layers x positions: along the tokens of one template, whose prompts all have as many words.
    rows = generate("ioi", n=40, templates=["when-went"])
    one = cp.Experiment(model, cp.load_pairs(rows, model, name="when-went"))
    layers = cp.sweep(one, "resid_pre")
    print("\nwhere the stream carries the answer, token by token")
    tokens = one.pairs.tokens("corrupt", 0)
    for layer, row in enumerate(layers.recovered().values):
        best = int(row.argmax())
        print(f"  into layer {layer}: {row[best]:.2f} at token {best}, in the first pair {tokens[best]!r}")

    folder.mkdir(parents=True, exist_ok=True)
    for name, effects in {"heads": heads, "layers": layers}.items():
        effects.plot().save(folder / f"{name}.svg")
    print(f"\npictures: {folder / 'heads.svg'}, {folder / 'layers.svg'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output"))
