"""Finalizers: a lab made of three parts is taken down step by step, and is gone only when every part is.

The first half of this file is a plug-in as you would write it: a kind, and three controllers that each hold a
finalizer on it. The second half runs it in a real daemon against a real etcd and checks what can be seen from outside.
Try `python examples/demo_finalizers.py --self-contained`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
from pydantic import Field

from demo_stage import Daemon, NotShown, Stage, Story, arguments, play
from lrm.controller import Context, Controller, Result
from lrm.errors import RetryLater
from lrm.kind import Column, Kind
from lrm.model import Model
from lrm.plugin import Plugin, PluginContext
from lrm.queue import BACKOFF_FIRST, BACKOFF_SPREAD
from lrm.resource import Resource, Status
from lrm.settings import LrmSettings


class StackSpec(Model):
    """What a person asks for."""

    nodes: int = Field(1, ge=1, le=20)


class StackStatus(Status):
    """What exists of it; each controller owns the field of its part."""

    container: str = ""
    allocation: str = ""
    network: str = ""


class Stack(Resource[StackSpec, StackStatus]):
    """A lab that needs a network, an allocation of memory, and a container that stands on both."""

    api_version: str = "demo.neuroglia.io/v1"
    kind: str = "Stack"


PARTS = ("container", "allocation", "network")
"""In the order in which they are taken down."""

STACKS: Kind[Stack] = Kind(
    model=Stack,
    plural="stacks",
    singular="stack",
    columns=(Column("Phase", lambda s: s.status.phase),),
    transitions={"Pending": frozenset({"Ready"})},
    default_owner="container",
    status_owners={part: part for part in PARTS},
)


def finalizer(part: str) -> str:
    return f"demo.neuroglia.io/{part}"


class World:
    """A folder that stands for a container engine, a scheduler and a switch: one file for each thing that exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def thing(self, part: str, stack: str) -> Path:
        return self.folder / f"{part}-{stack}"

    def refusals(self, stack: str) -> Path:
        """How often the switch will still refuse to give a network back."""
        return self.folder / f"busy-{stack}"

    def remove(self, part: str, stack: str) -> None:
        """Fine when it is gone already. Raises `RetryLater` while the switch is busy."""
        if part == "network":
            with (self.folder / "requests").open("a") as requests:
                requests.write(f"{stack} {time.monotonic()}\n")
            busy = self.refusals(stack)
            left = int(busy.read_text()) if busy.exists() else 0
            if left:
                busy.write_text(str(left - 1))
                raise RetryLater(f"the switch is busy and keeps the network of {stack}")
        self.thing(part, stack).unlink(missing_ok=True)


class Part(Controller[Stack]):
    """Makes its part of every stack; on deletion takes it down once what stands on it is gone."""

    model = Stack

    def __init__(self, world: World, name: str, after: str = "") -> None:
        self.name = self.lock_name = name
        self.finalizer = finalizer(name)
        self._world = world
        self._after = after

    async def reconcile(self, resource: Stack, ctx: Context) -> Result:
        """The finalizer is on the object already, so nothing that is made here can be forgotten."""
        ctx.check_leading()
        thing = self._world.thing(self.name, resource.name)
        thing.touch()

        def observe(stack: Stack) -> None:
            setattr(stack.status, self.name, thing.name)
            if self.name == "container" and stack.status.allocation and stack.status.network:
                stack.status.enter("Ready", "AllParts", ctx.clock.now())

        await ctx.client.update_status(resource, observe)
        return Result.done()

    async def finalize(self, resource: Stack, ctx: Context) -> Result:
        """`done` removes our finalizer; an error keeps it, and this is called again with growing delay."""
        if self._after and finalizer(self._after) in resource.metadata.finalizers:
            return Result.after(30)  # the removal of that finalizer is a change, which wakes us at once
        ctx.check_leading()
        self._world.remove(self.name, resource.name)
        return Result.done()


class StackSettings(LrmSettings):
    """Read from the environment, like all settings."""

    demo_world: Path = Field(Path(), description="Folder that stands for the world outside.")


@asynccontextmanager
async def controllers(context: PluginContext) -> AsyncIterator[Sequence[Controller[Any]]]:
    """Where real controllers open and close their clients."""
    world = World(context.settings.demo_world)
    yield (Part(world, "container"), Part(world, "allocation", "container"), Part(world, "network", "allocation"))


plugin = Plugin(name="stacks", kinds=(STACKS,), controllers=controllers, settings=StackSettings)


API = "/apis/demo.neuroglia.io/v1/namespaces/default/stacks"


async def tell(story: Story, stage: Stage) -> None:
    """See the module; raises `NotShown`."""
    world = World(stage.folder / "world")
    world.folder.mkdir(parents=True, exist_ok=True)
    story.chapter("1. A daemon with this file as its plug-in")
    daemon = stage.daemon("lrm", LRM_PLUGINS="demo_finalizers", LRM_LEADER="static", LRM_DEMO_WORLD=str(world.folder))
    daemon.start()
    await daemon.ready()
    story.line(f"ready at {daemon.api.base_url}, root {stage.root}")

    await three_finalizers(story, daemon, world)
    await step_by_step(story, daemon, world)
    await killed_in_the_middle(story, daemon, world)


async def three_finalizers(story: Story, daemon: Daemon, world: World) -> None:
    story.chapter("2. POST a Stack: three controllers make its parts, each under a finalizer of its own")
    stack = await make(story, daemon, "ccna")
    held = stack["metadata"]["finalizers"]
    for name in held:
        story.line(f"finalizer {name}")
    story.check("three finalizers of three controllers are on one resource", sorted(held) == finalizers(PARTS), held)
    story.check("container, allocation and network exist", things(world, "ccna") == set(PARTS), things(world, "ccna"))


