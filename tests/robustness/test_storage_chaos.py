"""Everything at once: writers that contend, a guard that changes hands, and faults drawn by lot."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from equipment.etcd import VERSIONS, WHEEL, Gateway, binary
from equipment.fault_proxy import FaultProxy, How, When
from equipment.ledger import Ledger
from equipment.listener import listening, told_by_etcd
from lrm.devservers import EtcdServer
from storage.errors import Conflict
from storage.etcd import EtcdStorage

TIMED_OUT = b'{"error":"etcdserver: request timed out","code":14,"message":"etcdserver: request timed out"}'
PREFIX = "/t/r/"


def _rounds() -> list[object]:
    whole = [
        pytest.param(version, seed, 300, marks=(pytest.mark.soak, pytest.mark.timeout(900)))
        for version in VERSIONS
        for seed in range(3)
    ]
    return [pytest.param(WHEEL, 1, 40), *whole]


@pytest.mark.slow
@pytest.mark.parametrize(("version", "seed", "rounds"), _rounds())
async def test_what_is_told_is_true_whatever_is_lost(server_dir: Path, version: str, seed: int, rounds: int) -> None:
    """Each round faults strike some exchanges and the guard may change; then there must be successes again."""
    draw = random.Random(seed)
    async with EtcdServer(server_dir / "etcd", binary=binary(version)) as etcd, AsyncExitStack() as stack:
        direct = Gateway(etcd.endpoint)
        proxies = [await stack.enter_async_context(FaultProxy(etcd.endpoint)) for _ in range(2)]
        endpoints = [proxy.endpoint for proxy in proxies]
        ledger = Ledger(PREFIX)
        await ledger.lead(direct)
        first = ledger.guard.create_revision - 1
        times = {"request_timeout": 1.0, "liveness_silence": 1.0, "liveness_deadline": 1.0}
        storages = [EtcdStorage(endpoints, root="/t", instance=name, **times) for name in ("one", "two")]
        for storage in storages:
            stack.push_async_callback(storage.aclose)
        async with listening(storages[0], PREFIX, first) as listener:
            async with ledger.writers(storages, 6):
                for _ in range(rounds):
                    for proxy in proxies:
                        _disturb(proxy, draw)
                    if draw.random() < 0.3:
                        await ledger.lead(direct)
                    await ledger.succeed(3)
                    for proxy in proxies:
                        proxy.clear()
            last = await direct.put(f"{PREFIX}end", b"")
            await listener.reach(last)
            assert listener.deliveries == await told_by_etcd(direct, PREFIX, first, last)
        ledger.check(await direct.history(PREFIX, first, last))
        told = ledger.told
        assert told["success"] >= 3 * rounds
        assert told["Conflict"] + told["AlreadyExists"] > 0, "the writers did contend"
        assert told["GuardFailed"] > 0, "the guard did change hands"


def _disturb(proxy: FaultProxy, draw: random.Random) -> None:
    """One or two faults of any kind on the next exchanges, or on the watch."""
    for _ in range(draw.randint(1, 2)):
        when, how = draw.choice(list(When)), draw.choice([How.CLOSE, How.RESET, How.TRUNCATE, How.REPLACE, How.SILENCE])
        path = draw.choice(["/v3/kv/", "/v3/kv/txn", "/v3/watch"])
        if path == "/v3/watch":
            proxy.abort(path)
            if when is When.AFTER:
                how = How.TRUNCATE  # the reply of a watch has no end at which it could be lost whole
        proxy.inject(
            when,
            how,
            path,
            skip=draw.randint(0, 5),
            times=draw.randint(1, 4),
            keep=draw.randint(0, 400),
            reply=draw.choice([TIMED_OUT, b"<html>", b'{"hea']),
            status=draw.choice([200, 502, 503]),
        )


async def test_two_daemons_at_one_key_both_get_through(etcd: EtcdServer, etcd_root: str) -> None:
    """Read, change, compare and write again on a conflict: fifty increments by each of two, and none is lost."""
    key = f"{etcd_root}/r/count"

    async def increment(storage: EtcdStorage) -> None:
        done = 0
        while done < 50:
            current = await storage.get(key)
            done += await _swapped(storage, key, current.value)

    async with (
        aclosing(EtcdStorage([etcd.endpoint], root=etcd_root, instance="one")) as one,
        aclosing(EtcdStorage([etcd.endpoint], root=etcd_root, instance="two")) as two,
    ):
        await one.create(key, b"0")
        async with asyncio.TaskGroup() as group:
            group.create_task(increment(one))
            group.create_task(increment(two))
        assert (await one.get(key)).value == b"100"


async def _swapped(storage: EtcdStorage, key: str, value: bytes) -> bool:
    try:
        await storage.compare_and_swap(key, value, b"%d" % (int(value) + 1))
    except Conflict:
        return False
    return True
