"""What holds an event loop is told apart from what holds up everybody."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest

from equipment.loop_lag import LoopLag

LIMIT = 0.05
SECONDS = 0.5


def _receive() -> None:
    """Wait on a socket that nobody writes to."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(SECONDS)
        with pytest.raises(TimeoutError):
            ours.recv(1)


def _compute() -> None:
    until = time.thread_time() + 2 * LIMIT
    while time.thread_time() < until:
        pass


@pytest.mark.parametrize(
    "hold",
    [lambda: time.sleep(SECONDS), _receive, lambda: threading.Event().wait(SECONDS), _compute],
    ids=["sleep", "socket", "lock", "processor"],
)
async def test_what_the_loops_thread_does_holds_it(hold: Callable[[], object]) -> None:
    lag = LoopLag()
    async with lag.watched():
        await asyncio.sleep(0)
        hold()
        await asyncio.sleep(0.01)  # the turn ends
    assert lag.held > LIMIT


async def test_what_others_do_holds_no_loop() -> None:
    lag = LoopLag()
    async with lag.watched():
        computing = [asyncio.to_thread(_compute) for _ in range(4)]
        await asyncio.gather(asyncio.to_thread(time.sleep, SECONDS), asyncio.sleep(SECONDS), *computing)
    assert lag.held < LIMIT
