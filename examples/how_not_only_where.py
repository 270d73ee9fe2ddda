"""How, not only where: what does a small language model remember of who gives, the name or the place in line?

"When Laura and Ashley went to the park, Laura gave a ring to" goes on with " Ashley". The model writes who gives into
the stream at the thing given, two layers before it answers. Two algorithms are possible, and both need that very
state:

    name: the receiver is the one who does not have the giver's *name*
    slot: the giver is the *first or second* of the two, and the receiver is the other one

On one prompt both say the same. They part when the state is taken from another prompt in which the two are named in
the other order.

    python examples/how_not_only_where.py [FOLDER for the numbers]
"""

import sys
from pathlib import Path

import causalpatch as cp

PEOPLE = ("Laura", "Ashley")
OTHER = {"Laura": "Ashley", "Ashley": "Laura"}
INPUTS = {
    "first": PEOPLE,
    "giver": PEOPLE,
    "place": ("park", "lake", "hotel", "harbor"),
    "thing": ("ring", "bowl", "pencil", "guitar"),
}
BY_NAME = cp.CausalModel(
    {"name": lambda giver: giver, "receiver": lambda name: OTHER[name]}, INPUTS, output="receiver", name="by name"
)
BY_SLOT = cp.CausalModel(
    {"slot": lambda giver, first: giver == first, "receiver": lambda slot, first: OTHER[first] if slot else first},
    INPUTS,
    output="receiver",
    name="by slot",
)
STATE = "resid_post.1@13"  # the stream behind layer 1 at the thing given
ANSWER = "attn_out.3@-1"  # what the attention of the last layer adds at the last token


def encode(first: str, giver: str, place: str, thing: str) -> str:
    return f"When {first} and {OTHER[first]} went to the {place}, {giver} gave a {thing} to"


def claim(algorithm: cp.CausalModel, variable: str) -> cp.Hypothesis:
    mapping = {variable: STATE, "receiver": ANSWER}
    return cp.Hypothesis(algorithm, mapping, encode=encode, answers=lambda name: f" {name}")


def main(folder: Path) -> None:
    model = cp.open_model("zoo:stories")
    by_name, by_slot = claim(BY_NAME, "name"), claim(BY_SLOT, "slot")
    accuracies = {}
    for hypothesis, variable in ((by_name, "name"), (by_slot, "slot")):
        found = cp.interchange_accuracy(model, hypothesis, n=100)
        print(found, "\n")
        found.save(folder / variable)
        accuracies[variable] = found.accuracy(variable)
    for hypothesis, variable in ((by_name, "name"), (by_slot, "slot")):
        scrubbed = cp.causal_scrubbing(model, hypothesis, n=100)
        print(scrubbed, "\n")
        print(
            f"{variable}: interchange accuracy {accuracies[variable]:.2f}, scrubbing recovers {scrubbed.recovered:.2f}"
        )
    strict = cp.strict_test(model, by_name)
    print(f"\n{strict}\n\nworst node that the hypothesis does not name: {strict.worst}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-output"))
