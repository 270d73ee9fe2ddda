"""What the small study finds where nothing disturbs it."""

import pytest

from small_studies import run_in


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What the small study finds where nothing disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_in(folder)[0].results["heads"]
