"""The real kubectl against a server of a test, run to its end or left running."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Ran:
    code: int
    out: str
    err: str


class Kubectl:
    """The program, with a home of its own: no configuration of the machine's user plays a part."""

    def __init__(self, program: Path, url: str, home: Path, *options: str) -> None:
        self._argv = [str(program), "--server", url, "--cache-dir", str(home / "cache"), *options]
        self._env = {"HOME": str(home), "KUBECONFIG": os.devnull, "PATH": os.environ["PATH"]}

    async def start(self, *args: str, stdin: bool = False, **env: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *self._argv,
            *args,
            stdin=pipe if stdin else asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env={**self._env, **env},
        )

    async def run(self, *args: str, given: Any = None, **env: str) -> Ran:
        """Run it to its end; documents in `given` go to its standard input as YAML."""
        process = await self.start(*args, stdin=given is not None, **env)
        text: bytes | None = None
        if given is not None:
            text = (given if isinstance(given, str) else yaml.safe_dump_all(_many(given))).encode()
        try:
            async with asyncio.timeout(40):
                out, err = await process.communicate(text)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        return Ran(process.returncode or 0, out.decode(), err.decode())

    async def __call__(self, *args: str, given: Any = None, **env: str) -> str:
        """Run it; it must succeed."""
        ran = await self.run(*args, given=given, **env)
        assert ran.code == 0, ran
        return ran.out


def _many(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]
