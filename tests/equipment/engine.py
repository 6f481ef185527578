"""A Docker engine for the tests that need one, and images made of programs on this machine: no registry is asked.

`DOCKER_HOST` names an engine that runs; otherwise root gets a private one for the length of the run. It lives in
process and mount namespaces of its own, so that everything in it ends with it, and it ends with the tests, even when
they are killed with -9 (only a network's bridge can stay then). The machine's firewall and routing stay as they are:
containers have no way off the machine.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio

from equipment import fetch_docker, fetch_etcd
from equipment.debian import NotHere
from lrm.devservers import etcd_binary, redis_binary
from lrm.processes import ChildProcess, ProcessError

if TYPE_CHECKING:
    import docker

LOOPBACK_NETWORK = {"options": {"com.docker.network.bridge.host_binding_ipv4": "127.0.0.1"}}
"""Arguments of a network whose containers publish on 127.0.0.1 unless told otherwise."""

_TESTCONTAINERS = {
    "TESTCONTAINERS_RYUK_DISABLED": "true",  # its image would come from a registry; the engine ends with the tests
    "TESTCONTAINERS_CONNECTION_MODE": "docker_host",  # published ports; containers cannot be reached otherwise
}


@dataclass(frozen=True)
class Engine:
    """A Docker engine that answers, with the images of our servers."""

    host: str
    """As DOCKER_HOST has it."""
    client: docker.DockerClient
    etcd_image: str = "lrm-test/etcd"
    redis_image: str = "lrm-test/redis"
    busybox_image: str = "lrm-test/busybox"
    """A shell and what goes with it; runs `sleep` unless told otherwise, and declares a volume, /data."""
    machine_image: str = "lrm-test/machine"
    """Nothing but the skeleton of this machine, whose programs are mounted into it."""

    def leftovers(self, label: str) -> list[str]:
        """Names of containers, networks and volumes that carry a label."""
        chosen = {"filters": {"label": label}}
        containers = self.client.containers.list(all=True, **chosen)
        things = [*containers, *self.client.networks.list(**chosen), *self.client.volumes.list(**chosen)]
        return [thing.name for thing in things]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[Engine]:
    """The engine of DOCKER_HOST, else a private one; where none can be had the test is skipped with the reason."""
    async with AsyncExitStack() as stack:
        host = os.environ.get("DOCKER_HOST")
        try:
            if not host:
                if os.geteuid() != 0:
                    raise NotHere("DOCKER_HOST names no engine, and only root can start one")  # noqa: TRY301
                host = await stack.enter_async_context(private_engine(fetch_docker.bring_engine()))
                environment = stack.enter_context(pytest.MonkeyPatch.context())
                for name, value in {"DOCKER_HOST": host, **_TESTCONTAINERS}.items():
                    environment.setenv(name, value)
            engine = stack.enter_context(with_images(host))
        except (NotHere, ProcessError) as error:
            pytest.skip(f"Docker: {error}")
        yield engine


@pytest.fixture(scope="session")
def compose_program() -> Path:
    """docker-compose, version 2."""
    try:
        return fetch_docker.bring_compose()
    except NotHere as error:
        pytest.skip(f"docker-compose: {error}")


@asynccontextmanager
async def private_engine(programs: Path) -> AsyncIterator[str]:
    """Run a dockerd of our own; yields its DOCKER_HOST. Raises `ProcessError` with its last words if it cannot run."""
    folder = Path(tempfile.mkdtemp(prefix="lrm-engine-"))
    socket = folder / "docker.sock"
    (folder / "bin").mkdir()
    (folder / "bin" / "iptables").symlink_to(programs / "xtables-nft-multi")
    environment = {
        "PATH": f"{folder}/bin:{programs}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(programs),
        "XTABLES_LIBDIR": str(programs),
    }
    argv = [
        *("unshare", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"),
        *(programs / "dockerd", f"--host=unix://{socket}", f"--pidfile={folder}/pid"),
        *(f"--data-root={folder}/data", f"--exec-root={folder}/exec", "--exec-opt=native.cgroupdriver=cgroupfs"),
        "--default-address-pool=base=10.213.0.0/16,size=28",  # as it comes it has room for thirty networks
        *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
    ]

    async def answers() -> bool:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(socket))) as session,
            session.get("http://engine/_ping") as reply,
        ):
            return reply.status == 200

    try:
        child = ChildProcess.start(argv, name="dockerd", log_path=folder / "log", env=environment)
        try:
            await child.wait_ready(answers, 20)
            yield f"unix://{socket}"
            _clear(f"unix://{socket}")
        finally:
            await child.stop(grace=20)
    finally:
        shutil.rmtree(folder)


def _connect(host: str) -> docker.DockerClient:
    import docker  # here, because every run of the suite imports this module

    return docker.DockerClient(base_url=host)


def _clear(host: str) -> None:
    """Networks are the one thing that would outlive the engine: their bridges are the machine's."""
    client = _connect(host)
    try:
        for container in client.containers.list(all=True):
            container.remove(force=True, v=True)
        client.networks.prune()
    finally:
        client.close()


