"""`kill -9` between any two steps of an import: it is carried out all the same, and no instance has two workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from controllers.aws.ec2 import Ec2, LaunchParameters
from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from controllers.imports.controller import CRASH_POINTS
from equipment.aws import HERE
from equipment.daemons import DaemonProcess
from equipment.waiting import until
from equipment.workers_world import REGION
from lrm.crashpoints import EXIT_CODE
from lrm.devservers import EtcdServer
from storage.clock import SystemClock

GROUP = "/apis/lab.neuroglia.io/v1/namespaces/default"
POINTS = ("imports.created:2", *CRASH_POINTS)
"""The sample, then all: the second of three workers was made, and nobody has written that down."""


@pytest.fixture
async def shim(moto_url: str) -> AsyncIterator[AwsShim]:
    async with AwsShim.run(ShimOptions(moto_url=moto_url, delay=0.05)) as running:
        yield running


@pytest.fixture
async def daemon(server_dir: Path, etcd: EtcdServer, etcd_root: str, shim: AwsShim) -> AsyncIterator[DaemonProcess]:
    process = DaemonProcess(
        server_dir,
        endpoint=etcd.endpoint,
        root=etcd_root,
        plugins="controllers.plugin",
        AWS_ENDPOINT_URL=shim.url,
        AWS_REGION=REGION,
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        LRM_WORKER_POLL_INTERVAL="0.1",
    )
    yield process
    await process.end()


@pytest.mark.parametrize("point", [POINTS[0], *(pytest.param(p, marks=pytest.mark.soak) for p in POINTS[1:])])
async def test_killed_while_it_imports_each_instance_has_one_worker(
    daemon: DaemonProcess, shim: AwsShim, point: str
) -> None:
    parameters = {"ami_id": DEMO_AMI, "instance_type": "m5zn.metal", "key_name": DEMO_KEY, "tags": {"track": "ccna"}}
    async with Ec2(SystemClock(), endpoint_url=shim.url) as ec2:
        made = [await ec2.run_instance(HERE, LaunchParameters(client_token=t, **parameters)) for t in "abc"]
    ids = sorted(instance.id for instance in made)
    await daemon.start_ready(LRM_CRASH_AT=point)
    document = {
        "apiVersion": "lab.neuroglia.io/v1",
        "kind": "LabWorkerImport",
        "metadata": {"name": "old"},
        "spec": {"region": REGION, "tags": {"track": "ccna"}},
    }
    status, answer = await daemon.request("POST", f"{GROUP}/labworkerimports", document)
    assert status == 201, answer
    assert await daemon.exit_code(40) == EXIT_CODE, daemon.log()[-2000:]
    await daemon.start_ready()
    seen: dict[str, Any] = {}

    async def done() -> bool:
        _, seen["import"] = await daemon.request("GET", f"{GROUP}/labworkerimports/old")
        return bool(seen["import"]["status"]["phase"] == "Done")

    await until(done, "the import's end")
    assert sorted(one["instanceId"] for one in seen["import"]["status"]["imported"]) == ids
    assert seen["import"]["status"]["skipped"] == []

    async def adopted() -> bool:
        _, listed = await daemon.request("GET", f"{GROUP}/labworkers")
        seen["workers"] = listed["items"]
        return all(w["status"]["ec2"].get("instanceId") for w in seen["workers"])

    await until(adopted, "the adoption")
    assert sorted(w["status"]["ec2"]["instanceId"] for w in seen["workers"]) == ids
    assert {w["spec"]["deletionPolicy"] for w in seen["workers"]} == {"Retain"}

    async def told() -> list[str]:
        selector = "involvedObject.kind=LabWorkerImport,involvedObject.name=old"
        _, listed = await daemon.request("GET", f"/api/v1/namespaces/default/events?fieldSelector={selector}")
        return [event["message"] for event in listed["items"]]

    assert await until(told, "the event") == ["3 of 3 instances have workers, 0 were left alone"]
