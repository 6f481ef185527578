"""What an engine tells of containers, images and itself, read from its JSON as far as we need it.

Sources: Docker Engine API, "Inspect a container", "List containers", "Monitor events", "Get system information".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from controllers.containers.words import one_line

INSTALLATION_LABEL = "lrm/installation"
UID_LABEL = "lrm/uid"
NAMESPACE_LABEL = "lrm/namespace"
NAME_LABEL = "lrm/name"
ATTEMPT_LABEL = "lrm/attempt"
CREATED_BY_LABEL = "lrm/created-by"

Document = Mapping[str, Any]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The engine, its machine, and its clock."""

    id: str
    """The engine's own: another engine has another, and so has this one once its data is gone."""
    cpus: float
    memory: int
    """Bytes."""
    now: float
    """The engine's own time, in seconds since 1970."""

    @classmethod
    def of(cls, document: Document) -> Self:
        now = datetime.fromisoformat(document["SystemTime"]).timestamp()
        return cls(str(document["ID"]), float(document["NCPU"]), int(document["MemTotal"]), now)


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something happened to a container; the action is without what the engine says after a colon."""

    action: str
    id: str

    @classmethod
    def of(cls, document: Document) -> Self:
        return cls(str(document["Action"]).partition(":")[0], str(document["Actor"]["ID"]))


@dataclass(frozen=True, slots=True)
class Labels:
    """Whose something on the engine is."""

    installation: str
    uid: str
    namespace: str
    name: str
    attempt: int
    """`status.attempt` when it was made; -1 if it does not say."""

    @classmethod
    def of(cls, labels: Mapping[str, str] | None) -> Self:
        told = labels or {}
        attempt = told.get(ATTEMPT_LABEL, "")
        return cls(
            told.get(INSTALLATION_LABEL, ""),
            told.get(UID_LABEL, ""),
            told.get(NAMESPACE_LABEL, ""),
            told.get(NAME_LABEL, ""),
            int(attempt) if attempt.isdecimal() else -1,
        )


NOBODYS = Labels("", "", "", "", -1)


@dataclass(frozen=True, slots=True)
class Thing:
    """A container, network or volume in a list of them."""

    kind: str
    """`container`, `network` or `volume`."""
    id: str
    """A volume's is its name."""
    labels: Labels = NOBODYS
    created: str = ""
    """Sorts by age."""
    state: str = ""
    """Of a container: created, running, paused, restarting, removing, exited, dead."""
    summary: str = ""
    """Of a container: the engine's words for people, with its health."""

    @classmethod
    def container(cls, document: Document) -> Self:
        labels = Labels.of(document.get("Labels"))
        state, summary = str(document.get("State", "")).lower(), str(document.get("Status", ""))
        return cls("container", str(document["Id"]), labels, str(document.get("Created", "")), state, summary)

    @classmethod
    def network(cls, document: Document) -> Self:
        return cls("network", str(document["Id"]), Labels.of(document.get("Labels")), str(document.get("Created", "")))

    @classmethod
    def volume(cls, document: Document) -> Self:
        return cls("volume", str(document["Name"]), Labels.of(document.get("Labels")))

    @property
    def health(self) -> str:
        """The health that the engine's words tell of, as `Container.health` has it; a hint, for they are for people."""
        for health in ("unhealthy", "healthy", "starting"):
            if f"({health})" in self.summary or f": {health})" in self.summary:
                return health
        return ""


@dataclass(frozen=True, slots=True)
class Binding:
    """A published TCP port."""

    port: int
    host_ip: str
    host_port: int


@dataclass(frozen=True, slots=True)
class Container:
    """How one container is."""

    id: str
    labels: Labels
    created: str
    status: str
    """As `Thing.state`."""
    exit_code: int
    oom_killed: bool
    error: str
    """Why it could not be started, in a line of the engine's."""
    health: str
    """starting, healthy, unhealthy; empty without a check, and of what does not run."""
    ports: tuple[Binding, ...]
    started_at: float
    """The engine's time, in seconds since 1970; of what has not happened long before that."""
    finished_at: float
    check_output: str = field(default="", compare=False)
    """What its health check said last when it was read, in a line; a change of it alone is no change."""

    @classmethod
    def of(cls, document: Document) -> Self:
        state = document["State"]
        status = str(state["Status"]).lower()
        checks = (state.get("Health") or {}).get("Log") or []
        health = str((state.get("Health") or {}).get("Status", "")).lower() if status == "running" else ""
        return cls(
            id=str(document["Id"]),
            labels=Labels.of(document["Config"].get("Labels")),
            created=str(document.get("Created", "")),
            status=status,
            exit_code=int(state.get("ExitCode") or 0),
            oom_killed=bool(state.get("OOMKilled")),
            error=one_line(str(state.get("Error") or "")),
            health="" if health == "none" else health,
            ports=tuple(_bindings((document.get("NetworkSettings") or {}).get("Ports") or {})),
            started_at=_moment(state.get("StartedAt")),
            finished_at=_moment(state.get("FinishedAt")),
            check_output=one_line(str(checks[-1].get("Output") or "")) if checks else "",
        )


@dataclass(frozen=True, slots=True)
class Image:
    """What an image says that matters to how its containers are made."""

    volumes: tuple[str, ...]

    @classmethod
    def of(cls, document: Document) -> Self:
        config = document.get("Config") or {}
        return cls(tuple(sorted(config.get("Volumes") or ())))


def _moment(text: str | None) -> float:
    """What an engine says of a time, which is that of the year 1 for never."""
    try:
        return (datetime.fromisoformat(text or "0001-01-01T00:00:00Z") - _EPOCH).total_seconds()
    except OverflowError:
        return -math.inf  # the year 1 east of Greenwich


def _bindings(ports: Mapping[str, Any]) -> list[Binding]:
    """One for each port that is published, the first where it is published twice (IPv4 and IPv6)."""
    found = []
    for name, told in ports.items():
        number, _, protocol = name.partition("/")
        if told and protocol == "tcp":
            found.append(Binding(int(number), str(told[0]["HostIp"]), int(told[0]["HostPort"])))
    return found
