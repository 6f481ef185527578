"""kubectl, a program of another project, does its daily work against the API."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from controllers.plugin import plugin
from equipment import certificates
from equipment.api import GROUP, Served, Telescope, path_of, served, telescope, tokens_file
from equipment.gc_scene import collecting
from equipment.kubectl import Kubectl
from equipment.waiting import until
from lrm.events import Events
from storage.memory import MemoryStorage


@pytest.fixture
async def api() -> AsyncIterator[Served]:
    async with served(MemoryStorage()) as it:
        yield it


@pytest.fixture
def kubectl(kubectl_program: Path, api: Served, tmp_path: Path) -> Kubectl:
    """The suite's program, pointed at the server of this test."""
    return Kubectl(kubectl_program, api.url, tmp_path)


async def test_it_finds_the_server_and_its_kinds(kubectl: Kubectl) -> None:
    assert "Server Version: v1.32.0-lrm" in await kubectl("version")
    listed = await kubectl("api-resources")
    for line in ("telescopes   tel", "sightings", "namespaces   ns", "events       ev"):
        assert line in listed
    verbs = await kubectl("api-resources", "-o", "wide")
    [sightings] = [line for line in verbs.splitlines() if line.startswith("sightings")]
    assert "create" not in sightings
    assert "default" in await kubectl("get", "namespaces")


async def test_apply_creates_then_changes_nothing_then_what_changed_and_removes_what_went(
    kubectl: Kubectl, api: Served
) -> None:
    document = telescope(labels={"track": "ccna", "old": "x"})
    document["spec"]["note"] = "a note"
    assert "created" in await kubectl("apply", "-f", "-", given=document)
    first = (await api.get(path_of("hubble"))).body
    assert "unchanged" in await kubectl("apply", "-f", "-", given=document)
    assert (await api.get(path_of("hubble"))).body == first
    del document["spec"]["note"], document["metadata"]["labels"]["old"]
    document["spec"]["mirror"]["diameterCm"] = 300
    assert "configured" in await kubectl("apply", "-f", "-", given=document)
    changed = (await api.get(path_of("hubble"))).body
    assert "note" not in changed["spec"]
    assert changed["spec"]["mirror"]["diameterCm"] == 300
    assert changed["metadata"]["labels"] == {"track": "ccna"}
    assert changed["metadata"]["generation"] == 2


async def test_apply_of_several_documents_and_of_the_seeds_spelling(kubectl: Kubectl) -> None:
    documents = [telescope(f"t{i}") for i in range(3)]
    documents[0]["spec"]["mirror"] = {"diameter_cm": 5}
    out = await kubectl("apply", "-f", "-", given=documents)
    assert out.count("created") == 3
    assert await kubectl("get", "tel", "t0", "-o", "jsonpath={.spec.mirror.diameterCm}") == "5"


async def test_apply_tells_every_wrong_field_and_stores_nothing(kubectl: Kubectl, api: Served) -> None:
    document = telescope()
    document["spec"] = {"site": 5, "mirror": {"diameterCm": 0, "shape": "odd"}}
    ran = await kubectl.run("apply", "-f", "-", given=document)
    assert ran.code != 0
    for field in ("spec.site", "spec.mirror.diameterCm", "spec.mirror.shape"):
        assert field in ran.err
    assert (await api.storage.list("/")).entries == ()


async def test_get_prints_tables_and_documents_and_selects(kubectl: Kubectl, api: Served) -> None:
    await api.make("a", labels={"track": "ccna"})
    await api.make("b", "elsewhere", labels={"track": "ccnp"})
    assert (await kubectl("get", "telescopes")).split()[:4] == ["NAME", "SITE", "PHASE", "AGE"]
    assert "DIAMETER" in await kubectl("get", "tel", "-o", "wide")
    everywhere = await kubectl("get", "tel", "-A", "--show-labels")
    assert "NAMESPACE" in everywhere
    assert "track=ccnp" in everywhere
    assert (await kubectl("get", "tel", "-A", "-l", "track=ccnp", "-o", "name")).split() == [
        "telescope.astro.example.io/b"
    ]
    assert "a" in await kubectl("get", "tel", "--field-selector", "status.phase=pending,metadata.name=a", "-o", "name")
    assert yaml.safe_load(await kubectl("get", "tel", "a", "-o", "yaml"))["spec"]["site"] == "orbit"
    assert json.loads(await kubectl("get", "tel,sightings", "-A", "-o", "json"))["kind"] == "List"
    assert "No resources found" in (await kubectl.run("get", "sightings")).err
    assert await kubectl("get", "--raw", "/readyz") == "ok\n"
    missing = await kubectl.run("get", "tel", "nothing")
    assert missing.err.strip() == 'Error from server (NotFound): telescopes.astro.example.io "nothing" not found'


