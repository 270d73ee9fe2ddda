"""Which head of a small language model copies a name?

The model (stories260k, 260,032 parameters, five layers of eight heads) was trained on children's stories. It goes on
with the right name after "Once upon a time, there was a child named Lily. One day,". Each pair holds this prompt and
one with another name. Clean values of one head at the last token are put into the corrupted run: the head that
restores the answer is the one that brings the name there.

    python examples/which_head_copies.py [FOLDER of the model]
"""

import sys
from pathlib import Path

import causalpatch as cp

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260k"
NEEDED = 10  # independent components, below which there is no interval


def main(folder: Path) -> None:
    model = cp.open_model(folder)
    pairs = cp.load_pairs(folder / "pairs.jsonl", model).where(behaviour="name_copy")
    experiment = cp.Experiment(model, pairs, metric=cp.logit_difference, direction="denoise")
    print(f"{len(pairs)} pairs, such as {pairs[0].clean_text!r}\n{experiment.baseline}\n")

    # Where does the name travel? The stream at the tokens that differ, then the stream at the last token.
    streams = [f"resid_pre.{layer}" for layer in range(model.shape.n_layers)]
    at_name = cp.Experiment(model, changed_tokens(pairs)).run(streams).recovered().values
    at_end = experiment.run([f"{stream}@-1" for stream in streams]).recovered().values
    print("recovered by the stream into a layer")
    for layer, (name, end) in enumerate(zip(at_name, at_end, strict=True)):
        print(f"  layer {layer}: {name:z.2f} at the name, {end:z.2f} at the last token")

    # Every head at the last token, each in a run of its own.
    heads = cp.sweep(experiment, "z@-1")
    best, second = heads.top(2).to_dict("records")
    print(f"\nthe name is copied by head {best['head']} of layer {best['layer']}")
    print(f"  recovered    {best['recovered']:.3f} of the gap, in {best['agreement']:.0%} of the pairs")
    print(f"  next         {second['recovered']:.3f}, head {second['head']} of layer {second['layer']}")
    print(f"  interval     {interval(best)}")
    print(f"  independent  {heads.n_components} components of pairs that share no prompt:")
    mine = heads.by_component().query(f"layer == {best['layer']} and head == {best['head']}")
    for component, n_pairs, recovered in mine[["component", "n_pairs", "recovered"]].itertuples(index=False):
        first = next(pair for pair, number in zip(pairs, pairs.components, strict=True) if number == component)
        print(f"               {recovered:.2f} in {n_pairs:3} pairs, such as {first.clean_text!r}")
    if heads.n_components < NEEDED:
        print(f"{heads.n_components} components are too few for a claim: more pairs of the same names add none.")


def changed_tokens(pairs: cp.Pairs) -> cp.Pairs:
    """Align the tokens that differ, so that a site without a position means all of these together."""
    return pairs.align("map", mapping=[[(i, i) for i in (p.clean != p.corrupt).nonzero()[0].tolist()] for p in pairs])


def interval(row: dict[str, float]) -> str:
    has_one = row["low"] == row["low"]  # NaN equals nothing
    return f"{row['low']:.3f} to {row['high']:.3f}" if has_one else f"none: it needs {NEEDED} independent components"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
