"""Examples in docstrings run and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import causalpatch

NAMES = [info.name for info in pkgutil.walk_packages(causalpatch.__path__, "causalpatch.")]


def examples_in(name):
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, name)
    return [example for example in found if example.examples]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("__main__")])
def test_examples_give_what_they_say(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where examples save
    for example in examples_in(name):
        said = []
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
        assert result.failed == 0, "".join(said)


def test_what_is_public_is_shown_by_example():
    shown = {example.name for name in NAMES for example in examples_in(name)}
    for name in (
        "causalpatch.experiment.experiment.Experiment.run",
        "causalpatch.metrics.custom.metric",
        "causalpatch.models.open.open_model",
        "causalpatch.patches.patch.Patch",
        "causalpatch.sites.site.parse",
        "causalpatch.sweeps.grid.sweep",
    ):
        assert name in shown
