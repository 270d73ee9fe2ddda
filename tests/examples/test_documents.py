"""The code in the README and in the guides runs as it stands, in the order of the page."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]


def blocks(page):
    """Return the Python blocks of a page, each with the line that it starts on."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page}
    for line, code in blocks(page):
        if ">>>" in code:
            continue
        # Empty lines before it, so that an error shows the line of the page.
        exec(compile("\n" * line + code, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if any(">>>" in code for _, code in blocks(page))])
def test_the_sessions_of_a_page_print_what_they_say(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(ROOT / page), module_relative=False)
    assert result.attempted
    assert not result.failed


def test_the_readme_has_code_to_run():
    assert len(blocks("README.md")) >= 3
