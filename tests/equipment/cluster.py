"""Three etcd members on this machine, whose peers reach each other through links that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from equipment.etcd import Gateway, restore
from equipment.tcp_link import TcpLink, holder_of
from lrm.devservers import EtcdServer
from lrm.processes import free_port


class EtcdCluster:
    """`async with EtcdCluster(folder, binary) as cluster`: members "a", "b", "c", all healthy on entering."""

    def __init__(self, folder: Path, binary: Path, *, args: Sequence[str] = ()) -> None:
        self._stack = AsyncExitStack()
        self._links: dict[str, TcpLink] = {}
        self._ports = {name: free_port() for name in "abc"}
        self._folder = folder
        self._binary = binary
        self._args = tuple(args)
        self.members: dict[str, EtcdServer] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for name, port in self._ports.items():
                self._links[name] = await stack.enter_async_context(TcpLink(port, origin_of=self._origin))
            everyone = ",".join(f"{name}={url}" for name, url in self._peers.items())
            for name, port in self._ports.items():
                args = (
                    *self._args,
                    f"--listen-peer-urls=http://127.0.0.1:{port}",
                    f"--initial-advertise-peer-urls=http://127.0.0.1:{self._links[name].port}",
                    f"--initial-cluster={everyone}",
                )
                server = EtcdServer(self._folder / name, binary=self._binary, name=name, args=args)
                self.members[name] = server
                stack.push_async_callback(server.stop)
            async with asyncio.TaskGroup() as group:
                for server in self.members.values():
                    group.create_task(server.start())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self.members.values():
            server.kill()  # a member that is asked to stop first hands over its leadership, which nobody needs here
        await self._stack.aclose()

    @property
    def endpoints(self) -> list[str]:
        return [server.endpoint for server in self.members.values()]

    @property
    def _peers(self) -> dict[str, str]:
        """Member → the URL at which the others reach it."""
        return {name: f"http://127.0.0.1:{link.port}" for name, link in self._links.items()}

    async def restore(self, snapshot: Path) -> None:
        """Put every member back to a snapshot, as an operator does after a disaster; ends when all are healthy."""
        for server in self.members.values():
            server.kill()
            restore(server, snapshot, peers=self._peers)
        async with asyncio.TaskGroup() as group:
            for server in self.members.values():
                group.create_task(server.start())

    def isolate(self, name: str) -> None:
        """Cut a member off from its peers, in both directions; its clients still reach it."""
        self._links[name].cut()
        for other, link in self._links.items():
            if other != name:
                link.cut(name)

    def heal(self) -> None:
        for link in self._links.values():
            link.heal()

    async def leader(self, timeout: float = 60.0) -> str:
        """The name of the member that leads, by the word of one that runs and knows a leader that runs."""
        async with asyncio.timeout(timeout):
            while True:
                ids: dict[str, str] = {}
                leaders: list[str] = []
                for name, server in self.members.items():
                    if server.running:
                        try:
                            status = await Gateway(server.endpoint).status()
                        except OSError:  # it has just been started, or is ending: asked again in a moment
                            continue
                        ids[status["header"]["member_id"]] = name
                        leaders.append(status.get("leader", "0"))
                for member in leaders:
                    if leaders.count(member) >= 2 and member in ids:
                        return ids[member]
                await asyncio.sleep(0.05)

    def _origin(self, port: int) -> str:
        return holder_of(port, {name: server.process.pid for name, server in self.members.items() if server.running})
