"""The demos as a person runs them: each shows all its claims, and says which one does not hold when one does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import httpx
import orjson
import pytest
from redis.asyncio import Redis

from lrm.devservers import EtcdServer, RedisServer
from lrm.processes import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
NOWHERE = ("--etcd", "http://127.0.0.1:1", "--redis", "redis://127.0.0.1:1/0")

pytestmark = pytest.mark.timeout(180)


def environment(**more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith(("LRM_", "AWS_"))}, **more}


@contextmanager
def playing(name: str, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A demo that runs while the block does; its output is read by the test."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited, where the suite runs in a script's background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"demo_{name}.py"), *arguments],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def played(name: str, *arguments: str, **env: str) -> tuple[int, str]:
    """Exit code and output of a demo that runs to its end."""
    with playing(name, *arguments, **env) as process:
        output, _ = process.communicate()
    return process.returncode, output


def lines_until(process: subprocess.Popen[str], word: str) -> list[str]:
    """The lines up to the one with a word in it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    pytest.fail(f"it ended without {word!r}:\n{''.join(lines)}")


def children(pid: int) -> list[int]:
    return [int(c) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for c in tasks.read_text().split()]


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(("name", "claims"), [("finalizers", 12), ("ha_deployment", 15), ("bookmarks", 18)])
def test_it_shows_all_its_claims(name: str, claims: int) -> None:
    code, output = played(name, "--self-contained")
    assert code == 0, output
    assert output.count("✔") == claims, output
    assert f"all {claims} claims were observed" in output


async def test_on_running_servers_it_leaves_nothing_in_them(etcd: EtcdServer, redis_server: RedisServer) -> None:
    """It finds them by the settings that lrm itself has."""
    code, output = played("finalizers", LRM_ETCD_ENDPOINTS=etcd.endpoint, LRM_REDIS_URL=redis_server.url)
    assert code == 0, output
    first, behind = (b64encode(key).decode() for key in (b"/lrm-demo-", b"/lrm-demo."))
    kept = httpx.post(f"{etcd.endpoint}/v3/kv/range", json={"key": first, "range_end": behind}).raise_for_status()
    assert "kvs" not in kept.json()
    async with Redis.from_url(redis_server.url) as client:
        assert await client.keys("*") == []


def test_a_retry_that_nobody_made_is_told_and_fails_the_demo(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "requests").write_text("ccna 1.0\n")
    code, output = played("finalizers", "--self-contained", "--data-dir", str(tmp_path))
    assert code == 1
    assert "not shown: the failing step was tried again with growing delay" in output


def test_an_effect_of_a_second_instance_is_told_and_fails_the_demo(tmp_path: Path) -> None:
    effect = {"instance": "instance-9", "term": 1, "name": "spread-0", "step": 1}
    (tmp_path / "effects.jsonl").write_bytes(orjson.dumps(effect) + b"\n")
    code, output = played("ha_deployment", "--self-contained", "--data-dir", str(tmp_path))
    assert code == 1
    assert "not shown: each was reconciled exactly once (observed: 31)" in output


def test_terms_that_overlap_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    demo = import_module("demo_ha_deployment")
    first, second = demo.Effect("instance-1", 3, "a", 1), demo.Effect("instance-2", 70, "b", 1)
    late, twin = demo.Effect("instance-1", 3, "c", 1), demo.Effect("instance-3", 70, "d", 1)
    assert demo.overlapping([first, first, second, second]) == []
    assert demo.overlapping([first, second, late]) == [(second, late)]
    assert demo.overlapping([first, second, twin]) == [(second, twin)]


def test_a_lost_delivery_is_told_and_fails_the_demo(tmp_path: Path) -> None:
    with playing("bookmarks", "--self-contained", "--data-dir", str(tmp_path)) as demo:
        lines_until(demo, "it stopped cleanly")
        file = tmp_path / "deliveries" / "audit.jsonl"
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
        output, _ = demo.communicate()
    assert demo.returncode == 1
    assert "not shown: audit: each of 100 changes exactly once, in order (observed: 99)" in output


def test_a_daemon_that_dies_unasked_fails_the_demo() -> None:
    with playing("finalizers", "--self-contained") as demo:
        lines_until(demo, "1. A daemon")
        lines_until(demo, "ready at")
        daemons = [
            pid for pid in children(demo.pid) if b"lrm" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        ]
        os.kill(daemons[0], signal.SIGKILL)
        output, _ = demo.communicate()
    assert demo.returncode == 1
    assert "not shown: 2. POST a Stack" in output


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_interrupted_it_ends_everything_that_it_started(number: signal.Signals) -> None:
    with playing("finalizers", "--self-contained") as demo:
        lines_until(demo, "ready at")
        started = children(demo.pid)
        assert len(started) == 3
        demo.send_signal(number)
        output, _ = demo.communicate()
    assert demo.returncode == 130, output
    assert [pid for pid in started if exists(pid)] == []


@pytest.mark.parametrize("command", [("bookmarks",), ("ha_deployment", "--instance-id", "instance-1")])
def test_without_servers_it_says_what_is_missing(command: tuple[str, ...]) -> None:
    code, output = played(*command, *NOWHERE)
    assert code == 1
    assert "no etcd answers at http://127.0.0.1:1 (--etcd, LRM_ETCD_ENDPOINTS)" in output
    assert "Traceback" not in output


def test_a_folder_with_an_earlier_story_is_refused(tmp_path: Path) -> None:
    """What that one left would be taken for what this one did."""
    (tmp_path / "lrm.log").touch()
    code, output = played("finalizers", "--self-contained", "--data-dir", str(tmp_path))
    assert code == 1
    assert "keeps an earlier story: name another folder" in output.replace("\n", " ")


def test_one_instance_in_a_terminal_leads_reconciles_and_hands_over(
    etcd: EtcdServer, etcd_root: str, redis_server: RedisServer
) -> None:
    port = free_port()
    arguments = ("--instance-id", "instance-1", "--port", str(port))
    servers = {"LRM_ETCD_ENDPOINTS": etcd.endpoint, "LRM_REDIS_URL": redis_server.url, "LRM_ETCD_ROOT": etcd_root}
    with playing("ha_deployment", *arguments, **servers) as demo:
        hint = lines_until(demo, "curl")[-1]
        lines_until(demo, "instance-1: leads")
        done = subprocess.run(["bash", "-c", hint], capture_output=True, text=True, check=True)
        name = orjson.loads(done.stdout)["metadata"]["name"]
        lines_until(demo, f"instance-1: reconciles {name}, step 1")
        demo.terminate()
        output, _ = demo.communicate()
    assert demo.returncode == 0
    assert "instance-1: has stopped, and leads nothing any more" in output