async def test_get_reads_long_lists_in_chunks(kubectl: Kubectl, api: Served) -> None:
    for i in range(23):
        await api.make(f"t{i:02}")
    out = await kubectl("get", "tel", "--chunk-size=5", "-o", "name")
    assert out.split() == [f"telescope.astro.example.io/t{i:02}" for i in range(23)]


async def test_describe_and_explain(kubectl: Kubectl, api: Served) -> None:
    await api.make("a", labels={"track": "ccna"})
    described = await kubectl("describe", "telescope", "a")
    for part in ("Name:", "track=ccna", "Diameter Cm:  240", "Events:  <none>"):
        assert part in described
    assert "What collects the light" in await kubectl("explain", "tel.spec.mirror")
    tree = await kubectl("explain", "telescopes", "--recursive")
    for part in ("diameterCm\t<integer> -required-", "enum: Silver, Gold", "phaseHistory\t<[]PhaseChange>"):
        assert part in tree


async def test_events_are_listed_described_and_watched(kubectl: Kubectl, api: Served) -> None:
    events = Events(api.storage, api.api.clock, root=api.registry.root, instance="host-a")
    writing = asyncio.create_task(events.run())
    await api.make("a")
    await api.make("b")
    about = [await api.client.get(Telescope, "default", name) for name in ("a", "b")]
    dome = events.recorder("dome")
    dome.record(about[0], "Normal", "Opened", "the sky is clear")
    dome.record(about[0], "Warning", "Closed", "clouds")
    dome.record(about[0], "Warning", "Closed", "clouds")
    dome.record(about[1], "Normal", "Parked", "nothing to see")
    await events.flush(10)
    listed = await kubectl("get", "events")
    assert listed.split()[:6] == ["LAST", "SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"]
    assert "telescope/b" in listed
    assert "COUNT" in await kubectl("get", "ev", "-A", "-o", "wide")
    warnings = await kubectl("get", "events", "--field-selector", "type=Warning,involvedObject.name=a", "-o", "json")
    assert [e["count"] for e in json.loads(warnings)["items"]] == [2]
    assert "nothing to see" not in await kubectl("events", "--for", "telescope/a")
    described = await kubectl("describe", "telescope", "a")
    told = described[described.index("Events:") :]
    for part in ("Opened", "dome", "the sky is clear", "(x2 over"):
        assert part in told
    assert "nothing to see" not in told
    watching = await kubectl.start("get", "events", "-w", "--output-watch-events")
    assert watching.stdout is not None
    async with asyncio.timeout(30):
        present = [await watching.stdout.readline() for _ in range(4)]
        assert present[0].split()[0] == b"EVENT"
        dome.record(about[1], "Normal", "Moved", "to the west")
        line = await watching.stdout.readline()
        assert (line.split()[0], b"to the west" in line) == (b"ADDED", True)
    watching.kill()
    await watching.wait()
    writing.cancel()
    await asyncio.wait([writing])


async def test_label_annotate_patch_replace_and_edit(kubectl: Kubectl, api: Served, tmp_path: Path) -> None:
    await api.make("a", labels={"old": "x"})
    await kubectl("label", "tel", "a", "new=y", "old-")
    await kubectl("annotate", "tel", "a", "example.io/note=some text")
    await kubectl("patch", "tel", "a", "--type=merge", "-p", '{"spec":{"tracking":true}}')
    await kubectl("patch", "tel", "a", "--type=json", "-p", '[{"op":"add","path":"/spec/tags/x","value":"y"}]')
    metadata = (await api.get(path_of("a"))).body["metadata"]
    assert (metadata["labels"], metadata["annotations"]) == ({"new": "y"}, {"example.io/note": "some text"})
    await kubectl("edit", "tel", "a", KUBE_EDITOR="sed -i s/diameterCm:.240/diameterCm:\\ 77/")
    edited = await kubectl("get", "tel", "a", "-o", "yaml")
    assert yaml.safe_load(edited)["spec"]["mirror"]["diameterCm"] == 77
    assert "replaced" in await kubectl("replace", "-f", "-", given=edited.replace("diameterCm: 77", "diameterCm: 78"))
    late = await kubectl.run("replace", "-f", "-", given=edited)
    assert "Conflict" in late.err
    spec = (await api.get(path_of("a"))).body["spec"]
    assert (spec["tracking"], spec["tags"], spec["mirror"]["diameterCm"]) == (True, {"x": "y"}, 78)


