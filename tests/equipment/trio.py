"""Three daemons as they run in production, on this machine, with something that can fail on every link between them.

Three etcd members whose peers can be cut off, a Redis, the simulated EC2 and CMLs; each daemon reaches each member
through a fault proxy of its own (and each member through a link that can be slow), and so Redis, EC2 and the CMLs.
The daemons run the product's own controllers beside the Gadgets of `trio_plugin`. Nothing is faked inside them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import aiohttp

from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from controllers.cml.simulator import Simulator
from equipment import trio_plugin
from equipment.cluster import EtcdCluster
from equipment.daemons import DaemonProcess
from equipment.fault_proxy import FaultProxy
from equipment.reference import Reference
from equipment.tcp_link import TcpLink
from equipment.waiting import until
from equipment.workers_world import FAST_CML, PASSWORD_ENV, REGION, TOKEN, TOKEN_ENV
from lrm.devservers import RedisServer
from lrm.processes import ProcessError

ROOT = "/lrm"
LEASE, RENEW, RETRY = 5.0, 3.0, 0.5
"""Seconds: the shortest that leave a machine with two cores room to breathe."""
SILENCE = 2.0
"""Seconds after which a silent watch is probed."""
WORKERS = "/apis/lab.neuroglia.io/v1/namespaces/default/labworkers"
COSTLY = ("pending", "running", "stopping", "stopped")

SPEED = {
    "LRM_LEADER": "lease",
    "LRM_LEASE_DURATION": str(LEASE),
    "LRM_RENEW_DEADLINE": str(RENEW),
    "LRM_RETRY_PERIOD": str(RETRY),
    "LRM_BOOKMARK_EVERY": "0.2",
    "LRM_ETCD_TIMEOUT": "2",
    "LRM_ETCD_SILENCE": str(SILENCE),
    "LRM_WORKER_POLL_INTERVAL": "0.2",
    "LRM_WORKER_REST_INTERVAL": "0.5",
    "LRM_WORKER_TRACE_TIMEOUT": "60",
    "LRM_WORKER_GONE_AFTER": "1",
    "LRM_LABS_REFRESH_INTERVAL": "1",
    "LRM_LABS_STEP_INTERVAL": "0.2",
}


@dataclass
class Node:
    """One daemon, and its own end of every link."""

    name: str
    process: DaemonProcess
    etcd: dict[str, FaultProxy]
    redis: TcpLink
    aws: FaultProxy
    cml: FaultProxy
    wall: Path

    @property
    def running(self) -> bool:
        return self.process.child is not None and self.process.child.exit_code is None

    def kill(self) -> None:
        self.process.process.kill()

    def pause(self) -> None:
        self.process.process.pause()

    def resume(self) -> None:
        self.process.process.resume()

    def cut_etcd(self) -> None:
        """No byte to or from any member; connections stay open."""
        for proxy in self.etcd.values():
            proxy.freeze()

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer (a probe's is text); 0 when there is none within 3 s."""
        timeout = aiohttp.ClientTimeout(total=3)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(method, self.process.url + path, json=body) as reply,
            ):
                is_json = "json" in reply.headers.get("Content-Type", "")
                return reply.status, await (reply.json() if is_json else reply.text())
        except (OSError, aiohttp.ClientError, TimeoutError):
            return 0, None

    def heal(self) -> None:
        """Everything on this daemon's links as it should be."""
        for proxy in (*self.etcd.values(), self.aws, self.cml):
            proxy.clear()
        self.redis.heal()
        trio_plugin.set_wall(self.wall, 0)


