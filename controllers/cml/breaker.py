"""A circuit breaker: after several unreachable results in a row, fail fast for a while, then let one probe through.

Promises that a dead worker costs one connection attempt per cool-down however many callers ask, and knows what came of
all of them: callers who are not let through learn it from here. Does not judge what unreachable means, and is not
shared between workers. Called by the transport, once per attempt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from controllers.cml.errors import CmlCircuitOpen, CmlError, CmlInvalid, CmlUnreachable
from storage.clock import Clock


class Breaker:
    """Closed (all pass), open (none passes), half open (one probe)."""

    def __init__(
        self,
        clock: Clock,
        *,
        threshold: int = 5,
        cool_down: float = 10.0,
        turned: Callable[[], None] = lambda: None,
    ) -> None:
        """`turned` is called when it opens, and when it closes."""
        if threshold < 1 or cool_down < 0:
            raise CmlInvalid("a circuit breaker needs a threshold of at least 1 and a cool-down that is not negative")
        self._clock = clock
        self._threshold = threshold
        self._cool_down = cool_down
        self._turned = turned
        self._failures = 0
        self.failed_at = -math.inf
        """When an attempt last proved unreachable, monotonic, whoever made it; -inf before the first."""
        self._opened_at: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether calls fail fast now, but for a probe."""
        return self._opened_at is not None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Guard one attempt: raises `CmlCircuitOpen` instead of it, and learns from how it ends."""
        probe = self._admit()
        try:
            yield
        except CmlUnreachable:
            if probe:
                self._probing = False
            self.failed()
            raise
        except CmlError:
            # Somebody answered, however badly.
            self._succeeded()
            raise
        except BaseException:
            # Cancelled or a defect: nothing was learned, the next caller may probe.
            if probe:
                self._probing = False
            raise
        self._succeeded()

    def _admit(self) -> bool:
        if self._opened_at is None:
            return False
        left = self._opened_at + self._cool_down - self._clock.monotonic()
        if left > 0 or self._probing:
            raise CmlCircuitOpen(max(left, 0.0))
        self._probing = True
        return True

    def failed(self) -> None:
        """Count one unreachable result; called from outside for an attempt that a deadline cancelled."""
        self._failures += 1
        self.failed_at = self._clock.monotonic()
        was_open = self.is_open
        if was_open or self._failures >= self._threshold:
            self._opened_at = self.failed_at
        if self.is_open and not was_open:
            self._turned()

    def _succeeded(self) -> None:
        was_open = self.is_open
        self._failures = 0
        self._opened_at = None
        self._probing = False
        if was_open:
            self._turned()
