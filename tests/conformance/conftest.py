"""Every backend on which the promises of `storage.base` are shown: memory, and each etcd that we support."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from equipment.backends import Backend
from equipment.etcd import VERSIONS, SharedEtcds, scratch_dir
from storage.base import Storage
from storage.etcd import EtcdStorage
from storage.memory import MemoryStorage

BACKENDS = ("memory", *(f"etcd-{version}" for version in VERSIONS))


@pytest.fixture(scope="session")
def compactable_etcds() -> Iterator[SharedEtcds]:
    """Servers of this suite alone, because it compacts them."""
    with scratch_dir("lrm-conformance-") as path:
        servers = SharedEtcds(path)
        yield servers
        servers.end()


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest, compactable_etcds: SharedEtcds) -> AsyncIterator[Backend]:
    root = f"/test/{uuid.uuid4().hex[:12]}"
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            memory = MemoryStorage(root=root)
            stack.push_async_callback(memory.aclose)
            yield Backend("memory", memory, root, lambda _instance: memory)
            return
        server = await compactable_etcds.get(request.param.removeprefix("etcd-"))

        def client(instance: str) -> EtcdStorage:
            opened = EtcdStorage([server.endpoint], root=root, instance=instance)
            stack.push_async_callback(opened.aclose)
            return opened

        yield Backend(request.param, client("one"), root, client)


@pytest.fixture
def store(backend: Backend) -> Storage:
    return backend.store
