"""Everything that is done to a trio, by name: each strikes, waits until it has told, and heals.

A fault waits for what it causes (a later term, progress of the others), never for a time alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import redis.asyncio

from equipment import trio_plugin
from equipment.etcd import Gateway, b64
from equipment.fault_proxy import FaultProxy, How, Request, Rule, When
from equipment.trio import RENEW, SILENCE, Node, Trio
from equipment.trio_plugin import set_wall
from equipment.trio_scene import Scene
from equipment.waiting import until
from lrm.devservers import EtcdServer

Fault = Callable[[Scene], Awaitable[None]]
FAULTS: dict[str, Fault] = {}
AT_ONCE: dict[str, list[str]] = {"daemon": [], "store": []}
"""Faults of which one of each group may strike at the same time; the others watch for what another would disturb."""


def fault(act: Fault, group: str = "") -> Fault:
    """Enter a fault into the table under its name, and into a group if it gets along with the other one's."""
    name = act.__name__.replace("_", "-")  # type: ignore[attr-defined]
    FAULTS[name] = act
    if group:
        AT_ONCE[group].append(name)
    return act


def daemon_fault(act: Fault) -> Fault:
    return fault(act, "daemon")


def store_fault(act: Fault) -> Fault:
    return fault(act, "store")


# Daemons


@daemon_fault
async def leader_daemon_killed(s: Scene) -> None:
    node, term = await _leader(s)
    node.kill()
    await s.trio.later_term(term)
    await s.progress()
    await node.process.start_ready(40)


@daemon_fault
async def leader_daemon_paused_past_its_lease(s: Scene) -> None:
    """It wakes up as a leader of the past in the middle of a write, which it would like to try once more."""
    # The store's trouble of the same moment may depose it before it writes: then the next one is paused.
    for _ in range(5):
        if await _paused_in_a_write(s, *await _leader(s)):
            return
    raise AssertionError("no leader stayed long enough to write")


async def _paused_in_a_write(s: Scene, node: Node, term: int) -> bool:
    """Whether this leader came to a write before its term ended; then it was paused there past its lease."""
    async with _held_writes(s, node) as rules:

        async def met() -> str:
            if any(rule.hits for rule in rules):
                return "a write"
            return "its end" if (await s.trio.holder(trio_plugin.GADGETS_LOCK))[1] != term else ""

        if await until(met, "a write of the controller") == "its end":
            return False
        node.pause()
        await s.trio.later_term(term)
        await s.progress()
    node.resume()
    await s.progress()
    return True


@daemon_fault
async def standby_daemon_killed(s: Scene) -> None:
    node = await s.trio.standby()
    node.kill()
    await s.progress(15, 8)
    await node.process.start_ready(40)


@daemon_fault
async def standby_daemon_paused(s: Scene) -> None:
    node = await s.trio.standby()
    node.pause()
    await s.progress(30, 15)
    node.resume()
    await s.progress()


@fault
async def leader_daemon_stutters(s: Scene) -> None:
    """Paused again and again for about as long as it may trust its lease: it is deposed or not, and both is well."""
    for _ in range(4):
        node = await s.trio.leader()
        node.pause()
        await asyncio.sleep(RENEW + s.draw.uniform(-0.3, 0.6))  # not waiting for anything: the length is the point
        node.resume()
        await s.progress()


@daemon_fault
async def leader_daemon_stopped_gracefully(s: Scene) -> None:
    node, term = await _leader(s)
    node.process.terminate()
    await s.trio.later_term(term)
    assert await node.process.exit_code(30) == 0
    await s.progress()
    await node.process.start_ready(40)


@fault
async def every_daemon_restarted_in_turn(s: Scene) -> None:
    """As an upgrade does it: each stops in order, and what was delivered to a consumer is not delivered again."""
    before = len(s.deliveries())
    for node in s.trio.nodes.values():
        node.process.terminate()
        assert await node.process.exit_code(30) == 0, node.process.log()[-2000:]
        await node.process.start_ready(40)
        await s.progress()
    taken = Counter((d.revision, d.name) for d in s.deliveries()[before:])
    repeated = {what: times for what, times in taken.items() if times > 1}
    assert not repeated, f"delivered again after an orderly stop: {repeated}"


