"""Child processes that cannot be left behind: for `lrm dev` and for tests.

A child dies with us, even when we are killed with -9 (on Linux; elsewhere only on an ordinary exit), it is always
reaped, its output goes to a file, and an early death is told with its last lines. Nothing here uses a shell, restarts
a child, or looks after processes that a child leaves behind by its own exit.

How a child is bound to us: a one-line Python launcher asks the kernel for SIGKILL on the death of its parent
(PR_SET_PDEATHSIG), makes sure that the parent is still there, and turns into the program by exec, keeping its pid. A
`preexec_fn` could do it without the launcher's 40 ms, but runs Python between fork and exec, which may deadlock in a
process with threads. The kernel watches the *thread* that started the child: start children from the main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from storage.clock import Clock, SystemClock

_LAUNCHER = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG): " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error}")
"""

_TAIL_LINES = 12
_REAP_SECONDS = 10.0
_FIRST_PORT, _LAST_PORT = 20_000, 32_000

_given_ports: set[int] = set()


class ProcessError(Exception):
    """A child process could not be started, died early, or did not become ready; says which, and its last lines."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens, never the same twice in this process.

    It lies below the kernel's ephemeral range, so no outgoing connection takes it before the server binds it; another
    process may still, with odds of one in thousands. A server that must not fail tries another port when it does.
    """
    for _ in range(200):
        port = _FIRST_PORT + secrets.randbelow(_LAST_PORT - _FIRST_PORT)
        if port in _given_ports:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given_ports.add(port)
        return port
    raise ProcessError(f"no free port found between {_FIRST_PORT} and {_LAST_PORT}")


class ChildProcess:
    """One running program, in a process group of its own; made by `start`, ended by `stop` or `kill`."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, log_path: Path, clock: Clock) -> None:
        self._process = process
        self._clock = clock
        self.name = name
        self.log_path = log_path

    @classmethod
    def start(
        cls,
        argv: Sequence[str | os.PathLike[str]],
        *,
        name: str,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        clock: Clock | None = None,
    ) -> ChildProcess:
        """Start a program with its output appended to `log_path`; `env` None inherits ours.

        Not a coroutine, so that there is no moment in which a cancellation could lose a child. Its own session keeps
        a Ctrl-C in our terminal away from it: who stops what, and when, is ours to decide.
        """
        words = [os.fspath(word) for word in argv]
        program = shutil.which(words[0])
        if program is None:
            raise ProcessError(f"{name}: {words[0]} is not an executable file, nor is one of that name in PATH")
        command = [str(Path(program).absolute()), *words[1:]]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log_path.open("ab") as log:
                process = subprocess.Popen(  # noqa: S603 - the caller's own program, no shell
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=None if env is None else dict(env),
                    cwd=cwd,
                    start_new_session=True,
                )
        except OSError as error:
            raise ProcessError(f"{name} could not be started: {error}") from error
        return cls(process, name, log_path, clock or SystemClock())

    @property
    def pid(self) -> int:
        """The program's own process id (the launcher keeps it)."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child and what it has started; nothing happens once it has ended."""
        if self._process.poll() is None:
            # Not yet reaped, so neither the pid nor its group can belong to anybody else.
            os.killpg(self._process.pid, number)

    def pause(self) -> None:
        """Stop its execution as a debugger would: connections stay open and nothing answers."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run on."""
        self.signal(signal.SIGCONT)

    async def wait(self) -> int:
        """Wait until it has ended and return its exit code; cancelling the wait does nothing to the child."""
        while (code := self._process.poll()) is None:
            if sys.platform == "linux":
                await _readable(os.pidfd_open(self._process.pid))
            else:
                await self._clock.sleep(0.05)
        return code

    async def wait_ready(self, probe: Callable[[], Awaitable[bool]], timeout: float) -> None:
        """Ask `probe` until it says True (False or OSError: not yet). Raises `ProcessError` on death or timeout."""
        pause = 0.01
        try:
            async with self._clock.timeout(timeout):
                while not await self._answers(probe):
                    if self.exit_code is not None:
                        raise ProcessError(f"{self.name} {self._end()} before it was ready{self._last_lines()}")
                    await self._clock.sleep(pause)
                    pause = min(pause * 1.5, 0.1)
        except TimeoutError as error:
            raise ProcessError(f"{self.name} was not ready within {timeout:g} s{self._last_lines()}") from error

    async def stop(self, grace: float = 5.0) -> int:
        """Ask it to end, kill it after `grace` seconds or when this call is cancelled; return its exit code."""
        try:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(grace):
                    await self.wait()
        finally:
            code = self.kill()
        return code

    def kill(self) -> int:
        """SIGKILL, and reap: returns only when it is gone. Not a coroutine, so nothing can interrupt it."""
        self.signal(signal.SIGKILL)
        try:
            return self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ProcessError(f"{self.name} (pid {self.pid}) survives SIGKILL: stuck in the kernel") from error

    def log_tail(self, lines: int = _TAIL_LINES) -> list[str]:
        """The last lines of its output."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
            return log.read().decode(errors="replace").splitlines()[-lines:]

    async def _answers(self, probe: Callable[[], Awaitable[bool]]) -> bool:
        try:
            return await probe()
        except OSError:  # refused, reset: the usual answers of a server that is not there yet
            return False

    def _end(self) -> str:
        code = self.exit_code or 0
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def _last_lines(self) -> str:
        tail = self.log_tail()
        return "".join(f"\n  | {line}" for line in tail) if tail else " and wrote nothing"


async def _readable(descriptor: int) -> None:
    """Wait until a descriptor, which is then closed, can be read: a pidfd can when its process has ended."""
    loop = asyncio.get_running_loop()
    woken = loop.create_future()
    try:
        loop.add_reader(descriptor, lambda: None if woken.done() else woken.set_result(None))
        await woken
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
