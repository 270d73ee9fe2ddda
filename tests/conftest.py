"""Settings shared by all tests: no network, two quiet threads, seeded property tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On some CPUs products are rounded by where in memory an array begins; tests of equal bits want them not to be.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "test", max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("slow", max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("test")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders of their own for what the library keeps of a user, one a test."""
    folder = tmp_path_factory.mktemp("state")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_state(states: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the ledgers of tests apart, and out of the user's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(next(states)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained models and reference numbers that stands beside the project."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"the folder with trained reference models is not there: {SHARED}")
    return SHARED
