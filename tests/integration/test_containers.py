"""Our stores against servers in containers: behind a published port, frozen, killed and started again."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest

from equipment.engine import LOOPBACK_NETWORK, Engine
from equipment.etcd import Gateway
from equipment.waiting import until
from storage.base import Event, Guard
from storage.clock import SystemClock
from storage.errors import AlreadyExists, Conflict, GuardFailed, NotFound, RedisFailed, Unavailable
from storage.etcd import EtcdStorage
from storage.redis_bookmarks import RedisBookmarks, Save, SavedBookmark

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

ANYWHERE = "http://0.0.0.0:2379"
ETCD = ["etcd", "--data-dir=/data", f"--listen-client-urls={ANYWHERE}", f"--advertise-client-urls={ANYWHERE}"]
REDIS = ["redis-server", "--dir", "/tmp", "--appendonly", "yes", "--protected-mode", "no"]


@pytest.fixture(scope="module")
def containers(engine: Engine) -> Iterator[dict[str, DockerContainer]]:
    """An etcd and a Redis on a network of their own; afterwards nothing of them is left."""
    # It reads DOCKER_HOST and its own settings when it is imported, and the engine has just set them.
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.network import Network

    label = f"lrm-test-{uuid.uuid4().hex[:8]}"
    marked = {"labels": {label: "yes"}}
    with (
        Network(docker_network_kw={**LOOPBACK_NETWORK, **marked}) as network,
        DockerContainer(engine.etcd_image, command=ETCD, ports=[2379], network=network, **marked) as etcd,
        DockerContainer(engine.redis_image, command=REDIS, ports=[6379], network=network, **marked) as redis,
    ):
        yield {"etcd": etcd, "redis": redis}
    assert engine.leftovers(label) == []


def address(container: DockerContainer, port: int) -> str:
    return f"{container.get_container_host_ip()}:{container.get_exposed_port(port)}"


@pytest.fixture
async def store(containers: dict[str, DockerContainer], etcd_root: str) -> AsyncIterator[EtcdStorage]:
    endpoint = f"http://{address(containers['etcd'], 2379)}"

    async def healthy() -> bool:
        try:
            return await Gateway(endpoint).revision() > 0
        except (OSError, RuntimeError):
            return False

    await until(healthy, "etcd in its container answers")
    store = EtcdStorage([endpoint], root=etcd_root, instance="one", request_timeout=1.0)
    yield store
    await store.aclose()


async def test_ports_are_published_on_loopback_alone(containers: dict[str, DockerContainer]) -> None:
    for container in containers.values():
        container.reload()
        ports = container.get_wrapped_container().attrs["NetworkSettings"]["Ports"]
        assert {binding["HostIp"] for bindings in filter(None, ports.values()) for binding in bindings} == {"127.0.0.1"}


async def test_the_promises_of_writes_and_watches_hold_through_a_published_port(
    store: EtcdStorage, etcd_root: str
) -> None:
    """Not the conformance suite, but one word of each of its chapters."""
    prefix = f"{etcd_root}/r/"
    first = await store.create(f"{prefix}a", b"1")
    with pytest.raises(AlreadyExists):
        await store.create(f"{prefix}a", b"2")
    async with store.watch(prefix, first.revision) as watch:
        second = await store.update(f"{prefix}a", b"2", expected_revision=first.revision)
        with pytest.raises(Conflict):
            await store.update(f"{prefix}a", b"3", expected_revision=first.revision)
        with pytest.raises(GuardFailed):
            await store.update(
                f"{prefix}a", b"3", expected_revision=second.revision, guards=(Guard(f"{prefix}nobody", 1),)
            )
        assert [entry.value for entry in (await store.list(prefix)).entries] == [b"2"]
        await store.delete(f"{prefix}a", expected_revision=second.revision)
        async with asyncio.timeout(30):
            assert (await anext(watch)).events == (Event("put", second, first),)
            (gone,) = (await anext(watch)).events
            assert (gone.kind, gone.previous) == ("delete", second)
    with pytest.raises(NotFound):
        await store.get(f"{prefix}a")


async def test_a_frozen_etcd_is_unavailable_and_serves_again_when_it_thaws(
    store: EtcdStorage, etcd_root: str, containers: dict[str, DockerContainer]
) -> None:
    key = f"{etcd_root}/r/a"
    await store.create(key, b"1")
    container = containers["etcd"].get_wrapped_container()
    container.pause()
    try:
        with pytest.raises(Unavailable):
            await store.get(key)
    finally:
        container.unpause()
    assert (await store.get(key)).value == b"1"


async def test_bookmarks_outlive_a_redis_that_is_killed(containers: dict[str, DockerContainer]) -> None:
    bookmarks = RedisBookmarks(f"redis://{address(containers['redis'], 6379)}/0", SystemClock())
    saved = SavedBookmark("cluster", "epoch", revision=7, term=3, saved_at="2026-01-01T00:00:00Z")
    try:

        async def keeps() -> bool:
            try:
                return await bookmarks.save([Save("workers", saved)]) == ["saved"]
            except RedisFailed:
                return False

        await until(keeps, "Redis in its container takes a bookmark")
        container = containers["redis"].get_wrapped_container()
        container.kill()
        with pytest.raises(RedisFailed):
            await bookmarks.load("workers")
        container.start()
    finally:
        await bookmarks.aclose()
    bookmarks = RedisBookmarks(f"redis://{address(containers['redis'], 6379)}/0", SystemClock())
    try:

        async def found() -> SavedBookmark | None:
            try:
                return await bookmarks.load("workers")
            except RedisFailed:
                return None

        assert await until(found, "Redis is back") == saved
    finally:
        await bookmarks.aclose()
