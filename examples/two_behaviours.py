"""Two behaviours of one small model, done by different heads: from the whole model to claims, and their contrast.

The model (stories260k, five layers of eight heads) was trained on children's stories. It goes on with the right name
after "… a child named Lily. One day,", and with "She" after "Lily had a red ball.". For each behaviour pairs that share
no name are made from templates and checked to be answered right. A search on some of the templates comes down to heads,
which are confirmed on the others. Then one contrast: does each head do the one thing and not the other?

    python examples/two_behaviours.py [FOLDER for the figures]
"""

import sys
import tempfile
from pathlib import Path

import causalpatch as cp
from causalpatch.testing.stories import templates

MODEL = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260k"
FOR_DISCOVERY = 0.4  # of the pairs, by whole templates
RUNS_PER_PAIR = 600  # of the search; every head and neuron by itself would take 900
LEAST = 0.2  # of the gap: twice delta, which is what can be supported with so few pairs


def main(folder: Path) -> None:
    model = cp.open_model(MODEL)
    sides = {name: pairs_of(model, name).split(FOR_DISCOVERY, by="template") for name in ("name_copy", "pronoun")}
    claims = {}
    with tempfile.TemporaryDirectory() as ledgers:  # of openings; one's own would let the example run but once
        for name, (discovery, held_out) in sides.items():
            found = cp.localize(cp.Experiment(model, discovery), budget=RUNS_PER_PAIR * len(discovery))
            stable = cp.selection_stability(found)
            print(f"{found}\n\n{stable}\n")
            print("figure:", found.plot(stable).save(folder / f"{name}_search.png"))
            claims[name] = cp.confirm(
                cp.Experiment(model, held_out),
                found.select("head", beyond=LEAST),
                found_on=discovery,
                unrelated=[pairs for other, (_, pairs) in sides.items() if other != name],
                ledger=Path(ledgers) / f"{name}.jsonl",
            )
            print(f"\n{claims[name]}\n\nfigure: {claims[name].plot().save(folder / f'{name}_claim.png')}\n")
    copying, agreeing = (claim.components[0] for claim in claims.values())
    contrast = cp.dissociate(*claims.values(), copying, agreeing)
    print(f"{contrast}\n\nfigure: {contrast.plot().save(folder / 'two_behaviours.png')}")


def pairs_of(model: cp.Model, behaviour: str) -> cp.Pairs:
    made = cp.make_pairs(
        None,
        model,
        templates=templates(behaviour),
        tries=2,
        entity_disjoint=True,
        equal_length=True,
        first_token=True,
        name=behaviour,
    )
    print(f"{made}\n")
    return made.pairs


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-output"))