@contextmanager
def with_images(host: str) -> Iterator[Engine]:
    """An engine with our images for as long as this lasts; those that somebody else has made stay."""
    client = _connect(host)
    engine = Engine(host, client)
    ours = {"reference": "lrm-test/*"}
    before = {image.id for image in client.images.list(filters=ours)}
    try:
        if not before:
            _make_images(client, engine)
        yield engine
    finally:
        for image in client.images.list(filters=ours):
            if image.id not in before:
                client.images.remove(image.id, force=True)
        client.close()


def _make_images(client: docker.DockerClient, engine: Engine) -> None:
    etcd = fetch_etcd.bring("current")
    busybox = fetch_docker.bring_engine() / "busybox"
    _make_image(
        client,
        engine.etcd_image,
        {"bin/etcd": etcd, "bin/etcdctl": etcd_binary().parent / "etcdctl"},
        changes=["ENV PATH=/bin", "ENV ETCDCTL_API=3", "EXPOSE 2379 2380", 'CMD ["etcd"]'],
    )
    _make_image(
        client,
        engine.redis_image,
        {"bin/redis-server": redis_binary(), "bin/busybox": busybox, "bin/redis-cli": _REDIS_CLI},
        links={"bin/sh": "busybox", "bin/nc": "busybox", "bin/grep": "busybox"},
        changes=["ENV PATH=/bin", "EXPOSE 6379", 'CMD ["redis-server"]'],
    )
    _make_image(
        client,
        engine.busybox_image,
        {"bin/busybox": busybox},
        links={f"bin/{name}": "busybox" for name in ("cat", "dd", "echo", "httpd", "id", "ls", "sh", "sleep", "touch")},
        changes=["ENV PATH=/bin", "VOLUME /data", 'CMD ["sleep", "1000000"]'],
    )
    _make_image(
        client,
        engine.machine_image,
        {},
        links={name: f"usr/{name}" for name in ("bin", "lib", "lib64")},
    )


_REDIS_CLI = b"""#!/bin/sh
# redis-cli -e ping, which is all that the health check of compose.yaml asks of it.
printf 'PING\\r\\n' | nc -w 2 127.0.0.1 6379 | grep -q '^+PONG'
"""


def _make_image(
    client: docker.DockerClient,
    name: str,
    files: Mapping[str, Path | bytes],
    *,
    links: Mapping[str, str] | None = None,
    changes: Sequence[str] = (),
) -> None:
    """As `FROM scratch` with these programs (path in the image → where it is here, or a script) and their libraries."""
    libraries = {path: place for it in files.values() if isinstance(it, Path) for path, place in _libraries(it).items()}
    with tempfile.TemporaryFile() as stream:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            scratch = tarfile.TarInfo("tmp")
            scratch.type, scratch.mode = tarfile.DIRTYPE, 0o1777
            archive.addfile(scratch)
            for path, content in {**libraries, **files}.items():
                _add(archive, path, content)
            for path, target in (links or {}).items():
                link = tarfile.TarInfo(path)
                link.type, link.linkname = tarfile.SYMTYPE, target
                archive.addfile(link)
        stream.seek(0)
        client.api.import_image(src=stream, repository=name, tag="latest", changes=list(changes))


def _add(archive: tarfile.TarFile, path: str, content: Path | bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.mode = 0o755
    if isinstance(content, bytes):
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    else:
        entry.size = content.stat().st_size
        with content.open("rb") as source:
            archive.addfile(entry, source)


def _libraries(program: Path) -> dict[str, Path]:
    """The shared libraries that a program is linked with, at their own paths; a static program has none."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode != 0:
        assert "not a dynamic executable" in done.stderr + done.stdout, done.stderr
        return {}
    paths: Iterable[str] = re.findall(r"(?:=> |^\s)(/\S+)", done.stdout, re.MULTILINE)
    return {path.lstrip("/"): Path(path) for path in paths}
