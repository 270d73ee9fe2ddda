"""Leases: who measures which shard, so that two runs on one store share the work and neither waits for a dead one.

1. A lease is an object ``SHARD/NUMBER``, made with ``put_new``: of two that want the same number one gets it.
2. Its holder writes it again and again with a count that goes up (a heartbeat).
3. Whoever finds it held notes the count, by his own steady clock. Where it has not gone up for the lease's time the
   holder is dead, and the next number may be taken. On the holder's own machine it is enough that its process is gone.
4. What is held counts only for the one with the highest number.

No two clocks are ever compared, and none that can be set: a clock that jumps changes nothing. Where a holder was only
slow both measure the shard, and write the same bytes under the same name.
"""

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from causalpatch.base.errors import StoreFull, StoreUnreachable
from causalpatch.studies.objects import Objects
from causalpatch.studies.sealed import seal, unseal

KIND: Final = "causalpatch lease"
TIME_S: Final = 60.0
_BEATS: Final = 4  # heartbeats in a lease's time


@dataclass
class Leases:
    """The leases of one run on a store.

    Args:
        objects: The store.
        folder: Where leases are kept in it.
        time_s: After how many seconds without a heartbeat a holder counts as dead.
        clock: A steady clock, in seconds.
    """

    objects: Objects
    folder: str
    time_s: float = TIME_S
    clock: Callable[[], float] = time.monotonic
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._held: dict[str, int] = {}  # number of the lease that is held, by shard
        self._seen: dict[str, tuple[Any, float]] = {}  # what a lease of another said last, and since when
        self._beat = 0
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self, shard: str) -> bool:
        """Take the lease of a shard, and keep it alive; return whether it was free."""
        numbers = sorted(int(name) for name in self.objects.names(f"{self.folder}/{shard}") if name.isdigit())
        last = numbers[-1] if numbers else 0
        if last and not self._is_dead(shard, last):
            return False
        if not self.objects.put_new(self._name(shard, last + 1), self._content(), lasting=False):
            return False
        with self._guard:
            self._held[shard] = last + 1
            self._seen.pop(shard, None)
            if self._heart is None:
                self._heart = threading.Thread(target=self._live, name="leases", daemon=True)
                self._heart.start()
        return True

    def release(self, shard: str) -> None:
        """Give a lease back, with all that were given up before it."""
        with self._guard:
            number = self._held.pop(shard, 0)
        for each in range(number, 0, -1):
            self.objects.delete(self._name(shard, each))

    def close(self) -> None:
        """Give all leases back."""
        self._stop.set()
        for shard in list(self._held):
            self.release(shard)

    def beat(self) -> None:
        """Say that the holder of all leases is alive."""
        self._beat += 1
        with self._guard:
            held = list(self._held.items())
        for shard, number in held:
            with self._guard:
                is_held = self._held.get(shard) == number
            if is_held:
                self.objects.put(self._name(shard, number), self._content(), lasting=False)

    def _is_dead(self, shard: str, number: int) -> bool:
        """Say whether the holder of a lease is known to be dead."""
        name = self._name(shard, number)
        data = self.objects.get(name)
        said = unseal(KIND, data)
        if said is not None and said["host"] == _host() and not _is_alive(said["process"]):
            return True
        now = self.clock()
        before, since = self._seen.get(shard, (None, now))
        if before != (number, data):
            self._seen[shard] = ((number, data), now)
            return False
        return now - since > (said["time_s"] if said else self.time_s)

    def _live(self) -> None:
        while not self._stop.wait(self.time_s / _BEATS):
            try:
                self.beat()
            except (StoreFull, StoreUnreachable):
                continue  # whoever measures will be told; until then the leases run out

    def _content(self) -> bytes:
        said = {"owner": self.owner, "beat": self._beat, "time_s": self.time_s}
        return seal(KIND, {**said, "host": _host(), "process": _this_process()})

    def _name(self, shard: str, number: int) -> str:
        return f"{self.folder}/{shard}/{number}"


def _host() -> str:
    """Return what tells this start of this machine from all others; of containers too, which share a kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = space = ""
    return f"{platform.node()}/{boot}/{space}"


def _this_process() -> str:
    return f"{os.getpid()}/{_started(os.getpid())}"


def _is_alive(process: str) -> bool:
    """Say whether a process of this machine runs; one that has the number of a dead one is another."""
    number, _, started = process.partition("/")
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return _started(int(number)) == started


def _started(number: int) -> str:
    """Return when a process was started, in ticks of the kernel; nothing where the kernel does not say, or it is dead.

    A process that has ended and was not waited for yet (Z) is dead.
    """
    try:
        words = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if words[0] == "Z" else words[19]
