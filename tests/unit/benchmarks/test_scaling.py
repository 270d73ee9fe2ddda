"""The simulated cluster goes by the library's own rules, and the page says what was measured."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks import scaling
from benchmarks.scaling import LARGE, SETUPS, Seconds, reproduced
from benchmarks.simulated import Measured, World, simulate

EXACT = Measured((2.0,), (1.0,), (0.0,), (0.0,))


def test_workers_that_lack_nothing_take_the_model_and_their_shards():
    assert simulate(EXACT, World(1, 10)).seconds == 12.0
    assert simulate(EXACT, World(4, 40)).seconds == 12.0
    assert simulate(EXACT, World(4, 40)).efficiency == pytest.approx(10 / 12)


def test_the_study_itself_bounds_how_many_workers_it_can_feed():
    slow = Measured((0.0,), (1.0,), (0.05,), (0.05,))
    many = simulate(slow, World(40, 400))
    assert many.seconds == pytest.approx(40, rel=0.1)
    assert many.own_s == pytest.approx(40)


def test_deaths_stragglers_and_shards_that_hang_lose_nothing_and_cost_little():
    troubled = World(50, 2000, size=10, deaths_per_hour=2, replaced_s=20, slow=0.01, slower=6, hanging=0.002, seed=3)
    found = simulate(EXACT, troubled)
    assert found.n_deaths > 5
    assert found.n_second > 0
    assert 0.6 < found.efficiency < simulate(EXACT, World(50, 2000, size=10)).efficiency


def test_equal_seeds_give_equal_outcomes():
    world = World(20, 200, slow=0.1, slower=5, deaths_per_hour=30, seed=1)
    assert simulate(EXACT, world) == simulate(EXACT, world)
    assert simulate(EXACT, world) != simulate(EXACT, World(20, 200, slow=0.1, slower=5, deaths_per_hour=30, seed=2))


def test_what_was_measured_is_reproduced():
    seconds = Seconds(measuring=[8.1, 8.0, 8.2], shards=[1.0, 1.02, 0.98], takes=[0.001], settles=[0.002])
    seen, simulated = reproduced(seconds, 2, 16)
    assert seen == 8.1
    assert simulated == pytest.approx(8.0, rel=0.02)


def test_the_page_says_what_was_measured(monkeypatch):
    monkeypatch.setattr(scaling, "LARGE", World(20, 200, size=LARGE.size, load_s=120.0))
    seconds = Seconds([3.0], 9.0, [16.0], [15.9], [1.0] * 16, [0.98] * 16, [0.001] * 16, [0.002] * 16)
    half = Seconds([3.0], 9.0, [9.0], [8.9], [1.1] * 16, [1.05] * 16, [0.001] * 16, [0.002] * 16)
    found = dict(zip(SETUPS, (seconds, half, half), strict=True))
    page = scaling.report(found, 16, "processes", "a command", scaling.large(found))
    assert "1.78 times as fast as one; target 1.5: kept" in page
    assert "no shard was lost" in page
    assert "Workers are processes (`executor: {kind: processes}`), and" in page
    assert "Workers are Ray's" in scaling.report(found, 16, "ray", "a command", scaling.large(found))
    assert "| 1 worker x 1 thread | 15.90 s |" in page


@pytest.mark.slow
def test_the_whole_command_runs_on_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "LARGE", World(20, 200, size=LARGE.size, load_s=120.0))
    monkeypatch.setattr(scaling, "NEAR", 10.0)  # shards of a millisecond: that it runs, not how near
    words = ["scaling", "--tiny", "--kind", "processes", "--repeats", "1", "--pairs", "4", "--out"]
    monkeypatch.setattr("sys.argv", [*words, str(tmp_path / "SCALING.md")])
    scaling.main()
    assert "## Simulated" in (tmp_path / "SCALING.md").read_text()
    assert (tmp_path / "scaling.json").exists()


def test_the_kept_page_says_who_the_workers_of_the_kept_numbers_were():
    kept = json.loads(scaling.OUT.with_name("scaling.json").read_text(encoding="utf-8"))
    assert f"Workers are {scaling.WORKERS[kept['kind']]}, and" in scaling.OUT.read_text(encoding="utf-8")