@fault
async def leader_daemon_killed_in_a_launch(s: Scene) -> None:
    """EC2 has made the instance; the daemon dies before it hears of it."""
    async with asyncio.timeout(60):
        node, term = await _leader(s, "workers")
        with _held(node.aws, "Action=RunInstances") as rule:
            worker = await s.post_worker()
            await rule.hit()
            node.kill()
        await s.trio.later_term(term, "workers")
        await s.worker_ready(worker)
        await node.process.start_ready(40)


@fault
async def leader_daemon_paused_in_a_launch(s: Scene) -> None:
    """The answer of a RunInstances waits until another has finished the work, and then wakes the first one up."""
    node, term = await _leader(s, "workers")
    with _held(node.aws, "Action=RunInstances") as rule:
        worker = await s.post_worker()
        await rule.hit()
        node.pause()
        await s.trio.later_term(term, "workers")
        await s.worker_ready(worker)
    node.resume()
    await s.progress()


@fault
async def leader_daemon_paused_in_a_registration(s: Scene) -> None:
    """The same with a CML that takes a licence: no seat is taken twice, and none is lost."""
    node, term = await _leader(s, "workers")
    with _held(node.cml, "", "licensing/registration") as rule:
        worker = await s.post_worker()
        await rule.hit()
        node.pause()
        await s.trio.later_term(term, "workers")
        await s.worker_ready(worker)
    node.resume()
    await s.progress()


@fault
async def wall_clock_of_the_leader_set(s: Scene) -> None:
    """An hour ahead, then an hour behind: leases run on the monotonic clock, and nothing is ended for it."""
    node, term = await _leader(s)
    worker = await s.post_worker()
    await s.worker_ready(worker)
    for hours in (1, -1):
        set_wall(node.wall, hours * 3600)
        await s.progress(20, 10)
    set_wall(node.wall, 0)
    assert (await s.trio.holder("gadgets")) == (node.name, term), "the lock changed hands"


# etcd


@store_fault
async def etcd_leader_killed(s: Scene) -> None:
    await _member_killed(s, leader=True)


@store_fault
async def etcd_follower_killed(s: Scene) -> None:
    await _member_killed(s, leader=False)


@store_fault
async def etcd_leader_paused(s: Scene) -> None:
    await _member_paused(s, leader=True)


@store_fault
async def etcd_follower_paused(s: Scene) -> None:
    await _member_paused(s, leader=False)


@store_fault
async def etcd_leader_cut_off_from_its_peers(s: Scene) -> None:
    """Daemons still reach it, and it knows nothing of what the others decide."""
    await _member_isolated(s, leader=True)


@store_fault
async def etcd_follower_cut_off_from_its_peers(s: Scene) -> None:
    await _member_isolated(s, leader=False)


@fault
async def etcd_without_a_majority(s: Scene) -> None:
    """Two of three die: nothing is written, nobody leads for ever, and everything resumes by itself."""
    leader = await s.trio.cluster.leader()
    victims = [server for name, server in s.trio.cluster.members.items() if name != leader]
    told = s.load.told["refused"] + s.load.told["unknown"]
    for server in victims:
        server.kill()
    await until(lambda: s.load.told["refused"] + s.load.told["unknown"] >= told + 6, "requests that fail", 40)
    async with asyncio.TaskGroup() as tasks:
        for server in victims:
            tasks.create_task(server.start())
    await s.progress()


@store_fault
async def etcd_slow(s: Scene) -> None:
    """Every byte to and from every member comes 0.2 s later."""
    for link in s.trio.members.values():
        link.delay = 0.2
    await s.progress(15, 8, timeout=60)
    for link in s.trio.members.values():
        link.delay = 0


@fault
async def replies_of_etcd_lost(s: Scene) -> None:
    """Writes are carried out and nobody hears of it, others are lost on the way: for several seconds, on every link."""
    proxies = [proxy for node in s.trio.nodes.values() for proxy in node.etcd.values()]
    for _ in range(4):
        rules = [
            proxy.inject(when, how, "/v3/kv/txn", skip=s.draw.randint(0, 3), times=3, keep=40)
            for proxy in proxies
            for when, how in (
                (When.AFTER, s.draw.choice([How.RESET, How.CLOSE, How.TRUNCATE, How.SILENCE])),
                (When.BEFORE, s.draw.choice([How.RESET, How.CLOSE])),
            )
        ]
        await until(lambda: sum(rule.hits for rule in rules) >= 12, "lost replies", 40)  # noqa: B023 - used at once
        for proxy in proxies:
            proxy.clear()
        await s.progress()


