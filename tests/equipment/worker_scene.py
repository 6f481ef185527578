"""Real daemons with the workers' plug-in over a real etcd, and the world that they work on: EC2 and CMLs, simulated.

The simulators live in the test's process and so survive what the test does to the daemons.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from controllers.cml.simulator import Machine, Simulator
from equipment.daemons import DaemonProcess
from equipment.waiting import until
from equipment.workers_world import FAST_CML, PASSWORD_ENV, REGION, TOKEN, TOKEN_ENV
from lrm.crashpoints import EXIT_CODE
from lrm.devservers import EtcdServer

WORKERS = "/apis/lab.neuroglia.io/v1/namespaces/default/labworkers"

SPEED = {
    "LRM_WORKER_POLL_INTERVAL": "0.1",
    "LRM_WORKER_REST_INTERVAL": "0.3",
    "LRM_WORKER_TRACE_TIMEOUT": "60",
    "LRM_WORKER_GONE_AFTER": "1",
    "LRM_LABS_REFRESH_INTERVAL": "1",
    "LRM_LABS_STEP_INTERVAL": "0.1",
    "LRM_LABS_DRAIN_INTERVAL": "0.5",
}


@dataclass
class Scene:
    """See the module; `daemon` is the one that is asked."""

    daemon: DaemonProcess
    shim: AwsShim
    cml: Simulator
    etcd: EtcdServer
    root: str
    daemons: tuple[DaemonProcess, ...] = ()

    async def post(self, name: str = "w1", **spec: Any) -> dict[str, Any]:
        aws = spec.pop("aws", {"amiId": DEMO_AMI, "keyName": DEMO_KEY})
        cml = {"passwordFrom": {"env": PASSWORD_ENV}, "licenseTokenFrom": {"env": TOKEN_ENV}}
        cml |= {"productLicense": "CML_Education"} | spec.pop("cml", {})
        document = {
            "apiVersion": "lab.neuroglia.io/v1",
            "kind": "LabWorker",
            "metadata": {"name": name},
            "spec": {"labTrack": "ccna", "region": REGION, "aws": aws, "cml": cml, **spec},
        }
        status, answer = await self.daemon.request("POST", WORKERS, document)
        assert status == 201, answer
        return dict(answer)

    async def get(self, name: str = "w1") -> dict[str, Any] | None:
        """The worker as the API tells it, None when there is none (and only then)."""
        status, answer = await self.daemon.request("GET", f"{WORKERS}/{name}")
        assert status in {200, 404}, answer
        return answer if status == 200 else None

    async def phase(self, phase: str, name: str = "w1", seconds: float = 60) -> dict[str, Any]:
        seen: list[dict[str, Any] | None] = [None]

        async def there() -> bool:
            seen[0] = await self.get(name)
            return seen[0] is not None and seen[0]["status"]["phase"] == phase

        await until(there, f"{name} {phase}", seconds)
        assert seen[0] is not None
        return seen[0]

    async def patch(self, **spec: Any) -> None:
        """Change the spec of the worker, as `kubectl patch --type=merge` does."""
        headers = {"Content-Type": "application/merge-patch+json"}
        status, answer = await self.daemon.request("PATCH", f"{WORKERS}/w1", {"spec": spec}, headers=headers)
        assert status == 200, answer

    def machine(self, worker: dict[str, Any]) -> Machine:
        return self.cml.machine(worker["status"]["ec2"]["instanceId"])

    async def gone(self, name: str = "w1", seconds: float = 60) -> None:
        async def absent() -> bool:
            return await self.get(name) is None

        await until(absent, f"the end of {name}", seconds)

    async def crashed(self) -> None:
        assert await self.daemon.exit_code() == EXIT_CODE, self.daemon.log()[-2000:]

    def live(self) -> list[str]:
        now = self.shim.instances.now
        keep = ("pending", "running", "stopping", "stopped")
        return [i.id for i in self.shim.instances.everywhere() if i.state_at(now) in keep]

    def launched(self) -> int:
        return len(list(self.shim.instances.everywhere()))


@asynccontextmanager
async def worker_scene(
    folder: Path, etcd: EtcdServer, root: str, moto_url: str, *, daemons: int = 1, delay: float = 0.3, **settings: str
) -> AsyncIterator[Scene]:
    """Everything but the daemons running; `delay` is how long each state of EC2's that passes lasts, seconds."""
    async with AwsShim.run(ShimOptions(moto_url=moto_url, delay=delay)) as shim:
        options = replace(FAST_CML, registration=0.3, ec2_state_url=f"{shim.url}/_shim/instances")
        async with Simulator.run(options) as cml:
            environment = {
                "AWS_ENDPOINT_URL": shim.url,
                "AWS_REGION": REGION,
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "LRM_CML_URL_TEMPLATE": f"{cml.url}/{{instance_id}}",
                "LRM_SECRETS_ALLOW": f"{PASSWORD_ENV},{TOKEN_ENV}",
                PASSWORD_ENV: options.password,
                TOKEN_ENV: TOKEN,
                **SPEED,
                **settings,
            }
            made = [
                DaemonProcess(folder, endpoint=etcd.endpoint, root=root, plugins="controllers.plugin", **environment)
                for _ in range(daemons)
            ]
            try:
                yield Scene(made[0], shim, cml, etcd, root, tuple(made))
            finally:
                for daemon in made:
                    await daemon.end()
