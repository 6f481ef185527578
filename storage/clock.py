"""The one door through which time comes in.

Leases and deadlines inside a process use `monotonic`; deadlines that outlive a process are wall time (`now`), always
aware and UTC. Everything that waits takes a `Clock`, so that tests can turn an hour into a call (`lrm.testing`).
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, Protocol


class Clock(Protocol):
    """Wall time, monotonic time, and the two ways to wait."""

    def now(self) -> datetime:
        """Wall time, aware, UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never falls and never jumps with the wall."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """Cancel the block after `seconds` and raise `TimeoutError`; None never does."""
        ...


class SystemClock:
    """The machine's own clocks and the event loop's timers."""

    def now(self) -> datetime:
        """Wall time, aware, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """The kernel's monotonic clock, in seconds."""
        return time.monotonic()  # noqa: TID251 - this is the door

    async def sleep(self, seconds: float) -> None:
        """Wait on the event loop."""
        await asyncio.sleep(seconds)  # noqa: TID251 - this is the door

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[Any]:
        """The event loop's own timeout."""
        return asyncio.timeout(seconds)  # noqa: TID251 - this is the door
