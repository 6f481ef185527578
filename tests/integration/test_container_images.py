"""Images pulled by a real engine from a registry of ours, and what a registry may answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from controllers.containers.images import TRIES
from controllers.instances.kind import LabInstanceRequest
from controllers.instances.phases import Reasons
from controllers.instances.runtime import NotNow, Refused, State
from equipment import fetch_docker
from equipment.containers_world import ContainersWorld, containers_world
from equipment.engine import Engine
from equipment.image_registry import ImageRegistry, image_registry
from equipment.waiting import until


@pytest.fixture
async def registry(engine: Engine) -> AsyncIterator[ImageRegistry]:
    async with image_registry(fetch_docker.bring_engine() / "busybox") as registry:
        yield registry
        for image in engine.client.images.list():
            for tag in image.tags:
                if tag.startswith(registry.host):
                    engine.client.images.remove(tag, force=True)


@pytest.fixture
async def world(engine: Engine) -> AsyncIterator[ContainersWorld]:
    async with containers_world(engine) as world:
        assert world.runtime._images is not None
        world.runtime._images._retry = 0.05
        yield world


def fresh(registry: ImageRegistry) -> str:
    """An image that the engine cannot have yet."""
    return f"{registry.host}/lab-{uuid.uuid4().hex[:8]}:1"


async def verdict(world: ContainersWorld, request: LabInstanceRequest) -> Refused:
    """Step until it is refused."""

    async def step() -> Refused | None:
        try:
            seen = await world.runtime.provision(request, world.ctx)
        except NotNow:
            return None
        except Refused as refusal:
            return refusal
        assert seen.state is State.STARTING
        return None

    refusal = await until(step, "it is refused", timeout=60)
    assert refusal is not None
    return refusal


async def test_many_labs_wait_for_one_pull_that_takes_its_time_and_are_woken_by_its_end(
    world: ContainersWorld, registry: ImageRegistry
) -> None:
    image = fresh(registry)
    registry.answering.clear()
    requests = [world.request(f"lab{n}", image=image) for n in range(3)]
    for request in requests:
        seen = await world.runtime.provision(request, world.ctx)
        assert (seen.state, seen.again) == (State.STARTING, None)
        assert "being pulled" in seen.message
    world.told.clear()
    registry.answering.set()
    await until(lambda: all(world.hinted(r) for r in requests), "all are woken", timeout=60)
    for request in requests:
        await world.provision(request)
    name = image.partition("/")[2].partition(":")[0]
    assert registry.manifests[name] <= 2, "one pull: a HEAD and a GET"
    assert len(world.told) >= 3
    await asyncio.gather(*(world.clean(request) for request in requests))


@pytest.mark.parametrize(
    ("name", "policy", "expected"),
    [
        pytest.param("missing:1", "IfNotPresent", (Reasons.IMAGE_NOT_FOUND, "manifest unknown"), id="no such image"),
        pytest.param("secret:1", "IfNotPresent", (Reasons.IMAGE_PULL_FAILED, "denied"), id="not for us"),
        pytest.param("any:1", "Never", (Reasons.IMAGE_NOT_FOUND, "not to be pulled"), id="not here, never pulled"),
    ],
)
async def test_what_a_registry_refuses_is_refused_with_its_words_and_leaves_nothing(
    world: ContainersWorld, registry: ImageRegistry, name: str, policy: str, expected: tuple[str, str]
) -> None:
    request = world.request(image=f"{registry.host}/{name}", pullPolicy=policy)
    refusal = await verdict(world, request)
    reason, words = expected
    assert refusal.reason == reason
    assert words in str(refusal)
    assert world.engine.leftovers(f"lrm/uid={request.uid}") == []


async def test_a_registry_that_fails_is_tried_again_and_given_up_but_not_for_those_who_come_later(
    world: ContainersWorld, registry: ImageRegistry
) -> None:
    image = fresh(registry)
    registry.broken = True
    first = world.request("first", image=image)
    refusal = await verdict(world, first)
    assert refusal.reason == Reasons.IMAGE_PULL_FAILED
    assert f"given up after {TRIES} tries" in str(refusal)
    registry.broken = False
    second = world.request("second", image=image)
    await world.provision(second)
    await world.clean(second)


async def test_always_pulls_anew_for_each_lab(world: ContainersWorld, registry: ImageRegistry) -> None:
    image = fresh(registry)
    name = image.partition("/")[2].partition(":")[0]
    asked = []
    for n in range(2):
        request = world.request(f"lab{n}", image=image, pullPolicy="Always")
        await world.provision(request)
        asked.append(registry.manifests[name])
        await world.clean(request)
    assert 0 < asked[0] < asked[1]
