"""What a container is to be, and how answers are read: pure, without an engine."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from controllers.containers.documents import ATTEMPT_LABEL, Binding, Container, EngineInfo, Image, Labels, Thing
from controllers.containers.errors import EngineError, EngineFailed, EngineNotFound, EngineRefused
from controllers.containers.images import refusal_of
from controllers.containers.plan import container_of, labels_of, network_of, ports_of, url_of
from controllers.instances.kind import LabInstanceRequest, Need, PublishedPort
from controllers.instances.phases import Reasons
from controllers.instances.settings import InstanceSettings


def request(**spec: Any) -> LabInstanceRequest:
    made = LabInstanceRequest.model_validate(
        {
            "metadata": {"name": "lab", "namespace": "class", "uid": "u-1"},
            "spec": {"labTemplate": "lab:1", "studentEmail": "ann@example.edu", "durationMinutes": 60, **spec},
        }
    )
    made.status.attempt = 3
    return made


def planned(settings: InstanceSettings | None = None, image: Image | None = None, **spec: Any) -> dict[str, Any]:
    return container_of(request(**spec), "net-id", image or Image(()), "ours", settings or InstanceSettings())


def test_nothing_in_a_plan_gives_a_container_more_than_it_needs() -> None:
    host = planned()["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["ReadonlyRootfs"] is True
    assert not {"Privileged", "CapAdd", "Binds", "Devices", "PidMode", "IpcMode", "UsernsMode"} & set(host)
    assert planned(labTemplate={"image": "lab:1", "writable": True})["HostConfig"]["ReadonlyRootfs"] is False


@pytest.mark.parametrize(
    ("memory", "tmp"),
    [pytest.param("32Mi", 16 * 1024**2, id="half of little"), pytest.param("4Gi", 64 * 1024**2, id="at most 64 MiB")],
)
def test_memory_bounds_swap_and_tmp_too(memory: str, tmp: int) -> None:
    host = planned(resources={"memory": memory})["HostConfig"]
    assert host["Memory"] == host["MemorySwap"]
    assert host["Tmpfs"] == {"/tmp": f"size={tmp},mode=1777"}


def test_what_was_reserved_is_the_limit_whatever_the_settings_say_by_now() -> None:
    made = request()
    made.status.need = Need(cpu=2, memory=1024**3)
    host = container_of(made, "n", Image(()), "ours", InstanceSettings(docker_default_cpu=9))["HostConfig"]
    assert (host["NanoCpus"], host["Memory"]) == (2_000_000_000, 1024**3)


def test_every_published_port_names_its_address() -> None:
    template = {"image": "lab:1", "ports": [80, 22]}
    document = planned(InstanceSettings(docker_publish="192.0.2.7"), labTemplate=template)
    assert document["HostConfig"]["PortBindings"] == {
        "80/tcp": [{"HostIp": "192.0.2.7", "HostPort": "0"}],
        "22/tcp": [{"HostIp": "192.0.2.7", "HostPort": "0"}],
    }
    bindings = planned(labTemplate=template)["HostConfig"]["PortBindings"].values()
    assert {b["HostIp"] for ports in bindings for b in ports} == {"127.0.0.1"}
    options = network_of(request(), "ours", InstanceSettings())["Options"]
    assert options == {"com.docker.network.bridge.host_binding_ipv4": "127.0.0.1"}


@pytest.mark.parametrize(
    ("publish", "public", "address"),
    [
        ("127.0.0.1", "", "127.0.0.1:4000"),
        ("0.0.0.0", "", "127.0.0.1:4000"),
        ("0.0.0.0", "labs.example.edu", "labs.example.edu:4000"),
        ("::1", "", "[::1]:4000"),
    ],
)
def test_the_access_url_names_where_students_reach_it(publish: str, public: str, address: str) -> None:
    settings = InstanceSettings(docker_publish=publish, docker_public_host=public)
    made = request(labTemplate={"image": "lab:1", "ports": [80, 22]})
    ports = ports_of(made, (Binding(22, publish, 5000), Binding(80, publish, 4000)), settings)
    assert [p.port for p in ports] == [80, 22], "in the template's order"
    assert ports[0].address == address
    assert [url_of(port) for port in ports] == [f"http://{address}", f"ssh://{address.replace('4000', '5000')}"]


@pytest.mark.parametrize(
    ("port", "scheme"), [(80, "http"), (8080, "http"), (443, "https"), (8443, "https"), (22, "ssh"), (5900, "tcp")]
)
def test_the_access_url_has_the_scheme_that_is_usual_at_its_port(port: int, scheme: str) -> None:
    assert url_of(PublishedPort(port=port, address="127.0.0.1:4000")) == f"{scheme}://127.0.0.1:4000"


def test_labels_are_read_as_they_were_written() -> None:
    labels = labels_of(request(), "ours")
    assert Labels.of(labels) == Labels("ours", "u-1", "class", "lab", 3)
    assert Labels.of({**labels, ATTEMPT_LABEL: "x"}).attempt == -1
    assert Labels.of(None) == Labels("", "", "", "", -1)
    volume = planned(image=Image(("/data",)))["HostConfig"]["Mounts"][0]
    assert volume == {"Type": "volume", "Target": "/data", "VolumeOptions": {"Labels": labels}}


def test_a_health_check_is_told_in_nanoseconds() -> None:
    check = {"command": ["ok"], "intervalSeconds": 0.1, "timeoutSeconds": 1.5, "retries": 2, "startPeriodSeconds": 3}
    document = planned(labTemplate={"image": "lab:1", "healthCheck": check})
    assert document["Healthcheck"] == {
        "Test": ["CMD", "ok"],
        "Interval": 100_000_000,
        "Timeout": 1_500_000_000,
        "Retries": 2,
        "StartPeriod": 3_000_000_000,
    }
    assert "Healthcheck" not in planned(), "the image's own holds"


def test_a_container_that_has_ended_has_no_health() -> None:
    state = {"Status": "exited", "ExitCode": 143, "Health": {"Status": "unhealthy"}}
    ended = Container.of({"Id": "a", "Config": {"Labels": None}, "State": state})
    assert (ended.status, ended.exit_code, ended.health) == ("exited", 143, "")


@pytest.mark.parametrize(
    ("summary", "health"),
    [
        ("Up 2 minutes", ""),
        ("Up 2 minutes (healthy)", "healthy"),
        ("Up 2 minutes (unhealthy)", "unhealthy"),
        ("Up 1 second (health: starting)", "starting"),
        ("Up 2 minutes (Paused)", ""),
    ],
)
def test_the_health_in_a_list_is_found_in_the_words_for_people(summary: str, health: str) -> None:
    listed = {"Id": "a", "Labels": {}, "Created": 1, "State": "running", "Status": summary}
    assert Thing.container(listed).health == health


def test_the_engines_clock_is_read_with_its_nanoseconds() -> None:
    told = {"ID": "engine-1", "NCPU": 2, "MemTotal": 1024, "SystemTime": "2026-11-22T11:29:29.06547485Z"}
    assert EngineInfo.of(told).now == pytest.approx(1795346969.065474, abs=1e-5)


@pytest.mark.parametrize(
    ("error", "reason", "why"),
    [
        (EngineNotFound("manifest for x not found"), Reasons.IMAGE_NOT_FOUND, "the registry has no such tag"),
        (
            EngineFailed("manifest unknown: manifest unknown"),
            Reasons.IMAGE_NOT_FOUND,
            "the same, as a registry says it",
        ),
        (
            EngineNotFound("pull access denied for x, repository does not exist or may require 'docker login'"),
            Reasons.IMAGE_NOT_FOUND,
            "what the hub says of a name that nobody has",
        ),
        (EngineFailed("unauthorized: authentication required"), Reasons.IMAGE_PULL_FAILED, "not for us"),
        (EngineFailed("no matching manifest for linux/amd64"), Reasons.IMAGE_PULL_FAILED, "for other machines"),
        (EngineRefused("invalid reference format"), Reasons.IMAGE_PULL_FAILED, "no name of an image"),
        (
            EngineFailed("dial tcp: lookup registry.example on 192.0.2.53:53: no such host"),
            None,
            "a name server may err",
        ),
        (EngineFailed("dial tcp 192.0.2.1:443: connect: connection refused"), None, "it may come back"),
        (EngineFailed("toomanyrequests: You have reached your pull rate limit"), None, "later it may"),
    ],
)
def test_what_a_failed_pull_says_for_good(error: EngineError, reason: str | None, why: str) -> None:
    assert refusal_of(error) == reason, why


@pytest.mark.parametrize("host", ["", "unix:///var/run/docker.sock", "tcp://engine.example.edu:2376"])
def test_an_engines_address_is_taken(host: str) -> None:
    assert InstanceSettings(docker_host=host).docker_host == host


@pytest.mark.parametrize("publish", ["", "everywhere", "labs.example.edu", "127.0.0.1:80", "10.0.0.0/8"])
def test_ports_are_published_on_an_ip_address_and_nothing_else(publish: str) -> None:
    with pytest.raises(ValidationError, match="docker_publish"):
        InstanceSettings(docker_publish=publish)


@pytest.mark.parametrize("host", ["docker", "/var/run/docker.sock", "unix://", "ssh://engine", "tcp://a b"])
def test_what_is_no_engines_address_is_refused_when_the_settings_are_read(host: str) -> None:
    with pytest.raises(ValidationError, match="docker_host"):
        InstanceSettings(docker_host=host)
