"""The container runtime on an engine whose answers the test writes: what a real one shows only in a bad hour."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from controllers.containers.collector import Collector
from controllers.containers.runtime import ContainerRuntime
from controllers.instances.kind import INSTANCES, LabInstanceRequest, WorkerRef
from controllers.instances.phases import Conditions, Reasons
from controllers.instances.runtime import LabFailed, NotNow, Refused, State, WorkerLost
from controllers.instances.settings import InstanceSettings
from equipment.containers_world import registry_at
from equipment.scripted_engine import INSTALLATION, ScriptedEngine, scripted_engine
from equipment.waiting import until
from lrm.cache import Cache
from lrm.controller import Hints, Key
from lrm.election import StaticElection
from lrm.outside import OutsideHealth
from lrm.telemetry import Telemetry
from lrm.testing import VirtualClock
from storage.memory import MemoryStorage


@dataclass
class Scene:
    script: ScriptedEngine
    runtime: ContainerRuntime
    clock: VirtualClock
    health: OutsideHealth
    told: list[Key] = field(default_factory=list)
    """Hints."""
    events: list[tuple[str, str]] = field(default_factory=list)
    """Reasons and messages."""

    @property
    def ctx(self) -> Any:
        def record(_request: LabInstanceRequest, _type: str, reason: str, message: str) -> None:
            self.events.append((reason, message))

        events = SimpleNamespace(record=record)
        return SimpleNamespace(clock=self.clock, check_leading=lambda *_: None, events=events)

    @property
    def ups(self) -> tuple[float, bool]:
        """What metrics and health say of the engine."""
        telemetry = Telemetry()
        telemetry.observe(self.runtime.observe)
        lines = telemetry.exposition()[0].decode().splitlines()
        (gauge,) = (line for line in lines if line.startswith("lrm_engine_up"))
        (party,) = self.health.describe()
        assert bool(party["error"]) != party["ok"]
        return float(gauge.rpartition(" ")[2]), party["ok"]

    async def lose_stream(self) -> None:
        """The stream of events ends; nothing else is known of the engine."""
        assert self.runtime.mirror is not None
        mirror = self.runtime.mirror
        self.script.end_streams()
        await until(lambda: not mirror.current, "its loss is noticed")

    async def lose(self) -> None:
        """The engine does not answer any more."""
        assert self.runtime.mirror is not None
        mirror, self.script.answers["/info"] = self.runtime.mirror, (503, b"starting", "text/plain")
        self.script.end_streams()
        await until(lambda: not mirror.current and not self.health.describe()[0]["ok"], "its loss is noticed")

    async def exchange(self, engine: str) -> None:
        """Another engine takes this one's address."""
        self.script.id = engine
        self.script.containers.clear()
        self.script.end_streams()
        await self.follow()

    async def follow(self) -> None:
        async def step() -> bool:
            await self.clock.advance(1)
            told = self.runtime.told()
            return told is not None and told.id == self.script.id

        await until(step, f"{self.script.id} is followed")


@pytest.fixture
async def scene(server_dir: Path) -> AsyncIterator[Scene]:
    clock, hints = VirtualClock(), Hints()
    health = OutsideHealth(clock)
    async with (
        scripted_engine(server_dir) as (script, host),
        ContainerRuntime(InstanceSettings(docker_host=host), INSTALLATION, hints, clock, health=health) as runtime,
    ):
        scene = Scene(script, runtime, clock, health)
        hints.listen(scene.told.append)
        await scene.follow()
        yield scene


def running(engine: str = "engine-1", **spec: Any) -> LabInstanceRequest:
    """A lab that runs in the container `c`, if there is one."""
    request = LabInstanceRequest.model_validate(
        {
            "metadata": {"name": "lab", "namespace": "default", "uid": "uid"},
            "spec": {"labTemplate": "lab:1", "studentEmail": "ann@example.edu", "durationMinutes": 60, **spec},
        }
    ).thaw()
    request.status.phase, request.status.attempt = "Running", 1
    request.status.worker_ref = WorkerRef(kind="Engine", name="docker", uid=engine)
    return request


