"""What plug-ins' controllers hold open, for the plug-ins' own endpoints that read the outside (logs, downloads).

Controllers open their clients when the daemon has found the store; until then, and once it stops, nothing is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lrm.errors import NotOpen

T = TypeVar("T")


class Offers:
    """One object for each type."""

    def __init__(self) -> None:
        self._things: dict[type[Any], Any] = {}

    @contextmanager
    def offering(self, *things: object) -> Iterator[None]:
        """They are to be had while this lasts. Raises `ValueError` where one of a type is offered already."""
        offered = {type(thing): thing for thing in things}
        if len(offered) < len(things) or offered.keys() & self._things.keys():
            raise ValueError(f"another one of a type is offered already: {things}")
        self._things |= offered
        try:
            yield
        finally:
            for kind in offered:
                del self._things[kind]

    def get(self, kind: type[T]) -> T:
        """The object of a type. Raises `NotOpen`."""
        thing = self._things.get(kind)
        if not isinstance(thing, kind):
            raise NotOpen(f"this daemon has no {kind.__name__} open: it is starting or stopping")
        return thing
