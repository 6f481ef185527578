"""High availability: several instances, one leader; the others take over when it stops, and even when it dies.

One instance, in the foreground, with etcd and Redis running already (three terminals make a deployment):

    python examples/demo_ha_deployment.py --instance-id instance-1 --port 8001

Or the whole scenario, told and checked, with three instances started by that very command:

    python examples/demo_ha_deployment.py --self-contained
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.markup import escape

from demo_clients import Stream, Watcher, changes_in_store
from demo_plugin import API, LOCK, Effect, exercise, narrate, plugin
from demo_stage import Daemon, Missing, NotShown, Stage, Story, arguments, out, play, servers_answer
from lrm.api.app import ApiError
from lrm.daemon import run_daemon
from lrm.errors import only_cause
from lrm.logs import configure_logs
from lrm.settings import Settings

ROOT = "/lrm-demo-ha"
LEASE = {"LRM_LEASE_DURATION": "5", "LRM_RENEW_DEADLINE": "3", "LRM_RETRY_PERIOD": "0.5"}


async def one_instance(settings: Settings) -> None:
    """A daemon in the foreground that says what becomes of it, until SIGTERM or Ctrl-C."""
    await servers_answer(settings.etcd_endpoints, settings.redis_url)
    try:
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(tell_leadership(settings.instance_id, f"http://127.0.0.1:{settings.api_port}"))
            await run_daemon(settings, [plugin])
            telling.cancel()
    except BaseExceptionGroup as group:
        raise only_cause(group) from group
    narrate(settings.instance_id, "has stopped, and leads nothing any more")


async def tell_leadership(instance: str, url: str) -> None:
    """Print what /api/status/leader says whenever it says something else."""
    body = '{"apiVersion": "demo.neuroglia.io/v1", "kind": "Exercise", "metadata": {"generateName": "e-"}, "spec": {}}'
    before = ""
    async with httpx.AsyncClient(base_url=url) as api:
        while True:
            with suppress(httpx.TransportError, NotShown):  # not serving yet, or no longer
                now = standing(the_lock((await api.get("/api/status/leader")).raise_for_status().json()))
                if not before:
                    narrate(instance, f"serves at {url}; give it something to reconcile with")
                    print(f"  curl -fsS -X POST -H 'Content-Type: application/json' -d '{body}' {url}{API}", flush=True)
                if before.startswith("leads") and now != before:
                    narrate(instance, "leads no more")
                if now != before:
                    narrate(instance, now)
                before = now
            await asyncio.sleep(0.2)


def standing(lock: dict[str, Any]) -> str:
    """Where an instance stands."""
    if lock["is_leader"]:
        return f"leads, in term {lock['term']}"
    return f"is a standby: {lock['holder']} leads" if lock["holder"] else "is a standby: nobody leads"


def the_lock(document: dict[str, Any]) -> dict[str, Any]:
    """The part of /api/status/leader about our lock. Raises `NotShown` when there is none."""
    for lock in document["locks"]:
        if lock["lock_name"] == LOCK:
            return dict(lock)
    raise NotShown(f"the daemon knows of no lock {LOCK}")


class Deployment:
    """Three instances, what they did to the world, and who of them leads."""

    def __init__(self, stage: Stage) -> None:
        self.effect_file = stage.folder / "effects.jsonl"
        self.effect_file.touch()
        script = str(Path(__file__))
        self.instances = [
            stage.daemon(
                f"instance-{i}",
                argv=[script, "--instance-id", f"instance-{i}", "--port", "{port}"],
                LRM_DEMO_EFFECTS=str(self.effect_file),
                **LEASE,
            )
            for i in (1, 2, 3)
        ]

    @property
    def running(self) -> list[Daemon]:
        return [i for i in self.instances if i.running]

    def effects(self) -> list[Effect]:
        lines = self.effect_file.read_bytes().split(b"\n")[:-1]  # the last is empty, or being written
        return [Effect(**orjson.loads(line)) for line in lines]

    async def leader(self) -> Daemon | None:
        """The one that leads, once every running instance agrees that it does and no other."""
        locks = [the_lock(await i.get("/api/status/leader")) for i in self.running]
        leading = [i for i, lock in zip(self.running, locks, strict=True) if lock["is_leader"]]
        agreed = len({(lock["holder"], lock["term"]) for lock in locks}) == 1
        return leading[0] if len(leading) == 1 and agreed else None

    async def create(self, instance: Daemon, name: str) -> None:
        (await instance.api.post(API, json=exercise(name))).raise_for_status()

    async def effect_of(self, name: str) -> Effect | None:
        return next((e for e in self.effects() if e.name == name), None)


async def tell(story: Story, stage: Stage) -> None:
    """The scenario. Raises `NotShown`."""
    deployment = Deployment(stage)
    async with asyncio.TaskGroup() as tasks:
        echo = tasks.create_task(echo_instances(story, deployment.instances))
        await one_leads(story, deployment)
        await only_it_reconciles(story, deployment)
        await killed(story, deployment)
        await handed_over(story, deployment)
        await rolling_restart(story, stage, deployment)
        echo.cancel()
    overlaps = overlapping(deployment.effects())
    story.check(
        "no effect of an older term came after one of a newer: no two ever acted at once", not overlaps, overlaps
    )


async def one_leads(story: Story, deployment: Deployment) -> None:
    story.chapter("1. Three instances: demo_ha_deployment.py --instance-id instance-N --port P")
    for instance in deployment.instances:
        instance.start()
    await asyncio.gather(*(i.ready() for i in deployment.instances))
    leader = await story.eventually("one leader, by all three", deployment.leader)
    story.claim(f"exactly one leads, and all three say that it is {leader.name}")
    await deployment.create(leader, "warm")
    for standby in others(deployment, leader):

        async def has_it(standby: Daemon = standby) -> bool:
            listed = (await standby.get(API, resourceVersion="0"))["items"]
            return [e["metadata"]["name"] for e in listed] == ["warm"]

        await story.eventually(f"the cache of {standby.name} with what was written to {leader.name}", has_it, 2)
    story.claim("the standbys are ready, and their caches warm: they list what was written to the leader")


async def only_it_reconciles(story: Story, deployment: Deployment) -> None:
    story.chapter("2. 30 writes, spread over all three")
    leader = await story.eventually("a leader", deployment.leader)
    names = [f"spread-{n}" for n in range(30)]
    for n, name in enumerate(names):
        await deployment.create(deployment.instances[n % 3], name)
    await story.eventually("all of them reconciled", lambda: all_done(deployment, dict.fromkeys(names, 1)))
    found = [e for e in deployment.effects() if e.name in names]
    story.check("each was reconciled exactly once", sorted(e.name for e in found) == sorted(names), len(found))
    by = {(e.instance, e.term) for e in found}
    story.check(f"and only by {leader.name}", {who for who, _ in by} == {leader.name} and len(by) == 1, by)


async def killed(story: Story, deployment: Deployment) -> None:
    lease = float(LEASE["LRM_LEASE_DURATION"])
    story.chapter(f"3. kill -9 the leader (the lease is {lease:g} s)")
    leader = await story.eventually("a leader", deployment.leader)
    leader.kill()
    took = await next_effect(story, deployment, leader, "after-kill", lease + 1.5)
    story.claim(f"another instance reconciled {took:.1f} s after the kill; at most {lease + 1.5:g} s are promised")
    await back(story, leader)


async def handed_over(story: Story, deployment: Deployment) -> None:
    story.chapter("4. SIGTERM to the leader")
    leader = await story.eventually("a leader", deployment.leader)
    leader.terminate()
    took = await next_effect(story, deployment, leader, "after-term", 1.0)
    code = await leader.process.wait()
    story.check(f"it handed over, and another reconciled {took:.2f} s after the signal", code == 0, f"exit code {code}")
    await back(story, leader)


async def next_effect(story: Story, deployment: Deployment, gone: Daemon, name: str, seconds: float) -> float:
    """Write to a standby and wait for the effect by another instance than the one that goes; the seconds it took."""
    since = time.monotonic()
    await deployment.create(others(deployment, gone)[0], name)
    effect = await story.eventually(f"{name} reconciled", lambda: deployment.effect_of(name), seconds)
    took = time.monotonic() - since
    story.check(f"{effect.instance} has taken over in term {effect.term}", effect.instance != gone.name, effect)
    return took


async def rolling_restart(story: Story, stage: Stage, deployment: Deployment) -> None:
    story.chapter("5. A rolling restart of all three, under a stream of writes, with a watch through the API")
    start = int((await deployment.running[0].get(API))["metadata"]["resourceVersion"])
    stream, watcher = Stream(deployment.instances), Watcher(deployment.instances, start)
    async with asyncio.TaskGroup() as tasks:
        writing, watching = tasks.create_task(stream.run()), tasks.create_task(watcher.run())
        await story.eventually("the watch open", lambda: watcher.reached(start + 1))
        for instance in deployment.instances:
            instance.terminate()
            code = await instance.process.wait()
            story.check(f"{instance.name} was restarted, with exit code 0", code == 0, code)
            await back(story, instance)
        stream.end()
        await writing
        await deployment.create(deployment.instances[0], "last")
        wanted = {**stream.acknowledged, "last": 1}
        await story.eventually("every write reconciled", lambda: all_done(deployment, wanted))
        story.claim(f"each of {stream.writes} acknowledged writes was kept and reconciled")
        story.line(f"{stream.refused} attempts met an instance that was stopping, and were repeated elsewhere")
        last = (await deployment.instances[0].get(f"{API}/last"))["metadata"]["resourceVersion"]
        history = await changes_in_store(stage, start, int(last))
        await story.eventually("the last change in the watch", lambda: watcher.reached(int(last)))
        watching.cancel()
    seen = [change for change in watcher.seen if change[0] <= int(last)]
    story.check(
        f"the watch was opened {watcher.opened} times and showed each of {len(history)} changes once, in order",
        seen == history and watcher.opened > 1,
        f"{len(seen)} changes, without {sorted(set(history) - set(seen))[:5]}",
    )


async def all_done(deployment: Deployment, wanted: dict[str, int]) -> bool:
    """Whether the last acknowledged step of each was done outside, and its status says so. Raises `NotShown`."""
    steps = set(wanted.items())
    if undone := steps - {(e.name, e.step) for e in deployment.effects()}:
        raise NotShown(f"not done outside: {sorted(undone)[:5]}")
    items = (await deployment.running[0].get(API))["items"]
    if unsaid := steps - {(e["metadata"]["name"], e["status"]["done"]) for e in items}:
        raise NotShown(f"not in the status: {sorted(unsaid)[:5]}")
    return True


def overlapping(effects: Sequence[Effect]) -> list[tuple[Effect, Effect]]:
    """Neighbours in the effect file of which the later was done in an older term, or by another in the same."""
    return [(a, b) for a, b in pairwise(effects) if b.term < a.term or (b.term == a.term and b.instance != a.instance)]


def others(deployment: Deployment, leader: Daemon) -> list[Daemon]:
    return [i for i in deployment.running if i is not leader]


async def back(story: Story, instance: Daemon) -> None:
    instance.start()
    await instance.ready()
    story.line(f"{instance.name} is back (pid {instance.process.pid})")


async def echo_instances(story: Story, instances: Sequence[Daemon]) -> None:
    """What the instances print about leadership, as it would be seen in their terminals."""
    told = dict.fromkeys(instances, 0)
    while True:
        for instance in instances:
            lines = instance.log_path.read_text().splitlines() if instance.pids else []
            for line in lines[told[instance] :]:
                if line.startswith(f"{instance.name}: ") and "reconciles" not in line and "serves" not in line:
                    story.line(f"[dim]{line}[/dim]", "│")
            told[instance] = len(lines)
        await asyncio.sleep(0.05)


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--instance-id", metavar="ID", help="start one instance of this name, in the foreground")
    parser.add_argument("--port", metavar="PORT", type=int, default=8001, help="its port (%(default)s)")
    options = parser.parse_args()
    if not options.instance_id:
        title, _, _ = (__doc__ or "").partition("\n")
        return play(title, tell, options)
    os.environ.setdefault("LRM_ETCD_ROOT", ROOT)
    os.environ |= {
        "LRM_LEADER": "lease",
        "LRM_INSTANCE_ID": options.instance_id,
        "LRM_API_PORT": str(options.port),
        "LRM_ETCD_ENDPOINTS": options.etcd,
        "LRM_REDIS_URL": options.redis,
    }
    configure_logs("console", "warning", instance=options.instance_id)
    try:
        asyncio.run(one_instance(Settings()))
    except (Missing, ApiError) as error:
        out.print(f"[bold red]cannot begin[/bold red]: {escape(str(error))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