@fault
async def keepalive_replies_lost(s: Scene) -> None:
    """The store renews the lease, the leader does not hear of it, stops all the same, and lets another one begin."""
    node, term = await _leader(s)
    rules = [proxy.inject(When.AFTER, How.SILENCE, "/v3/lease/keepalive", times=0) for proxy in node.etcd.values()]
    await s.trio.later_term(term)
    assert any(rule.hits for rule in rules)
    await s.progress()
    for proxy in node.etcd.values():
        proxy.clear()
    await s.progress()


@fault
async def writes_to_etcd_late(s: Scene) -> None:
    """A leader's writes wait on the way, arrive in the next term before its leader has written, and must be refused."""
    node, term = await _leader(s)
    async with AsyncExitStack() as stack:
        async with _held_writes(s, node) as rules:
            await until(lambda: sum(rule.hits for rule in rules) >= 3, "writes of the controller")
            for other in s.trio.nodes.values():
                if other is not node:
                    await stack.enter_async_context(_held_writes(s, other, avoid=False))
            for proxy in node.etcd.values():
                proxy.inject(When.BEFORE, How.SILENCE, "/v3/lease", times=0)
            await s.trio.later_term(term)
        async with asyncio.timeout(20):
            await asyncio.gather(*(rule.over.wait() for rule in rules if rule.hits))
    await s.progress()


@fault
async def writes_to_etcd_overtaken(s: Scene) -> None:
    """A daemon's writes wait, others change the same objects, and they are lost: nobody takes those for its own."""
    for node in s.trio.nodes.values():
        async with _held_writes(s, node, How.RESET, avoid=False) as rules:
            await until(lambda: sum(rule.hits for rule in rules) >= 4, "writes on the way")
            s.load.avoided.add(node.name)
            await s.progress(20, 0)
        await s.progress()


@store_fault
async def history_compacted(s: Scene) -> None:
    """To the head, three times, under load: whoever needs what is gone must say so or start anew."""
    for _ in range(3):
        revision = await s.reference.mark()
        await Gateway(_someone(s.trio).endpoint).compact(revision)
        for node in s.trio.nodes.values():
            for proxy in node.etcd.values():
                proxy.abort("/v3/watch")
        await s.progress()


# The links of one daemon


@daemon_fault
async def leader_daemon_cut_off_from_etcd(s: Scene) -> None:
    node, term = await _leader(s)
    node.cut_etcd()
    await s.trio.later_term(term)
    await s.progress()
    node.heal()
    await s.progress()


@daemon_fault
async def standby_daemon_cut_off_from_etcd(s: Scene) -> None:
    node = await s.trio.standby()
    node.cut_etcd()
    await s.progress(25, 12)
    node.heal()
    await s.progress()


@daemon_fault
async def leader_daemon_hears_no_events(s: Scene) -> None:
    """Requests pass and watches are silent, on every member: it must not take its caches for the truth."""
    node, _ = await _leader(s)
    silenced = asyncio.get_running_loop().time()
    for proxy in node.etcd.values():
        proxy.freeze("/v3/watch")
    listed = len(s.history.listings)
    await until(lambda: len(s.history.listings) >= listed + 5, "lists by the others", 40)
    await until(lambda: asyncio.get_running_loop().time() > silenced + 2 * SILENCE, "time to find out", 30)
    for proxy in node.etcd.values():
        proxy.thaw()
    await s.progress()


@fault
async def leader_daemon_cut_off_from_redis(s: Scene) -> None:
    """Nothing stops for want of a bookmark, and the lock does not change hands."""
    node, term = await _leader(s)
    node.redis.cut()
    await s.progress(25, 12)
    node.redis.heal()
    assert (await s.trio.holder("gadgets")) == (node.name, term), "the lock changed hands"
    await s.progress()


@fault
async def leader_daemon_cut_off_from_ec2(s: Scene) -> None:
    node, _ = await _leader(s, "workers")
    node.aws.freeze()
    worker = await s.post_worker()
    await until(lambda: node.aws.serving() > 0, "a call that waits")
    await s.progress(25, 12)
    node.aws.thaw()
    await s.worker_ready(worker)


