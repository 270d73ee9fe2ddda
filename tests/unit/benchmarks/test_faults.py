"""The table of faults: what a hit is, and that a page comes out."""

import pytest
from benchmarks import faults


def test_parts_of_a_component_count_as_it_and_coarser_ones_do_not():
    names = ["z.1.2@-1", "head_out.0.3", "mlp_post.3.17@changed", "mlp_out.3@-1", "attn_out.2", "z.1.2"]
    assert faults.ranked(names) == ("z.1.2", "z.0.3", "mlp_out.3", "attn_out.2")
    assert [faults.hits("mlp_out.3", faults.ranked(names), k) for k in faults.AT] == [False, True, True]
    assert not faults.hits("z.2.0", faults.ranked(names), 5)


@pytest.mark.slow
def test_a_page_is_written(tmp_path):
    page = tmp_path / "FAULTS.md"
    faults.main(["--only", "damage-ioi-mlp", "--ways", "against", "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| damage-ioi-mlp") and "confirmed" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == "yes / yes / yes"
    assert int(cells[11].replace(",", "")) > int(cells[7].replace(",", ""))