async def test_create_refuses_what_is_there_and_what_users_may_not_make(kubectl: Kubectl) -> None:
    await kubectl("create", "-f", "-", given=telescope())
    assert "AlreadyExists" in (await kubectl.run("create", "-f", "-", given=telescope())).err
    sighting = {"apiVersion": "astro.example.io/v1", "kind": "Sighting", "metadata": {"name": "s"}}
    refused = await kubectl.run("create", "-f", "-", given={**sighting, "spec": {"telescope": "t"}})
    assert "they appear when something is seen" in refused.err


async def test_a_server_side_dry_run_changes_nothing(kubectl: Kubectl, api: Served) -> None:
    assert "created (server dry run)" in await kubectl("apply", "--dry-run=server", "-f", "-", given=telescope())
    assert (await api.get(path_of("hubble"))).status == 404
    await api.make("a")
    assert "deleted (server dry run)" in await kubectl("delete", "tel", "a", "--dry-run=server")
    assert (await api.get(path_of("a"))).status == 200


async def test_delete_waits_until_it_is_gone(kubectl: Kubectl, api: Served) -> None:
    await api.make("a", finalizers=["example.io/hold"])
    deleting = await kubectl.start("delete", "tel", "a")

    async def marked() -> bool:
        return "deletionTimestamp" in (await api.get(path_of("a"))).body["metadata"]

    await until(marked, "the deletion")
    waiting = await kubectl.start("wait", "--for=delete", "tel/a", "--timeout=30s")
    assert deleting.returncode is None
    await api.merge(path_of("a"), {"metadata": {"finalizers": []}})
    for process in (deleting, waiting):
        out, err = await process.communicate()
        assert process.returncode == 0, (out, err)


async def test_delete_by_label_and_all(kubectl: Kubectl, api: Served) -> None:
    for i in range(4):
        await api.make(f"t{i}", labels={"odd": str(i % 2)})
    assert (await kubectl("delete", "tel", "-l", "odd=1")).count("deleted") == 2
    assert (await kubectl("delete", "tel", "--all")).count("deleted") == 2
    assert (await api.get(path_of())).body["items"] == []


async def test_delete_cascades_as_it_is_told(kubectl: Kubectl, api: Served) -> None:
    """The program waits for what it deletes: in the foreground that is longer than its dependants live."""
    async with collecting(api.storage, api.cache, api.api.clock):
        for cascade, left in (("background", set()), ("foreground", set()), ("orphan", {"child"})):
            owner = await api.make("owner")
            reference = {"apiVersion": GROUP, "kind": "Telescope", "name": "owner", "uid": owner["metadata"]["uid"]}
            await api.make("child", ownerReferences=[{**reference, "blockOwnerDeletion": True}])
            assert "deleted" in await kubectl("delete", "tel", "owner", f"--cascade={cascade}", "--timeout=30s")
            if cascade == "background":
                await until(lambda: not api.cache.all(Telescope), "the child to follow its owner")
            assert {item["metadata"]["name"] for item in (await api.get(path_of())).body["items"]} == left


