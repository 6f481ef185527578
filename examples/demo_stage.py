"""What the demos share: a story told as it is observed, and a stage of real servers and real daemons.

A story prints one ✔ line per claim, and only after something outside of it (the API, etcd, files that controllers
wrote) has shown the claim. A stage starts what a story needs and has ended all of it when the story is over, however
it ends. `play` is the frame of a demo's `main`: its exit code is 0 only if every claim was observed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
import uuid
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import httpx
from rich.console import Console
from rich.markup import escape

from lrm.devservers import EtcdServer, RedisServer
from lrm.errors import only_cause
from lrm.logs import configure_logs
from lrm.processes import ChildProcess, ProcessError, free_port
from lrm.settings import Settings
from storage.clock import SystemClock
from storage.errors import StorageError
from storage.etcd import EtcdStorage
from storage.redis_bookmarks import RedisBookmarks
from storage.redis_health import redis_error

EXAMPLES = Path(__file__).parent

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class NotShown(Exception):  # noqa: N818 - what happened
    """A claim did not come true in time; the text names it."""


class Missing(Exception):  # noqa: N818 - what happened
    """Something that the demo needs is not there; the text says what to do."""


class Story:
    """Prints with the time since the start, waits with a deadline, counts what was shown."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.shown = 0
        self.title = ""
        """Of the chapter that is being told."""

    def chapter(self, title: str) -> None:
        self.title = title
        out.print(f"\n[bold]{title}[/bold]")

    def line(self, text: str, mark: str = "·") -> None:
        out.print(f"  [dim]{time.monotonic() - self.started:5.1f} s[/dim]  {mark} {text}")

    def claim(self, text: str) -> None:
        """Something was observed."""
        self.shown += 1
        self.line(text, "[green]✔[/green]")

    def check(self, claim: str, held: object, otherwise: object = "") -> None:
        """A claim that the observations bear out, or do not. Raises `NotShown`."""
        if not held:
            raise NotShown(f"{claim}{f' (observed: {otherwise})' if otherwise != '' else ''}")
        self.claim(claim)

    def until(self, what: str, condition: Callable[[], Any], seconds: float = 20.0) -> Any:
        """The first true value of `condition`. Raises `NotShown` after so many seconds."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            self._in_time(what, deadline, seconds)
            time.sleep(0.1)
        return value

    async def eventually(self, what: str, condition: Callable[[], Awaitable[Any]], seconds: float = 20.0) -> Any:
        """`until` for coroutines; a condition may raise `NotShown` to tell what it still misses."""
        deadline = time.monotonic() + seconds
        while True:
            missed = ""
            try:
                if value := await condition():
                    return value
            except (httpx.TransportError, NotShown) as error:
                missed = f" ({str(error) or type(error).__name__})"
            self._in_time(what + missed, deadline, seconds)
            await asyncio.sleep(0.02)

    @staticmethod
    def _in_time(what: str, deadline: float, seconds: float) -> None:
        if time.monotonic() > deadline:
            raise NotShown(f"not seen within {seconds:g} s: {what}")


class Daemon:
    """One daemon as a process of its own, and a client of its API."""

    def __init__(self, name: str, argv: Sequence[str], env: dict[str, str], folder: Path) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self.port = int(env["LRM_API_PORT"])
        self.api = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=10)
        self.pids: list[int] = []
        self._argv, self._env = argv, env
        self._child: ChildProcess | None = None

    def start(self) -> None:
        self._child = ChildProcess.start(self._argv, name=self.name, log_path=self.log_path, env=self._env)
        self.pids.append(self._child.pid)

    async def ready(self, seconds: float = 30.0) -> None:
        """Return when its caches are filled and it serves. Raises `ProcessError` with its last lines."""

        async def answers() -> bool:
            try:
                return (await self.api.get("/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await self.process.wait_ready(answers, seconds)

    @property
    def process(self) -> ChildProcess:
        if self._child is None:
            raise ProcessError(f"{self.name} was never started")
        return self._child

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.exit_code is None

    def kill(self) -> None:
        """SIGKILL: it cannot say goodbye to anybody."""
        self.process.kill()

    def terminate(self) -> None:
        """SIGTERM: a clean stop; `process.wait()` tells when it is over."""
        self.process.signal(signal.SIGTERM)

    async def stop(self) -> int:
        """A clean stop; its exit code."""
        return await self.process.stop(grace=15)

    async def get(self, path: str, **params: str) -> Any:
        """A JSON document. Raises httpx' errors."""
        return (await self.api.get(path, params=params)).raise_for_status().json()


