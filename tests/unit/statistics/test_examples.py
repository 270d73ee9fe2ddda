"""The examples in the docstrings hold, and the room is light."""

import doctest
import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["agreement", "coverage", "families", "intervals", "permutation", "together"])
def test_the_examples_in_the_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(f"causalpatch.statistics.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("room", ["causalpatch.statistics", "causalpatch.sites"])
def test_the_room_loads_nothing_heavy(room):
    heavy = "{'scipy', 'torch', 'transformers', 'pandas', 'xarray'}"
    code = f"import sys, {room}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