@fault
async def leader_daemon_cut_off_from_cml(s: Scene) -> None:
    node, _ = await _leader(s, "workers")
    node.cml.freeze()
    worker = await s.post_worker()
    await until(lambda: node.cml.serving() > 0, "a call that waits", 30)
    await s.progress(25, 12)
    node.cml.thaw()
    await s.worker_ready(worker)


# Redis


@store_fault
async def redis_killed(s: Scene) -> None:
    """It comes back with an empty memory; bookmarks are written again."""
    s.trio.redis_era += 1
    s.trio.redis.kill()
    await s.progress(15, 8)
    await s.trio.redis.start()
    era = s.trio.redis_era
    await until(lambda: any(mark.era == era for mark in s.history.marks), "bookmarks again")


@store_fault
async def redis_paused(s: Scene) -> None:
    s.trio.redis.pause()
    await s.progress(25, 12)
    s.trio.redis.resume()
    await s.progress()


@fault
async def redis_full(s: Scene) -> None:
    """Every write is refused for want of memory, then there is room again and the bookmarks move on."""
    client = redis.asyncio.Redis.from_url(s.trio.redis.url)
    try:
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "1")
        await s.progress(15, 8)
        await client.config_set("maxmemory", "0")
        head = await s.reference.mark()
        await until(lambda: any(mark.revision >= head for mark in s.history.marks), "a bookmark past the fault")
    finally:
        await client.config_set("maxmemory", "0")
        await client.aclose()


async def _leader(s: Scene, lock: str = "gadgets") -> tuple[Node, int]:
    """The leading daemon and its term."""

    async def found() -> tuple[Node, int] | None:
        name, term = await s.trio.holder(lock)
        return (s.trio.nodes[name], term) if name and s.trio.nodes[name].running else None

    return await until(found, f"a leader of {lock}", 40)


@contextmanager
def _held(proxy: FaultProxy, words: str, path: str = "") -> Iterator[Rule]:
    """The answer of the first such request waits until the end of the block."""

    def matches(request: Request) -> bool:
        return words.encode() in request.body and path in request.path and not request.head.startswith(b"GET")

    rule = proxy.inject(When.AFTER, How.PASS, held=True, matches=matches)
    try:
        yield rule
    finally:
        proxy.clear()


@asynccontextmanager
async def _held_writes(s: Scene, node: Node, how: How = How.PASS, *, avoid: bool = True) -> AsyncIterator[list[Rule]]:
    """What a daemon writes of the scene's gadgets waits until the end of the block, and goes on to etcd then (or not).

    Users avoid the daemon meanwhile, so that these are its controller's writes; or all users' are held up, too.
    """
    key = b64(s.prefix)[: len(s.prefix) // 3 * 4].encode()
    rules = [
        proxy.inject(When.BEFORE, how, "/v3/kv/txn", held=True, times=0, matches=lambda r: key in r.body)
        for proxy in node.etcd.values()
    ]
    if avoid:
        s.load.avoided.add(node.name)
    try:
        yield rules
    finally:
        for proxy in node.etcd.values():
            proxy.clear()
        s.load.avoided.discard(node.name)


def _someone(trio: Trio) -> EtcdServer:
    return next(server for server in trio.cluster.members.values() if server.running)


async def _member(s: Scene, *, leader: bool) -> EtcdServer:
    name = await s.trio.cluster.leader()
    if not leader:
        name = s.draw.choice([other for other in s.trio.cluster.members if other != name])
    return s.trio.cluster.members[name]


async def _member_killed(s: Scene, *, leader: bool) -> None:
    server = await _member(s, leader=leader)
    server.kill()
    await s.progress(15, 8)
    await server.start()
    await s.progress()


async def _member_paused(s: Scene, *, leader: bool) -> None:
    server = await _member(s, leader=leader)
    server.pause()
    await s.progress(15, 8)
    server.resume()
    await s.progress()


async def _member_isolated(s: Scene, *, leader: bool) -> None:
    server = await _member(s, leader=leader)
    s.trio.cluster.isolate(server.name)
    await s.progress(15, 8)
    s.trio.cluster.heal()
    await s.progress()