async def test_what_another_engine_has_says_nothing_of_a_lab(scene: Scene) -> None:
    """A wiped one, or that of another daemon's host: nothing is lost or made until the right one is back."""
    scene.script.put("c")
    await scene.exchange("engine-2")
    for step in (scene.runtime.provision, scene.runtime.look, scene.runtime.clean):
        with pytest.raises(NotNow, match=r"engine-1.*engine-2") as raised:
            await step(running(), scene.ctx)
        assert raised.value.reason == Reasons.WORKER_AWAY
    with pytest.raises(NotNow, match="same engine"):
        await anext(scene.runtime.logs(running()))
    with pytest.raises(LabFailed):
        await scene.runtime.look(running("engine-2"), scene.ctx)
    assert await scene.runtime.clean(running("engine-2"), scene.ctx)
    assert await scene.runtime.clean(running(""), scene.ctx), "placed before engines were told apart"
    await scene.exchange("engine-1")
    scene.script.put("c")
    assert (await scene.runtime.look(running(), scene.ctx)).state is State.RUNNING


@pytest.mark.parametrize("step", ["look", "clean"])
async def test_an_engine_that_changes_behind_its_address_proves_nothing(scene: Scene, step: str) -> None:
    """An address that moves to another machine leaves the stream of events silent for a while, not ended."""
    scene.script.id = "engine-2"
    with pytest.raises(NotNow, match="engine-2"):
        await getattr(scene.runtime, step)(running(), scene.ctx)


@pytest.mark.parametrize(
    "spec",
    [
        {"resources": {"pids": 4097}},
        {"labTemplate": {"image": "lab:1", "healthCheck": {"command": ["ok"], "intervalSeconds": 1}}},
    ],
)
async def test_more_than_the_settings_allow_is_refused_also_where_it_is_stored_already(
    scene: Scene, spec: dict[str, Any]
) -> None:
    with pytest.raises(Refused, match="spec"):
        await scene.runtime.prepare(running(**spec), scene.ctx)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("write /sys/fs/cgroup/cpu/x/cpu.cfs_quota_us: invalid argument", Refused),
        ("unable to start unit: cannot allocate memory", NotNow),
        ("mkdir /run/x: no space left on device", NotNow),
    ],
)
async def test_a_start_that_the_kernel_refuses_is_not_tried_for_ever(
    scene: Scene, said: str, error: type[Exception]
) -> None:
    scene.script.put("c", "created")
    await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
    message = f"failed to create task for container: OCI runtime create failed: {said}: unknown"
    answer = json.dumps({"message": message}).encode()
    scene.script.answers["/containers/c/start"] = (500, answer, "application/json")
    with pytest.raises(error, match=said.rpartition(": ")[2]):
        await scene.runtime.provision(running(), scene.ctx)


async def test_a_health_that_comes_and_goes_is_told_once_in_a_while(scene: Scene) -> None:
    lab, changes = running(), 0
    lab.status.set_condition(Conditions.READY, True, Reasons.RUNNING, "it runs", now=scene.clock.now())
    for n in range(300):  # half a minute of a check that flaps
        said = [{"Output": f"try {n}\n"}]  # is written where it begins to fail, not each time
        scene.script.put("c", Health={"Status": ("healthy", "unhealthy")[n % 2], "Log": said})
        await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
        seen = await scene.runtime.look(lab, scene.ctx)
        ready = lab.status.condition(Conditions.READY)
        assert ready is not None
        well = seen.state is State.RUNNING
        if (ready.status == "True") != well or (not well and ready.message != seen.message):
            changes += 1
            reason = Reasons.RUNNING if well else Reasons.UNHEALTHY
            lab.status.set_condition(Conditions.READY, well, reason, seen.message, now=scene.clock.now())
        await scene.clock.advance(0.1)
    assert changes == 2
    await scene.clock.advance(10)
    scene.script.put("c", Health={"Status": "healthy" if ready.status == "False" else "unhealthy"})
    await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
    seen = await scene.runtime.look(lab, scene.ctx)
    assert (seen.state is State.RUNNING) == (ready.status == "False"), "and what lasts is told"


async def test_a_check_that_fails_while_the_lab_is_made_is_one_event_with_what_it_said(scene: Scene) -> None:
    lab, words = running(), "connection \x1b[1mrefused\x1b[0m\n"
    lab.status.phase = "Provisioning"
    for n in range(5):
        scene.script.put("c", Health={"Status": "unhealthy", "Log": [{"Output": "first"}, {"Output": words}]})
        await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
        seen = await scene.runtime.provision(lab, scene.ctx)
        assert (seen.state, seen.trouble) == (State.STARTING, Reasons.UNHEALTHY), n
        lab.status.set_condition(Conditions.READY, False, seen.trouble, seen.message, now=scene.clock.now())
    assert scene.events == [(Reasons.UNHEALTHY, "it runs, and its health check fails: connection refused")]


