"""Promise 6: a call that is cancelled leaves no task and no socket, wherever it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from equipment.etcd import Gateway
from equipment.fault_proxy import FaultProxy, How, When
from equipment.footprint import Footprint
from equipment.listener import listening
from equipment.waiting import until
from lrm.devservers import EtcdServer
from storage.errors import OutcomeUnknown, Unavailable
from storage.etcd import EtcdStorage

Call = Callable[[EtcdStorage, str], Awaitable[object]]


async def _watch(storage: EtcdStorage, prefix: str) -> None:
    async with storage.watch(prefix, await storage.current_revision()) as watch:
        async for _ in watch:
            pass


async def _live_watch(storage: EtcdStorage, prefix: str) -> None:
    now = await storage.current_revision()
    async with storage.watch(prefix, now, live=True) as watch, asyncio.TaskGroup() as group:
        group.create_task(watch.barrier(timeout=30))
        async for _ in watch:
            pass


CALLS: dict[str, Call] = {
    "get": lambda s, p: s.get(f"{p}a"),
    "list": lambda s, p: s.list(p),
    "keys": lambda s, p: s.keys(f"{p}*"),
    "create": lambda s, p: s.create(f"{p}a", b"1"),
    "update": lambda s, p: s.update(f"{p}a", b"1", expected_revision=1),
    "delete": lambda s, p: s.delete(f"{p}a", expected_revision=1),
    "set": lambda s, p: s.set(f"{p}a", b"1"),
    "lease": lambda s, _: s.grant_lease(5),
    "compact": lambda s, _: s.compact(1),
    "health": lambda s, _: s.health(),
    "watch": _watch,
    "live-watch": _live_watch,
}


@pytest.mark.parametrize("name", CALLS)
async def test_cancelled_after_any_number_of_steps_nothing_is_left(etcd: EtcdServer, etcd_root: str, name: str) -> None:
    """The call is cancelled after 0, 1, 2, … turns of the event loop, on one connection pool and on fresh ones."""
    before = Footprint.now()
    shared = EtcdStorage([etcd.endpoint], root=etcd_root)
    await shared.current_revision()
    async with asyncio.timeout(60):
        for steps in range(0, 60, 3):
            fresh = EtcdStorage([etcd.endpoint], root=etcd_root, instance="fresh")
            for storage in (shared, fresh):
                tasks = Footprint.now().tasks
                call = asyncio.ensure_future(CALLS[name](storage, f"{etcd_root}/r/"))
                for _ in range(steps):
                    await asyncio.sleep(0)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                left = Footprint.now().tasks - tasks
                assert not left, f"after {steps} steps: {left}"
            await fresh.aclose()
        assert await shared.current_revision() > 0
        await shared.aclose()
    await before.is_all_that_is_left()


@pytest.mark.parametrize("name", CALLS)
async def test_cancelled_while_the_network_swallows_everything_nothing_is_left(
    etcd: EtcdServer, etcd_root: str, name: str
) -> None:
    before = Footprint.now()
    async with FaultProxy(etcd.endpoint) as proxy:
        storage = EtcdStorage([proxy.endpoint], root=etcd_root)
        silence = proxy.inject(When.BEFORE, How.SILENCE, times=0)
        call = asyncio.ensure_future(CALLS[name](storage, f"{etcd_root}/r/"))
        await silence.hit()
        call.cancel()
        outcome = (await asyncio.gather(call, return_exceptions=True))[0]
        assert isinstance(outcome, asyncio.CancelledError)
        await until(lambda: proxy.connections == 0, "the connection whose answer may still come is not kept")
        await storage.aclose()
    await before.is_all_that_is_left()


async def test_a_hundred_watches_opened_and_left_leave_nothing(etcd: EtcdServer, etcd_root: str) -> None:
    """Also on etcd's side: the streams are closed, not forgotten."""
    before, prefix = Footprint.now(), f"{etcd_root}/r/"
    async with FaultProxy(etcd.endpoint) as proxy:
        storage = EtcdStorage([proxy.endpoint], root=etcd_root)
        await Gateway(etcd.endpoint).put(f"{prefix}a", b"1")
        now = await storage.current_revision()  # other tests of this etcd compact it
        for i in range(25):
            async with (
                storage.watch(prefix, now),
                storage.watch(prefix, now, live=True) as live,
                listening(storage, prefix, now),
                listening(storage, prefix, now, live=False),
            ):
                assert live is not None
                assert proxy.serving("/v3/watch") == 4, i
            await until(lambda: proxy.serving("/v3/watch") == 0, "the streams are closed")
        await storage.aclose()
        await until(lambda: proxy.connections == 0, "every connection is closed")
    await before.is_all_that_is_left()


async def test_a_block_that_fails_closes_its_watch(etcd: EtcdServer, etcd_root: str) -> None:
    before = Footprint.now()
    storage = EtcdStorage([etcd.endpoint], root=etcd_root)
    now = await storage.current_revision()
    with pytest.raises(ZeroDivisionError):
        async with storage.watch(f"{etcd_root}/r/", now, live=True):
            raise ZeroDivisionError
    await storage.aclose()
    await before.is_all_that_is_left()


async def test_closing_the_storage_ends_what_is_open_with_an_error(etcd: EtcdServer, etcd_root: str) -> None:
    """A reader, a barrier that waits and a write under way: each hears it, none hangs; closing twice is fine."""
    before, prefix = Footprint.now(), f"{etcd_root}/r/"
    async with FaultProxy(etcd.endpoint) as proxy:
        storage = EtcdStorage([proxy.endpoint], root=etcd_root, request_timeout=2.0)
        async with listening(storage, prefix, await storage.current_revision()) as listener:
            held = proxy.inject(When.AFTER, How.PASS, "/v3/kv/", held=True, times=0)
            barrier = asyncio.create_task(listener.watch.barrier(timeout=30))
            write = asyncio.create_task(storage.create(f"{prefix}a", b"1"))
            await held.hit(2)
            async with asyncio.timeout(30):
                await storage.aclose()
                await storage.aclose()
                assert isinstance(await listener.fails(), Unavailable)
                outcomes = await asyncio.gather(barrier, write, return_exceptions=True)
        assert isinstance(outcomes[0], Unavailable)
        assert isinstance(outcomes[1], OutcomeUnknown), "it may have been made"
        with pytest.raises(Unavailable):
            await storage.get(f"{prefix}a")
    await before.is_all_that_is_left()
