"""Brings a Docker engine and docker-compose into `.cache/`: `PYTHONPATH=tests python -m equipment.fetch_docker`.

The engine is Debian stable's, with the libraries that a small machine lacks and a busybox for images; docker-compose is
Debian testing's, because stable's is the old one. What is there already is not fetched again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from equipment.debian import CACHE, NotHere, fetch

ENGINE = CACHE / "docker-engine"
COMPOSE = CACHE / "docker-compose"
_LIB = f"usr/lib/{os.uname().machine}-linux-gnu"
_ENGINE_PACKAGES = {
    "docker.io": ["usr/sbin/dockerd", "usr/sbin/docker-proxy"],
    "containerd": ["usr/bin/containerd", "usr/bin/containerd-shim-runc-v2"],
    "runc": ["usr/sbin/runc"],
    "tini": ["usr/bin/docker-init"],
    "libdevmapper1.02.1": [f"{_LIB.removeprefix('usr/')}/libdevmapper.so.1.02.1"],
    "libseccomp2": [f"{_LIB}/libseccomp.so.2"],
    # The engine's name server for containers lives behind rules inside each container's own network.
    "iptables": [
        "usr/sbin/xtables-nft-multi",
        *(f"{_LIB}/xtables/libxt_{name}.so" for name in ("udp", "tcp", "DNAT", "SNAT")),
    ],
    "libxtables12": [f"{_LIB}/libxtables.so.12"],
    "libmnl0": [f"{_LIB}/libmnl.so.0"],
    "libnftnl11": [f"{_LIB}/libnftnl.so.11"],
    "busybox-static": ["bin/busybox"],
}


def bring_engine() -> Path:
    """A folder with dockerd, all that it runs, their libraries and busybox; fetched if need be. Raises `NotHere`."""
    for path in ENGINE.glob("*/dockerd"):
        return path.parent
    return ENGINE / fetch("bookworm", _ENGINE_PACKAGES, ENGINE)


def bring_compose() -> Path:
    """The program docker-compose, version 2; fetched if need be. Raises `NotHere`."""
    program = "usr/libexec/docker/cli-plugins/docker-compose"
    for path in COMPOSE.glob("*/docker-compose"):
        return path
    return COMPOSE / fetch("testing", {"docker-compose": [program]}, COMPOSE) / "docker-compose"


def main() -> int:
    try:
        print(f"Docker engine: {bring_engine()}")
        print(f"docker-compose: {bring_compose()}")
    except NotHere as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
