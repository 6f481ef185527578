"""What an instance's network and container are to be, as the engine wants it told. Pure.

Promises: never privileged, no capabilities, no new ones by setuid, a bounded log, bounded processor, memory (swap
included) and processes; a root that cannot be written to unless the template says so; every published port names the
address on which it is published. Volumes that the image declares get our labels, so that they are found even when
somebody removes the container alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from controllers.containers.documents import (
    ATTEMPT_LABEL,
    CREATED_BY_LABEL,
    INSTALLATION_LABEL,
    NAME_LABEL,
    NAMESPACE_LABEL,
    UID_LABEL,
    Binding,
    Image,
)
from controllers.instances.kind import HealthCheck, LabInstanceRequest, LabInstanceRequestSpec, Need, PublishedPort
from controllers.instances.settings import InstanceSettings
from lrm.errors import Cause

_NANO = 1_000_000_000
_TMP_MOST = 64 * 1024**2
"""Bytes of /tmp, which is memory; half of the container's own where that is less."""
_LOG = {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}}
_HOST_BINDING = "com.docker.network.bridge.host_binding_ipv4"
_ANYWHERE = ("", "0.0.0.0", "::")
_SCHEMES = {22: "ssh", 443: "https", 8443: "https"} | dict.fromkeys((80, 3000, 5000, 8000, 8008, 8080, 8888), "http")
"""By the port in the container: what is usually spoken there."""


def need_of(request: LabInstanceRequest, settings: InstanceSettings) -> Need:
    """What is reserved for it, which is also what it is limited to."""
    resources = request.spec.resources
    return Need(
        cpu=resources.cpu or settings.docker_default_cpu, memory=resources.memory or settings.docker_default_memory
    )


def beyond(spec: LabInstanceRequestSpec, settings: InstanceSettings) -> Iterator[Cause]:
    """What it names that no lab may have here."""
    pids, check = spec.resources.pids, spec.lab_template.health_check
    if pids is not None and pids > settings.docker_most_pids:
        yield Cause("spec.resources.pids", "FieldValueInvalid", f"at most {settings.docker_most_pids}")
    if check is not None and check.interval_seconds < settings.docker_check_interval:
        field = "spec.labTemplate.healthCheck.intervalSeconds"
        yield Cause(field, "FieldValueInvalid", f"at least {settings.docker_check_interval:g} seconds")


def labels_of(request: LabInstanceRequest, installation: str) -> dict[str, str]:
    """By which everything of it is found."""
    return {
        INSTALLATION_LABEL: installation,
        UID_LABEL: request.uid,
        NAMESPACE_LABEL: request.namespace,
        NAME_LABEL: request.name,
        ATTEMPT_LABEL: str(request.status.attempt),
        CREATED_BY_LABEL: "lrm",
    }


def network_of(request: LabInstanceRequest, installation: str, settings: InstanceSettings) -> dict[str, Any]:
    """A bridge of its own, so that no lab reaches another."""
    return {
        "Name": request.outside_name,
        "CheckDuplicate": True,
        "Driver": "bridge",
        "Options": {_HOST_BINDING: settings.docker_publish},
        "Labels": labels_of(request, installation),
    }


def container_of(
    request: LabInstanceRequest, network: str, image: Image, installation: str, settings: InstanceSettings
) -> dict[str, Any]:
    """The container, on the network with that id."""
    spec, template = request.spec, request.spec.lab_template
    labels = labels_of(request, installation)
    need = request.status.need or need_of(request, settings)
    document: dict[str, Any] = {
        "Image": template.image,
        "Env": [f"{name}={value}" for name, value in sorted(spec.environment.items())],
        "Labels": labels,
        "ExposedPorts": {f"{port}/tcp": {} for port in template.ports},
        "HostConfig": {
            "NetworkMode": network,
            "NanoCpus": round(need.cpu * _NANO),
            "Memory": need.memory,
            "MemorySwap": need.memory,
            "PidsLimit": spec.resources.pids or settings.docker_default_pids,
            "ReadonlyRootfs": not template.writable,
            "Tmpfs": {"/tmp": f"size={min(_TMP_MOST, need.memory // 2)},mode=1777"},  # noqa: S108 - in the container
            "Mounts": [
                {"Type": "volume", "Target": path, "VolumeOptions": {"Labels": labels}} for path in image.volumes
            ],
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Init": True,
            "RestartPolicy": {"Name": "no"},
            "LogConfig": _LOG,
            "PortBindings": {
                f"{port}/tcp": [{"HostIp": settings.docker_publish, "HostPort": "0"}] for port in template.ports
            },
        },
    }
    if template.command:
        document["Cmd"] = template.command
    if template.health_check is not None:
        document["Healthcheck"] = _check_of(template.health_check)
    return document


def ports_of(
    request: LabInstanceRequest, bindings: tuple[Binding, ...], settings: InstanceSettings
) -> list[PublishedPort]:
    """Where its ports are reached, in the template's order; those that are not published yet are missing."""
    host = settings.docker_public_host or settings.docker_publish
    found = {b.port: b for b in bindings}
    return [
        PublishedPort(port=port, address=f"{_in_url(host)}:{found[port].host_port}")
        for port in request.spec.lab_template.ports
        if port in found
    ]


def url_of(port: PublishedPort) -> str:
    """How a program would be told to go there; of a port that has no usual scheme only that it is TCP."""
    return f"{_SCHEMES.get(port.port, 'tcp')}://{port.address}"


def _in_url(host: str) -> str:
    """An address that names no machine is this one's; IPv6 goes into brackets."""
    if host in _ANYWHERE:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _check_of(check: HealthCheck) -> dict[str, Any]:
    return {
        "Test": ["CMD", *check.command],
        "Interval": round(check.interval_seconds * _NANO),
        "Timeout": round(check.timeout_seconds * _NANO),
        "Retries": check.retries,
        "StartPeriod": round(check.start_period_seconds * _NANO),
    }
