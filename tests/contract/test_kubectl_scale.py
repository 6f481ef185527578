"""`kubectl scale` and the subresource behind it, on pools; kinds without a number of replicas have none."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from controllers.pools.kind import LAB_WORKER_POOL, POOL_LABEL
from equipment.api import SIGHTING, TELESCOPE, Served, served, tokens_file
from equipment.kubectl import Kubectl
from storage.memory import MemoryStorage

MANIFEST = Path(__file__).parents[2] / "examples" / "manifests" / "labworkerpool.yaml"
POOLS = "/apis/lab.neuroglia.io/v1/namespaces/default/labworkerpools"
ONE = f"{POOLS}/ccna"
SCALE = f"{ONE}/scale"
KINDS = (LAB_WORKER_POOL, TELESCOPE, SIGHTING)


@pytest.fixture
async def api() -> AsyncIterator[Served]:
    async with served(MemoryStorage(), kinds=KINDS) as it:
        answer = await it.post(POOLS, yaml.safe_load(MANIFEST.read_text()))
        assert answer.status == 201, answer.raw
        yield it


@pytest.fixture
def kubectl(kubectl_program: Path, api: Served, tmp_path: Path) -> Kubectl:
    """The suite's program, pointed at the server of this test."""
    return Kubectl(kubectl_program, api.url, tmp_path)


async def replicas(api: Served) -> Any:
    return (await api.get(ONE)).body["spec"].get("replicas")


async def test_kubectl_scales_a_pool(kubectl: Kubectl, api: Served) -> None:
    assert "scaled" in await kubectl("scale", "lwp/ccna", "--replicas=3")
    assert await replicas(api) == 3
    assert "scaled" in await kubectl("scale", "labworkerpools", "ccna", "--current-replicas=3", "--replicas=2")
    assert await replicas(api) == 2
    stale = await kubectl.run("scale", "lwp/ccna", "--current-replicas=3", "--replicas=4")
    assert "Expected replicas to be 3, was 2" in stale.err
    assert "scaled (server dry run)" in await kubectl("scale", "lwp/ccna", "--replicas=4", "--dry-run=server")
    assert await replicas(api) == 2
    refused = await kubectl.run("scale", "lwp/ccna", "--replicas=9")
    assert "spec.replicas: must be from minWorkers (1) to maxWorkers (4)" in refused.err
    unscalable = await kubectl.run("scale", "telescope/hubble", "--replicas=2")
    assert unscalable.code != 0


async def test_kubectl_scales_to_zero_in_both_ways_that_it_has(kubectl: Kubectl, api: Served) -> None:
    await api.merge(ONE, {"spec": {"minWorkers": 0}})
    await kubectl("scale", "lwp/ccna", "--replicas=0")
    assert await replicas(api) == 0
    await api.merge(ONE, {"spec": {"replicas": 1}})
    await kubectl("scale", "lwp/ccna", "--current-replicas=1", "--replicas=0")
    assert await replicas(api) == 0, "a client that leaves a zero out means it"


async def test_kubectl_shows_the_scale_and_applies_and_explains_the_manifest(kubectl: Kubectl) -> None:
    shown = yaml.safe_load(await kubectl("get", "lwp", "ccna", "--subresource=scale", "-o", "yaml"))
    assert (shown["apiVersion"], shown["kind"], shown["metadata"]["name"]) == ("autoscaling/v1", "Scale", "ccna")
    assert "configured" in (await kubectl.run("apply", "-f", str(MANIFEST))).out
    assert "unchanged" in await kubectl("apply", "-f", str(MANIFEST))
    table = (await kubectl("get", "lwp")).splitlines()
    assert table[0].split() == ["NAME", "PHASE", "READY", "TRACK", "POLICY", "MIN", "MAX", "WORKERS", "SERVING", "AGE"]
    assert "ccna" in table[1]
    assert "cpuUp" in await kubectl("explain", "lwp.spec.thresholds")


async def test_the_scale_tells_wish_number_and_selector(api: Served) -> None:
    pool = (await api.get(ONE)).body
    answer = await api.get(SCALE)
    assert answer.status == 200
    scale = answer.body
    metadata = scale.pop("metadata")
    assert scale == {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "spec": {"replicas": 1},
        "status": {"replicas": 0, "selector": f"{POOL_LABEL}=ccna"},
    }
    for name in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp"):
        assert metadata[name] == pool["metadata"][name]
    assert (await api.get(f"{POOLS}/nothing/scale")).status == 404
    assert (await api.get("/apis/astro.example.io/v1/namespaces/default/telescopes/hubble/scale")).status == 404


