"""Lazy doors to heavy and optional packages: a package is imported when something of it is first used.

``import causalpatch`` must be silent and quick, and the light rooms must work where torch is not installed. So a module
that needs a heavy package writes::

    if TYPE_CHECKING:
        import xarray as xr
    else:
        xr = lazy("xarray")
"""

import importlib
from types import ModuleType
from typing import Any

from causalpatch.base.errors import MissingExtra

_EXTRA_OF = {
    "accelerate": "ray",
    "captum": "captum",
    "lm_eval": "lm-eval",
    "peft": "peft",
    "ray": "ray",
    "s3fs": "s3",
}


class _LazyModule(ModuleType):
    """A stand-in that imports its package on the first attribute access."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return getattr(require(self.__name__), name)


def lazy(package: str) -> Any:
    """Return a stand-in for ``package`` that imports it on first use.

    Args:
        package: Dotted name of the module, such as ``"xarray"`` or ``"pyarrow.parquet"``.

    Returns:
        The stand-in. Attribute access raises ``MissingExtra`` where the package is not installed.
    """
    return _LazyModule(package)


def require(package: str) -> ModuleType:
    """Import ``package`` now.

    Args:
        package: Dotted name of the module.

    Returns:
        The module.

    Raises:
        MissingExtra: The package is not installed; the message says which ``pip install`` mends it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        root = package.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        extra = _EXTRA_OF.get(root)
        wanted = f'"causalpatch[{extra}]"' if extra else root
        raise MissingExtra(f"the package {root!r} is not installed", fix=f"pip install {wanted}") from error
