"""examples/kubernetes: what kubectl makes of it has only fields that Kubernetes knows, and keeps its README's word."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_asyncio import client as kubernetes

from lrm.api.probes import OPEN_PATHS
from lrm.plugin import load_plugins
from lrm.settings import Settings, parse_duration

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"
SCALARS = {"str": str, "int": int, "bool": bool, "object": (str, int)}
MODELS = {
    "Namespace": "V1Namespace",
    "ServiceAccount": "V1ServiceAccount",
    "ConfigMap": "V1ConfigMap",
    "Service": "V1Service",
    "Deployment": "V1Deployment",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
}


@pytest.fixture(scope="module")
def documents(kubectl_program: Path) -> dict[str, Any]:
    """What `kubectl apply --kustomize` would send, by kind: one of each."""
    argv = [kubectl_program, "kustomize", FOLDER]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kubectl warns"
    found = list(yaml.safe_load_all(done.stdout))
    by_kind = {document["kind"]: document for document in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture(scope="module")
def pod(documents: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = documents["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    found: dict[str, Any] = only
    return found


@pytest.fixture(scope="module")
def environment(documents: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = documents["ConfigMap"]["data"]
    return found


def build(type_name: str, value: Any, path: str) -> Any:
    """A Kubernetes client's model out of a document; fails on a field or a type that the model does not know."""
    if inner := re.fullmatch(r"list\[(.+)\]", type_name):
        assert isinstance(value, list), path
        return [build(inner[1], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if inner := re.fullmatch(r"dict\(str, (.+)\)", type_name):
        assert isinstance(value, dict), path
        return {key: build(inner[1], item, f"{path}.{key}") for key, item in value.items()}
    if type_name in SCALARS:
        assert isinstance(value, SCALARS[type_name]), f"{path} is {value!r}, not {type_name}"
        return value
    model = getattr(kubernetes, type_name)
    names = {wire: name for name, wire in model.attribute_map.items()}
    assert isinstance(value, dict), path
    assert set(value) <= set(names), f"{path} has fields that {type_name} does not know"
    fields = {
        names[wire]: build(model.openapi_types[names[wire]], item, f"{path}.{wire}") for wire, item in value.items()
    }
    return model(**fields)  # which refuses one that lacks what is required


@pytest.mark.parametrize("kind", MODELS)
def test_kubernetes_knows_every_field(documents: dict[str, Any], kind: str) -> None:
    assert set(documents) == set(MODELS)
    build(MODELS[kind], documents[kind], kind)


def test_a_field_that_kubernetes_does_not_know_would_be_found(documents: dict[str, Any]) -> None:
    service = documents["Service"]
    with pytest.raises(AssertionError, match="fields that V1ServiceSpec does not know"):
        build("V1Service", {**service, "spec": {**service["spec"], "selectors": {}}}, "Service")


def test_selectors_find_the_pods_and_everything_is_in_the_namespace(documents: dict[str, Any]) -> None:
    deployment = documents["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        documents["Service"]["spec"]["selector"],
        documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    rules = deployment["template"]["spec"]["affinity"]["podAntiAffinity"]
    for rule in rules["preferredDuringSchedulingIgnoredDuringExecution"]:
        selectors.append(rule["podAffinityTerm"]["labelSelector"]["matchLabels"])  # noqa: PERF401 - reads as it is
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    namespace = documents["Namespace"]["metadata"]["name"]
    homes = {kind: document["metadata"].get("namespace") for kind, document in documents.items()}
    assert homes == {"Namespace": None, **dict.fromkeys(set(MODELS) - {"Namespace"}, namespace)}


def test_two_of_three_daemons_stay_through_updates_and_drained_nodes(documents: dict[str, Any]) -> None:
    deployment = documents["Deployment"]["spec"]
    assert deployment["replicas"] == 3
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 1}
    assert documents["PodDisruptionBudget"]["spec"]["minAvailable"] == 2


def test_the_name_of_a_daemon_is_its_pods(container: dict[str, Any]) -> None:
    (variable,) = container["env"]
    assert variable == {"name": "LRM_INSTANCE_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}


def test_every_setting_is_one_and_no_link_to_a_service_looks_like_one(
    environment: dict[str, str], pod: dict[str, Any]
) -> None:
    classes = [Settings, *(plugin.settings for plugin in load_plugins(()))]
    known = {f"LRM_{name.upper()}" for cls in classes for name in cls.model_fields}
    assert {name for name in environment if name.startswith("LRM_")} <= known
    assert pod["enableServiceLinks"] is False


def test_probes_ask_open_paths_on_the_port_that_is_served(
    container: dict[str, Any], environment: dict[str, str], documents: dict[str, Any]
) -> None:
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in asked.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    assert {probe["path"] for probe in asked.values()} <= OPEN_PATHS
    (port,) = container["ports"]
    assert str(port["containerPort"]) == environment["LRM_API_PORT"]
    assert {probe["port"] for probe in asked.values()} == {port["name"]}
    assert [p["targetPort"] for p in documents["Service"]["spec"]["ports"]] == [port["name"]]


def test_a_daemon_may_take_its_time_to_stop(
    pod: dict[str, Any], container: dict[str, Any], environment: dict[str, str]
) -> None:
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > wait + parse_duration(environment["LRM_STOP_TIMEOUT"])


def test_a_pod_has_no_rights_that_it_does_not_need(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """What the Pod Security Standard "restricted" asks, and more: nothing can be written but /tmp."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/tmp"}


def test_tokens_come_from_a_secret_that_no_file_here_holds(
    documents: dict[str, Any], pod: dict[str, Any], container: dict[str, Any], environment: dict[str, str]
) -> None:
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "tokens"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "tokens"]
    file = Path(environment["LRM_AUTH_TOKENS_FILE"])
    assert str(file.parent) == mount["mountPath"]
    assert "subPath" not in mount, "a changed Secret would not arrive"
    made = f"create secret generic {volume['secret']['secretName']} --from-file={file.name}"
    assert made in (FOLDER / "README.md").read_text()
    assert "Secret" not in documents


def test_a_daemon_has_room_and_is_never_throttled(container: dict[str, Any]) -> None:
    """A leader that waits for its share of a processor renews its lease too late."""
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}
    assert set(container["resources"]["limits"]) == {"memory"}
