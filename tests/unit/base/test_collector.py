"""Objects set aside from the collector while runs are laid out."""

import gc

import pytest

from causalpatch.base.collector import undisturbed


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.me = self


def count_rings() -> int:
    return sum(type(each) is Ring for each in gc.get_objects())


def test_what_was_there_is_set_aside_and_brought_back_even_after_an_error():
    def fail() -> None:
        with undisturbed():
            with undisturbed():
                assert gc.get_freeze_count() > 1000
            assert gc.get_freeze_count() > 1000
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.get_freeze_count() == 0


def test_what_is_made_inside_is_collected_inside():
    with undisturbed():
        Ring()
        assert count_rings() == 1
        gc.collect()
        assert count_rings() == 0


def test_objects_that_someone_else_has_set_aside_stay_so():
    gc.freeze()
    try:
        with undisturbed():
            assert gc.get_freeze_count() > 1000
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
