"""Importing is silent, quick and light: nothing heavy is loaded until something needs it."""

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "xarray", "pandas", "altair", "pyarrow", "jaxtyping", "scipy", "vl_convert", "rich")
LIGHT_ROOMS = ("base", "sites", "statistics", "results", "pairs")


def run(code):
    """Run code in a fresh process; return what it printed on both streams."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_importing_the_package_is_silent_and_loads_nothing_heavy():
    assert run(f"import sys, causalpatch\nprint(sorted(set({HEAVY}) & set(sys.modules)))") == "[]\n"


def test_importing_the_package_changes_no_global_state():
    state = "[dict(os.environ), warnings.filters[:], logging.root.level, logging.root.handlers[:], locale.getlocale()]"
    code = f"import sys, os, warnings, logging, locale\nhook = sys.excepthook\nbefore = {state}\nimport causalpatch\n"
    assert run(f"{code}print(before == {state}, hook is sys.excepthook)") == "True True\n"


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_a_light_room_with_all_its_files_loads_nothing_heavy(room):
    code = (
        "import sys, pkgutil, importlib\n"
        f"room = importlib.import_module('causalpatch.{room}')\n"
        "for file in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
        "    importlib.import_module(file.name)\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    assert run(code) == "[]\n"


def test_importing_the_package_takes_less_than_three_tenths_of_a_second():
    # The smallest of five processes; the machine may be busy, so up to three rounds.
    for _ in range(3):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            run("import causalpatch")
            times.append(time.perf_counter() - started)
        if min(times) < 0.3:
            return
    pytest.fail(f"the fastest of fifteen imports took {min(times):.2f} s")


def test_every_public_name_is_there_and_says_what_it_is():
    code = (
        "import causalpatch as cp\n"
        "names = [name for name in cp.__all__ if name not in ('__version__', 'METRICS')]\n"
        "objects = {name: getattr(cp, name) for name in names}\n"
        "print([name for name, made in objects.items() if not (made.__doc__ or '').strip()], set(names) - set(dir(cp)))"
    )
    assert run(code) == "[] set()\n"
