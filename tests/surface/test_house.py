"""Rules of the house that no linter knows: where things may stand, read from the source itself."""

import ast
import re
from pathlib import Path

import causalpatch
from causalpatch.base import errors
from causalpatch.base.axes import AXES
from causalpatch.results.layout import label_name

SOURCE = Path(causalpatch.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_type_checkers_see_the_names_that_are_loaded_lazily():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in guarded.body for alias in node.names}
    lazy = {name: f"causalpatch.{room}" for name, room in causalpatch._ROOM_OF.items()}
    assert seen == lazy


def test_exceptions_are_defined_in_one_file():
    elsewhere = [
        f"{path.name}: {node.name}"
        for path, tree in trees().items()
        if path.name != "errors.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(getattr(base, "id", "").endswith(("Error", "Exception", "Warning")) for base in node.bases)
    ]
    assert elsewhere == []


def test_every_error_stands_on_one_branch_with_its_exit_code():
    branches = {errors.RequestError: 2, errors.UnsupportedError: 3, errors.IntegrityError: 4}
    classes = [
        made
        for made in vars(errors).values()
        if isinstance(made, type) and issubclass(made, errors.CausalPatchError) and made is not errors.CausalPatchError
    ]
    assert len(classes) > len(branches)
    for made in classes:
        assert [made.exit_code] == [code for branch, code in branches.items() if issubclass(made, branch)]


def test_only_the_engine_registers_hooks():
    users = {room_of(path) for path in FILES if "register_forward" in path.read_text(encoding="utf-8")}
    # The script that trains the embedded model measures its mechanism by plain hooks, on purpose without the engine.
    users -= {room_of(path) for path in FILES if "zoo" in path.parts}
    assert users == {"engine"}


def test_only_the_command_line_and_the_zoo_script_print():
    printing = {
        path.relative_to(SOURCE).as_posix()
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert {path for path in printing if not path.startswith("cli/")} <= {
        "models/zoo/train.py",
        "models/zoo/measure.py",
    }


def test_heavy_packages_are_loaded_by_the_two_lazy_doors_alone():
    users = {
        path.relative_to(SOURCE).as_posix()
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and any(alias.name == "importlib" for alias in node.names)
    }
    assert users == {"__init__.py", "base/extras.py"}


def test_names_of_dims_come_from_the_closed_list():
    assert len(set(AXES)) == len(AXES)
    used = set()
    for path in FILES:
        used |= set(re.findall(r'dims=\("(\w+)"', path.read_text(encoding="utf-8")))
    assert used <= {*AXES, "metric_name"}
    assert label_name("position") == "token"


def test_no_file_holds_two_ideas_in_more_than_about_four_hundred_lines():
    sizes = {path.relative_to(SOURCE).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > 420} == {}


def test_no_room_is_called_after_nothing_in_particular():
    vague = {"utils", "util", "common", "helpers", "helper", "core", "misc", "manager", "handler"}
    assert not vague & {path.stem for path in FILES}
