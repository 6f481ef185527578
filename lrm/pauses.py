"""Keeps Python's cycle collector from stopping a daemon: its full collections look through everything that lives.

With a thousand workers that is a million objects and a quarter of a second, in which no lease is renewed. What lives
when the caches are full lives on, and ends by reference counts; it is left out of collections from then on. New
objects are looked through less often, in larger steps. Called once per daemon, when its caches are full.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (10_000, 20, 20)
"""New objects until the young are looked through, and how many such looks make one of the older."""


def shorten() -> None:
    """From now on; what is unreachable now is collected first, so that none of it is kept for good."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


@contextmanager
def shortened() -> Iterator[None]:
    """The same for the length of a block: measurements and tests."""
    before = gc.get_threshold()
    shorten()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
