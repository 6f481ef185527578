"""Everything that a person does to labs, by kubectl alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from equipment.kubectl import Kubectl
from equipment.labs_daemon import LabsDaemon, labs_daemon
from lrm.devservers import EtcdServer

MANIFEST = Path(__file__).parents[2] / "examples" / "manifests" / "labimport.yaml"


@pytest.fixture
async def served(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LabsDaemon]:
    retention = {"LRM_LABS_TOPOLOGY_RETENTION": "1h"}
    async with labs_daemon(server_dir, etcd, etcd_root, monkeypatch, **retention) as served:
        yield served


@pytest.mark.slow
async def test_labs_are_operated_imported_deleted_and_brought_back(
    kubectl_program: Path, served: LabsDaemon, tmp_path: Path
) -> None:
    kubectl, machine = Kubectl(kubectl_program, served.daemon.url, tmp_path), served.machine
    lab = machine.add_lab("BGP", nodes=2)
    (record,) = (await served.mirrored(1)).values()
    name = f"lr/{record['metadata']['name']}"

    async def becomes(what: str, path: str, value: str) -> None:
        await kubectl("wait", f"--for=jsonpath={{{path}}}={value}", what, "--timeout=30s")

    async def patch(spec: str) -> None:
        await kubectl("patch", name, "--type=merge", "-p", f'{{"spec":{spec}}}')

    for number, (verb, state) in enumerate((("Start", "STARTED"), ("Stop", "STOPPED"), ("wipe", "DEFINED_ON_CORE"))):
        await patch(f'{{"operation":{{"id":"{number}","verb":"{verb}"}}}}')
        await becomes(name, ".status.operation.id", str(number))
        await becomes(name, ".status.operation.result", "Succeeded")
        assert lab.state == state
    refused = await kubectl.run("patch", name, "--type=merge", "-p", '{"spec":{"operation":{"verb":"Start"}}}')
    assert (refused.code, "spec.operation.id" in refused.err) == (1, True)
    await patch('{"desiredState":"STARTED"}')
    await becomes(name, ".status.state", "STARTED")

    order = yaml.safe_load(MANIFEST.read_text())
    order["spec"]["workerRef"] = "w1"
    await kubectl("apply", "-f", "-", given=order)
    await becomes("li/two-switches", ".status.phase", "Imported")
    assert {made.title: len(made.links) for made in machine.labs.values()}["Two switches"] == 1
    assert "Imported" in await kubectl("get", "li")

    await kubectl("delete", name, "--timeout=30s")
    assert lab.id not in machine.labs
    kept = (await kubectl("get", "li", "-l", f"lab.neuroglia.io/lab={lab.id}", "-o", "name")).strip()
    await becomes(kept, ".status.phase", "Held")
    await kubectl("annotate", kept, "lab.neuroglia.io/import=true")
    await becomes(kept, ".status.phase", "Imported")
    (again,) = (made for made in machine.labs.values() if made.title == "BGP")
    assert len(again.nodes) == 2