async def test_a_change_holds_for_what_it_was_made_from_and_changes_the_number_alone(api: Served) -> None:
    before = (await api.get(ONE)).body
    scale = (await api.get(SCALE)).body
    scale["spec"]["replicas"] = 2
    answer = await api.call("PUT", SCALE, scale)
    assert (answer.status, answer.body["spec"]) == (200, {"replicas": 2})
    assert (await api.call("PUT", SCALE, scale)).status == 409, "its resourceVersion is an older one"
    del scale["metadata"]["resourceVersion"]
    again = await api.call("PUT", SCALE, scale)
    assert again.body["metadata"]["resourceVersion"] == answer.body["metadata"]["resourceVersion"], "nothing to write"
    scale["metadata"]["uid"] = "another"
    assert (await api.call("PUT", SCALE, scale)).status == 409
    patched = await api.call(
        "PATCH",
        SCALE,
        [{"op": "test", "path": "/spec/replicas", "value": 2}, {"op": "replace", "path": "/spec/replicas", "value": 3}],
        content_type="application/json-patch+json",
    )
    assert patched.body["spec"] == {"replicas": 3}
    after = (await api.get(ONE)).body
    assert after["spec"].pop("replicas") == 3
    assert after["spec"] == before["spec"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"] + 2


@pytest.mark.parametrize(
    ("body", "code", "why"),
    [
        ({"spec": {"replicas": -1}}, 422, "fewer than none"),
        ({"spec": {"replicas": True}}, 422, "not a number"),
        ({"spec": {"replicas": 2.5}}, 422, "half a worker"),
        ({"spec": {"replicas": 2**31}}, 422, "more than the field holds"),
        ({"spec": []}, 422, "no object"),
        ({"kind": "LabWorkerPool", "spec": {"replicas": 2}}, 400, "another kind of document"),
        ({"apiVersion": "autoscaling/v2", "spec": {"replicas": 2}}, 400, "another version of it"),
        ({"metadata": {"name": "other"}, "spec": {"replicas": 2}}, 400, "another object's"),
        ({"metadata": "x", "spec": {"replicas": 2}}, 400, "no metadata"),
        ("[", 400, "no document"),
    ],
)
async def test_what_is_no_scale_of_this_object_is_refused(api: Served, body: Any, code: int, why: str) -> None:
    for method, content_type in (("PUT", "application/json"), ("PATCH", "application/merge-patch+json")):
        answer = await api.call(method, SCALE, body, content_type=content_type)
        assert answer.status == code, (why, method, answer.raw)
    assert await replicas(api) is None


async def test_a_pool_that_is_being_deleted_is_not_scaled(api: Served) -> None:
    await api.merge(ONE, {"metadata": {"finalizers": ["example.io/hold"]}})
    await api.call("DELETE", ONE)
    assert (await api.merge(SCALE, {"spec": {"replicas": 2}})).status == 403


async def test_viewers_may_look_and_not_scale(tmp_path: Path) -> None:
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "role": name}
        for name in ("viewer", "manager")
    ]
    async with served(MemoryStorage(), kinds=KINDS, tokens_file=tokens_file(tmp_path, *entries)) as api:
        manager, viewer = ({"Authorization": f"Bearer {name}"} for name in ("manager", "viewer"))
        assert (await api.post(POOLS, yaml.safe_load(MANIFEST.read_text()), headers=manager)).status == 201
        assert (await api.get(SCALE, headers=viewer)).status == 200
        assert (await api.merge(SCALE, {"spec": {"replicas": 2}}, headers=viewer)).status == 403
        assert (await api.merge(SCALE, {"spec": {"replicas": 2}}, headers=manager)).status == 200


async def test_discovery_and_openapi_tell_of_it(api: Served) -> None:
    listed = (await api.get("/apis/lab.neuroglia.io/v1")).body["resources"]
    [scale] = [r for r in listed if r["name"] == "labworkerpools/scale"]
    assert (scale["group"], scale["version"], scale["kind"]) == ("autoscaling", "v1", "Scale")
    assert scale["verbs"] == ["get", "patch", "update"]
    aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    groups = (await api.get("/apis", headers={"Accept": aggregated})).body["items"]
    kinds = {r["resource"]: r for g in groups for v in g["versions"] for r in v["resources"]}
    assert [s["subresource"] for s in kinds["labworkerpools"]["subresources"]] == ["status", "scale"]
    assert [s["subresource"] for s in kinds["telescopes"]["subresources"]] == ["status"]
    document = (await api.get("/openapi/v3/apis/lab.neuroglia.io/v1")).body
    path = document["paths"]["/apis/lab.neuroglia.io/v1/namespaces/{namespace}/labworkerpools/{name}/scale"]
    assert {"get", "put", "patch"} <= path.keys()
    assert "io.k8s.api.autoscaling.v1.Scale" in document["components"]["schemas"]
