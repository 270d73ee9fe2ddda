"""Where a store keeps its objects: bytes under names, each written whole or not at all.

============  ====================================================================================================
where         how an object appears whole
============  ====================================================================================================
a folder      written under a temporary name, forced to disk where it has to last, then renamed; ``put_new`` links it,
              which fails where the name is taken
an address    one request of the object store (a PUT is atomic); ``put_new`` asks it to refuse a name that is taken
              (``If-None-Match: *`` on S3)
============  ====================================================================================================

Addresses are those that fsspec reads. A server that does not answer is asked again for a minute before it counts as
unreachable, so that one that is started again in between costs nothing but time.
"""

import errno
import os
import platform
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, runtime_checkable

from causalpatch.base.errors import StoreFull, StoreUnreachable
from causalpatch.base.extras import lazy, require

if TYPE_CHECKING:
    from fsspec import core as fsspec_core
else:
    fsspec_core = lazy("fsspec.core")

T = TypeVar("T")

PARTIAL: Final = ".partial"
PATIENCE_S: Final = 60.0
_AT_FIRST_S: Final = 10.0  # where a server has not answered yet: nothing that was begun is waiting for it
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_RIGHTS: Final = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
_CLIENTS: Final = ("botocore", "aiobotocore", "aiohttp", "asyncio", "urllib3", "requests", "gcsfs", "adlfs", "azure")
_DOORS: Final = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_NUMBER = count()