async def test_an_engine_that_is_away_is_told_of_after_a_while_and_its_return_too(scene: Scene) -> None:
    scene.script.put("c", StartedAt="2025-12-31T23:00:00Z")
    await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
    lab = running()
    lab.status.set_condition(Conditions.READY, True, Reasons.RUNNING, "it runs", now=scene.clock.now())
    assert scene.ups == (1, True)
    await scene.lose()
    assert scene.ups == (0, False)
    seen = await scene.runtime.look(lab, scene.ctx)
    assert (seen.state, seen.message) == (State.RUNNING, "it runs"), "a restart of the engine passes unnoticed"
    assert seen.again is not None
    assert 0 < seen.again <= 15
    await scene.clock.advance(14)
    assert scene.told == []
    await scene.clock.advance(1)
    assert scene.told == [("default", "lab")], "it is woken, and need not ask"
    reasons = set()
    for _ in range(3):
        with pytest.raises(NotNow) as raised:
            await scene.runtime.look(lab, scene.ctx)
        assert (raised.value.reason, raised.value.again) == (Reasons.ENGINE_UNAVAILABLE, 60.0)
        reasons.add(str(raised.value))
        await scene.clock.advance(10)
        scene.script.answers["/info"] = (500, b'{"message":"another reason each time"}', "application/json")
    assert len(reasons) == 1, "and costs one write"
    del scene.script.answers["/info"]
    await scene.follow()
    assert scene.told == [("default", "lab")] * 2
    assert (await scene.runtime.look(lab, scene.ctx)).state is State.RUNNING
    assert scene.ups == (1, True)


async def test_an_engine_that_comes_for_moments_is_away_and_costs_no_writes(scene: Scene) -> None:
    scene.script.put("c", StartedAt="2025-12-31T23:00:00Z")
    await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
    why = set()

    async def comes() -> None:
        async def step() -> int:
            await scene.clock.advance(1)
            return scene.script.listeners

        if held := scene.script.held.pop("/info", None):
            held.set()
        scene.script.answers.pop("/info", None)
        await until(step, "its stream begins")

    async def stays() -> float:
        began = scene.clock.monotonic()
        await scene.follow()
        return scene.clock.monotonic() - began

    await scene.lose()
    for _ in range(3):
        await scene.clock.advance(16)
        with pytest.raises(NotNow) as raised:
            await scene.runtime.look(running(), scene.ctx)
        why.add(str(raised.value))
        await comes()
        scene.script.hold("/info")
        scene.script.end_streams()
        await until(lambda: "ended its stream" in scene.health.describe()[0]["error"], "its loss is noticed")
    assert (len(scene.told), len(why)) == (1, 1)
    await comes()
    assert await stays() >= 4, "a second may have passed before its stream was seen"
    assert (len(scene.told), scene.ups) == (2, (1, True))
    await scene.lose()
    await scene.clock.advance(16)
    assert len(scene.told) == 3
    await comes()
    assert await stays() >= 9, "twice as long, soon after another absence"
    assert len(scene.told) == 4


async def test_an_absence_is_told_of_also_while_a_question_hangs(scene: Scene) -> None:
    scene.script.put("c")
    await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
    held = scene.script.hold("/info")
    await scene.lose_stream()
    await scene.clock.advance(16)
    assert scene.told == [("default", "lab")]
    held.set()


