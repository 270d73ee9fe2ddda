"""The two roles of an input in a pair."""

from typing import Final, Literal, TypeAlias

from causalpatch.base.errors import SettingError

Role: TypeAlias = Literal["clean", "corrupt"]
ROLES: Final[tuple[Role, Role]] = ("clean", "corrupt")
ROLE_WORDS: Final[dict[Role, str]] = {"clean": "clean", "corrupt": "corrupted"}


def as_role(text: str) -> Role:
    """Return a role as it is.

    Raises:
        SettingError: The text is neither ``clean`` nor ``corrupt``.
    """
    if text not in ROLES:
        raise SettingError(
            f"{text!r} is not a role of a pair", facts=[("known", "clean, corrupt")], fix='write "clean" or "corrupt"'
        )
    return text


def other(role: Role) -> Role:
    """Return the other role."""
    return "corrupt" if role == "clean" else "clean"