@runtime_checkable
class Objects(Protocol):
    """Bytes under names with slashes."""

    address: str
    """What messages call the place."""

    def get(self, name: str) -> bytes | None:
        """Return an object; None where there is none."""

    def put(self, name: str, data: bytes, *, lasting: bool = True) -> None:
        """Write an object, in place of one that is there.

        Args:
            name: Its name.
            data: Its bytes.
            lasting: Whether it has to outlast the machine's losing its power; what only the living need is not forced
                to disk, and written faster.
        """

    def put_new(self, name: str, data: bytes, *, lasting: bool = True) -> bool:
        """Write an object unless its name is taken; return whether these bytes are there now.

        Args:
            name: Its name.
            data: Its bytes.
            lasting: As for ``put``.
        """

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder, without it, sorted."""

    def delete(self, name: str) -> None:
        """Take an object away; nothing where there is none."""

    def path(self, name: str) -> Path | None:
        """Return the file that an object is; None where it is none of this machine."""

    def tidy(self, folder: str, *, deeply: bool = True) -> None:
        """Take away what processes of this machine that are gone were writing into a folder and those in it."""


def open_objects(address: str, patience_s: float = PATIENCE_S) -> Objects:
    """Return what stands behind an address.

    Args:
        address: A folder, or what fsspec reads, such as ``s3://bucket/place``.
        patience_s: How long a server that does not answer is asked again, in seconds.

    Raises:
        MissingExtra: A package that the address needs is not installed.
        StoreUnreachable: The address is none, or a file stands where the folder would be.
    """
    protocol, colon, rest = address.partition("://")
    if not colon:
        return _folder(Path(address))
    if protocol == "file":
        return _folder(Path(rest))
    if protocol in _DOORS:
        require(_DOORS[protocol])
    return Remote(address, patience_s)


class Folder:
    """A folder of this machine.

    Args:
        root: Made with the first object.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.address = str(root)

    def get(self, name: str) -> bytes | None:
        """Return an object; None where there is none."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise self._refused("read", error) from error

    def put(self, name: str, data: bytes, *, lasting: bool = True) -> None:
        """Write an object, in place of one that is there."""
        self._write(name, data, lambda partial, path: partial.replace(path), lasting=lasting)

    def put_new(self, name: str, data: bytes, *, lasting: bool = True) -> bool:
        """Write an object unless its name is taken; return whether these bytes are there now."""
        try:
            self._write(name, data, _link, lasting=lasting)
        except FileExistsError:
            return self.get(name) == data
        return True

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder, without it, sorted."""
        try:
            with os.scandir(self.root / folder) as found:
                return sorted(each.name for each in found if not each.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._refused("read", error) from error

    def delete(self, name: str) -> None:
        """Take an object away; nothing where there is none."""
        try:
            (self.root / name).unlink(missing_ok=True)
        except OSError as error:
            raise self._refused("changed", error) from error

    def path(self, name: str) -> Path | None:
        """Return the file that an object is."""
        return self.root / name

    def tidy(self, folder: str, *, deeply: bool = True) -> None:
        """Take away what processes of this machine that are gone were writing into a folder and those in it."""
        pattern, place = f".*.{platform.node()}.*{PARTIAL}", self.root / folder
        for path in place.rglob(pattern) if deeply else place.glob(pattern):
            number = path.name.split(".")[-3]
            if number.isdigit() and not _runs(int(number)):
                path.unlink(missing_ok=True)

    def _write(self, name: str, data: bytes, place: Callable[[Path, Path], object], *, lasting: bool) -> None:
        path = self.root / name
        partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.{next(_NUMBER)}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            place(partial, path)
        except FileExistsError:
            raise
        except OSError as error:
            raise self._refused("written", error) from error
        finally:
            partial.unlink(missing_ok=True)

    def _refused(self, verb: str, error: OSError) -> StoreFull | StoreUnreachable:
        facts: list[tuple[str, object]] = [("error", f"{type(error).__name__}: {error.strerror}")]
        if error.errno in _FULL:
            facts.append(("kept", "every shard that was finished"))
            return StoreFull(f"the store '{self.address}' is full", facts, fix="make room, and run the study again")
        return StoreUnreachable(
            f"the store '{self.address}' cannot be {verb}", facts, fix="name another folder: --set store=FOLDER"
        )


def _folder(root: Path) -> Folder:
    # Not Path.is_file, which raises where a folder may not be looked into: Folder says so in its own words.
    file = next((path for path in (root, *root.absolute().parents) if os.path.isfile(path)), None)
    if file is not None:
        raise StoreUnreachable(
            f"'{root}' cannot be the folder of a store",
            facts=[("is a file", file)],
            fix="name another folder: --set store=FOLDER",
        )
    return Folder(root)


def _runs(process: int) -> bool:
    """Say whether a process of this machine may be running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _link(partial: Path, path: Path) -> None:
    """Give a file its name unless that is taken, also where files cannot have two names."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with path.open("xb") as file:
            file.write(partial.read_bytes())


class Remote:
    """A place of an object store.

    Args:
        address: What fsspec reads.
        patience_s: How long a server that does not answer is asked again, in seconds; no longer than ten of them before
            it has answered at all.
    """

    def __init__(self, address: str, patience_s: float) -> None:
        self.address = address.rstrip("/")
        self.patience_s = patience_s
        self._has_answered = False
        options = {} if address.startswith("memory:") else {"skip_instance_cache": True, "use_listings_cache": False}
        try:
            self._files, self._root = fsspec_core.url_to_fs(self.address, **options)
        except (ValueError, TypeError, ImportError) as error:
            raise StoreUnreachable(
                f"'{address}' is no address of a store",
                facts=[("error", str(error)[:80])],
                fix="name a folder, or such as s3://bucket/place",
            ) from error

    def get(self, name: str) -> bytes | None:
        """Return an object; None where there is none."""

        def read() -> bytes | None:
            try:
                return bytes(self._files.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

        return self._patiently(read)

    def put(self, name: str, data: bytes, *, lasting: bool = True) -> None:
        """Write an object, in place of one that is there."""
        del lasting
        self._patiently(lambda: self._files.pipe_file(self._at(name), data))

    def put_new(self, name: str, data: bytes, *, lasting: bool = True) -> bool:
        """Write an object unless its name is taken; return whether these bytes are there now."""
        del lasting

        def write() -> bool:
            try:
                self._files.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                # Perhaps our own: an answer that was lost was asked for again.
                return self.get(name) == data
            return True

        return self._patiently(write)

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder, without it, sorted."""

        def read() -> list[str]:
            try:
                found = self._files.ls(self._at(folder), detail=False)
            except FileNotFoundError:
                return []
            inside = self._at(folder).strip("/") + "/"
            names = (str(each).strip("/").removeprefix(inside) for each in found)
            return sorted(name for name in names if name and not name.startswith("."))

        return self._patiently(read)

    def delete(self, name: str) -> None:
        """Take an object away; nothing where there is none."""

        def take() -> None:
            try:
                self._files.rm_file(self._at(name))
            except FileNotFoundError:
                return

        self._patiently(take)

    def path(self, name: str) -> Path | None:
        """Return None: it is no file of this machine."""
        del name
        return None

    def tidy(self, folder: str, *, deeply: bool = True) -> None:
        """Do nothing: what was not written whole is not there."""

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again for a while where the server does not answer."""
        started, wait = time.monotonic(), 0.1
        while True:
            try:
                answer = ask()
            except PermissionError as error:
                raise self._unreachable(error, "give this machine the right to read and write it") from error
            except FileNotFoundError as error:  # of what is written: there is no such bucket
                raise self._unreachable(error, "make the bucket, or name another one: --set store=…") from error
            except Exception as error:
                if type(error).__name__ in _RIGHTS:
                    raise self._unreachable(error, "give credentials, such as AWS_ACCESS_KEY_ID") from error
                if not _is_of_the_way(error):
                    raise
                most = self.patience_s if self._has_answered else min(self.patience_s, _AT_FIRST_S)
                if time.monotonic() - started > most:
                    raise self._unreachable(error, "start the server, and run the study again") from error
            else:
                self._has_answered = True
                return answer
            time.sleep(wait)
            wait = min(2 * wait, 5.0)

    def _unreachable(self, error: Exception, fix: str) -> StoreUnreachable:
        said = " ".join(str(error).split())[:80]
        return StoreUnreachable(
            f"the store '{self.address}' does not answer",
            facts=[
                ("error", f"{type(error).__name__}: {said}"),
                *([("kept", "every shard that was finished")] if self._has_answered else []),
            ],
            fix=fix,
        )


def _is_of_the_way(error: Any) -> bool:
    """Say whether an exception is of the way to the server, not of what was asked."""
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in _CLIENTS
