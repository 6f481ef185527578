"""The daemon as its users run it: a process that starts before etcd, lives through its outages, and ends in order."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipment.daemons import WIDGETS, DaemonProcess, widget_document
from equipment.waiting import until
from lrm.devservers import EtcdServer


@pytest.fixture
async def own_etcd(server_dir: Path) -> AsyncIterator[EtcdServer]:
    async with EtcdServer(server_dir / "etcd") as server:
        yield server


@pytest.fixture
async def daemon(server_dir: Path, own_etcd: EtcdServer) -> AsyncIterator[DaemonProcess]:
    process = DaemonProcess(server_dir, endpoint=own_etcd.endpoint, root="/lrm")
    yield process
    await process.end()


async def eventually(condition: Callable[[], Awaitable[Any]]) -> Any:
    return await until(condition, timeout=60)


async def phase(daemon: DaemonProcess, name: str = "w1") -> str | None:
    status, document = await daemon.request("GET", f"{WIDGETS}/{name}")
    return document["status"]["phase"] if status == 200 else None


async def test_it_serves_reconciles_and_cleans_up(daemon: DaemonProcess) -> None:
    await daemon.start_ready()
    assert (await daemon.request("POST", WIDGETS, widget_document(count=7)))[0] == 201

    async def followed() -> bool:
        return await phase(daemon) == "Ready"

    await eventually(followed)
    _, stored = await daemon.request("GET", f"{WIDGETS}/w1")
    assert stored["status"]["seen"] == 7
    assert stored["metadata"]["finalizers"] == ["test.neuroglia.io/follow"]

    async def leads_all() -> bool:
        _, leader = await daemon.request("GET", "/api/status/leader")
        held = [lock["lock_name"] for lock in leader["locks"] if lock["is_leader"]]
        return leader["is_leader"] is True and held == ["compactor", "gc", "widgets"]

    await eventually(leads_all)
    _, finalizers = await daemon.request("GET", "/api/status/finalizers")
    assert (finalizers["pending"], finalizers["processing"], finalizers["completed"]) == (0, 0, 0)
    assert finalizers["controllers"][0]["finalizer"] == "test.neuroglia.io/follow"
    _, bookmarks = await daemon.request("GET", "/api/status/bookmarks")
    assert bookmarks["bookmark"] is None, "there is no Redis"
    assert bookmarks["current_version"] > 0
    assert bookmarks["error"]
    _, health = await daemon.request("GET", "/api/status/health")
    assert health["etcd"]["ok"] is True
    assert health["redis"]["ok"] is False
    assert health["status"] == "degraded"
    _, status = await daemon.request("GET", "/api/status/status")
    assert status["resources"] == {"widgets": 1, "notes": 0}
    assert (await daemon.request("DELETE", f"{WIDGETS}/w1"))[0] == 200

    async def gone() -> bool:
        return await phase(daemon) is None

    await eventually(gone)

    async def completed() -> bool:
        # Counted when the write that took the object away is answered.
        return bool((await daemon.request("GET", "/api/status/finalizers"))[1]["completed"] == 1)

    await eventually(completed)


async def test_it_waits_for_etcd_says_so_and_becomes_ready_when_it_comes(
    daemon: DaemonProcess, own_etcd: EtcdServer
) -> None:
    own_etcd.kill()
    daemon.start()

    async def answers() -> bool:
        try:
            return (await daemon.request("GET", "/livez"))[0] == 200
        except OSError:
            return False

    await eventually(answers)
    status, text = await daemon.request("GET", "/readyz")
    assert status == 503
    assert "caches" in str(text)

    async def said() -> bool:
        return "daemon.waiting_for_etcd" in daemon.log()

    await eventually(said)
    await own_etcd.start()
    await eventually(daemon.is_ready)


async def test_an_etcd_outage_leaves_reads_refuses_writes_and_heals_by_itself(
    daemon: DaemonProcess, own_etcd: EtcdServer
) -> None:
    await daemon.start_ready()
    await daemon.request("POST", WIDGETS, widget_document())

    async def followed() -> bool:
        return await phase(daemon) == "Ready"

    await eventually(followed)
    own_etcd.kill()
    status, headers, refused = await daemon.exchange("POST", WIDGETS, widget_document("w2"))
    assert (status, refused["reason"]) == (503, "ServiceUnavailable")
    assert int(headers["Retry-After"]) >= 1
    status, listed = await daemon.request("GET", f"{WIDGETS}?resourceVersion=0")
    assert status == 200
    assert [w["metadata"]["name"] for w in listed["items"]] == ["w1"]
    status, headers, _ = await daemon.exchange("GET", WIDGETS)
    assert status == 504
    assert "Retry-After" in headers
    assert await daemon.is_ready()
    await own_etcd.start()

    async def written() -> bool:
        return (await daemon.request("POST", WIDGETS, widget_document("w3", count=3)))[0] == 201

    await eventually(written)

    async def third_followed() -> bool:
        return await phase(daemon, "w3") == "Ready"

    await eventually(third_followed)
    assert (await daemon.request("GET", f"{WIDGETS}/w2"))[0] == 404


async def test_sigterm_ends_it_in_order_with_exit_code_0_and_its_locks_released(
    daemon: DaemonProcess, own_etcd: EtcdServer
) -> None:
    await daemon.start_ready()

    async def leads() -> bool:
        return bool((await daemon.request("GET", "/api/status/leader"))[1]["is_leader"])

    await eventually(leads)
    daemon.terminate()
    assert await daemon.exit_code() == 0
    log = daemon.log()
    assert log.index("daemon.stopping") < log.index("daemon.stopped")
    assert await keys_below(own_etcd, "/lrm/leader/") == []


async def test_the_second_signal_ends_it_at_once(daemon: DaemonProcess, own_etcd: EtcdServer) -> None:
    await daemon.start_ready()

    async def leads() -> bool:
        return bool((await daemon.request("GET", "/api/status/leader"))[1]["is_leader"])

    await eventually(leads)
    own_etcd.pause()
    try:
        daemon.terminate()

        async def stopping() -> bool:
            return "daemon.stopping" in daemon.log()

        await eventually(stopping)
        daemon.process.signal(signal.SIGINT)
        assert await daemon.exit_code(20) == 130, "it does not wait for the store"
    finally:
        own_etcd.resume()


async def test_a_second_static_daemon_deposes_the_first_which_exits(
    daemon: DaemonProcess, own_etcd: EtcdServer, server_dir: Path
) -> None:
    await daemon.start_ready()

    async def leads() -> bool:
        return bool((await daemon.request("GET", "/api/status/leader"))[1]["is_leader"])

    await eventually(leads)
    second = DaemonProcess(server_dir, endpoint=own_etcd.endpoint, root="/lrm")
    try:
        await second.start_ready()
        assert await daemon.exit_code() == 1
        assert "another daemon has taken the lock" in daemon.log(), "whichever of its locks it was"
        await second.request("POST", WIDGETS, widget_document())

        async def followed() -> bool:
            return await phase(second) == "Ready"

        await eventually(followed)
    finally:
        await second.end()


async def test_a_port_in_use_is_one_sentence_and_exit_code_1(
    daemon: DaemonProcess, own_etcd: EtcdServer, server_dir: Path
) -> None:
    await daemon.start_ready()
    second = DaemonProcess(server_dir, endpoint=own_etcd.endpoint, root="/other", LRM_API_PORT=str(daemon.port))
    second.start()
    assert await second.exit_code() == 1
    lines = [line for line in second.log().splitlines() if "lrm: " in line]
    assert lines == [f"lrm: cannot serve on 127.0.0.1 port {daemon.port}: {os.strerror(errno.EADDRINUSE)}"]
    assert "Traceback" not in second.log()
    assert await daemon.is_ready()


async def test_kill_9_loses_nothing_that_was_acknowledged(daemon: DaemonProcess) -> None:
    await daemon.start_ready()
    for i in range(10):
        assert (await daemon.request("POST", WIDGETS, widget_document(f"w{i}", count=i)))[0] == 201
    daemon.process.kill()
    await daemon.start_ready()

    async def all_followed() -> bool:
        items = (await daemon.request("GET", WIDGETS))[1]["items"]
        return len(items) == 10 and all(w["status"]["seen"] == w["spec"]["count"] for w in items)

    await eventually(all_followed)


async def test_restore_done_begins_an_epoch_that_a_running_daemon_notices(
    daemon: DaemonProcess, own_etcd: EtcdServer
) -> None:
    """Its caches are filled anew, and go on following."""
    await daemon.start_ready()
    done = run_cli("restore-done", LRM_ETCD_ENDPOINTS=own_etcd.endpoint)
    assert done.returncode == 0, done.stderr
    assert "(it was not set)" in done.stdout
    assert await keys_below(own_etcd, "/lrm/epoch") == ["/lrm/epoch"]

    async def noticed() -> bool:
        await daemon.request("GET", WIDGETS)  # a consistent list writes a barrier, and barriers see the epoch
        return "cache.relist" in daemon.log()

    await eventually(noticed)
    assert (await daemon.request("POST", WIDGETS, widget_document()))[0] == 201

    async def followed() -> bool:
        return await phase(daemon) == "Ready"

    await eventually(followed)


async def keys_below(server: EtcdServer, prefix: str) -> list[str]:
    from storage.etcd import EtcdStorage

    storage = EtcdStorage([server.endpoint])
    try:
        return [e.key for e in (await storage.list(prefix)).entries]
    finally:
        await storage.aclose()


UNSET = ""
NO_SETTINGS = dict.fromkeys(
    [name for name in DaemonProcess(Path(), endpoint="", root="").environment if name.startswith("LRM_")], UNSET
)


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    daemon = DaemonProcess(Path(), endpoint="http://127.0.0.1:1", root="/lrm")
    env = {name: value for name, value in {**daemon.environment, **environment}.items() if value != UNSET}
    return subprocess.run(
        [sys.executable, "-m", "lrm", *arguments], env=env, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LRM_API_HOST", "0.0.0.0", "LRM_AUTH_TOKENS_FILE"),
        ("LRM_ETCD_TIMEOUT", "soon", "not a duration"),
        ("LRM_ETCD_ENDPOINTS", " , ", "no endpoint"),
        ("LRM_ETCD_ENDPOINTS", "foo", "http:// or https://"),
        ("LRM_ETCD_ROOT", "lrm", "an absolute path"),
        ("LRM_REDIS_URL", "http://127.0.0.1", "redis://"),
        ("LRM_RETRY_PERIOD", "8", "must stay below"),
        ("LRM_STOP_TIMEOUT", "0", "greater than 0"),
        ("LRM_LEADER", "redis", "'static'"),
        ("LRM_CONFIG", "/nowhere/lrm.yaml", "not a file"),
        ("LRM_TLS_CERT", "/some/cert.pem", "go together"),
    ],
)
def test_impossible_settings_are_exit_code_2_and_a_sentence(name: str, value: str, said: str) -> None:
    done = run_cli("serve", **{name: value})
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_config_show_masks_secrets_and_check_names_strangers() -> None:
    shown = run_cli("config", "show", LRM_REDIS_URL="redis://user:hunter2@127.0.0.1:6379/0")
    assert shown.returncode == 0, shown.stderr
    assert "hunter2" not in shown.stdout
    assert yaml.safe_load(shown.stdout)["etcd_root"] == "/lrm"
    assert run_cli("config", "check").returncode == 0
    done = run_cli("config", "check", LRM_ETCD_ENDPOINT="http://typo")
    assert done.returncode == 2
    assert "LRM_ETCD_ENDPOINT " in done.stderr


def test_the_example_file_is_the_defaults_with_their_reasons(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "lrm.example.yaml"
    shown = run_cli("config", "show", LRM_CONFIG=str(example), **NO_SETTINGS)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == example.read_text(), (
        "write it anew: LRM_INSTANCE_ID=lrm-1 lrm config show > lrm.example.yaml"
    )
    changed = tmp_path / "lrm.yaml"
    changed.write_text("labs_refresh_interval: 10m\nlog_level: loud\n")
    refused = run_cli("config", "check", LRM_CONFIG=str(changed))
    assert (refused.returncode, refused.stderr.split(":")[0]) == (2, "LRM_LOG_LEVEL")


def test_a_plugin_that_is_not_there_is_exit_code_1() -> None:
    done = run_cli("serve", LRM_PLUGINS="no.such.plugin")
    assert done.returncode == 1
    assert "no.such.plugin" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_is_printed_once_and_only_its_hash_is_for_the_file() -> None:
    done = run_cli("token", "create", "alice", "--role", "manager", "--namespace", "a", "--namespace", "b")
    assert done.returncode == 0, done.stderr
    token = done.stderr.split(": ")[-1].strip()
    (entry,) = yaml.safe_load(done.stdout)
    assert entry["name"] == "alice"
    assert entry["role"] == "manager"
    assert entry["namespaces"] == ["a", "b"]
    assert len(entry["sha256"]) == 64
    assert token not in done.stdout


def test_restore_done_without_etcd_is_exit_code_1_and_a_sentence() -> None:
    done = run_cli("restore-done", LRM_ETCD_TIMEOUT="1s")
    assert done.returncode == 1
    assert done.stderr.startswith("lrm: no new epoch was written: ")
    assert "Traceback" not in done.stderr


def test_version_is_told() -> None:
    assert run_cli("version").stdout.startswith("lrm ")
