"""The sentences of the built-in tasks: templates with slots in braces, ended where the model must go on.

The last template of each task never occurs in the embedded model's training; all of its words do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Template:
    """A sentence with slots.

    Args:
        name: How the template is asked for and reported.
        text: The prompt, with slots in braces.
    """

    name: str
    text: str


@dataclass(frozen=True)
class ListTemplate:
    """A frame in which a list of words is repeated.

    Args:
        name: How the template is asked for and reported.
        opening: What stands before the first list.
        between: What stands between two lists, and before the last word.
    """

    name: str
    opening: str
    between: str

    def fill(self, lists: Sequence[str]) -> str:
        """Return the prompt that holds these lists one after the other."""
        return self.opening + self.between.join(lists)


IOI: Final[tuple[Template, ...]] = (
    Template("when-went", "When {a} and {b} went to the {place}, {giver} gave a {object} to"),
    Template("after-met", "After {a} and {b} met at the {place}, {giver} handed the {object} to"),
    Template("then-had", "Then {a} and {b} had fun at the {place}. {giver} offered a {object} to"),
    Template(
        "day-aside",
        "{a} and {b} spent the day at the {place}. {aside} was {adjective}. {giver} showed the {object} to",
    ),
    Template(
        "found-aside", "{a} and {b} found a {object} near the {place}. {aside} felt {adjective}. {giver} gave it to"
    ),
    Template("while-worked", "While {a} and {b} worked at the {place}, {giver} sold a {object} to"),
    Template(
        "before-aside", "{aside} was {adjective}. {a} and {b} came to the {place} and {giver} brought the {object} to"
    ),
    Template("once-back", "Once {a} and {b} came back from the {place}, {giver} passed the {object} to"),
)

INDUCTION: Final[tuple[ListTemplate, ...]] = (
    ListTemplate("plain", "", " "),
    ListTemplate("stops", "", ". "),
    ListTemplate("commas", "", ", "),
    ListTemplate("again", "List: ", ". Again: "),
    ListTemplate("then", "First ", " then "),
    ListTemplate("and-then", "Say ", " and then "),
    ListTemplate("we-read", "We read ", "; then we read "),
    ListTemplate("they-said", "They said ", ". They said "),
)

AGREEMENT: Final[tuple[Template, ...]] = (
    Template("near", "The {subject} near the {attractor}"),
    Template("behind", "The {subject} behind the {attractor}"),
    Template("today", "Today the {subject} from the {attractor}"),
    Template("people-say", "People say that the {subject} beside the {attractor}"),
    Template("next-to", "The {adjective} {subject} next to the {attractor}"),
    Template("stood-under", "The {subject} that stood under the {attractor}"),
    Template("close-to", "The {subject} close to the {adjective} {attractor}"),
    Template("came-from", "Then the {adjective} {subject} that came from the {attractor}"),
)

GREATER_THAN: Final[tuple[Template, ...]] = (
    Template("lasted", "The {event} lasted from the year {start} to the year {century}"),
    Template("began-ended", "The {event} began in {start} and ended in {century}"),
    Template("from-until", "From {start} the {event} went on until {century}"),
    Template("started-over", "In {start} the {event} started and it was over by {century}"),
    Template("people-say", "People say that the {event} ran from {start} to {century}"),
    Template("between", "The {event} took place between {start} and {century}"),
    Template("opened-closed", "After it opened in {start}, the {event} closed in {century}"),
    Template("did-not-stop", "The {event} that started in {start} did not stop until {century}"),
)
