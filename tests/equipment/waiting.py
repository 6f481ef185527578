"""Waiting for something to become true, with a deadline: the only loop of its kind in the tests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(condition: Callable[[], Awaitable[T] | T], what: str = "", timeout: float = 30.0) -> T:
    """Ask until the answer is truthy, and return it; fails with `what` and the last answer after `timeout` seconds.

    For what cannot be awaited: another process, a server, a count. An exception of the condition is the test's.
    The limit is for a machine that others keep busy: it says that something never comes, not how soon it should.
    """
    answer: T | None = None
    try:
        async with asyncio.timeout(timeout):
            while True:
                asked = condition()
                answer = await asked if inspect.isawaitable(asked) else asked
                if answer:
                    return answer
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {timeout:g} s: {what or 'the condition'}; last answer {answer!r}") from None