async def step_by_step(story: Story, daemon: Daemon, world: World) -> None:
    story.chapter("3. DELETE it, while the switch refuses twice to give the network back")
    world.refusals("ccna").write_text("2")
    resource_version = (await daemon.get(f"{API}/ccna"))["metadata"]["resourceVersion"]
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(follow_deletion(story, daemon, world, "ccna", resource_version))
        answer = (await daemon.api.delete(f"{API}/ccna")).raise_for_status().json()
        since = answer["metadata"].get("deletionTimestamp")
        story.check("DELETE answers with the resource, marked with a deletionTimestamp", since, answer)
    steps = watching.result()
    story.check(
        "finalizers went one by one: container, then allocation, then network",
        steps == [finalizers(PARTS[i:]) for i in range(4)],
        steps,
    )
    tries = [float(line.split()[1]) for line in (world.folder / "requests").read_text().splitlines()]
    waits = [later - earlier for earlier, later in pairwise(tries)]
    least = BACKOFF_FIRST * (1 - BACKOFF_SPREAD)
    story.check(
        "the failing step was tried again with growing delay: " + ", ".join(f"+{w:.2f} s" for w in waits),
        len(waits) == 2 and waits[0] >= least and waits[1] >= 2 * least,
        waits,
    )
    story.check("nothing of it is left outside", not things(world, "ccna"), things(world, "ccna"))
    gone = (await daemon.api.get(f"{API}/ccna")).status_code
    story.check("and only now it is gone: GET answers 404", gone == 404, gone)


async def killed_in_the_middle(story: Story, daemon: Daemon, world: World) -> None:
    story.chapter("4. DELETE another one, and kill -9 the daemon in the middle")
    await make(story, daemon, "bgp")
    world.refusals("bgp").write_text("1000000")
    (await daemon.api.delete(f"{API}/bgp")).raise_for_status()

    async def half_done() -> Any:
        stack = await daemon.get(f"{API}/bgp")
        return stack if stack["metadata"]["finalizers"] == finalizers(["network"]) else None

    stack = await story.eventually("a deletion that waits for the network only", half_done)
    story.check("container and allocation are gone, the network is not", things(world, "bgp") == {"network"})
    story.check(
        "with one finalizer left it is still there, marked for deletion", stack["metadata"].get("deletionTimestamp")
    )
    counts = await daemon.get("/api/status/finalizers")
    story.line(
        "/api/status/finalizers: " + ", ".join(f"{counts[n]} {n}" for n in ("pending", "processing", "completed"))
    )
    daemon.kill()
    story.line("kill -9")
    world.refusals("bgp").unlink()
    daemon.start()
    await daemon.ready()
    story.line(f"the daemon is back (pid {daemon.process.pid})")

    async def gone() -> bool:
        return (await daemon.api.get(f"{API}/bgp")).status_code == 404

    await story.eventually("the killed daemon's deletion finished by its successor", gone)
    story.claim("the deletion was finished after the restart: GET answers 404")
    story.check("nothing of it is left outside", not things(world, "bgp"), things(world, "bgp"))


async def make(story: Story, daemon: Daemon, name: str) -> Any:
    """A stack that is Ready."""
    body = {"apiVersion": "demo.neuroglia.io/v1", "kind": "Stack", "metadata": {"name": name}, "spec": {"nodes": 2}}
    (await daemon.api.post(API, json=body)).raise_for_status()

    async def ready() -> Any:
        stack = await daemon.get(f"{API}/{name}")
        return stack if stack["status"]["phase"] == "Ready" else None

    stack = await story.eventually(f"the stack {name} Ready", ready)
    story.line(f"stack/{name} is Ready: " + ", ".join(stack["status"][part] for part in PARTS))
    return stack


async def follow_deletion(story: Story, daemon: Daemon, world: World, name: str, after: str) -> list[list[str]]:
    """The finalizers left at each step of a deletion, as a watch tells them; at each the world is looked at, too."""
    steps: list[list[str]] = []
    query = {"watch": "true", "resourceVersion": after, "timeoutSeconds": "20"}
    async with daemon.api.stream("GET", API, params=query) as reply:
        async for line in reply.raise_for_status().aiter_lines():
            event = orjson.loads(line)
            left = [] if event["type"] == "DELETED" else event["object"]["metadata"].get("finalizers", [])
            if event["object"]["metadata"].get("name") != name or (steps and left == steps[-1]):
                continue
            steps.append(sorted(left))
            outside = things(world, name)
            story.line(f"{event['type']:<9} finalizers: {short(left):<30} outside now: {short(outside)}")
            if early := {part for part in outside if finalizer(part) not in left}:
                raise NotShown(f"a finalizer goes only after its part: {short(early)} still there without it")
            if not left:
                return steps
    raise NotShown(f"the deletion of {name} did not end; steps seen: {steps}")


def things(world: World, name: str) -> set[str]:
    return {part for part in PARTS if world.thing(part, name).exists()}


def finalizers(parts: Iterable[str]) -> list[str]:
    return sorted(finalizer(part) for part in parts)


def short(names: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(name.rpartition("/")[2] for name in names)) or "none"


if __name__ == "__main__":
    title, _, _ = (__doc__ or "").partition("\n")
    sys.exit(play(title, tell, arguments(__doc__ or "").parse_args()))
