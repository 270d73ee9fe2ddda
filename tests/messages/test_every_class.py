"""Every class of error is provoked by a test of this folder, and every refusal in the source says what to type."""

import ast
import inspect
import pickle
from pathlib import Path

import causalpatch
from causalpatch.base import errors

NEVER_RAISED = {"CausalPatchError", "IntegrityError"}  # the root and a branch: only their children are raised
CLASSES = {
    name
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__ and kind is not errors.EnoughError  # a signal that no reader sees
}


def calls(folder):
    """Yield every call in the Python files of a folder, with its file."""
    for file in sorted(Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file, node


def test_every_class_of_error_is_provoked_here():
    provoked = set()
    for _, call in calls(Path(__file__).parent):
        if ast.unparse(call.func) in ("refuses", "pytest.warns"):
            provoked.add(ast.unparse(call.args[0]).rpartition(".")[2])
    assert provoked == CLASSES - NEVER_RAISED


def test_every_error_in_the_source_says_what_to_type():
    silent = [
        f"{file.name}:{call.lineno}"
        for file, call in calls(Path(causalpatch.__file__).parent)
        if ast.unparse(call.func) in CLASSES - {"CausalPatchWarning", "IllusionWarning"}
        and len(call.args) < 3
        and "fix" not in {keyword.arg for keyword in call.keywords}
    ]
    assert silent == []


def test_an_error_survives_a_journey_between_processes():
    error = errors.PairError("pair 3", facts=[("clean", "4 tokens")], fix="drop it")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back)) == (errors.PairError, "pair 3\n  clean  4 tokens\n  fix: drop it")


def test_each_branch_has_its_own_exit_code():
    branches = (errors.RequestError, errors.UnsupportedError, errors.IntegrityError)
    assert [branch.exit_code for branch in branches] == [2, 3, 4]
    warned = {name for name in CLASSES if issubclass(getattr(errors, name), Warning)}
    for name in CLASSES - {"CausalPatchError"} - warned:
        assert sum(issubclass(getattr(errors, name), branch) for branch in branches) == 1
