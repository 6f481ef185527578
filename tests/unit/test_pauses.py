"""What lives when the caches are full is left out of collections, and a block gives everything back."""

from __future__ import annotations

import gc

from lrm.pauses import shortened


class Knot:
    """Refers to itself, so that only the cycle collector can end it."""

    def __init__(self) -> None:
        self.me = self


def test_what_lives_is_left_out_and_what_is_unreachable_is_not_kept_for_it() -> None:
    thresholds, living = gc.get_threshold(), Knot()
    Knot()
    with shortened():
        assert gc.get_threshold()[0] > thresholds[0]
        assert not any(found is living for found in gc.get_objects())
        assert gc.get_freeze_count() > 0
        Knot()
        assert gc.collect() >= 1  # what came since is collected as ever
    assert gc.get_threshold() == thresholds
    assert any(found is living for found in gc.get_objects())
