"""A store that went back in time is noticed once, whatever order the answers come in."""

from __future__ import annotations

import pytest

from storage.errors import StoreReset
from storage.lineage import Lineage


def line_at(revision: int) -> tuple[Lineage, list[StoreReset]]:
    line, told = Lineage(), []
    line.listen(told.append)
    line.saw(line.mark(), revision)
    return line, told


def test_revisions_grow_and_nobody_is_told() -> None:
    line, told = line_at(10)
    line.saw(line.mark(), 10)
    line.saw(line.mark(), 12)
    assert (line.seen, told) == (12, [])


def test_a_reply_below_what_was_seen_before_its_request_is_a_reset() -> None:
    line, told = line_at(10)
    with pytest.raises(StoreReset):
        line.saw(line.mark(), 4)
    assert line.seen == 4
    assert len(told) == 1
    line.saw(line.mark(), 5)
    assert len(told) == 1, "the new line is accepted"


def test_a_reply_that_was_overtaken_is_none() -> None:
    line, told = line_at(10)
    slow = line.mark()
    line.saw(line.mark(), 20)
    line.saw(slow, 11)
    assert (line.seen, told) == (20, [])


def test_a_call_under_way_during_a_reset_hears_of_it_and_does_not_poison_the_new_line() -> None:
    line, told = line_at(10)
    under_way = line.mark()
    with pytest.raises(StoreReset):
        line.saw(line.mark(), 4)
    with pytest.raises(StoreReset):
        line.saw(under_way, 11)
    line.delivered(under_way, 12)
    assert line.seen == 4
    line.saw(line.mark(), 5)
    assert len(told) == 1


def test_a_changed_epoch_is_a_reset_even_when_the_revision_grew() -> None:
    line, told = line_at(10)
    line.saw_epoch(line.mark(), None, 10)
    line.saw_epoch(line.mark(), None, 11)
    with pytest.raises(StoreReset):
        line.saw_epoch(line.mark(), b"two", 12)
    line.saw_epoch(line.mark(), b"two", 13)
    with pytest.raises(StoreReset):
        line.saw_epoch(line.mark(), b"three", 14)
    assert len(told) == 2


def test_a_lower_revision_with_a_new_epoch_is_one_reset_not_two() -> None:
    line, told = line_at(10)
    line.saw_epoch(line.mark(), b"one", 10)
    with pytest.raises(StoreReset):
        line.saw_epoch(line.mark(), b"two", 4)
    line.saw_epoch(line.mark(), b"two", 5)
    assert len(told) == 1


def test_who_stopped_listening_is_not_told() -> None:
    line, told = line_at(10)
    line.forget(told.append)
    with pytest.raises(StoreReset):
        line.saw(line.mark(), 4)
    assert told == []
