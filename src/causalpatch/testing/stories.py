"""Templates of what small models of children's stories do: copy a name, copy a thing, say "He" or "She".

Each behaviour has eight templates and enough names or things for more than forty pairs that share none. Answers are
read by their first token, since the vocabularies of such models are small. Which pairs a model answers right,
``make_pairs(None, model, templates=templates("name_copy"), entity_disjoint=True, first_token=True)`` finds out.
"""

from collections.abc import Sequence
from typing import Any, Final

from causalpatch.base.errors import TaskNotFound


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS: Final = _words(
    """
    Lily Sue Mia Anna Lucy Amy Sara Mary Jane Zoe Emma Kate Jill Pam Nina Lila Rose Daisy Molly Sally Jenny Polly Ella
    Bella Ellie Sophie Grace Alice Clara Eva Ivy Ruby Nora Kim Liz Meg Peg Bea Deb Fay Irma Betty Nancy Linda Lola Maya
    Tina Wendy Cindy Dora Fiona Gina Hannah Holly Julia Katie Laura Lisa Mandy Nelly Olivia Penny Rita Susie Tara Vicky
    """
)
BOYS: Final = _words(
    """
    Tim Tom Ben Sam Max Jack Bob Leo Joe Jim Billy Bobby Johnny Timmy Tommy Benny Mike Fred Jake Luke John Peter Paul
    Mark Dan Dave Carl Rex Ted Nick Rob Roy Ray Ron Gus Hal Ian Ken Lee Val Wes Abe Art Cal Eli Gil Hank Jeb Kip Lou Ned
    Andy Adam Alex Bill Charlie David Eric Frank George Harry Henry Jerry Kevin Larry Oscar Robert Steve Toby Will
    """
)
THINGS: Final = _words(
    """
    ball car doll toy book kite boat train hat box bear truck drum bike cat dog fish bird duck frog rabbit horse cow pig
    mouse lion tiger monkey puppy kitten balloon block puzzle robot rope shell stick rock leaf flower tree key bell cup
    spoon bowl plate pan pot lamp clock chair table bed pillow blanket coat shoe sock glove ring crown sword flag tent
    bag basket bucket shovel ladder wheel wagon plane rocket bus cake cookie apple banana carrot orange egg button
    ribbon string map coin stone feather mask horn whistle guitar piano camera phone radio mirror brush pencil crayon
    paint letter card
    """
)

NAME_COPY: Final = (
    "Once upon a time, there was a child named {name}. One day,",
    "Once upon a time, there was a kid named {name}. One day,",
    "There was a child named {name}. One day,",
    "Once there was a little child called {name}. One day,",
    "Once upon a time, there lived a child named {name}. Every day,",
    "In a big house there was a child named {name}. One sunny day,",
    "Once upon a time, there was a friend named {name}. One day,",
    "Long ago, there was a child called {name}. One morning,",
)
_OBJECT_COPY = (
    "Tim had a big {thing}. Tim liked to play with the",
    "Lily had a red {thing}. Lily loved to play with the",
    "Tom found a {thing} in the park. Tom took the",
    "Sue got a new {thing}. Sue wanted to show the",
    "Mom gave Ben a {thing}. Ben was happy and he hugged the",
    "Mia saw a {thing}. Mia wanted to touch the",
    "Sam and his mom bought a small {thing}. Sam liked the",
    "There was a {thing} on the floor. Amy picked up the",
)
PRONOUN: Final = (
    "{name} had a red ball.",
    "One day, {name} was very sad.",
    "{name} went to the park.",
    "{name} was a happy child.",
    "{name} liked to play.",
    "One day, {name} saw a big dog.",
    "There was a child named {name}.",
    "{name} wanted to eat a cake.",
)
_SAID = [{"name": name, "pronoun": "She"} for name in GIRLS] + [{"name": name, "pronoun": "He"} for name in BOYS]
_BEHAVIOURS: Final[dict[str, tuple[Sequence[str], str, Any]]] = {
    "name_copy": (NAME_COPY, " {name}", {"name": (*GIRLS, *BOYS)}),
    "object_copy": (_OBJECT_COPY, " {thing}", {"thing": THINGS}),
    "pronoun": (PRONOUN, " {pronoun}", _SAID),
}
BEHAVIOURS: Final = tuple(_BEHAVIOURS)


def templates(behaviour: str) -> list[dict[str, Any]]:
    """Return the templates of a behaviour, for ``make_pairs``.

    Args:
        behaviour: ``name_copy``, ``object_copy`` or ``pronoun``.

    Raises:
        TaskNotFound: There is no such behaviour.

    Examples:
        >>> templates("pronoun")[0]["prompt"]
        '{name} had a red ball.'
    """
    if behaviour not in _BEHAVIOURS:
        raise TaskNotFound(
            f"there are no templates of {behaviour!r}", facts=[("known", ", ".join(BEHAVIOURS))], fix='"name_copy"'
        )
    prompts, answer, fillers = _BEHAVIOURS[behaviour]
    return [
        {"name": f"{behaviour}-{number}", "prompt": prompt, "answer": answer, "fillers": fillers}
        for number, prompt in enumerate(prompts)
    ]
