"""The mirror of an engine: what it believes, in orders of answers and events that a real engine shows rarely."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controllers.containers.engine import Engine
from controllers.containers.errors import (
    EngineConflict,
    EngineError,
    EngineFailed,
    EngineNotFound,
    EngineRefused,
    EngineUnavailable,
    of_status,
)
from controllers.containers.mirror import Mirror
from equipment.scripted_engine import INSTALLATION, ScriptedEngine, scripted_engine
from equipment.waiting import until
from lrm.controller import Hints, Key
from lrm.testing import VirtualClock


@dataclass
class Scene:
    script: ScriptedEngine
    engine: Engine
    mirror: Mirror
    clock: VirtualClock
    told: list[Key]

    def states(self) -> list[str]:
        return [c.status for c in self.mirror.containers("uid")]

    async def advance_until(self, condition: object, what: str) -> None:
        """Let virtual time pass until something real has happened."""

        async def step() -> bool:
            await self.clock.advance(1)
            return bool(condition())  # type: ignore[operator]

        await until(step, what)


@pytest.fixture
async def scene(server_dir: Path) -> AsyncIterator[Scene]:
    clock, hints, told = VirtualClock(), Hints(), list[Key]()
    hints.listen(told.append)
    async with (
        scripted_engine(server_dir) as (script, host),
        Engine(host, clock, INSTALLATION) as engine,
        asyncio.TaskGroup() as tasks,
    ):
        mirror = Mirror(engine, clock, hints)
        running = tasks.create_task(mirror.run())
        yield Scene(script, engine, mirror, clock, told)
        running.cancel()


async def test_nothing_is_said_before_the_first_list_was_read_to_its_end(scene: Scene) -> None:
    scene.script.put("a")
    read = scene.script.hold("/containers/a/json")
    await until(lambda: "/containers/a/json" in scene.script.asked, "it is listed")
    with pytest.raises(EngineUnavailable):
        scene.mirror.containers("uid")
    read.set()
    await scene.mirror.wait_current()
    assert scene.states() == ["running"]
    assert scene.mirror.info is not None
    assert scene.mirror.info.cpus == 4


async def test_a_read_that_is_late_brings_nothing_back(scene: Scene) -> None:
    """A container dies and is removed while its reading is on the way: it is gone, whatever the reading says."""
    await scene.mirror.wait_current()
    scene.script.put("a")
    read = scene.script.hold("/containers/a/json")
    await scene.script.tell("start", "a")
    await until(lambda: scene.script.asked.count("/containers/a/json") == 1, "it is read")
    del scene.script.containers["a"]
    await scene.script.tell("destroy", "a")
    scene.script.put("b")
    await scene.script.tell("start", "b")
    await until(lambda: scene.states() == ["running"], "what comes after the removal is known")
    read.set()
    await until(lambda: "a" not in scene.mirror._entries, "the reading has ended")
    assert [c.id for c in scene.mirror.containers("uid")] == ["b"]


async def test_what_happens_during_a_read_is_read_again(scene: Scene) -> None:
    await scene.mirror.wait_current()
    scene.script.put("a")
    read = scene.script.hold("/containers/a/json")
    await scene.script.tell("start", "a")
    await until(lambda: scene.script.asked.count("/containers/a/json") == 1, "it is read")
    scene.script.put("a", "exited", ExitCode=3)
    for _ in range(5):
        await scene.script.tell("die", "a")
    scene.script.put("b")
    await scene.script.tell("start", "b")
    await until(lambda: "b" in {c.id for c in scene.mirror.containers("uid")}, "all was heard")
    read.set()
    await until(lambda: "exited" in scene.states(), "the end is known")
    assert scene.script.asked.count("/containers/a/json") == 2, "five events, one more reading"
    assert ("default", "lab") in scene.told


async def test_a_list_that_is_older_than_a_container_does_not_remove_it(scene: Scene) -> None:
    await scene.mirror.wait_current()
    listed = scene.script.hold("/containers/json")
    before = scene.script.asked.count("/containers/json")
    comparing = asyncio.create_task(scene.mirror._compare())
    await until(lambda: scene.script.asked.count("/containers/json") > before, "the list is asked for")
    scene.script.put("a")
    await scene.mirror.refresh("a")
    listed.set()
    await comparing
    assert scene.states() == ["running"]
    await scene.mirror._compare()
    del scene.script.containers["a"]
    await scene.mirror._compare()
    assert scene.states() == [], "a later list that lacks it does"


@pytest.mark.parametrize("line", [b"{not json", b'{"Action": "start"}', b"[]"])
async def test_a_stream_that_makes_no_sense_is_given_up_and_a_new_one_followed(scene: Scene, line: bytes) -> None:
    scene.script.put("a")
    await scene.mirror.wait_current()
    await until(lambda: scene.script.listeners == 1)
    await scene.script.say(line)
    await until(lambda: not scene.mirror.current, "it is given up")
    scene.script.put("a", "exited")
    scene.script.end_streams()
    await scene.advance_until(lambda: scene.mirror.current, "another one is followed")
    assert scene.states() == ["exited"]


async def test_an_engine_that_is_away_for_long_is_told_of_once_and_its_return_too(scene: Scene) -> None:
    """A restart of the engine wakes nobody whose container has not changed."""
    scene.script.put("a")
    await scene.mirror.wait_current()
    scene.told.clear()
    scene.script.end_streams()
    await until(lambda: not scene.mirror.current, "its end is noticed")
    await scene.advance_until(lambda: scene.mirror.current, "it is back soon")
    assert scene.told == []
    scene.script.answers["/info"] = (503, b"starting", "text/plain")
    scene.script.end_streams()
    await until(lambda: not scene.mirror.current, "it is away")
    await scene.advance_until(lambda: scene.told, "its lab is told")
    assert scene.told == [("default", "lab")]
    del scene.script.answers["/info"]
    await scene.advance_until(lambda: scene.mirror.current, "it is back")
    assert scene.told == [("default", "lab")] * 2


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, b'{"message": "No such container"}', EngineNotFound),
        (409, b'{"message": "in progress"}', EngineConflict),
        (403, b'{"message": "network lrm-a has active endpoints"}', EngineConflict),
        (400, b'{"message": "invalid"}', EngineRefused),
        (500, b'{"message": "driver failed"}', EngineFailed),
        (503, b'{"message": "starting"}', EngineUnavailable),
        (500, b'{"odd": 1}', EngineUnavailable),
        (200, b"[]", EngineUnavailable),
        (200, b"{}", EngineUnavailable),
    ],
)
async def test_whatever_is_answered_is_one_of_our_errors(
    scene: Scene, status: int, body: bytes, error: type[EngineError]
) -> None:
    await scene.mirror.wait_current()
    scene.script.answers["/containers/x/json"] = (status, body, "application/json")
    with pytest.raises(error):
        await scene.engine.inspect("x")


def test_a_connection_that_fails_is_told_without_the_words_of_a_library() -> None:
    """It says `ssl:default` of every connection, also where no TLS is spoken."""
    said = "Cannot connect to host docker:80 ssl:default [Connection refused]"
    assert str(of_status(900, said)) == "Cannot connect to host docker:80 [Connection refused]"


async def test_an_answer_that_does_not_come_is_unavailable_at_its_deadline(scene: Scene) -> None:
    await scene.mirror.wait_current()
    scene.script.put("x")
    scene.script.hold("/containers/x/json")
    asking = asyncio.create_task(scene.engine.inspect("x"))
    await until(lambda: "/containers/x/json" in scene.script.asked, "it is asked")
    await scene.clock.advance(31)
    with pytest.raises(EngineUnavailable, match="in time"):
        await asking
