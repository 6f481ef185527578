"""Random lives of a lab instance: whatever happens, its steps are of the table, and nothing is doubled or left."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controllers.instances.runtime import LabFailed
from equipment.instances_scene import (
    InstancesScene,
    at_rest,
    away,
    check_history,
    instances_scene,
)
from lrm.errors import Forbidden, Invalid
from lrm.resource import RETRY_ANNOTATION

FATES = ("Completed", "Failed")


EVENTS = st.sampled_from(
    [
        "tick",
        "minute",
        "away",
        "back",
        "lose",
        "another",
        "stop",
        "extend",
        "retry",
        "delete",
        "end",
        "fail",
        "mend",
        "die",
        "full",
    ]
)


async def _happen(scene: InstancesScene, event: str, count: int) -> None:
    """One thing that may happen to an instance, its worker, or whoever leads."""
    outside, steps = scene.outside, ("prepare", "provision", "look", "clean")
    gone = (found := await scene.find()) is None or found.deleting
    changes: dict[str, dict[str, Any]] = {
        "stop": {"desired_phase": "Stopped"},
        "extend": {"duration_minutes": 5 + count},
    }
    if event == "tick":
        await scene.clock.advance(3)
    elif event == "minute":
        await scene.clock.advance(61)
    elif event == "away":
        outside.troubles |= {step: away() for step in steps}
    elif event == "fail":
        outside.troubles |= {
            step: LabFailed("ContainerFailed", "exit code 1", exit_code=1) for step in ("provision", "look")
        }
    elif event in ("back", "mend"):
        outside.troubles.clear()
    elif event == "lose":
        name = next(iter(scene.places.slots), None)
        if name is not None:
            scene.places.slots.pop(name)
            outside.lose(name)
    elif event == "another":
        scene.places.slots[f"w{count}"] = 1
    elif event == "full":
        scene.places.slots.clear()
    elif event == "end":
        for lab in outside.labs:
            lab.state = "ended"
    elif event == "die":
        await scene.stop()
        await scene.lead()
    elif event == "delete" and not gone:
        await scene.delete()
    elif event in changes and not gone:
        with suppress(Invalid, Forbidden):  # what the rules refuse is refused, whatever else happens
            await scene.change(**changes[event])
    elif event == "retry" and not gone:
        await scene.annotate(RETRY_ANNOTATION, str(count))
    scene.hints.tell(("default", "a"))


async def _live_through(events: list[str], policy: str) -> None:
    """Its steps are of the table, and it is never doubled, without a place, or left behind."""
    async with instances_scene(slots={"w0": 1}, instances_retry_delay=2) as scene:
        made = await scene.make(durationMinutes=5, restartPolicy=policy)
        for count, event in enumerate(events, 1):
            await _happen(scene, event, count)
            assert len(scene.running_now()) <= 1, event
            if scene.running_now():
                assert made.uid in scene.places.held, f"after {event} it is outside without a place"
            found = await scene.find()
            if found is not None:
                check_history(found)
        scene.outside.troubles.clear()
        scene.places.slots["last"] = 1
        for _ in range(40):
            await scene.clock.advance(300)
            found = await scene.find()
            if found is None or found.status.phase in FATES:
                break
        await scene.clock.advance(60)
        found = await scene.find()
        assert found is None or found.status.phase in FATES
        at_rest(scene)


LIVES = given(events=st.lists(EVENTS, max_size=12), policy=st.sampled_from(["Never", "OnFailure"]))


UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=12, derandomize=True, **UNHURRIED)
@LIVES
async def test_whatever_happens_its_steps_are_of_the_table_and_nothing_is_doubled_or_left(
    events: list[str], policy: str
) -> None:
    await _live_through(events, policy)


@pytest.mark.soak
@pytest.mark.timeout(900)
@settings(max_examples=400, **UNHURRIED)
@LIVES
async def test_whatever_happens_in_many_lives(events: list[str], policy: str) -> None:
    await _live_through(events, policy)
