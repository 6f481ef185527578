"""Everything that a person does to a LabWorker, by kubectl alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from controllers.aws.simulator import DEMO_AMI, DEMO_KEY
from controllers.workers.kind import DRAIN_ANNOTATION
from equipment.kubectl import Kubectl
from equipment.waiting import until
from equipment.worker_scene import Scene, worker_scene
from equipment.workers_world import PASSWORD_ENV, REGION, TOKEN_ENV
from lrm.devservers import EtcdServer
from lrm.resource import RECONCILE_ANNOTATION, RETRY_ANNOTATION


def manifest(ami: str) -> dict[str, Any]:
    return {
        "apiVersion": "lab.neuroglia.io/v1",
        "kind": "LabWorker",
        "metadata": {"name": "w1"},
        "spec": {
            "labTrack": "ccna",
            "region": REGION,
            "aws": {"amiId": ami, "keyName": DEMO_KEY},
            "cml": {"passwordFrom": {"env": PASSWORD_ENV}, "licenseTokenFrom": {"env": TOKEN_ENV}},
        },
    }


@pytest.fixture
async def scene(server_dir: Path, etcd: EtcdServer, etcd_root: str, moto_url: str) -> AsyncIterator[Scene]:
    settings = {"LRM_LABS_REFRESH_INTERVAL": "3600"}
    async with worker_scene(server_dir, etcd, etcd_root, moto_url, delay=0.1, **settings) as made:
        await made.daemon.start_ready()
        yield made


@pytest.fixture
def kubectl(kubectl_program: Path, scene: Scene, tmp_path: Path) -> Kubectl:
    return Kubectl(kubectl_program, scene.daemon.url, tmp_path)


@pytest.mark.slow
async def test_a_workers_whole_life(kubectl: Kubectl, scene: Scene) -> None:
    async def becomes(phase: str) -> None:
        await kubectl("wait", f"--for=jsonpath={{.status.phase}}={phase}", "lw/w1", "--timeout=30s")

    async def wish(phase: str) -> None:
        await kubectl("patch", "lw", "w1", "--type=merge", "-p", f'{{"spec":{{"desiredPhase":"{phase}"}}}}')

    async def read(path: str) -> str:
        return await kubectl("get", "lw", "w1", "-o", f"jsonpath={{{path}}}")

    async def retried() -> bool:
        return "Retry" in (await read(".status.phaseHistory[*].reason")).split()

    await kubectl("apply", "-f", "-", given=manifest("ami-00000000000000bad"))
    await becomes("Failed")
    await kubectl("annotate", "lw", "w1", f"{RETRY_ANNOTATION}=please")
    await until(retried, "another try")
    await becomes("Failed")
    await kubectl("apply", "-f", "-", given=manifest(DEMO_AMI))
    await kubectl("wait", "--for=condition=Ready", "lw/w1", "--timeout=30s")
    await becomes("Ready")
    assert '"api/lab-instances"' in await kubectl("get", "--raw", "/openapi/v3"), "what plug-ins serve is told too"

    await wish("Draining")
    await becomes("Draining")
    await wish("Ready")
    await becomes("Ready")
    assert "DrainCancelled" in (await read(".status.phaseHistory[*].reason")).split()

    await wish("Stopped")
    await becomes("Stopped")
    assert not await read(".status.ec2.publicIp")
    await wish("Ready")
    await becomes("Ready")

    worker = await scene.get()
    assert worker is not None
    machine = scene.machine(worker)
    lab = machine.add_lab("exam", nodes=1, running=True)
    await kubectl("annotate", "lw", "w1", f"{RECONCILE_ANNOTATION}=now")
    await becomes("Active")
    assert await kubectl("get", "lr", "-o", "jsonpath={.items[*].status.title}") == "exam"

    await kubectl("annotate", "lw", "w1", f"{DRAIN_ANNOTATION}=true")
    await kubectl("delete", "lw", "w1", "--wait=false")
    await becomes("Draining")
    machine.force(lab, "STOPPED")
    await kubectl("wait", "--for=delete", "lw/w1", "--timeout=30s")
    assert scene.live() == []
    assert not machine.licensing.licensed

    await kubectl("apply", "-f", "-", given=manifest(DEMO_AMI))
    await becomes("Ready")
    await wish("Terminated")
    await becomes("Terminated")
    assert scene.live() == []
    await kubectl("delete", "lw", "w1", "--timeout=30s")
