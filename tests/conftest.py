"""Fixtures that many tests share, and what holds for all of them.

In CI a skip is a failure, and the time is told. No example of Hypothesis has a time limit, and in CI the examples are
the same in every run. Logs are written as the daemon writes them: structlog's own default renders every local variable
of a traceback, which holds up the event loop for seconds. Processes that share the suite take the ports of their
servers from ranges of their own, so that none binds what another has just chosen.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog

from equipment import fetch_kubectl
from equipment.debian import NotHere
from equipment.etcd import VERSIONS, WHEEL, SharedEtcds, scratch_dir
from lrm import processes
from lrm.devservers import EtcdServer, RedisServer

pytest_plugins = ["equipment.aws", "equipment.engine"]

BUDGET_SECONDS = 20 * 60
_began = pytest.StashKey[float]()

hypothesis.settings.register_profile(
    "here",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
hypothesis.settings.load_profile("here")
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)
if (_worker := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")).isdecimal():
    _share = (processes._LAST_PORT - processes._FIRST_PORT) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    processes._FIRST_PORT += int(_worker) * _share
    processes._LAST_PORT = processes._FIRST_PORT + _share


@pytest.fixture
def server_dir() -> Iterator[Path]:
    """An empty folder for the data of servers, in memory where possible."""
    with scratch_dir() as path:
        yield path


@pytest.fixture(scope="session")
def shared_etcds() -> Iterator[SharedEtcds]:
    with scratch_dir("lrm-etcds-") as path:
        servers = SharedEtcds(path)
        yield servers
        servers.end()


@pytest.fixture(params=VERSIONS, ids=lambda version: f"etcd-{version}")
async def each_etcd(request: pytest.FixtureRequest, shared_etcds: SharedEtcds) -> EtcdServer:
    """The shared etcd of each version in turn; use keys below `etcd_root` only, and do it no harm."""
    return await shared_etcds.get(request.param)


@pytest.fixture
async def etcd(shared_etcds: SharedEtcds) -> EtcdServer:
    """The shared etcd of the wheel, for what does not depend on the version."""
    return await shared_etcds.get(WHEEL)


@pytest.fixture
def etcd_root() -> str:
    """A key root that no other test uses."""
    return f"/test/{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def redis_server(server_dir: Path) -> AsyncIterator[RedisServer]:
    async with RedisServer(server_dir / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def kubectl_program() -> Path:
    """A kubectl of at least 1.27."""
    try:
        return fetch_kubectl.bring()
    except NotHere as error:
        pytest.skip(f"kubectl: {error}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """In CI a test that did not run has failed, unless it carries the marker that allows it."""
    report = yield
    if item.get_closest_marker("may_skip") is None:
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[Any]:
    """The same for a whole file that skips itself."""
    report = yield
    _forbid_skip(report)
    return report


def _forbid_skip(report: Any) -> None:
    if os.environ.get("CI") and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {reason}"


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_began] = time.monotonic()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    took = time.monotonic() - config.stash[_began]
    share = took / BUDGET_SECONDS
    terminalreporter.write_line(
        f"The suite took {took:.0f} s of its {BUDGET_SECONDS} s ({share:.0%}).", red=share > 1, green=share <= 1
    )
