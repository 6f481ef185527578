"""compose.yaml: what it promises on paper, and that all of it comes up, keeps its data and ends where an engine is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis.asyncio as redis
import yaml

from equipment.daemons import TESTS, WIDGETS, widget_document
from equipment.engine import Engine
from equipment.waiting import until
from lrm.plugin import load_plugins
from lrm.processes import free_port
from lrm.settings import Settings, parse_duration

ROOT = Path(__file__).parents[2]
ETCDS = ("etcd-1", "etcd-2", "etcd-3")
DAEMONS = ("lrm-1", "lrm-2", "lrm-3")
MAKE_TOKEN = ("run", "--rm", "--no-deps", "-T", "lrm-1", "token", "create", "alice", "--role", "admin")
UP = ("up", "--detach", "--wait")
TOKEN = re.compile(r"token \(shown only now\): (\S+)")


def plain_environment(**variables: str) -> dict[str, str]:
    """Nothing of the machine's own that compose.yaml would pass on."""
    strangers = ("LRM_", "AWS_", "CML_", "ETCD", "REDIS", "COMPOSE")
    return {k: v for k, v in os.environ.items() if not k.startswith(strangers)} | variables


@pytest.fixture(scope="module")
def services(compose_program: Path) -> dict[str, Any]:
    """The services as docker-compose understands them, after it found the file valid."""
    argv = [compose_program, "--file", ROOT / "compose.yaml", "config", "--format=json"]
    done = subprocess.run(argv, env=plain_environment(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "docker-compose warns"
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_the_services_are_three_etcds_a_redis_and_three_daemons(services: dict[str, Any]) -> None:
    assert set(services) == {*ETCDS, *DAEMONS, "redis"}
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] == "CMD", f"{name}: no shell is needed to ask for health"
        assert service["restart"] == "unless-stopped", name
        assert "privileged" not in service, name


def test_each_daemon_has_its_own_name_and_its_own_port_on_loopback(services: dict[str, Any]) -> None:
    for name, port in zip(DAEMONS, ("8001", "8002", "8003"), strict=True):
        service = services[name]
        assert service["environment"]["LRM_INSTANCE_ID"] == name
        ((host, published, target),) = [(p["host_ip"], p["published"], p["target"]) for p in service["ports"]]
        assert (host, published, str(target)) == ("127.0.0.1", port, service["environment"]["LRM_API_PORT"])
    assert not any("ports" in services[name] for name in (*ETCDS, "redis")), "only the API is published"


def test_daemons_wait_for_healthy_stores_and_are_judged_by_readyz(services: dict[str, Any]) -> None:
    for name in DAEMONS:
        waits = {other: wait["condition"] for other, wait in services[name]["depends_on"].items()}
        assert waits == dict.fromkeys((*ETCDS, "redis"), "service_healthy")
        assert "/readyz" in services[name]["healthcheck"]["test"][-1]


def test_a_daemon_has_more_time_to_stop_than_it_takes(services: dict[str, Any]) -> None:
    for name in DAEMONS:
        assert parse_duration(services[name]["stop_grace_period"]) > Settings.model_fields["stop_timeout"].default


def test_every_setting_of_a_daemon_is_one(services: dict[str, Any]) -> None:
    classes = [Settings, *(plugin.settings for plugin in load_plugins(()))]
    known = {f"LRM_{name.upper()}" for cls in classes for name in cls.model_fields}
    for name in DAEMONS:
        assert {key for key in services[name]["environment"] if key.startswith("LRM_")} <= known


def test_daemons_ask_every_member_and_serve_only_who_has_a_token(services: dict[str, Any]) -> None:
    for name in DAEMONS:
        environment = services[name]["environment"]
        assert environment["LRM_ETCD_ENDPOINTS"].split(",") == [f"http://{etcd}:2379" for etcd in ETCDS]
        (secret,) = services[name]["secrets"]
        assert environment["LRM_AUTH_TOKENS_FILE"] == secret["target"]


def test_members_know_each_other_and_keep_their_data_apart(services: dict[str, Any]) -> None:
    cluster = ",".join(f"{name}=http://{name}:2380" for name in ETCDS)
    volumes = set()
    for name in ETCDS:
        environment = services[name]["environment"]
        assert environment["ETCD_INITIAL_CLUSTER"] == cluster
        assert environment["ETCD_AUTO_COMPACTION_RETENTION"] == "0", "the compactor of lrm does that"
        assert int(environment["ETCD_QUOTA_BACKEND_BYTES"]) == 4 * 2**30
        assert services[name]["command"] == [
            "etcd",
            f"--name={name}",
            f"--advertise-client-urls=http://{name}:2379",
            f"--initial-advertise-peer-urls=http://{name}:2380",
        ]
        ((volume, target),) = [(v["source"], v["target"]) for v in services[name]["volumes"]]
        assert environment["ETCD_DATA_DIR"].startswith(f"{target}/")
        volumes.add(volume)
    assert len(volumes) == 3


def test_images_have_short_names_so_that_nobody_depends_on_one_registry(services: dict[str, Any]) -> None:
    assert all(re.fullmatch(r"[a-z-]+(:[\w.-]+)?", service["image"]) for service in services.values())
    bases = re.findall(r"^ARG \w+=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    bases += re.findall(r"^ARG \w+=(\S+)", (ROOT / "examples/compose/etcd.Dockerfile").read_text(), re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"[a-z-]+:[\w.-]+", base) for base in bases)


def test_the_image_holds_the_three_packages_and_what_installing_them_takes() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == {"constraints.txt", "pyproject.toml", "README.md", "storage", "lrm", "controllers"}
    assert all((ROOT / name).exists() for name in allowed)


def test_its_first_lines_say_the_two_commands_that_these_tests_run() -> None:
    text = (ROOT / "compose.yaml").read_text()
    assert f"#   docker compose {' '.join(MAKE_TOKEN)} >> tokens.yaml\n#   docker compose {' '.join(UP)}\n" in text


class Stack:
    """compose.yaml, brought up under a project name of its own with images of this machine's programs."""

    def __init__(self, engine: Engine, program: Path, folder: Path) -> None:
        self.engine = engine
        self.project = f"lrm-test-{uuid.uuid4().hex[:8]}"
        self.ports = {name: free_port() for name in (*DAEMONS, "redis")}
        self.token = ""
        self._tokens_file = folder / "tokens.yaml"
        self._override = folder / "override.yaml"
        self._override.write_text(yaml.safe_dump({"services": self._services()}))
        self._argv = [
            *(program, "--project-name", self.project, "--project-directory", ROOT),
            *("--file", ROOT / "compose.yaml", "--file", self._override),
        ]
        self._environment = plain_environment(
            DOCKER_HOST=engine.host,
            ETCD_IMAGE=engine.etcd_image,
            REDIS_IMAGE=engine.redis_image,
            LRM_IMAGE=engine.machine_image,
            LRM_TOKENS=str(self._tokens_file),
            **{f"LRM_PORT_{name[-1]}": str(self.ports[name]) for name in DAEMONS},
        )

    def _services(self) -> dict[str, Any]:
        """What the tests change: lrm is this very checkout, with Widgets instead of a cloud, and Redis can be asked."""
        folders = {"/usr", sys.base_prefix, sys.prefix, str(ROOT)}
        daemon = {
            "volumes": [f"{folder}:{folder}:ro" for folder in sorted(folders)],
            "entrypoint": [sys.executable, "-m", "lrm"],
            "command": ["serve"],
            "environment": {
                "PATH": f"{Path(sys.executable).parent}:/usr/bin",
                "PYTHONPATH": str(TESTS),
                "LRM_PLUGINS": "equipment.widget_plugin",
            },
        }
        return {
            **dict.fromkeys(DAEMONS, daemon),
            "redis": {"ports": [f"127.0.0.1:{self.ports['redis']}:6379"]},
        }

    def compose(self, *args: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        argv = [*self._argv, *args]
        return subprocess.run(argv, env=self._environment, capture_output=True, text=True, timeout=timeout, check=False)

    def up(self) -> None:
        """The two commands at the top of compose.yaml."""
        with self._tokens_file.open("a") as tokens:
            made = subprocess.run(
                [*self._argv, *MAKE_TOKEN],
                env=self._environment,
                stdout=tokens,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
        assert made.returncode == 0, made.stderr
        self.token = TOKEN.findall(made.stderr)[0]
        done = self.compose(*UP, "--no-build")
        assert done.returncode == 0, done.stderr + self.compose("logs", "--tail=20").stdout

    def down(self) -> None:
        done = self.compose("down", "--volumes", "--timeout=1")
        assert done.returncode == 0, done.stderr
        assert self.engine.leftovers(f"com.docker.compose.project={self.project}") == []

    def container(self, service: str) -> Any:
        return self.engine.client.containers.get(f"{self.project}-{service}-1")

    def etcdctl(self, *args: str) -> str:
        code, output = self.container("etcd-1").exec_run(["etcdctl", "--endpoints=http://etcd-1:2379", *args])
        assert code == 0, output
        return output.decode()

    async def ask(
        self, daemon: str, method: str, path: str, body: Mapping[str, Any] | None = None, *, token: str | None = None
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        url = f"http://127.0.0.1:{self.ports[daemon]}{path}"
        timeout = aiohttp.ClientTimeout(total=15)
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.request(method, url, json=body) as reply,
        ):
            return reply.status, await (reply.json() if "json" in reply.content_type else reply.text())

    async def leaders(self, lock_name: str) -> list[str]:
        """The daemons that say of themselves that they lead."""
        found = []
        for daemon in DAEMONS:
            _, leader = await self.ask(daemon, "GET", "/api/status/leader")
            if any(lock["lock_name"] == lock_name and lock["is_leader"] for lock in leader["locks"]):
                found.append(daemon)
        return found


@pytest.fixture(scope="module")
def stack(engine: Engine, compose_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(engine, compose_program, tmp_path_factory.mktemp("compose"))
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


def test_three_healthy_members_are_one_cluster(stack: Stack) -> None:
    members = json.loads(stack.etcdctl("member", "list", "--write-out=json"))["members"]
    assert {member["name"] for member in members} == set(ETCDS)
    health = json.loads(stack.etcdctl("endpoint", "health", "--cluster", "--write-out=json"))
    assert [endpoint["health"] for endpoint in health] == [True, True, True]


async def test_redis_remembers_what_it_was_told_before_it_was_killed(stack: Stack) -> None:
    async with redis.Redis(port=stack.ports["redis"]) as client:
        assert (await client.config_get("appendonly")) == {"appendonly": "yes"}
        await client.set("kept", "1")
        stack.container("redis").kill()
        stack.container("redis").start()

        async def answers() -> bool:
            try:
                return bool(await client.ping())
            except (redis.ConnectionError, redis.BusyLoadingError):
                return False

        await until(answers, "Redis is back")
        assert await client.get("kept") == b"1"


async def test_what_one_daemon_is_told_all_of_them_show_and_one_acts_on(stack: Stack) -> None:
    assert (await stack.ask("lrm-1", "GET", WIDGETS, token="no such token"))[0] == 401
    assert (await stack.ask("lrm-1", "POST", WIDGETS, widget_document("w1", count=3)))[0] == 201
    for daemon in DAEMONS:

        async def shown(daemon: str = daemon) -> bool:
            status, widget = await stack.ask(daemon, "GET", f"{WIDGETS}/w1")
            assert status == 200
            return bool(widget["status"].get("phase") == "Ready")

        await until(shown, f"{daemon} shows the widget as reconciled")
    assert len(await stack.leaders("widgets")) == 1


async def test_a_stopped_daemon_ends_in_order_and_the_others_go_on(stack: Stack) -> None:
    (gone,) = await stack.leaders("widgets")
    left = [daemon for daemon in DAEMONS if daemon != gone]
    stack.container(gone).stop(timeout=40)
    assert stack.container(gone).attrs["State"]["ExitCode"] == 0
    assert (await stack.ask(left[0], "POST", WIDGETS, widget_document("w2", count=1)))[0] == 201

    async def reconciled() -> bool:
        return bool((await stack.ask(left[1], "GET", f"{WIDGETS}/w2"))[1]["status"].get("phase") == "Ready")

    await until(reconciled, "another daemon leads and has reconciled")
