"""A daemon with the whole controllers' plug-in, an engine and no cloud; and lab instances in containers for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp

from equipment.daemons import DaemonProcess
from equipment.engine import Engine
from equipment.waiting import until

INSTANCES = "/apis/lab.neuroglia.io/v1/namespaces/default/labinstancerequests"


class ContainersDaemon(DaemonProcess):
    """See the module."""

    @classmethod
    @asynccontextmanager
    async def at(cls, folder: Path, endpoint: str, root: str, engine: Engine, **settings: str) -> AsyncIterator[Self]:
        """One that is not started yet; it ends with the block."""
        values = {
            "LRM_DOCKER_HOST": engine.host,
            "LRM_DOCKER_STOP_GRACE": "1",
            "LRM_DOCKER_CPU": "100",
            "LRM_INSTANCES_MOST_PER_STUDENT": "0",
            "LRM_INSTANCES_STEP_INTERVAL": "0.2",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **settings,
        }
        daemon = cls(folder, endpoint=endpoint, root=root, plugins="controllers.plugin", **values)
        try:
            yield daemon
        finally:
            await daemon.end()

    async def create(self, document: dict[str, Any]) -> dict[str, Any]:
        status, made = await self.request("POST", INSTANCES, document)
        assert status == 201, made
        return dict(made)

    async def get(self, name: str) -> dict[str, Any] | None:
        """The object, None when there is none."""
        status, found = await self.request("GET", f"{INSTANCES}/{name}")
        assert status in (200, 404), found
        return found if status == 200 else None

    async def phase(self, name: str, phase: str, seconds: float = 60) -> dict[str, Any]:
        """The object, once it is in a phase."""
        return await self._once(name, lambda found: found["status"]["phase"] == phase, f"it is {phase}", seconds)

    async def cleaned(self, name: str, phase: str, seconds: float = 60) -> dict[str, Any]:
        """The object, once it is in a phase and nothing of it is left outside."""
        return await self._once(
            name,
            lambda found: found["status"]["phase"] == phase and not found["status"].get("workerRef"),
            f"it is {phase} and cleaned up",
            seconds,
        )

    async def gone(self, name: str, seconds: float = 60) -> None:
        async def absent() -> bool:
            return await self.get(name) is None

        await until(absent, f"{name} is gone", timeout=seconds)

    async def _once(self, name: str, fits: Any, what: str, seconds: float) -> dict[str, Any]:
        last: dict[str, Any] | None = None

        async def asked() -> dict[str, Any] | None:
            nonlocal last
            try:
                last = await self.get(name)
            except (aiohttp.ClientError, OSError):
                return None
            return last if last is not None and fits(last) else None

        try:
            found = await until(asked, f"{name}: {what}", timeout=seconds)
        except AssertionError as error:
            error.add_note(f"last seen: {last}")
            raise
        assert found is not None
        return found


def instance(name: str, engine: Engine, **template: Any) -> dict[str, Any]:
    """A lab instance of the busybox image, as it is posted."""
    return {
        "apiVersion": "lab.neuroglia.io/v1",
        "kind": "LabInstanceRequest",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "labTemplate": {"image": engine.busybox_image, **template},
            "studentEmail": "ann@example.edu",
            "durationMinutes": 60,
            "resources": {"cpu": 0.1, "memory": "32Mi"},
        },
    }
