"""Work between two steps, and a runtime without an engine."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from controllers.containers.chores import Chores
from controllers.containers.runtime import ContainerRuntime
from controllers.instances.kind import LabInstanceRequest
from controllers.instances.phases import Reasons
from controllers.instances.runtime import NotNow
from controllers.instances.settings import InstanceSettings
from equipment.waiting import until
from lrm.controller import Hints
from lrm.testing import VirtualClock


async def test_one_piece_of_work_for_each_key_at_a_time_and_its_end_is_told_when_another_may_begin() -> None:
    done, told, go = [], [], asyncio.Event()

    async def work() -> None:
        await go.wait()
        done.append(1)

    async with Chores() as chores:
        for _ in range(3):
            chores.begin("a", work, then=lambda: told.append(chores.busy("a")))
        chores.begin("b", work)
        assert chores.busy("a")
        go.set()
        await until(lambda: told)
        assert told == [False]
        await until(lambda: not chores.busy("b"))
        assert len(done) == 2
        chores.begin("a", work)
        await until(lambda: len(done) == 3)


async def test_a_defect_costs_its_own_work_and_the_end_cancels_what_is_in_hand() -> None:
    cancelled = asyncio.Event()

    async def fails() -> None:
        raise KeyError("a mistake of ours")

    async def lasts() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with capture_logs() as logs:
        async with Chores() as chores:
            chores.begin("fails", fails)
            chores.begin("lasts", lasts)
            await until(lambda: not chores.busy("fails"))
            assert chores.busy("lasts")
    assert cancelled.is_set()
    assert [entry["event"] for entry in logs] == ["containers.chore_defect"]


async def test_without_an_engine_in_the_settings_nothing_has_room_and_every_step_says_why() -> None:
    request = LabInstanceRequest.model_validate(
        {
            "metadata": {"name": "lab", "namespace": "default", "uid": "u-1"},
            "spec": {"labTemplate": "lab:1", "studentEmail": "ann@example.edu", "durationMinutes": 60},
        }
    )
    async with ContainerRuntime(InstanceSettings(), "ours", Hints(), VirtualClock()) as runtime:
        assert runtime.told() is None
        assert runtime.engine is None
        for step in (runtime.provision, runtime.look, runtime.clean):
            with pytest.raises(NotNow) as told:
                await step(request, None)  # type: ignore[operator]
            assert told.value.reason == Reasons.ENGINE_UNAVAILABLE
        with pytest.raises(NotNow):
            await anext(runtime.logs(request))
