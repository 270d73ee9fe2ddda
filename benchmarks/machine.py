"""The machine: what it is, how fast it multiplies matrices, and how much memory a process holds."""

import ctypes
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

ROOT: Final = Path(__file__).resolve().parents[1]
MIB: Final = 2**20
# Rows, inner and outer size of the products that the rate is taken from: those of the largest layers measured here.
LEAST_PRODUCTS: Final = 3
PRODUCTS: Final = ((2048, 768, 3072), (2048, 3072, 768), (2048, 2048, 2048))


def gemm_rate(seconds: float = 0.3) -> float:
    """Return the best rate of large float32 matrix products, in GFLOP/s."""
    best = 0.0
    for rows, inner, outer in PRODUCTS:
        left, right = torch.randn(rows, inner), torch.randn(outer, inner)
        with torch.inference_mode():
            torch.nn.functional.linear(left, right)
            end, number = time.perf_counter() + seconds / len(PRODUCTS), 0
            while number < LEAST_PRODUCTS or time.perf_counter() < end:
                number += 1
                started = time.perf_counter()
                torch.nn.functional.linear(left, right)
                best = max(best, 2e-9 * rows * inner * outer / (time.perf_counter() - started))
    return best


def describe() -> dict[str, str]:
    """Return the machine in words."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((int(line.split()[1]) / MIB for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0.0)
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{memory:.0f} GiB",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that is measured, as far as it is installed."""
    found = {}
    for name in ("causalpatch", "torch", "transformers", "transformer-lens", "nnsight", "pyvene", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--short", "HEAD")
    is_changed = bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src"))
    return found | ({"commit": commit + (" and changes" if is_changed else "")} if commit else {})


def resident_mib() -> float:
    """Return the memory that this process holds now, in MiB; 0 where the system does not say."""
    return _status("VmRSS")


def peak_mib() -> float:
    """Return the most memory that this process has held since the last ``forget_peak``, in MiB."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak start anew from what is held now, where the system lets one."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def release_freed() -> None:
    """Give memory that was freed back to the system, where its C library can, so that growth is seen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def _status(name: str) -> float:
    return next((int(line.split()[1]) / 1024 for line in _lines("/proc/self/status") if line.startswith(name)), 0.0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _git(*words: str) -> str:
    try:
        found = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
