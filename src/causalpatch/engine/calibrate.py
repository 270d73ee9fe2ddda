"""How many rows a device should compute at once: measured once per device and shape of model, then remembered.

1. The matrix products of one layer, with its norm and activation, are timed at several numbers of rows.
2. The smallest number whose rate is within 3 % of the best is taken: more rows would only cost memory.
3. The answer is kept in the user's cache folder. A cache that cannot be read or written is as good as none.

A CPU is not measured: 2,048 rows are fast on every one that was tried. ``CAUSALPATCH_CALIBRATE=0`` switches measuring
and the cache off.

Cost: well under a second and one layer's weights in memory, once.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from causalpatch.engine.cone import ModelNumbers
from causalpatch.engine.memory import CPU_CHUNK_ROWS, budget_bytes, is_out_of_memory, packed_row_bytes

SWITCH: Final = "CAUSALPATCH_CALIBRATE"
CLOSE_ENOUGH: Final = 0.97
_SIZES: Final = tuple(512 * 2**step for step in range(9))  # 512 to 131,072 rows
_DEFAULT_ROWS: Final = 8192
_VERSION: Final = 1
_KEYS: Final = 128  # tokens that a row sees, as far as memory for the largest size goes
_SECONDS: Final = 0.03  # of timing per size, at least


@dataclass(frozen=True)
class Calibration:
    """What was found for a device and a shape of model.

    Args:
        rows: Rows that go through a layer together.
        rate: Floating-point operations per second at that size.
    """

    rows: int
    rate: float


Rate = Callable[[int], float]
"""From a number of rows to floating-point operations per second."""


def preferred_rows(numbers: ModelNumbers, device: torch.device, dtype: torch.dtype) -> int | None:
    """Return at how many rows a device is fast.

    Args:
        numbers: The model.
        device: Where it is.
        dtype: Its floating-point type.

    Returns:
        2,048 on a CPU; on a GPU what was measured, now or earlier; elsewhere None, for as many as fit.
    """
    if device.type == "cpu":
        return CPU_CHUNK_ROWS
    if device.type != "cuda":
        return None
    found = calibrate(numbers, device, dtype)
    return found.rows if found else _DEFAULT_ROWS


def remembered(numbers: ModelNumbers, device: torch.device, dtype: torch.dtype) -> Calibration | None:
    """Return what was found for a device and a shape of model earlier, if anything; nothing is measured."""
    return _load(_describe(numbers, device, dtype)) if _is_on() else None


def calibrate(
    numbers: ModelNumbers, device: torch.device, dtype: torch.dtype, rate: Rate | None = None
) -> Calibration | None:
    """Find out at how many rows a device is fast, or remember it.

    Args:
        numbers: The model.
        device: Where it is.
        dtype: Its floating-point type.
        rate: Measures a number of rows; by default the products of one layer with random numbers.

    Returns:
        What was found; None if measuring is switched off or not even the smallest number of rows fits into memory.
    """
    if not _is_on():
        return None
    key = _describe(numbers, device, dtype)
    found = _load(key)
    if found is None:
        most = budget_bytes(device, None) // packed_row_bytes(numbers, _KEYS)
        rates = measure_rates(_rate_of_layer(numbers, device, dtype) if rate is None else rate, most)
        found = choose(rates)
        # Where memory was what ended the series, more of it may be free next time.
        if found is not None and (found.rows < max(rates) or found.rows == _SIZES[-1]):
            _save(key, found)
    return found


def measure_rates(rate: Rate, most: int) -> dict[int, float]:
    """Measure growing numbers of rows until they no longer fit or no longer gain.

    Args:
        rate: Measures a number of rows.
        most: Most rows to try.

    Returns:
        The rate at each number of rows.
    """
    found: dict[int, float] = {}
    for rows in _SIZES:
        if rows > most:
            break
        try:
            found[rows] = rate(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
    return found


def choose(rates: Mapping[int, float]) -> Calibration | None:
    """Return the smallest number of rows whose rate is within 3 % of the best, or None if there is no rate."""
    sound = {rows: rate for rows, rate in rates.items() if math.isfinite(rate) and rate > 0}
    if not sound:
        return None
    enough = CLOSE_ENOUGH * max(sound.values())
    rows = min(rows for rows, rate in sound.items() if rate >= enough)
    return Calibration(rows, sound[rows])


def _rate_of_layer(numbers: ModelNumbers, device: torch.device, dtype: torch.dtype) -> Rate:
    """Return what times the products of one layer, with a norm in front and an activation in the MLP."""
    inner = numbers.n_heads * numbers.head_width
    qkv = inner + 2 * numbers.n_kv_heads * numbers.head_width
    shapes = {
        "qkv": (numbers.width, qkv),
        "projection": (inner, numbers.width),
        "up": (numbers.width, numbers.up // numbers.width),
        "down": (numbers.n_neurons, numbers.width),
    }
    weights = {name: torch.randn(shape, device=device, dtype=dtype) / shape[0] ** 0.5 for name, shape in shapes.items()}

    def layer(x: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:])
        mid = x + (normed @ weights["qkv"])[:, :inner] @ weights["projection"]
        raised = torch.nn.functional.gelu(mid @ weights["up"])
        out: Tensor = mid + raised[:, : numbers.n_neurons] @ weights["down"]
        return out

    def rate(rows: int) -> float:
        x = torch.randn(rows, numbers.width, device=device, dtype=dtype)
        with torch.inference_mode():
            layer(x)  # the first call chooses kernels and takes memory
            seconds = _time_cuda(layer, x) if device.type == "cuda" else _time_here(layer, x)
        return 2.0 * rows * numbers.layer / seconds

    return rate


def _time_cuda(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the seconds of one call on a GPU, the smallest of several."""
    best, spent = math.inf, 0.0
    while spent < _SECONDS:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(x.device):
            start.record()
            layer(x)
            stop.record()
            stop.synchronize()
        seconds = max(start.elapsed_time(stop) / 1e3, 1e-9)
        best, spent = min(best, seconds), spent + max(seconds, 1e-3)
    return best


def _time_here(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the seconds of one call on a CPU, the smallest of several."""
    best, spent = math.inf, 0.0
    while spent < _SECONDS:
        start = time.perf_counter()
        layer(x)
        seconds = max(time.perf_counter() - start, 1e-9)
        best, spent = min(best, seconds), spent + seconds
    return best


def _is_on() -> bool:
    return os.environ.get(SWITCH, "1").strip().lower() not in ("0", "false", "no", "off")


def _describe(numbers: ModelNumbers, device: torch.device, dtype: torch.dtype) -> str:
    """Return all that the answer depends on; the number of layers and the vocabulary do not matter."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.processor()}"
    shape = (numbers.width, numbers.n_heads, numbers.n_kv_heads, numbers.head_width, numbers.n_neurons, numbers.up)
    return json.dumps([_VERSION, name, str(dtype), torch.__version__, shape])


def _path(key: str) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "causalpatch" / f"rows-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _load(key: str) -> Calibration | None:
    """Return what was found earlier, or None; a file that is not as it was written counts as none."""
    try:
        content = json.loads(_path(key).read_text(encoding="utf-8"))
        found = Calibration(int(content["rows"]), float(content["rate"]))
        is_sound = content["key"] == key and found.rows > 0 and math.isfinite(found.rate) and found.rate > 0
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return found if is_sound else None


def _save(key: str, found: Calibration) -> None:
    """Keep what was found; where that is not possible it is found again next time."""
    path = _path(key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, **asdict(found)}, file)
            os.replace(name, path)
        except OSError:
            with suppress(OSError):
                os.unlink(name)
