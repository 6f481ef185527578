"""Notices when wall time is set: deadlines that outlive a process are wall time, and a wrong step ends them early.

A step of more than 30 s against the monotonic clock holds destructive actions back for a while: long enough for the
next looks at the world, and for a person or NTP to set the clock right. A slow correction is no step.
"""

from __future__ import annotations

import structlog

from storage.clock import Clock

log = structlog.get_logger(__name__)

JUMP_SECONDS = 30.0
HOLD_SECONDS = 60.0
"""The longest interval at which a worker at rest is looked at."""


class WallJumps:
    """Compares the two clocks whenever it is asked; ask at every reconcile."""

    def __init__(self, clock: Clock, *, hold: float = HOLD_SECONDS) -> None:
        self._clock = clock
        self._hold = hold
        self._offset = self._measure()
        self._held_until = float("-inf")

    def lately(self) -> bool:
        """Whether wall time jumped within the last `hold` seconds."""
        offset = self._measure()
        jump, self._offset = offset - self._offset, offset
        if abs(jump) > JUMP_SECONDS:
            self._held_until = self._clock.monotonic() + self._hold
            log.warning("clock.wall_jumped", seconds=round(jump, 1), holding=self._hold)
        return self._clock.monotonic() < self._held_until

    def _measure(self) -> float:
        return self._clock.now().timestamp() - self._clock.monotonic()
