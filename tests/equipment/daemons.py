"""A real daemon as a process of its own, for tests that kill it, starve it or look at its exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from lrm.processes import ChildProcess, free_port
from storage.clock import SystemClock

TESTS = Path(__file__).parents[1]
WIDGETS = "/apis/test.neuroglia.io/v1/namespaces/default/widgets"


class DaemonProcess:
    """`lrm serve` with the widgets' plug-in (or others) on a port of its own; started and ended by the test."""

    def __init__(
        self, folder: Path, *, endpoint: str, root: str, plugins: str = "equipment.widget_plugin", **settings: str
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("LRM_", "AWS_"))},
            "PYTHONPATH": str(TESTS),
            "LRM_ETCD_ENDPOINTS": endpoint,
            "LRM_ETCD_ROOT": root,
            "LRM_API_PORT": str(self.port),
            "LRM_INSTANCE_ID": f"test-{self.port}",
            "LRM_PLUGINS": plugins,
            "LRM_LEADER": "static",
            "LRM_LOG_FORMAT": "json",
            "LRM_REDIS_URL": "redis://127.0.0.1:1/0",
            **settings,
        }
        self._log = folder / f"daemon-{self.port}.log"
        self.child: ChildProcess | None = None

    @property
    def process(self) -> ChildProcess:
        assert self.child is not None, "not started"
        return self.child

    def start(self, **extra: str) -> ChildProcess:
        env = {**self.environment, **extra}
        self.child = ChildProcess.start([sys.executable, "-m", "lrm", "serve"], name="lrm", log_path=self._log, env=env)
        return self.child

    async def start_ready(self, seconds: float = 60, **extra: str) -> None:
        self.start(**extra)
        await self.process.wait_ready(self.is_ready, seconds)

    async def is_ready(self) -> bool:
        return (await self.request("GET", "/readyz"))[0] == 200

    async def exit_code(self, seconds: float = 60) -> int:
        async with SystemClock().timeout(seconds):
            return await self.process.wait()

    def terminate(self) -> None:
        self.process.signal(signal.SIGTERM)

    def log(self) -> str:
        return self._log.read_text()

    async def request(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON (or text). A connection error is an OSError."""
        status, _, document = await self.exchange(method, path, body, headers=headers)
        return status, document

    async def exchange(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], Any]:
        data = body if isinstance(body, str | bytes) or body is None else None
        json = None if data is not None else body
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            try:
                async with session.request(method, self.url + path, data=data, json=json, headers=headers) as reply:
                    is_json = "json" in reply.headers.get("Content-Type", "")
                    return reply.status, reply.headers, await (reply.json() if is_json else reply.text())
            except aiohttp.ClientConnectionError as error:
                raise ConnectionError(str(error)) from error

    async def end(self) -> None:
        if self.child is not None:
            await self.child.stop(grace=15)


def widget_document(name: str = "w1", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "test.neuroglia.io/v1",
        "kind": "Widget",
        "metadata": {"name": name},
        "spec": {"labTrack": "ccna", **spec},
    }
