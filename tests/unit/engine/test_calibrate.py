import json
import os
from dataclasses import replace

import pytest
import torch

from causalpatch.engine import calibrate as module
from causalpatch.engine.calibrate import Calibration, calibrate, choose, measure_rates, preferred_rows, remembered
from causalpatch.engine.cone import ModelNumbers

SMALL = ModelNumbers(2, 16, 2, 2, 8, 64, 16 * 64, 40)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(module.SWITCH, raising=False)
    return tmp_path / "causalpatch"


@pytest.fixture
def gpu(monkeypatch):
    """Stand in for a GPU that has a name and memory, and is never computed on."""
    names = ["Device One"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    return names


def rising(rows):
    return 1e12 * rows / (rows + 4096)


def never(rows):
    pytest.fail("measured again")


def test_the_smallest_number_of_rows_near_the_best_rate_is_chosen():
    assert choose({512: 50.0, 1024: 96.9, 2048: 97.0, 4096: 100.0, 8192: 99.0}) == Calibration(2048, 97.0)
    assert choose({8192: 100.0, 512: 98.0}) == Calibration(512, 98.0)
    assert choose({512: 3.0}) == Calibration(512, 3.0)


def test_without_a_sound_rate_nothing_is_chosen():
    assert choose({}) is None
    assert choose({512: float("nan"), 1024: 0.0, 2048: float("inf")}) is None
    assert choose({512: float("nan"), 1024: 5.0}) == Calibration(1024, 5.0)


def test_measuring_stops_at_what_fits():
    assert list(measure_rates(rising, 5000)) == [512, 1024, 2048, 4096]

    def narrow(rows):
        if rows > 1024:
            raise torch.OutOfMemoryError("full")
        return 1.0

    assert list(measure_rates(narrow, 10**6)) == [512, 1024]
    assert measure_rates(rising, 100) == {}


def test_other_errors_of_measuring_are_not_hidden():
    def broken(rows):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        measure_rates(broken, 1000)


def test_what_was_found_is_remembered_for_this_device_shape_and_type(gpu, folder):
    found = calibrate(SMALL, CUDA, torch.float32, rising)
    assert found == Calibration(65536, rising(65536))
    assert calibrate(SMALL, CUDA, torch.float32, never) == found
    assert remembered(SMALL, CUDA, torch.float32) == found
    assert preferred_rows(SMALL, CUDA, torch.float32) == 65536
    # Depth and vocabulary do not change a layer's products.
    assert calibrate(replace(SMALL, n_layers=9, vocab=7), CUDA, torch.float32, never) == found
    assert remembered(SMALL, CUDA, torch.bfloat16) is None
    assert remembered(replace(SMALL, n_neurons=128), CUDA, torch.float32) is None
    gpu[0] = "Device Two"
    assert remembered(SMALL, CUDA, torch.float32) is None
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"rows": 0}',
        '{"key": "other", "rows": 512, "rate": 1.0}',
        '{"key": "KEY", "rows": -1, "rate": 1.0}',
        '{"key": "KEY", "rows": 512, "rate": NaN}',
        '{"key": "KEY", "rows": 1e999, "rate": 1.0}',
        '{"key": "KEY", "rows": "many", "rate": 1.0}',
        b"\xff\xfe",
    ],
)
def test_a_corrupt_cache_is_measured_again_and_mended(gpu, folder, content):
    calibrate(SMALL, CUDA, torch.float32, rising)
    (path,) = folder.iterdir()
    key = json.loads(path.read_text())["key"]
    path.write_bytes(content if isinstance(content, bytes) else content.replace('"KEY"', json.dumps(key)).encode())
    assert remembered(SMALL, CUDA, torch.float32) is None
    found = calibrate(SMALL, CUDA, torch.float32, rising)
    assert remembered(SMALL, CUDA, torch.float32) == found


def test_a_cache_that_cannot_be_written_is_no_error(gpu, folder, monkeypatch):
    folder.write_text("a file where the folder should be")
    assert calibrate(SMALL, CUDA, torch.float32, rising).rows == 65536
    folder.unlink()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert calibrate(SMALL, CUDA, torch.float32, rising).rows == 65536
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("word", ["0", "off", "False"])
def test_measuring_and_cache_can_be_switched_off(gpu, folder, monkeypatch, word):
    calibrate(SMALL, CUDA, torch.float32, rising)
    monkeypatch.setenv(module.SWITCH, word)
    assert calibrate(SMALL, CUDA, torch.float32, never) is None
    assert remembered(SMALL, CUDA, torch.float32) is None
    assert preferred_rows(SMALL, CUDA, torch.float32) == 8192


def test_a_device_without_room_for_the_smallest_size_gets_no_answer(gpu, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2**36))
    assert calibrate(SMALL, CUDA, torch.float32, rising) is None
    assert not folder.exists()


def test_a_size_that_only_memory_chose_is_not_remembered(gpu, folder, monkeypatch):
    def narrow(rows):
        if rows > 1024:
            raise torch.OutOfMemoryError("full")
        return rising(rows)

    assert calibrate(SMALL, CUDA, torch.float32, narrow).rows == 1024
    assert remembered(SMALL, CUDA, torch.float32) is None


def test_a_processor_is_not_measured(folder, monkeypatch):
    monkeypatch.setattr(module, "_rate_of_layer", never)
    assert preferred_rows(SMALL, CPU, torch.float32) == 2048
    assert preferred_rows(SMALL, torch.device("meta"), torch.float32) is None
    assert not folder.exists()


@pytest.mark.parametrize("numbers", [SMALL, replace(SMALL, n_kv_heads=1, up=2 * 16 * 64), replace(SMALL, n_heads=3)])
def test_a_layer_can_be_timed_where_there_is_no_gpu(numbers, monkeypatch):
    monkeypatch.setattr(module, "_SIZES", (8, 16))
    monkeypatch.setattr(module, "_SECONDS", 1e-6)
    found = calibrate(numbers, CPU, torch.float32)
    assert found.rows in (8, 16)
    assert 0 < found.rate < 1e14


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed():
    found = calibrate(SMALL, CUDA, torch.float32)
    assert found.rows in module._SIZES
    assert found.rate > 0
