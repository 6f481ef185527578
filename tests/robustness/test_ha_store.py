"""A trio whose store as a whole is in trouble: out of space, or put back to a snapshot of yesterday.

Both end with what an operator does by the runbook, and nothing else: no daemon is started anew.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from equipment.aws import SharedMoto
from equipment.etcd import Gateway, binary, scratch_dir, snapshot
from equipment.trio import LEASE, ROOT, Trio
from equipment.trio_scene import Scene, scene
from equipment.waiting import until

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    pytest.mark.slow,
]

QUOTA = 24 * 1024 * 1024
_FILLER = "/filler"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trio(shared_moto: SharedMoto) -> AsyncIterator[Trio]:
    with scratch_dir("lrm-trio-") as folder:
        args = (f"--quota-backend-bytes={QUOTA}",)
        async with Trio(folder, binary("current"), await shared_moto.url(), etcd_args=args) as world:
            yield world


async def test_every_promise_holds_through_an_etcd_out_of_space(trio: Trio) -> None:
    """Writes are refused for certain, lists are served, leaders keep their locks; room is made, and all goes on."""
    async with scene(trio, random.Random(1)) as s:
        held = await trio.holder("gadgets")
        refused = s.load.told["refused"]
        await _fill(Gateway(trio.cluster.endpoints[0]))
        await until(lambda: s.load.told["refused"] >= refused + 10, "writes that are refused", 30)
        began, listed = asyncio.get_running_loop().time(), len(s.history.listings)
        unknown = s.load.told["unknown"]
        await until(lambda: asyncio.get_running_loop().time() > began + 1.5 * LEASE, "the lease to be over", 30)
        assert await trio.holder("gadgets") == held, "the lock changed hands"
        assert len(s.history.listings) > listed, "lists are served"
        assert s.load.told["unknown"] == unknown, "a full store refuses for certain"
        await _make_room(s)
        await s.progress()
        assert await trio.holder("gadgets") == held, "the lock changed hands"


@pytest.mark.soak
async def test_every_promise_holds_through_the_death_of_a_leader_in_an_etcd_out_of_space(trio: Trio) -> None:
    """Nobody can be elected there: reads go on, nothing is written, and work resumes as soon as there is room."""
    async with scene(trio, random.Random(4)) as s:
        node, held = await trio.leader(), await trio.holder("gadgets")
        await _fill(Gateway(trio.cluster.endpoints[0]))
        node.kill()
        await until(lambda: _nobody_leads(trio), "the lease to end", 30)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(node.process.start_ready(60))
            listed = len(s.history.listings)
            await until(lambda: len(s.history.listings) >= listed + 10, "lists that are served", 30)
            assert await _nobody_leads(trio)
            await _make_room(s)
            await trio.later_term(held[1])
        await s.progress()


async def test_every_promise_holds_after_a_snapshot_was_restored(trio: Trio) -> None:
    """What was written after the snapshot is gone, for every daemon alike; what was there goes on where it was."""
    async with scene(trio, random.Random(2)) as s:
        await s.worker_ready(await s.post_worker())
        path = trio.folder / "snapshot.db"
        await asyncio.to_thread(snapshot, next(iter(trio.cluster.members.values())), path)
        await s.progress(20, 10)
        await _judged_before_the_loss(s)
        await trio.cluster.restore(path)
        await asyncio.to_thread(_restore_done, trio)
    async with scene(trio, random.Random(3)) as later:
        later.workers += s.workers
        await later.progress(20, 10)


async def _fill(member: Gateway) -> None:
    """Write what nobody needs until etcd takes no more."""

    async def full() -> bool:
        try:
            await member.put(_FILLER, os.urandom(500_000))
        except RuntimeError as error:
            if "space" not in str(error):
                raise
            return True
        return False

    await until(full, "the quota reached", 60)


async def _make_room(s: Scene) -> None:
    """The runbook: compact (here only what the reference has read), defragment each member, lift the alarm."""
    members = [Gateway(endpoint) for endpoint in s.trio.cluster.endpoints]
    await members[0].compact(s.reference.seen)
    for member in members:
        await member.call("maintenance/defragment", {})
    for alarm in (await members[0].call("maintenance/alarm", {"action": "GET"})).get("alarms", ()):
        await members[0].call("maintenance/alarm", {"action": "DEACTIVATE", **alarm})


async def _nobody_leads(trio: Trio) -> bool:
    return (await trio.holder("gadgets"))[1] == 0


async def _judged_before_the_loss(s: Scene) -> None:
    """Users go, and all that was told is held against what was; then nothing of it counts any more."""
    await s.load.stop()
    await s.settle()
    await s.judge()
    s.over = True


def _restore_done(trio: Trio) -> None:
    env = {**os.environ, "LRM_ETCD_ENDPOINTS": ",".join(trio.cluster.endpoints), "LRM_ETCD_ROOT": ROOT}
    done = subprocess.run(
        [sys.executable, "-m", "lrm", "restore-done"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