@pytest.mark.parametrize(
    ("code", "finished", "other", "lost"),
    [
        pytest.param(255, "00:00:00.1", None, True, id="nobody was there to see its end"),
        pytest.param(137, "00:00:00.1", None, True, id="the engine that came back has killed it"),
        pytest.param(143, "00:00:00.1", None, True, id="the engine that went has ended it"),
        pytest.param(137, "00:00:00.1", "2026-01-01T00:00:00.11Z", True, id="what runs began later"),
        pytest.param(
            137, "00:00:00.1", "2025-12-31T23:00:00Z", False, id="another one has outlived it: only the stream was cut"
        ),
        pytest.param(3, "00:00:00.1", None, False, id="its own code"),
        pytest.param(137, "00:00:09.0", None, False, id="the engine was heard when it was killed"),
    ],
)
async def test_a_container_that_ended_with_its_engine_has_not_failed(
    scene: Scene, code: int, finished: str, other: str | None, lost: bool
) -> None:
    """It begins again where that is wanted, as after the loss of a worker."""
    began = {"StartedAt": "2025-12-31T23:00:00Z"}
    scene.script.put("c", **began)
    await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
    await scene.lose()
    del scene.script.answers["/info"]
    scene.script.put("c", "exited", ExitCode=code, FinishedAt=f"2026-01-01T{finished}Z", **began)
    if other is not None:
        scene.script.put("other", StartedAt=other)
        scene.script.containers["other"]["Config"]["Labels"]["lrm/uid"] = "other"
    await scene.follow()
    with pytest.raises(WorkerLost if lost else LabFailed) as raised:
        await scene.runtime.look(running(), scene.ctx)
    assert (raised.value.reason == Reasons.ENGINE_RESTARTED) == lost
    assert str(code) in str(raised.value)
    assert ("most likely from outside" in str(raised.value)) == (not lost and code != 3)
    assert raised.value.last_log == "hello\n"


async def test_a_log_that_cannot_be_read_holds_up_no_end(scene: Scene) -> None:
    scene.script.put("c", "exited", ExitCode=3)
    await scene.runtime.mirror.refresh("c")  # type: ignore[union-attr]
    logs = "/containers/c/logs"
    scene.script.answers[logs] = (500, b'{"message":"the log driver cannot read"}', "application/json")
    with pytest.raises(LabFailed, match=r"exit code 3$") as raised:
        await scene.runtime.look(running(), scene.ctx)
    assert raised.value.last_log is None
    scene.script.hold(logs)
    looking = asyncio.create_task(scene.runtime.look(running(), scene.ctx))
    await until(lambda: scene.script.asked.count(logs) == 2, "it is asked for")
    await scene.clock.advance(2)
    with pytest.raises(LabFailed):
        await looking


async def test_what_cannot_be_removed_keeps_nothing_else_from_being_collected(scene: Scene) -> None:
    store, registry = MemoryStorage(), registry_at()
    cache = Cache(store, registry, scene.clock)
    engine = scene.runtime.engine
    assert engine is not None
    term = await StaticElection(store, scene.clock, root="/lrm", lock_name=INSTANCES, identity="test").acquire()
    for container in "abc":
        scene.script.put(container)
    scene.script.answers["/containers/a"] = (500, b'{"message":"the device is busy"}', "application/json")
    collector = Collector(engine, cache, scene.clock, observe_only=False)
    following = asyncio.create_task(cache.run())
    await cache.wait_synced()
    leading = asyncio.create_task(collector.run(term))

    async def step() -> bool:
        await scene.clock.advance(10)
        return "the device is busy" in collector.error

    await until(step, "it has tried to remove what nobody claims")
    for task in (leading, following):
        task.cancel()
    await asyncio.gather(leading, following, return_exceptions=True)
    assert list(scene.script.containers) == ["a"]
    assert collector.describe()["removed"] == 2


async def _until_cleaned(scene: Scene) -> None:
    async def step() -> bool:
        await scene.clock.advance(1)
        try:
            return await scene.runtime.clean(running(), scene.ctx)
        except NotNow:
            return False

    await until(step, "nothing is left")


async def test_a_stop_that_has_not_reached_the_engine_is_asked_for_again(scene: Scene) -> None:
    """Else its container would be killed without its grace."""
    scene.script.put("c")
    scene.script.answers["/containers/c/stop"] = (503, b'{"message":"starting"}', "application/json")

    async def asked_often() -> bool:
        await scene.clock.advance(1)
        assert not await scene.runtime.clean(running(), scene.ctx)
        return scene.script.asked.count("/containers/c/stop") == 3

    await until(asked_often, "it is asked to end again and again")
    assert "c" in scene.script.containers
    scene.script.answers["/containers/c/stop"] = (204, b"", "application/json")
    await _until_cleaned(scene)
    assert not scene.script.containers


async def test_what_the_engine_cannot_stop_is_killed(scene: Scene) -> None:
    scene.script.put("c")
    scene.script.answers["/containers/c/stop"] = (500, b'{"message":"it does not listen"}', "application/json")
    await _until_cleaned(scene)
    assert scene.script.asked.count("/containers/c/stop") == 1
