"""Blocking calls in threads, and callers that leave."""

from __future__ import annotations

import asyncio
import threading

import pytest

from controllers.aws.threads import Abandoned, Threads, Ticket
from equipment.waiting import until


async def test_a_call_gives_what_it_returns_or_raises() -> None:
    threads = Threads(2, "t")
    assert await threads.run(lambda: 41 + 1) == 42

    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await threads.run(fail)
    threads.close()


async def test_no_more_calls_run_at_once_than_there_are_slots() -> None:
    threads = Threads(3, "t")
    gate = threading.Event()
    running, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(10)
        with lock:
            running -= 1

    tasks = [asyncio.create_task(threads.run(work)) for _ in range(10)]
    await until(lambda: running == 3)
    assert threads.busy == 3
    gate.set()
    await asyncio.gather(*tasks)
    assert most == 3
    assert threads.busy == 0
    threads.close()


async def test_a_cancelled_caller_leaves_at_once_and_its_slot_comes_back_when_the_thread_is_done() -> None:
    threads = Threads(1, "t")
    gate, began = threading.Event(), threading.Event()

    def work() -> str:
        began.set()
        gate.wait(10)
        return "too late"

    task = asyncio.create_task(threads.run(work))
    await until(began.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    waiting = asyncio.create_task(threads.run(lambda: "next"))
    await asyncio.sleep(0)
    assert threads.busy == 1
    assert not waiting.done()
    gate.set()
    assert await waiting == "next"
    await until(lambda: threads.busy == 0)
    threads.close()


async def test_a_caller_cancelled_in_the_queue_never_runs_and_takes_no_slot() -> None:
    threads = Threads(1, "t")
    gate, ran = threading.Event(), threading.Event()
    first = asyncio.create_task(threads.run(lambda: gate.wait(10)))
    await until(lambda: threads.busy == 1)
    second = asyncio.create_task(threads.run(ran.set))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.set()
    assert await first
    assert await threads.run(lambda: 1) == 1
    assert not ran.is_set()
    threads.close()


async def test_closing_ends_the_threads_and_takes_no_more_calls() -> None:
    threads = Threads(2, "closing")
    await asyncio.gather(threads.run(lambda: 1), threads.run(lambda: 2))
    threads.close()
    threads.close()
    await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("closing-")])
    with pytest.raises(RuntimeError, match="closed"):
        await threads.run(lambda: 1)


async def test_callers_in_the_queue_are_told_when_it_is_closed() -> None:
    threads = Threads(1, "t")
    gate = threading.Event()
    first = asyncio.create_task(threads.run(lambda: gate.wait(10)))
    await until(lambda: threads.busy == 1)
    queued = [asyncio.create_task(threads.run(lambda: 1)) for _ in range(3)]
    await asyncio.sleep(0)
    threads.close()
    gate.set()
    assert await first
    for task in queued:
        with pytest.raises(RuntimeError, match="closed"):
            await task


def test_a_thread_whose_loop_is_gone_ends_quietly() -> None:
    gate = threading.Event()

    async def leave() -> Threads:
        threads = Threads(1, "orphan")
        began = threading.Event()

        def work() -> None:
            began.set()
            gate.wait(10)

        task = asyncio.create_task(threads.run(work))
        await until(began.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        threads.close()
        return threads

    asyncio.run(leave())
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("orphan-"):
            thread.join(10)
            assert not thread.is_alive()


def test_a_ticket_lets_nothing_leave_once_its_caller_has_left_and_tells_what_had() -> None:
    left_first = Ticket()
    assert left_first.abandon() is False
    with pytest.raises(Abandoned):
        left_first.begin_send()
    assert not left_first.sent
    sent_first = Ticket()
    sent_first.begin_send()
    assert sent_first.sent
    assert sent_first.abandon() is True
    with pytest.raises(Abandoned):
        sent_first.begin_send()  # the retry that botocore would make
