"""What a simulated CML can be told at its start: who may log in, how long things take, what it runs on.

Durations are seconds. The defaults suit a person who watches; tests set most of them to less. Everything that should
change while the simulator runs (faults, power, load, labs) goes through the control surface instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_AMOUNTS = (
    *("boot_refused", "boot_bad_gateway", "boot_not_ready", "token_seconds", "registration", "ec2_state_ttl"),
    *("node_queued", "node_boot", "node_stop", "node_wipe", "nodes_unlicensed", "nodes_licensed"),
    *("seed_labs", "seed_nodes", "max_instances"),
)
_VERSION = re.compile(r"^\d{1,2}\.\d{1,2}\.\d{1,2}.{0,32}$")


@dataclass(frozen=True, slots=True)
class Account:
    """A user that exists from the start."""

    username: str
    password: str
    admin: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """Options of one simulator; every instance in it is made after the same pattern."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free port."""
    username: str = "admin"
    password: str = "admin-secret"  # noqa: S105 - the documented password of a simulator on loopback
    accounts: tuple[Account, ...] = ()
    """Users beside the administrator."""
    version: str = "2.9.1+build.7"
    """Decides which endpoints and shapes there are: 2.10 differs from 2.9."""
    boot_refused: float = 0.0
    """After power on: connections are dropped for so long (nothing listens yet)."""
    boot_bad_gateway: float = 2.0
    """Then every request is answered by the proxy's 502 page for so long."""
    boot_not_ready: float = 2.0
    """Then the API answers with `ready: false` for so long."""
    token_seconds: float = 86400.0
    registration: float = 2.0
    """From an accepted licence registration to COMPLETED; the authorization follows half of it later."""
    node_queued: float = 0.5
    node_boot: float = 2.0
    node_stop: float = 0.5
    node_wipe: float = 0.2
    nodes_unlicensed: int = 5
    nodes_licensed: int = 200
    refusal_status: int = 400
    """Status of a wipe or delete that is out of order; no document says which one CML uses."""
    cpus: int = 48
    memory_bytes: int = 192 * 1024**3
    disk_bytes: int = 500 * 1024**3
    seed_labs: int = 0
    """Labs that each new instance starts with, half of them running."""
    seed_nodes: int = 2
    max_instances: int = 5000
    ec2_state_url: str = ""
    """Base of `GET {url}/{instance}` -> {"state", "launch"}: only running instances are alive. Empty: all are."""
    ec2_state_ttl: float = 0.25
    """How long such an answer is believed."""
    tls_cert: str = ""
    tls_key: str = ""

    def __post_init__(self) -> None:
        if not _VERSION.match(self.version):
            raise ValueError(f"version {self.version!r} does not look like 2.9.1+build.7")
        below = [name for name in _AMOUNTS if not getattr(self, name) >= 0]
        if below:
            raise ValueError(f"{', '.join(below)}: not below zero")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key are given together or not at all")

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)
