"""Moto as a child process, and what is asked of it: does this image, key pair, instance type exist?

Moto keeps everything in memory: what was made in it (key pairs, subnets, metrics) is gone after a restart. It simulates
all of AWS but instances, which it does not take as seriously as the simulator here needs.
Called by `controllers.aws.simulator.server`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlencode

import aiohttp

from controllers.aws.simulator.wire import CloudError, text
from lrm.processes import ChildProcess, ProcessError, free_port
from storage.clock import Clock

DEMO_AMI = "ami-0c0ffee0c0ffee001"
"""An image that exists in every region of the simulator, for demos; moto does not know it."""
DEMO_KEY = "lrm-demo"
"""A key pair that exists in every region of the simulator, for demos."""
ACCOUNT_HEADER = "x-moto-account-id"
"""Tells moto whose request it is."""
_TYPES = frozenset({"m5zn.metal", "m1.small"})
_START_SECONDS = 30.0
_BIND_TRIES = 3


@asynccontextmanager
async def run_moto(log_path: Path, clock: Clock) -> AsyncIterator[str]:
    """Start moto on a free port of loopback, give its URL, and stop it at the end of the block."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        raise ProcessError("the simulated AWS needs moto: install the extra dev-stack of lrm, or moto[server]")
    child, url = await start_moto(log_path, clock)
    try:
        yield url
    finally:
        await child.stop(grace=1.0)


async def start_moto(log_path: Path, clock: Clock) -> tuple[ChildProcess, str]:
    """Start moto on a free port of loopback; the process, which the caller ends, and its URL."""
    for left in reversed(range(_BIND_TRIES)):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        child = ChildProcess.start(argv, name="moto", log_path=log_path, clock=clock)

        async def answers(url: str = url) -> bool:
            try:
                async with (
                    aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
                    session.get(f"{url}/moto-api/") as reply,
                ):
                    return reply.status == 200
            except (aiohttp.ClientError, TimeoutError):
                return False

        try:
            await child.wait_ready(answers, _START_SECONDS)
        except BaseException as error:
            child.kill()
            if left and isinstance(error, ProcessError) and "in use" in str(error).lower():
                continue  # somebody took the port meanwhile
            raise
        return child, url
    raise AssertionError("the last try returns or raises")


class Catalogue:
    """What can be launched: what moto knows, the demo's image and key, and what the options name."""

    def __init__(
        self, session: aiohttp.ClientSession, moto_url: str, amis: Collection[str], key_names: Collection[str]
    ) -> None:
        self._session = session
        self._moto_url = moto_url
        self._amis = {DEMO_AMI, *amis}
        self._key_names = {DEMO_KEY, *key_names}
        self._types = set(_TYPES)

    async def check(self, parameters: Mapping[str, str], authorization: str, account: str) -> None:
        """Raise what EC2 answers to a launch of something that does not exist."""
        headers = {"Authorization": authorization, ACCOUNT_HEADER: account}
        ami = text(parameters, "ImageId")
        key = text(parameters, "KeyName")
        kind = text(parameters, "InstanceType", "m1.small")
        if not ami:
            raise CloudError("MissingParameter", "The request must contain the parameter ImageId")
        if ami not in self._amis:
            if not re.fullmatch(r"ami-[0-9a-f]{8,17}", ami):
                raise CloudError("InvalidAMIID.Malformed", f'Invalid id: "{ami}" (expecting "ami-...")')
            if not await self._knows("DescribeImages", {"ImageId.1": ami}, headers):
                raise CloudError("InvalidAMIID.NotFound", f"The image id '[{ami}]' does not exist")
        if kind not in self._types:
            if not await self._knows("DescribeInstanceTypes", {"InstanceType.1": kind}, headers):
                raise CloudError("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
            self._types.add(kind)
        if (
            key
            and key not in self._key_names
            and not await self._knows("DescribeKeyPairs", {"KeyName.1": key}, headers)
        ):
            raise CloudError("InvalidKeyPair.NotFound", f"The key pair '{key}' does not exist")

    async def _knows(self, action: str, named: Mapping[str, str], headers: Mapping[str, str]) -> bool:
        """Whether moto describes this thing; it refuses to describe what does not exist."""
        form = urlencode({"Action": action, "Version": "2016-11-15", **named})
        headers = {**headers, "Content-Type": "application/x-www-form-urlencoded"}
        try:
            async with self._session.post(self._moto_url, data=form, headers=headers) as reply:
                body = await reply.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CloudError("Unavailable", f"The simulator's moto does not answer: {error}", 503) from error
        if reply.status == 200:
            # Some calls answer with an empty set instead of refusing.
            return all(f">{value}<" in body for value in named.values())
        if reply.status >= 500:
            raise CloudError("InternalError", f"The simulator's moto failed: HTTP {reply.status}", 500)
        return False