class Trio:
    """`async with Trio(folder, etcd_binary, moto_url) as trio`: everything runs and each daemon is ready."""

    def __init__(self, folder: Path, binary: Path, moto_url: str, *, etcd_args: Sequence[str] = ()) -> None:
        self.folder = folder
        self._moto_url = moto_url
        self._stack = AsyncExitStack()
        self.cluster = EtcdCluster(folder / "etcd", binary, args=etcd_args)
        self.redis = RedisServer(folder / "redis")
        self.redis_era = 0
        """How many times Redis has lost its memory."""
        self.attempts, self.deliveries = folder / "attempts", folder / "deliveries"
        self.members: dict[str, TcpLink] = {}
        """Member → the link through which every daemon reaches it."""
        self.nodes: dict[str, Node] = {}
        self.shim: AwsShim
        self.cml: Simulator

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.cluster)
            await stack.enter_async_context(self.redis)
            self.shim = await stack.enter_async_context(AwsShim.run(ShimOptions(moto_url=self._moto_url, delay=0.1)))
            options = replace(FAST_CML, registration=0.2, ec2_state_url=f"{self.shim.url}/_shim/instances")
            self.cml = await stack.enter_async_context(Simulator.run(options))
            for name, server in self.cluster.members.items():
                self.members[name] = await stack.enter_async_context(TcpLink(server.port))
            for number in (1, 2, 3):
                node = await self._node(f"lrm-{number}", stack)
                self.nodes[node.name] = node
                stack.push_async_callback(_end, node)
            async with asyncio.TaskGroup() as tasks:
                for node in self.nodes.values():
                    tasks.create_task(node.process.start_ready(40))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _node(self, name: str, stack: AsyncExitStack) -> Node:
        etcd = {
            member: await stack.enter_async_context(FaultProxy(f"http://127.0.0.1:{link.port}"))
            for member, link in self.members.items()
        }
        redis = await stack.enter_async_context(TcpLink(self.redis.port))
        aws = await stack.enter_async_context(FaultProxy(self.shim.url))
        cml = await stack.enter_async_context(FaultProxy(self.cml.url))
        wall = self.folder / f"{name}.wall"
        trio_plugin.set_wall(wall, 0)
        process = DaemonProcess(
            self.folder,
            endpoint=",".join(proxy.endpoint for proxy in etcd.values()),
            root=ROOT,
            plugins="equipment.trio_plugin,controllers.plugin",
            LRM_INSTANCE_ID=name,
            LRM_REDIS_URL=f"redis://127.0.0.1:{redis.port}/0",
            LRM_CML_URL_TEMPLATE=f"{cml.endpoint}/{{instance_id}}",
            LRM_SECRETS_ALLOW=f"{PASSWORD_ENV},{TOKEN_ENV}",
            AWS_ENDPOINT_URL=aws.endpoint,
            AWS_REGION=REGION,
            AWS_ACCESS_KEY_ID="testing",
            AWS_SECRET_ACCESS_KEY="testing",
            AWS_EC2_METADATA_DISABLED="true",
            TRIO_ATTEMPTS=str(self.attempts),
            TRIO_DELIVERIES=str(self.deliveries),
            TRIO_WALL=str(wall),
            **{PASSWORD_ENV: FAST_CML.password, TOKEN_ENV: TOKEN},
            **SPEED,
        )
        return Node(name, process, etcd, redis, aws, cml, wall)

    # What is, by the word of etcd and of the world outside

    async def stored(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Key → object of everything below a prefix, from etcd itself."""
        found: dict[str, dict[str, Any]] = {}
        for key, (_, value) in (await self.keys(prefix)).items():
            found[key] = json.loads(value)
        return found

    async def keys(self, prefix: str) -> dict[str, tuple[int, bytes]]:
        """Key → create_revision and value; asks members until one answers."""
        reference = Reference(self.cluster.endpoints, prefix.rstrip("/"))
        await reference.begin()
        return {c.key: (c.create_revision, c.value or b"") for c in reference.state.values()}

    async def holder(self, lock: str) -> tuple[str, int]:
        """The daemon that holds a lock, and its term; "" and 0 when nobody does."""
        held = (await self.keys(f"{ROOT}/leader/")).get(f"{ROOT}/leader/{lock}")
        if held is None:
            return "", 0
        identity = json.loads(held[1])["identity"]
        name = next((name for name in self.nodes if identity.startswith(name)), "")
        return name, held[0]

    async def leader(self, lock: str = trio_plugin.GADGETS_LOCK, timeout: float = 30) -> Node:
        """The daemon that leads; waits for one that runs."""

        async def leading() -> Node | None:
            name, _ = await self.holder(lock)
            return self.nodes[name] if name and self.nodes[name].running else None

        return await until(leading, f"a leader of {lock}", timeout)

    async def standby(self, lock: str = trio_plugin.GADGETS_LOCK) -> Node:
        """One that does not lead."""
        leader = await self.leader(lock)
        return next(node for node in self.nodes.values() if node is not leader and node.running)

    async def later_term(self, than: int, lock: str = trio_plugin.GADGETS_LOCK, timeout: float = 30) -> int:
        """The number of a term after this one, once there is one."""

        async def began() -> int:
            term = (await self.holder(lock))[1]
            return term if term > than else 0

        return await until(began, f"a term of {lock} after {than}", timeout)

    def live(self) -> dict[str, str]:
        """Instance → uid of its worker, for every instance that costs money."""
        now = self.shim.instances.now
        return {i.id: i.tags.get("lrm/uid", "") for i in self.shim.instances.everywhere() if i.state_at(now) in COSTLY}

    async def post_worker(self, name: str) -> None:
        """As a user who tries again until it is certain that the worker is there."""
        spec = {
            "labTrack": "ccna",
            "region": REGION,
            "aws": {"amiId": DEMO_AMI, "keyName": DEMO_KEY},
            "cml": {"passwordFrom": {"env": PASSWORD_ENV}, "licenseTokenFrom": {"env": TOKEN_ENV}},
        }
        document = {"apiVersion": "lab.neuroglia.io/v1", "kind": "LabWorker", "metadata": {"name": name}, "spec": spec}
        await self._insist("POST", WORKERS, document, {201, 409})

    async def delete_worker(self, name: str) -> None:
        await self._insist("DELETE", f"{WORKERS}/{name}", None, {200, 404})

    async def _insist(self, method: str, path: str, body: Any, wanted: set[int]) -> None:
        async def answered() -> bool:
            for node in self.nodes.values():
                if node.running and (await node.ask(method, path, body))[0] in wanted:
                    return True
            return False

        await until(answered, f"{method} {path}", 60)

    # Faults that need more than a proxy

    async def heal(self) -> None:
        """Everything runs and every link carries: what a scene that failed may have left is undone, too."""
        self.cluster.heal()
        for link in self.members.values():
            link.delay = 0
            link.heal()
        for server in (*self.cluster.members.values(), self.redis):
            if server.running:
                server.resume()
            else:
                await server.start()
        for node in self.nodes.values():
            node.heal()
            if node.running:
                node.resume()
        async with asyncio.TaskGroup() as tasks:
            for node in self.nodes.values():
                tasks.create_task(self._revive(node))

    async def _revive(self, node: Node) -> None:
        if not node.running:
            await node.process.start_ready(40)

        async def ready() -> bool:
            return (await node.ask("GET", "/readyz"))[0] == 200

        try:
            await until(ready, f"{node.name} ready", 40)
        except AssertionError as error:
            raise AssertionError(f"{error}: {node.process.log()[-3000:]}") from None


async def _end(node: Node) -> None:
    node.heal()
    if node.process.child is not None:
        try:
            node.process.process.kill()
        except ProcessError as error:
            raise AssertionError(f"{node.name} cannot be ended: {error}") from error
