"""A reply is lost, and before that is noticed another client acts: the verdict is the truth, and says the right thing.

The other client is a raw one; the storage under test learns of it only while it settles. Promise 5.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from equipment.fault_proxy import How, When
from equipment.storage_scene import OTHER, OWN, WRITES, Scene, is_write, outcome_of, scene_at
from lrm.devservers import EtcdServer
from storage.errors import Conflict, GuardFailed, OutcomeUnknown, StorageError

Meanwhile = Callable[[Scene], Awaitable[object]]


async def _others(scene: Scene) -> None:
    await scene.direct.put(scene.key, OTHER)


async def _others_then_ours(scene: Scene) -> None:
    await scene.direct.put(scene.key, OTHER)
    await scene.direct.put(scene.key, OWN)


async def _ours(scene: Scene) -> None:
    await scene.direct.put(scene.key, OWN)


async def _gone(scene: Scene) -> None:
    await scene.direct.delete(scene.key)


async def _gone_and_back_as_ours(scene: Scene) -> None:
    await scene.direct.delete(scene.key)
    await scene.direct.put(scene.key, OWN)


async def _come_and_gone(scene: Scene) -> None:
    await scene.direct.put(scene.key, OTHER)
    await scene.direct.delete(scene.key)


async def _guard_gone(scene: Scene) -> None:
    await scene.direct.delete(f"{scene.root}/r/guard")


async def _guard_anew(scene: Scene) -> None:
    await _guard_gone(scene)
    await scene.direct.put(f"{scene.root}/r/guard", b"")


async def _guard_gone_and_others(scene: Scene) -> None:
    await _guard_gone(scene)
    await _others(scene)


async def _compacted(scene: Scene) -> None:
    await scene.direct.compact(await scene.direct.revision())


async def _others_and_compacted(scene: Scene) -> None:
    await _others(scene)
    await _compacted(scene)


async def _gone_and_compacted(scene: Scene) -> None:
    await _gone(scene)
    await _compacted(scene)


@dataclass(frozen=True)
class Row:
    write: str
    carried_out: bool
    meanwhile: Meanwhile
    verdict: type[StorageError] | None
    """What is raised; None: success, at the first revision after the expected one."""
    why: str


ROWS = [
    Row("update", True, _others, None, "carried out first, whatever came later"),
    Row("update", True, _others_then_ours, None, "the revision is that of our write, not of the later equal one"),
    Row("update", True, _gone, None, "carried out, then deleted by another"),
    Row("update", True, _gone_and_back_as_ours, None, "carried out before all that"),
    Row("update", True, _guard_gone, None, "the guard held when it was carried out"),
    Row("update", True, _guard_gone_and_others, None, "the guard held, and ours came first"),
    Row("update", False, _others, Conflict, "another was first"),
    Row("update", False, _others_then_ours, Conflict, "the bytes that are there are not ours"),
    Row("update", False, _ours, None, "equal writes from one revision count as one"),
    Row("update", False, _gone, Conflict, "deleted"),
    Row("update", False, _gone_and_back_as_ours, Conflict, "another incarnation with our bytes"),
    Row("update", False, _guard_gone, GuardFailed, "the key is as expected, the guard is not"),
    Row("update", False, _guard_anew, GuardFailed, "another incarnation of the guard is another leader"),
    Row("update", False, _guard_gone_and_others, Conflict, "the key's own history decides before its guard"),
    Row("update", True, _others_and_compacted, OutcomeUnknown, "the event that would tell is forgotten"),
    Row("delete", True, _others, None, "deleted, then made anew by another"),
    Row("delete", True, _guard_gone, None, "the guard held when it was deleted"),
    Row("delete", False, _others, Conflict, "another wrote first"),
    Row("delete", False, _gone, None, "a deletion from the expected revision is a deletion"),
    Row("delete", False, _come_and_gone, Conflict, "what was deleted later is not what was to be deleted"),
    Row("delete", False, _guard_gone, GuardFailed, "still there, and we may not"),
    Row("create", True, _gone, None, "carried out; repeating it would bring back what another deleted"),
    Row("create", True, _others, None, "carried out, then overwritten"),
    Row("create", True, _guard_gone, None, "the guard held when it was created"),
    Row("create", False, _come_and_gone, OutcomeUnknown, "ours may still come late: nobody can say that it failed"),
    Row("create", False, _others, OutcomeUnknown, "somebody's create is no proof about ours"),
    Row("create", True, _gone_and_compacted, OutcomeUnknown, "the event that would tell is forgotten"),
    Row("swap", True, _others, None, "swapped first"),
    Row("swap", True, _others_then_ours, None, "swapped first, and the later equal write is another's"),
    Row("swap", False, _others, Conflict, "another was first"),
    Row("set", True, _others, OutcomeUnknown, "no compare, no proof"),
    Row("set", False, _others, OutcomeUnknown, "no compare, no proof; and a repeat would overwrite another's"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.write}-{row.carried_out}-{row.meanwhile.__name__[1:]}")
async def test_what_happened_meanwhile_does_not_deceive(
    server_dir: Path, etcd: EtcdServer, etcd_root: str, row: Row
) -> None:
    """The reply is lost, and before that is noticed another client acts: the verdict is the truth, and says why."""
    if "compacted" in row.meanwhile.__name__:
        async with EtcdServer(server_dir / "etcd") as own:
            await _meanwhile(own, etcd_root, row)
    else:
        await _meanwhile(etcd, etcd_root, row)


async def _meanwhile(etcd: EtcdServer, root: str, row: Row) -> None:
    unseen = row.write == "create" and not row.carried_out  # looked for until the deadline
    async with scene_at(etcd, root, request_timeout=1.0 if unseen else 5.0) as scene:
        await scene.prepare(exists=row.write != "create")
        when = When.AFTER if row.carried_out else When.BEFORE
        rule = scene.proxy.inject(when, How.CLOSE, held=True, matches=is_write)
        writing = asyncio.create_task(outcome_of(WRITES[row.write](scene)))
        await rule.hit()
        await row.meanwhile(scene)
        before = await scene.direct.get(scene.key)
        rule.release.set()
        outcome = await writing
        if row.verdict is None:
            assert isinstance(outcome, int), f"{row.why}: {outcome!r}"
            assert outcome == (await scene.written())[0].revision, row.why
        else:
            assert type(outcome) is row.verdict, f"{row.why}: {outcome!r}"
        if isinstance(outcome, Conflict):
            assert (outcome.current.value, outcome.current.revision) == before if outcome.current else before is None
        assert await scene.direct.get(scene.key) == before, "settling changes nothing that another has done"
