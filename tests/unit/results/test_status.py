import numpy as np

from causalpatch.results.status import Status, describe, describe_cells, has_number


def test_the_codes_that_files_hold_never_change():
    assert [(code.text, int(code)) for code in Status] == [
        ("measured", 0),
        ("derived", 1),
        ("screened", 2),
        ("unaligned", 3),
        ("skipped", 4),
        ("failed", 5),
    ]


def test_only_measured_derived_and_screened_stand_for_a_number():
    assert has_number(np.arange(6)).tolist() == [True, True, True, False, False, False]


def test_a_cell_says_which_of_its_pairs_have_no_number():
    status = np.array([[0, 0, 0], [0, 3, 3], [4, 4, 4], [3, 4, 4], [0, 1, 5], [2, 2, 2], [2, 3, 2]])
    assert describe_cells(status) == [
        "measured",
        "measured; 2 unaligned",
        "skipped",
        "1 unaligned; 2 skipped",
        "measured; 1 derived; 1 failed",
        "screened",
        "screened; 1 unaligned",
    ]


def test_a_cell_without_pairs_was_skipped():
    assert describe({}) == "skipped"
