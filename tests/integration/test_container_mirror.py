"""The mirror of a real engine, through a socket that counts, breaks and falls silent; and the collector."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controllers.containers import mirror as mirror_module
from controllers.containers.collector import Collector
from controllers.instances.kind import LabInstanceRequest, WorkerRef
from controllers.instances.phases import Reasons
from controllers.instances.runtime import LabFailed, NotNow, State
from equipment.containers_world import ContainersWorld, containers_world
from equipment.engine import Engine
from equipment.engine_proxy import EngineProxy, engine_proxy
from equipment.waiting import until
from lrm.testing import VirtualClock


@pytest.fixture
async def proxy(engine: Engine, server_dir: Path) -> AsyncIterator[EngineProxy]:
    async with engine_proxy(server_dir, engine.host) as proxy:
        yield proxy


@pytest.fixture
async def world(engine: Engine, proxy: EngineProxy) -> AsyncIterator[ContainersWorld]:
    async with containers_world(engine, host=proxy.host) as world:
        yield world


async def looks(world: ContainersWorld, request: LabInstanceRequest) -> State | str:
    """How it is said to be; the reason where that is an error."""
    try:
        return (await world.runtime.look(request, world.ctx)).state
    except (NotNow, LabFailed) as error:
        return error.reason


async def test_a_lab_costs_five_calls_to_make_and_none_while_it_runs(
    world: ContainersWorld, proxy: EngineProxy
) -> None:
    """However often it is looked at: what changes is told by the engine."""
    proxy.asked.clear()
    request = world.request(ports=[8000])
    await world.provision(request)
    made = {
        "GET /images/lrm-test/busybox/json": 1,
        "POST /networks/create": 1,
        "POST /containers/create": 1,
        "POST /containers/*/start": 1,
        "GET /containers/*/json": 1,
    }
    assert dict(proxy.asked) == made
    for _ in range(100):
        assert await looks(world, request) is State.RUNNING
    assert dict(proxy.asked) == made
    await world.clean(request)


async def test_while_the_engine_is_away_nothing_is_concluded_and_then_everything_is_known(
    world: ContainersWorld, proxy: EngineProxy
) -> None:
    stays, goes, ends = world.request("stays"), world.request("goes"), world.request("ends")
    for request in (stays, goes, ends):
        await world.provision(request)
    await proxy.close()
    await until(lambda: world.runtime.told() is None, "the loss is noticed")
    world.engine.client.containers.get(goes.outside_name).remove(force=True)
    world.engine.client.containers.get(ends.outside_name).kill()
    for request in (stays, goes, ends):
        assert await looks(world, request) == Reasons.ENGINE_UNAVAILABLE
        with pytest.raises(NotNow):
            await world.runtime.clean(request, world.ctx)
    world.told.clear()
    await proxy.open()
    await until(lambda: world.runtime.told() is not None, "the engine is followed again", timeout=40)
    assert await looks(world, stays) is State.RUNNING
    assert await looks(world, goes) == Reasons.CONTAINER_LOST
    assert await looks(world, ends) == Reasons.CONTAINER_FAILED
    assert world.hinted(goes)
    assert world.hinted(ends)
    for request in (stays, goes, ends):
        await world.clean(request)


async def test_an_engine_that_falls_silent_is_given_up_and_followed_anew(
    engine: Engine, proxy: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word and no answer to a question: the stream is not trusted any more."""
    monkeypatch.setattr(mirror_module, "_SILENCE", 0.2)
    async with containers_world(engine, host=proxy.host) as world:
        monkeypatch.setattr("controllers.containers.engine._OPEN", 0.5)
        request = world.request()
        await world.provision(request)
        proxy.freeze()
        await until(lambda: world.runtime.told() is None, "its silence is noticed", timeout=40)
        assert await looks(world, request) == Reasons.ENGINE_UNAVAILABLE
        monkeypatch.setattr("controllers.containers.engine._OPEN", 10.0)
        proxy.thaw()
        await until(lambda: world.runtime.told() is not None, "it is followed again", timeout=60)
        assert await looks(world, request) is State.RUNNING
        await world.clean(request)


async def test_a_list_makes_good_what_the_stream_has_lost(
    engine: Engine, proxy: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine drops events for a listener that is slow; its deaths are found all the same."""
    monkeypatch.setattr("controllers.containers.engine._WATCHED", ("pause",))
    async with containers_world(engine, host=proxy.host) as world:
        ends, goes = world.request("ends"), world.request("goes")
        for request in (ends, goes):
            await world.provision(request)
        world.engine.client.containers.get(goes.outside_name).remove(force=True)
        world.engine.client.containers.get(ends.outside_name).kill()
        assert await looks(world, ends) is State.RUNNING, "nothing was heard"
        assert world.runtime.mirror is not None
        await world.runtime.mirror._compare()
        assert await looks(world, ends) == Reasons.CONTAINER_FAILED
        assert await looks(world, goes) == Reasons.CONTAINER_LOST
        for request in (ends, goes):
            await world.clean(request)


async def test_what_nobody_claims_is_removed_at_the_second_look_a_minute_later(world: ContainersWorld) -> None:
    """A claim is a request with a place; one that cannot be read may claim anything."""
    claimed = await world.client.create(world.request("claimed"))
    orphan, other = world.request("orphan"), world.request("other")

    def place(r: LabInstanceRequest) -> None:
        r.status.worker_ref = WorkerRef(kind="Engine", name="docker")
        r.status.attempt = 1

    claimed = await world.client.update_status(claimed, place)
    for request in (claimed, orphan):
        await world.provision(request)
    clock, engine = VirtualClock(), world.runtime.engine
    assert engine is not None
    collector = Collector(engine, world.cache, clock, observe_only=False)

    async def left() -> tuple[int, int]:
        leftovers = world.engine.leftovers
        return len(leftovers(f"lrm/uid={claimed.uid}")), len(leftovers(f"lrm/uid={orphan.uid}"))

    await collector.look(world.term)
    await clock.advance(59)
    await collector.look(world.term)
    assert await left() == (3, 3), "two looks, but not far enough apart"
    watcher = Collector(engine, world.cache, clock, observe_only=True)
    await watcher.look(world.term)
    await clock.advance(61)
    await watcher.look(world.term)
    assert await left() == (3, 3), "who only observes removes nothing"
    await world.provision(other)
    for _ in range(3):  # the container first; its network and its volume are free after that
        await collector.look(world.term)
    assert await left() == (3, 0)
    assert len(world.engine.leftovers(f"lrm/uid={other.uid}")) == 3, "it is younger"
    assert collector.describe()["suspects"] == 3
    key = f"/lrm/r/labinstancerequests/default/{claimed.name}"
    await world.cache.storage.set(key, b"{not json")
    await world.cache.barrier(30)
    await clock.advance(120)
    await collector.look(world.term)
    assert await left() == (3, 0)
    assert len(world.engine.leftovers(f"lrm/uid={other.uid}")) == 3
    for request in (claimed, other):
        await world.clean(request)
