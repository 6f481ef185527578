"""Simulated clouds for tests: plain moto, the simulator before it, servers that lie, and credentials for them."""

from __future__ import annotations

import asyncio
import functools
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

from controllers.aws.accounts import _core
from controllers.aws.ec2 import Ec2, LaunchParameters
from controllers.aws.place import Place
from controllers.aws.settings import AwsAccount
from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from controllers.aws.simulator.moto import start_moto
from equipment.etcd import scratch_dir
from equipment.waiting import until
from lrm.processes import ChildProcess
from storage.clock import SystemClock

REGION = "us-east-1"
HERE = Place(REGION)
ABSENT = "i-0123456789abcdef0"
"""An instance id that is well formed and belongs to nothing."""
_MOTOS_OWN_AMI = "ami-12c6146b"


class SharedMoto:
    """One moto for all tests, started when first asked for; each test keeps to tags of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: tuple[ChildProcess, str] | None = None

    async def url(self) -> str:
        if self._running is None:
            self._running = await start_moto(self._folder / "moto.log", SystemClock())
            await asyncio.to_thread(_warm, self._running[1])
        return self._running[1]

    def end(self) -> None:
        if self._running is not None:
            self._running[0].kill()


def _warm(url: str) -> None:
    """Let moto and this process's clients load what AWS knows: seconds in which no test's deadline is to strike."""
    client = boto3.Session(botocore_session=_core()).client(
        "ec2",
        region_name=REGION,
        endpoint_url=url,
        aws_access_key_id="testing",
        aws_secret_access_key="testing-secret",
    )
    try:
        client.describe_images(ImageIds=[_MOTOS_OWN_AMI])
        client.describe_instance_types(InstanceTypes=["t3.micro"])
    finally:
        client.close()


@pytest.fixture(scope="session")
def shared_moto() -> Iterator[SharedMoto]:
    with scratch_dir("lrm-moto-") as path:
        moto = SharedMoto(path)
        yield moto
        moto.end()


@pytest.fixture
def aws_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials for simulators, and nothing of the machine's own."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
async def moto_url(shared_moto: SharedMoto, aws_credentials: None) -> str:
    """Plain moto."""
    return await shared_moto.url()


@pytest.fixture
async def aws_shim(moto_url: str) -> AsyncIterator[AwsShim]:
    """The simulator in this process, with passing states of 0.2 s and nothing on disk."""
    async with AwsShim.run(ShimOptions(moto_url=moto_url, delay=0.2)) as shim:
        yield shim


@pytest.fixture
async def ec2(aws_shim: AwsShim) -> AsyncIterator[Ec2]:
    """Our client at the simulator."""
    async with Ec2(SystemClock(), endpoint_url=aws_shim.url) as client:
        yield client


EXAMS, CLASSES, PARTNER = (Place(REGION, name) for name in ("exams", "classes", "partner"))
EXAMS_NUMBER, CLASSES_NUMBER, PARTNER_NUMBER = "111111111111", "222222222222", "333333333333"
ROLE = AwsAccount(role_arn=f"arn:aws:iam::{PARTNER_NUMBER}:role/lrm", external_id="lab-42")
ACCOUNTS = {"exams": AwsAccount(profile="exams"), "classes": AwsAccount(profile="classes"), "partner": ROLE}
"""What settings say of three accounts."""


def write_profiles(file: Path, **keys: str) -> None:
    """A file of credentials; the simulated AWS takes a key of twelve digits for the number of its account."""
    file.write_text("".join(f"[{n}]\naws_access_key_id = {k}\naws_secret_access_key = s\n" for n, k in keys.items()))


@pytest.fixture
def profiles(aws_credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The profiles of `ACCOUNTS`, in a file."""
    file = tmp_path / "credentials"
    write_profiles(file, exams=EXAMS_NUMBER, classes=CLASSES_NUMBER)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    return file


class LaterClock(SystemClock):
    """The system's clock, some seconds ahead."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


Boto = Callable[..., Awaitable[dict[str, Any]]]


@asynccontextmanager
async def boto(
    url: str, service: str = "ec2", region: str = REGION, *, access_key: str | None = None
) -> AsyncIterator[Boto]:
    """Real boto3, in threads: `await call("describe_instances", …)`."""
    create: Any = functools.partial(boto3.client, region_name=region, endpoint_url=url)
    signed = {} if access_key is None else {"aws_access_key_id": access_key, "aws_secret_access_key": "secret"}
    client = await asyncio.to_thread(create, service, **signed)

    async def call(method: str, **parameters: Any) -> dict[str, Any]:
        answer: dict[str, Any] = await asyncio.to_thread(functools.partial(getattr(client, method), **parameters))
        return answer

    try:
        yield call
    finally:
        client.close()


@asynccontextmanager
async def shim_process(folder: Path, moto_url: str, *arguments: str) -> AsyncIterator[tuple[ChildProcess, str]]:
    """The simulator as a process of its own, and its URL once it is ready."""
    command = [sys.executable, "-m", "controllers.aws.simulator", "--moto-url", moto_url, *arguments]
    child = ChildProcess.start(command, name="shim", log_path=folder / "shim.log")
    try:

        def announced() -> str:
            lines = [line for line in child.log_tail() if line.startswith("ready ")]
            return lines[-1].split()[1] if lines else ""

        yield child, await until(announced, "ready", timeout=60)
    finally:
        child.kill()


def launch(token: str, **changes: Any) -> LaunchParameters:
    """Parameters of a launch that the simulator accepts, tagged by its token."""
    values: dict[str, Any] = {
        "ami_id": DEMO_AMI,
        "instance_type": "m5zn.metal",
        "key_name": DEMO_KEY,
        "client_token": token,
        "tags": {"lrm/uid": token},
    }
    return LaunchParameters(**values | changes)


@asynccontextmanager
async def lying_server(
    *replies: bytes, pause: float = 0.0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers each request with the next of `replies` (the last one for ever) and closes.

    With a pause it sends a byte at a time. Gives its URL and the requests it has seen, which it reads whole.
    """
    seen: list[bytes] = []
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = [line.lower() for line in head.split(b"\r\n")]
            length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
            seen.append(head + await reader.readexactly(length))
            reply = replies[min(len(seen), len(replies)) - 1]
            for piece in [reply] if not pause else [reply[i : i + 1] for i in range(len(reply))]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client has left: what some tests are about
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def reply(body: str, *, status: int = 200, length: int | None = None, content_type: str = "text/xml") -> bytes:
    """An HTTP answer; a `length` larger than the body makes it one that breaks off."""
    content = body.encode()
    size = len(content) if length is None else length
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
    return head.encode() + content
