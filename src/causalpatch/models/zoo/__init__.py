"""Models that come with the library, with nothing to download, and the script that trained them.

``open_model("zoo:stories")`` opens one; its folder holds the weights, the configuration, the tokenizer and ``CARD.md``.
"""

from pathlib import Path

from causalpatch.base.errors import ModelNotFound
from causalpatch.base.suggest import closest

__all__ = ["zoo_folder", "zoo_names"]

_HERE = Path(__file__).parent


def zoo_names() -> list[str]:
    """Return the names of the models that come with the library."""
    return sorted(folder.parent.name for folder in _HERE.glob("*/config.json"))


def zoo_folder(name: str) -> Path:
    """Return the folder of a model that comes with the library.

    Raises:
        ModelNotFound: No model of this name comes with the library.
    """
    names = zoo_names()
    if name not in names:
        near = closest(name, names) or names
        raise ModelNotFound(
            f"no model named {name!r} comes with the library",
            facts=[("zoo", ", ".join(names) or "(empty)")],
            fix=f"use 'zoo:{near[0]}'" if near else "train it with: python -m causalpatch.models.zoo.train",
        )
    return _HERE / name
