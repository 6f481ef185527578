"""Who may wait for EC2: an account or a region that does not answer must not hold up the workers of the others.

Promises that at most `_AT_ONCE` reconciles wait for one place, and one alone while its last word was silence: that one
finds out whether it answers again, and the others hear at once what was heard last. Whoever is turned away as one too
many holds nothing meanwhile, and is told through `hints` when there is room. Called by the provisioner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from controllers.aws.errors import AwsError, AwsOutcomeUnknown, AwsUnavailable
from controllers.aws.place import Place
from controllers.workers.work import Work
from lrm.controller import Hints, Key

_AT_ONCE = 4
"""Fewer than the threads of an account, of which another of its regions and the shared looks need some."""


class Crowded(Exception):  # noqa: N818 - not an error: others are first
    """Enough wait for the place already; the worker is told when it is its turn, and must not wait for that."""


class Turns:
    """See the module; used on one event loop."""

    def __init__(self, hints: Hints) -> None:
        self._hints = hints
        self._asking: Counter[Place] = Counter()
        self._later: dict[Place, dict[Key, None]] = {}
        """Who was turned away, in the order of their coming."""
        self._silence: dict[Place, AwsUnavailable] = {}
        """What was heard last of a place that does not answer."""

    @contextmanager
    def turn(self, work: Work) -> Iterator[None]:
        """Surround each question about a worker's place. Raises `Crowded`, and `AwsUnavailable` without asking."""
        worker, place = work.worker, work.worker.spec.place
        silence = self._silence.get(place)
        if silence is not None and self._asking[place]:
            raise _again(silence)
        if self._asking[place] >= _AT_ONCE:
            self._later.setdefault(place, {})[(worker.namespace, worker.name)] = None
            raise Crowded
        self._asking[place] += 1
        try:
            yield
        except AwsUnavailable as error:
            self._silence[place] = _again(error)
            raise
        except AwsOutcomeUnknown:
            raise  # a lost answer tells neither
        except AwsError:
            self._silence.pop(place, None)
            raise
        else:
            self._silence.pop(place, None)
        finally:
            self._leave(place)

    def _leave(self, place: Place) -> None:
        self._asking[place] -= 1
        later = self._later.get(place, {})
        # While it is silent all of them hear that.
        room = len(later) if place in self._silence else _AT_ONCE - self._asking[place]
        for key in list(later)[:room]:
            del later[key]
            self._hints.tell(key)
        if not later:
            self._later.pop(place, None)
        if not self._asking[place]:
            del self._asking[place]


def _again(error: AwsUnavailable) -> AwsUnavailable:
    """The same, without what it was raised in."""
    return AwsUnavailable(
        error.code, error.message, operation=error.operation, place=error.place, request_id=error.request_id
    )