class Stage:
    """Servers and daemons for one demo; its installation has a key root of its own, so it disturbs no other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.root = f"/lrm-demo-{uuid.uuid4().hex[:8]}"
        self.daemons: list[Daemon] = []
        self.folder = Path()
        self.etcd_endpoints: str = options.etcd
        self.redis_url: str = options.redis
        self._self_contained: bool = options.self_contained
        self._data_dir: Path | None = options.data_dir
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self._data_dir is None:
                self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrm-demo-")))
            else:
                self.folder = self._data_dir.resolve()
                self.folder.mkdir(parents=True, exist_ok=True)
                if any(self.folder.glob("*.log")):
                    raise Missing(f"{self.folder} keeps an earlier story: name another folder")
            if self._self_contained:
                etcd = await stack.enter_async_context(EtcdServer(self.folder / "etcd"))
                redis = await stack.enter_async_context(RedisServer(self.folder / "redis"))
                self.etcd_endpoints, self.redis_url = etcd.endpoint, redis.url
            else:
                await servers_answer(self.etcd_endpoints.split(","), self.redis_url)
                stack.push_async_callback(self._clear)
            stack.push_async_callback(self._stop_daemons)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def daemon(self, name: str, *, argv: Sequence[str] = (), **settings: str) -> Daemon:
        """A daemon, not yet started, that finds the plug-ins of examples/: `lrm serve`, unless `argv` differs."""
        port = str(free_port())
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("LRM_", "AWS_"))},
            "PYTHONPATH": os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH")))),
            "LRM_ETCD_ENDPOINTS": self.etcd_endpoints,
            "LRM_ETCD_ROOT": self.root,
            "LRM_REDIS_URL": self.redis_url,
            "LRM_API_PORT": port,
            "LRM_INSTANCE_ID": name,
            **settings,
        }
        command = [part.format(port=port) for part in argv] or ["-m", "lrm", "serve"]
        daemon = Daemon(name, [sys.executable, *command], env, self.folder)
        self.daemons.append(daemon)
        return daemon

    def storage(self) -> EtcdStorage:
        """A client of the demo's etcd, to look behind the daemons' backs; close it with `aclose`."""
        return EtcdStorage(self.etcd_endpoints.split(","), root=self.root)

    async def _stop_daemons(self) -> None:
        await asyncio.gather(*(d.stop() for d in self.daemons if d.running))
        for daemon in self.daemons:
            await daemon.api.aclose()

    async def _clear(self) -> None:
        """Leave nothing of the demo in servers that stay."""
        first, behind = (b64encode(key.encode()).decode() for key in (f"{self.root}/", f"{self.root}0"))
        async with httpx.AsyncClient(base_url=self.etcd_endpoints.split(",")[0]) as etcd:
            reply = await etcd.post("/v3/kv/deleterange", json={"key": first, "range_end": behind})
            reply.raise_for_status()
        bookmarks = RedisBookmarks(self.redis_url, SystemClock(), root=self.root)
        try:
            for watcher, saved in (await bookmarks.all()).items():
                await bookmarks.forget(watcher, saved)
        finally:
            await bookmarks.aclose()


async def servers_answer(etcd_endpoints: Sequence[str], redis_url: str) -> None:
    """Raise `Missing`, saying what to do, unless etcd and Redis answer."""
    remedy = "start one, name it, or let --self-contained start everything"
    storage = EtcdStorage(etcd_endpoints)
    try:
        async with asyncio.timeout(2):
            await storage.current_revision()
    except (StorageError, TimeoutError) as error:
        where = ", ".join(etcd_endpoints)
        raise Missing(f"no etcd answers at {where} (--etcd, LRM_ETCD_ENDPOINTS): {remedy}") from error
    finally:
        await storage.aclose()
    if problem := await redis_error(redis_url, SystemClock()):
        raise Missing(f"no Redis answers at the URL of --redis or LRM_REDIS_URL ({problem}): {remedy}")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every demo has; the servers' defaults are lrm's own settings."""
    settings = Settings()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--self-contained", action="store_true", help="start everything that is needed: etcd, Redis, several daemons"
    )
    parser.add_argument(
        "--etcd",
        metavar="URLS",
        default=",".join(settings.etcd_endpoints),
        help="etcd that is running already; comma-separated (LRM_ETCD_ENDPOINTS, now %(default)s)",
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        default=settings.redis_url,
        help="Redis that is running already (LRM_REDIS_URL, else redis://127.0.0.1:6379/0)",
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", type=Path, help="keep logs and side effects here; else they go at the end"
    )
    return parser


def play(title: str, tell: Callable[[Story, Stage], Awaitable[None]], options: argparse.Namespace) -> int:
    """Tell a story on a stage: 0 if every claim was observed, 1 if not (the last lines say which), 130 on Ctrl-C."""
    story = Story()
    configure_logs("console", "warning")
    out.print(f"[bold]{title}[/bold]")
    try:
        asyncio.run(_play(story, tell, options))
    except Missing as error:
        out.print(f"[bold red]cannot begin[/bold red]: {escape(str(error))}")
        return 1
    except (NotShown, httpx.HTTPError, ProcessError) as error:
        where = "" if isinstance(error, NotShown) else f"{story.title}: {type(error).__name__}: "
        out.print(f"\n[bold red]not shown[/bold red]: {escape(f'{where}{error}')}")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        out.print("\ninterrupted; everything that was started has been ended")
        return 130
    seconds = time.monotonic() - story.started
    out.print(f"\n[bold green]all {story.shown} claims were observed[/bold green] in {seconds:.0f} s")
    return 0


async def _play(story: Story, tell: Callable[[Story, Stage], Awaitable[None]], options: argparse.Namespace) -> None:
    telling = asyncio.current_task()
    if telling is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, telling.cancel)
    stage = Stage(options)
    async with stage:
        try:
            await tell(story, stage)
        except Exception as error:
            for daemon in stage.daemons:
                tail = daemon.process.log_tail() if daemon.pids else []
                out.print(f"\nthe end of {daemon.log_path.name}:", *tail, sep="\n  ", markup=False)
            if isinstance(error, BaseExceptionGroup):
                raise only_cause(error) from error
            raise
    pids = [pid for daemon in stage.daemons for pid in daemon.pids]
    left = [pid for pid in pids if running(pid)]
    story.check(f"all {len(pids)} daemon processes of this story have ended", not left, left)


def running(pid: int) -> bool:
    """Whether a process of that id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
