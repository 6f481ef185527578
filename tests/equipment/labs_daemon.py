"""A real daemon with the labs' plug-in, one worker that a test puts there, and the simulated CML that it serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from controllers.cml.simulator import Machine, Simulator
from equipment.daemons import DaemonProcess
from equipment.labs_world import FAST, PASSWORD_ENV, instance_of, labs_world
from equipment.waiting import until
from lrm.devservers import EtcdServer
from storage.etcd import EtcdStorage

API = "/apis/lab.neuroglia.io/v1/namespaces/default"
MERGE = {"Content-Type": "application/merge-patch+json"}


@dataclass
class LabsDaemon:
    """See the module; the worker is `w1`."""

    daemon: DaemonProcess
    machine: Machine

    async def get(self, path: str) -> Any:
        status, document = await self.daemon.request("GET", f"{API}/{path}")
        assert status == 200, document
        return document

    async def records(self, query: str = "") -> dict[str, Any]:
        return {r["spec"]["labId"]: r for r in (await self.get(f"labrecords{query}"))["items"]}

    async def patch(self, name: str, document: dict[str, Any]) -> tuple[int, Any]:
        return await self.daemon.request("PATCH", f"{API}/labrecords/{name}", document, headers=MERGE)

    async def mirrored(self, count: int) -> dict[str, Any]:
        async def there() -> dict[str, Any] | None:
            records = await self.records()
            return records if len(records) == count else None

        found = await until(there, f"{count} records")
        assert found is not None
        return found


@asynccontextmanager
async def labs_daemon(
    server_dir: Path, etcd: EtcdServer, root: str, monkeypatch: pytest.MonkeyPatch, **environment: str
) -> AsyncIterator[LabsDaemon]:
    """It runs, and the worker serves."""
    async with Simulator.run(FAST) as simulator:
        storage = EtcdStorage([etcd.endpoint], root=root)
        async with labs_world(monkeypatch, storage=storage, root=root, simulator=simulator) as world:
            world.term.lost()  # the daemon alone acts
            await world.worker()
        await storage.aclose()
        daemon = DaemonProcess(
            server_dir,
            endpoint=etcd.endpoint,
            root=root,
            plugins="equipment.labs_plugin",
            LRM_SECRETS_ALLOW=PASSWORD_ENV,
            LRM_LABS_REFRESH_INTERVAL="0.2",
            LRM_LABS_STEP_INTERVAL="0.05",
            **{PASSWORD_ENV: FAST.password},
            **environment,
        )
        try:
            await daemon.start_ready()
            yield LabsDaemon(daemon, simulator.machine(instance_of("w1")))
        finally:
            await daemon.end()
