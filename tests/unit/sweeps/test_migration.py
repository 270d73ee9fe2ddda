"""Every call that the page on migration gives runs as it stands, and has the axes that it says."""

import re
from pathlib import Path

import pytest

import causalpatch as cp
from toys import prompts
from worlds import tiny_world

PAGE = Path(__file__).parents[3] / "docs" / "migration.md"
ROWS = re.findall(
    r"^\| `(get_act_patch\w+)` \| `([^`]+)` \| ([\w ]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)


def test_the_table_is_there():
    assert len(ROWS) == 18


@pytest.mark.parametrize(("theirs", "ours", "axes"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_runs_and_has_its_axes(theirs, ours, axes):
    # As many kv_heads as heads, as in the models that the rows were written for; four layers' names fit in three.
    model, _ = tiny_world("llama", (3, 2, 2, 0))
    experiment = cp.Experiment(model, prompts(([3, 4, 5], [3, 9, 5]), ([8, 4, 1], [2, 4, 6])))
    made = eval(ours, {"cp": cp, "experiment": experiment})
    effects = made[0] if isinstance(made, list) else made
    assert effects.dims == (*axes.split(), "pair")