async def test_wait_sees_conditions_and_fields_as_they_come(kubectl: Kubectl, api: Served) -> None:
    await api.make("a")
    ready = await kubectl.start("wait", "--for=condition=Ready", "tel/a", "--timeout=30s")
    azimuth = await kubectl.start("wait", "--for=jsonpath={.status.azimuth}=42", "tel/a", "--timeout=30s")

    await until(lambda: api.fanout.readers >= 2, "two watches")
    condition = {"type": "Ready", "status": "True", "reason": "Aimed", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    status = {"status": {"observedGeneration": 1, "azimuth": 42, "conditions": [condition]}}
    answer = await api.merge(path_of("a", sub="status"), status, params={"fieldManager": "telescopes"})
    assert answer.status == 200
    for process in (ready, azimuth):
        out, err = await process.communicate()
        assert (process.returncode, b"condition met" in out) == (0, True), (out, err)


async def test_the_status_is_shown_and_refused_to_who_does_not_own_it(kubectl: Kubectl, api: Served) -> None:
    await api.make("a")
    assert "Pending" in await kubectl("get", "tel", "a", "--subresource=status", "-o", "yaml")
    patch = ("patch", "tel", "a", "--subresource=status", "--type=merge", "-p", '{"status":{"azimuth":5}}')
    refused = await kubectl.run(*patch)
    assert "status.azimuth (owned by telescopes)" in refused.err
    await kubectl(*patch, "--field-manager=telescopes")
    assert await kubectl("get", "tel", "a", "-o", "jsonpath={.status.azimuth}") == "5"


async def test_get_w_prints_what_happens(kubectl: Kubectl, api: Served) -> None:
    await api.make("a")
    watching = await kubectl.start("get", "tel", "-w", "--output-watch-events")
    assert watching.stdout is not None
    async with asyncio.timeout(30):
        assert (await watching.stdout.readline()).split()[:2] == [b"EVENT", b"NAME"]
        assert (await watching.stdout.readline()).split()[:2] == [b"ADDED", b"a"]
        await api.make("b")
        assert (await watching.stdout.readline()).split()[:2] == [b"ADDED", b"b"]
        await api.merge(path_of("b"), {"metadata": {"labels": {"x": "y"}}})
        assert (await watching.stdout.readline()).split()[:2] == [b"MODIFIED", b"b"]
        await api.call("DELETE", path_of("b"))
        assert (await watching.stdout.readline()).split()[:2] == [b"DELETED", b"b"]
    watching.kill()
    await watching.wait()


async def test_tokens_decide_over_tls(kubectl_program: Path, tmp_path: Path) -> None:
    made = certificates.make(tmp_path / "tls")
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "role": name}
        for name in ("viewer", "manager")
    ]
    secured = {"tls_cert": made.server.cert, "tls_key": made.server.key, "tokens_file": tokens_file(tmp_path, *entries)}
    async with served(MemoryStorage(), **secured) as api:
        trusting = ("--certificate-authority", str(made.ca))
        manager = Kubectl(kubectl_program, api.url, tmp_path / "m", *trusting, "--token", "manager")
        viewer = Kubectl(kubectl_program, api.url, tmp_path / "v", *trusting, "--token", "viewer")
        assert "created" in await manager("apply", "-f", "-", given=telescope())
        assert "hubble" in await viewer("get", "tel")
        assert "Forbidden" in (await viewer.run("delete", "tel", "hubble")).err
        nobody = Kubectl(kubectl_program, api.url, tmp_path / "n", *trusting, "--token", "nobody")
        assert (await nobody.run("get", "tel")).code != 0
        assert "deleted" in await manager("delete", "tel", "hubble")


async def test_documents_of_endpoints_without_a_kind_do_not_disturb_it(kubectl_program: Path, tmp_path: Path) -> None:
    """It reads the whole index, and parses the paths in it as groups and versions."""
    routes, operations = plugin.routes, plugin.operations
    async with served(MemoryStorage(), kinds=plugin.kinds, routes=routes, operations=operations) as api:
        kubectl = Kubectl(kubectl_program, api.url, tmp_path)
        assert {"api/lab-instances", "api/status", "api/v1"} < set((await api.get("/openapi/v3")).body["paths"])
        assert "durationMinutes\t<integer> -required-" in await kubectl("explain", "lir.spec")
        assert "reason\t<string>" in await kubectl("explain", "events")
        lab: dict[str, Any] = {
            "apiVersion": "lab.neuroglia.io/v1",
            "kind": "LabInstanceRequest",
            "metadata": {"name": "a"},
            "spec": {"labTemplate": {"image": "nginx"}, "studentEmail": "a@b.ch", "durationMinutes": 5},
        }
        assert "created" in await kubectl("apply", "-f", "-", given=lab)
        lab["spec"]["durationMinutes"] = 6
        assert "configured" in await kubectl("apply", "-f", "-", given=lab)
        assert "a@b.ch" in await kubectl("get", "lir,lw")
        assert '"a"' in await kubectl("get", "--raw", "/api/lab-instances/")
        lab["spec"]["colour"] = "red"
        refused = await kubectl.run("apply", "-f", "-", given=lab)
        assert "unknown field" in refused.err
