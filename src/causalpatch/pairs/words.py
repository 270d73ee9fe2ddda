"""The words of the built-in tasks: written for this library, and the vocabulary of its embedded model.

Names, nouns and adjectives are plentiful so that a task can make more than forty pairs that share none of them. No noun
begins with another noun, so "the key" is found once in a prompt.
"""

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: Final[tuple[str, ...]] = _words(
    """
    Mary John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Donald
    Steven Paul Andrew Joshua Kenneth Kevin Brian George Edward Ronald Timothy Jason Jeffrey Ryan Jacob Gary Nicholas
    Eric Jonathan Stephen Larry Justin Scott Brandon Benjamin Samuel Frank Gregory Raymond Patrick Jack Dennis Jerry
    Tyler Aaron Adam Henry Nathan Peter Zachary Kyle Walter Harold Carl Arthur Roger Keith Jeremy Terry Lawrence Sean
    Victor Albert Oscar Ethan Austin Jesse Martin Billy Bryan Bruce Ralph Roy Louis Patricia Jennifer Linda Elizabeth
    Barbara Susan Jessica Sarah Karen Nancy Lisa Margaret Betty Sandra Ashley Dorothy Kimberly Emily Donna Michelle
    Carol Amanda Melissa Deborah Stephanie Rebecca Laura Sharon Cynthia Kathleen Amy Angela Shirley Anna Ruth Brenda
    Pamela Nicole Katherine Virginia Monica Christine Samantha Audrey Janet Rachel Carolyn Emma Maria Heather Diane
    Julie Joyce Victoria Kelly Claire Joan Evelyn Lauren Judith Olivia Martha Cheryl Megan Andrea Helen Alice Jean
    Doris Jacqueline Naomi Hannah Julia Gloria Teresa Sophie Janice Grace Judy Irene
    """
)

PLACES: Final[tuple[str, ...]] = _words(
    """
    store park garden school museum market station harbor castle temple tower bridge forest river lake mountain valley
    island village office kitchen cellar stable hospital theater palace hotel library bakery church
    """
)

OBJECTS: Final[tuple[str, ...]] = _words(
    """
    book letter ring coin lamp drum guitar hammer bottle basket blanket candle mirror pencil ticket map clock spoon
    plate bowl cup pillow picture flower lemon carrot melon cake cookie hat coat shirt glove button needle ladder rope
    kite ball doll puzzle jewel necklace sword shield flag lantern bucket shovel key
    """
)

_OTHER_NOUNS = _words(
    """
    doctor lawyer teacher sailor painter soldier butcher singer writer dancer driver nurse judge guard pilot king queen
    prince merchant hunter tailor barber poet clerk priest bishop servant student cousin neighbor dog cat horse cow
    goat rabbit tiger lion bear eagle owl duck frog snake spider whale shark camel monkey donkey pigeon turtle beetle
    parrot lizard otter badger falcon hawk chair table desk curtain carpet statue wheel wagon boat arrow tent apple
    boot window door wall fence road violin cottage meadow
    """
)

NOUNS: Final[tuple[str, ...]] = PLACES + OBJECTS + _OTHER_NOUNS

EVENTS: Final[tuple[str, ...]] = _words(
    """
    war siege voyage trial strike reign plague famine flood drought festival feud rebellion expedition campaign project
    program contest debate dispute election revolution renovation construction exhibition concert banquet journey
    mission treaty alliance embargo blockade occupation boycott crisis inquiry hearing harvest migration conquest
    crusade truce marriage partnership experiment survey lecture ceremony celebration tournament restoration
    investigation negotiation friendship exile quarantine depression recession parade
    """
)

MOODS: Final[tuple[str, ...]] = _words("happy sad angry calm brave shy kind quiet gentle proud lazy warm cold famous")

ADJECTIVES: Final[tuple[str, ...]] = MOODS + _words(
    """
    red blue green yellow white black brown golden silver purple old new young small big tall short long wide narrow
    heavy light dark bright quick slow cruel rich poor clean dirty soft hard sweet bitter sour hot dry wet empty full
    broken loud strange common secret
    """
)

LIST_WORDS: Final[tuple[str, ...]] = NOUNS + EVENTS + ADJECTIVES
"""What the lists of the induction task are made of."""

CENTURIES: Final[tuple[str, ...]] = tuple(str(century) for century in range(11, 19))
"""The first two digits of a year."""

YEARS: Final[tuple[str, ...]] = tuple(f"{year:02d}" for year in range(100))
"""The last two digits of a year."""


def plural(noun: str) -> str:
    """Return the regular plural of a noun of these lists.

    Examples:
        >>> plural("key"), plural("church"), plural("library")
        ('keys', 'churches', 'libraries')
    """
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def never_meet(first: int, second: int) -> bool:
    """Say whether two words of one list, given by their indices, are kept apart in the embedded model's training.

    One couple in eight is: two such names never stand in one training text, two such nouns are never subject and
    attractor of one verb, two such words never neighbours in a list, and such a century and year never begin an event.
    The built-in tasks ask about these couples only.
    """
    return (first + second) % 8 == 0
