"""Promise 5 against a real etcd behind a proxy that loses things: a lost reply is settled, else it is unknown.

What a call says is held against etcd's own history, read past our code: a success is in it exactly once and at the
revision that was returned, a refusal is not in it, and what could have been settled was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from equipment.etcd import VERSIONS, WHEEL, SharedEtcds
from equipment.fault_proxy import How, When
from equipment.footprint import Footprint
from equipment.storage_scene import OTHER, OWN, WRITES, Scene, is_write, outcome_of, scene_at
from lrm.devservers import EtcdServer
from storage.errors import NotFound, OutcomeUnknown, Unavailable
from storage.etcd import EtcdStorage

TIMED_OUT = b'{"error":"etcdserver: request timed out","code":14,"message":"etcdserver: request timed out"}'


@dataclass(frozen=True)
class Fault:
    name: str
    when: When
    how: How
    keep: int = 0
    status: int = 503
    reply: bytes = b""
    slow: bool = False
    """Only its timeout tells the client, which may leave no time to settle: unknown is then an honest answer."""


FAULTS = [
    Fault("request-closed", When.BEFORE, How.CLOSE),
    Fault("request-reset", When.BEFORE, How.RESET),
    Fault("request-replaced-by-html", When.BEFORE, How.REPLACE, reply=b"<html>502</html>", status=502),
    Fault("request-said-to-have-timed-out", When.BEFORE, How.REPLACE, reply=TIMED_OUT),
    Fault("request-black-holed", When.BEFORE, How.SILENCE, slow=True),
    Fault("reply-closed", When.AFTER, How.CLOSE),
    Fault("reply-reset", When.AFTER, How.RESET),
    Fault("reply-cut-in-its-head", When.AFTER, How.TRUNCATE, keep=60),
    Fault("reply-cut-in-its-body", When.AFTER, How.TRUNCATE, keep=240),
    Fault("reply-replaced-by-html", When.AFTER, How.REPLACE, reply=b"<html>502</html>", status=502),
    Fault("reply-said-to-have-timed-out", When.AFTER, How.REPLACE, reply=TIMED_OUT),
    Fault("reply-is-half-a-json", When.AFTER, How.REPLACE, reply=b'{"header":{"clus', status=200),
    Fault("reply-is-an-empty-list", When.AFTER, How.REPLACE, reply=b"[]", status=200),
    Fault("reply-black-holed", When.AFTER, How.SILENCE, slow=True),
]


def _matrix() -> list[object]:
    """The sample: every fault on creates and updates, the plainest on all writes, two of them on every version."""
    rows = []
    for version in VERSIONS:
        for name in WRITES:
            for fault in FAULTS:
                plain = fault.name in {"request-closed", "reply-closed"}
                if version == WHEEL:
                    sample = plain or name in {"create", "update"}
                else:
                    sample = fault.name == "reply-closed" and name in {"create", "update"}
                marks = () if sample else (pytest.mark.soak,)
                rows.append(pytest.param(version, name, fault, marks=marks, id=f"{version}-{name}-{fault.name}"))
    return rows


def _patience(name: str, fault: Fault) -> float:
    """A create that was not carried out is looked for until the deadline."""
    return 0.8 if fault.slow or (name == "create" and fault.when is When.BEFORE) else 5.0


@pytest.mark.parametrize(("version", "name", "fault"), _matrix())
async def test_one_lost_exchange_is_settled_or_unknown(
    shared_etcds: SharedEtcds, etcd_root: str, version: str, name: str, fault: Fault
) -> None:
    """Repeatable writes succeed once; creates succeed when they were carried out; nothing is ever sent too often."""
    etcd = await shared_etcds.get(version)
    async with scene_at(etcd, etcd_root, request_timeout=_patience(name, fault)) as scene:
        await scene.prepare(exists=name != "create")
        rule = scene.proxy.inject(
            fault.when, fault.how, keep=fault.keep, status=fault.status, reply=fault.reply, matches=is_write
        )
        outcome = await outcome_of(WRITES[name](scene))
        assert rule.hits == 1
        written = await scene.written()
        own = [change for change in written if change.value == (None if name == "delete" else OWN)]
        assert len(own) == len(written) <= 1, "one write, once"
        carried_out = fault.when is When.AFTER
        settled = {"create": carried_out, "set": False}.get(name, True)
        if isinstance(outcome, OutcomeUnknown):
            assert not settled or fault.slow, "this could have been settled"
        else:
            assert settled, "nobody can know this"
            assert [change.revision for change in own] == [outcome]
        if name in {"create", "set"}:
            assert rule.seen == 1, "never sent twice"
            assert len(own) == carried_out


@pytest.fixture
async def scene(shared_etcds: SharedEtcds, etcd_root: str) -> AsyncIterator[Scene]:
    async with scene_at(await shared_etcds.get(WHEEL), etcd_root) as made:
        yield made


@pytest.mark.parametrize("when", When)
async def test_an_answer_that_is_only_slow_is_waited_for(scene: Scene, when: When) -> None:
    """Held back on its way there or back, well within the timeout: one request, one write, its own revision."""
    await scene.prepare(exists=True)
    slow = scene.proxy.inject(when, How.PASS, held=True, times=0, matches=is_write)
    writing = asyncio.create_task(outcome_of(WRITES["update"](scene)))
    await slow.hit()
    assert not (await asyncio.wait({writing}, timeout=0.5))[0]
    slow.release.set()
    outcome = await writing
    assert [change.revision for change in await scene.written()] == [outcome]
    assert slow.seen == 1, "it was not sent twice"


async def test_a_lease_bound_create_is_recognised_by_its_lease(scene: Scene) -> None:
    """Its bytes may be the same as an earlier holder's: the lease is what makes it ours."""
    await scene.prepare(exists=False)
    lease = await scene.storage.grant_lease(30)
    scene.proxy.inject(When.AFTER, How.CLOSE, matches=is_write)
    entry = await scene.storage.create(scene.key, OWN, lease=lease.id)
    assert entry.lease == lease.id
    assert [change.revision for change in await scene.written()] == [entry.revision]
    await scene.storage.revoke(lease.id)


async def test_a_lost_grant_of_a_lease_is_not_asked_for_again(scene: Scene) -> None:
    await scene.prepare(exists=False)
    rule = scene.proxy.inject(When.AFTER, How.CLOSE, "/v3/lease/grant", times=0)
    with pytest.raises(OutcomeUnknown):
        await scene.storage.grant_lease(30)
    assert rule.seen == 1


async def test_a_write_that_arrives_late_is_made_once(etcd: EtcdServer, etcd_root: str) -> None:
    """A request is stuck in the network, its caller has long been answered, and then it arrives."""
    async with scene_at(etcd, etcd_root, request_timeout=0.5) as scene:
        await scene.prepare(exists=True)
        late = scene.proxy.inject(When.BEFORE, How.PASS, held=True, matches=is_write)
        outcome = await outcome_of(WRITES["update"](scene))
        assert isinstance(outcome, int | OutcomeUnknown)
        await scene.direct.put(scene.key, OTHER)
        late.release.set()
        await late.over.wait()
        written = await scene.written()
        assert [change.value for change in written] == ([OWN, OTHER] if isinstance(outcome, int) else [OTHER])


async def test_a_create_that_arrives_late_was_called_unknown(etcd: EtcdServer, etcd_root: str) -> None:
    async with scene_at(etcd, etcd_root, request_timeout=0.5) as scene:
        await scene.prepare(exists=False)
        late = scene.proxy.inject(When.BEFORE, How.PASS, held=True, matches=is_write)
        assert isinstance(await outcome_of(WRITES["create"](scene)), OutcomeUnknown)
        assert await scene.direct.get(scene.key) is None
        late.release.set()
        await late.over.wait()
        assert [change.value for change in await scene.written()] == [OWN]


@pytest.mark.parametrize("name", WRITES)
async def test_a_network_that_swallows_everything_is_told_in_time(etcd: EtcdServer, etcd_root: str, name: str) -> None:
    """Requests are accepted and nothing comes back: unknown for a write that was sent, unavailable for a read."""
    async with scene_at(etcd, etcd_root, request_timeout=0.3) as scene:
        await scene.prepare(exists=name != "create")
        await scene.answered()
        scene.proxy.freeze()
        began = asyncio.get_running_loop().time()
        outcome = await outcome_of(WRITES[name](scene))
        took = asyncio.get_running_loop().time() - began
        # A swap reads before it writes: when that read fails nothing was sent.
        assert type(outcome) is (Unavailable if name == "swap" else OutcomeUnknown)
        with pytest.raises(Unavailable):
            await scene.storage.get(scene.key)
        assert took < 10, f"took {took:.1f} s with a request timeout of 0.3 s"


@pytest.mark.parametrize("name", WRITES)
async def test_an_etcd_that_refuses_connections_is_unavailable(etcd: EtcdServer, etcd_root: str, name: str) -> None:
    """Certainly not written, so it may be retried; and it is not."""
    async with scene_at(etcd, etcd_root, request_timeout=0.2) as scene:
        await scene.prepare(exists=name != "create")
        await scene.proxy.refuse()
        with pytest.raises(Unavailable):
            await scene.storage.get(scene.key)  # finds the connection that was in the pool broken
        assert type(await outcome_of(WRITES[name](scene))) is Unavailable
        await scene.proxy.listen()
        assert await scene.written() == []


async def test_an_etcd_that_dies_and_comes_back_within_the_timeout_is_not_noticed(
    etcd: EtcdServer, etcd_root: str
) -> None:
    async with scene_at(etcd, etcd_root) as scene:
        await scene.prepare(exists=True)
        await scene.proxy.refuse()
        writing = asyncio.create_task(outcome_of(WRITES["update"](scene)))
        await asyncio.sleep(0)
        await scene.proxy.listen()
        outcome = await writing
        assert [change.revision for change in await scene.written()] == [outcome]


async def test_an_error_is_never_an_empty_answer(scene: Scene) -> None:
    """Promise 4: each read fails loudly while every exchange is lost, and answers truly when it is over."""
    await scene.prepare(exists=True)
    patient, hasty = scene.storage, EtcdStorage([scene.proxy.endpoint], root=scene.root, request_timeout=0.15)
    scene.storage = hasty
    reads: dict[str, Callable[[], Awaitable[object]]] = {
        "get": lambda: scene.storage.get(scene.key),
        "exists": lambda: scene.storage.exists(scene.key),
        "keys": lambda: scene.storage.keys(f"{scene.root}/r/*"),
        "list": lambda: scene.storage.list(f"{scene.root}/r/"),
        "count": lambda: scene.storage.count(f"{scene.root}/r/"),
        "revision": lambda: scene.storage.current_revision(),  # noqa: PLW0108 - of the storage of the moment
        "labels": lambda: scene.storage.list_with_labels(f"{scene.root}/r/", {}, lambda _: {}),
    }
    try:
        for how, reply in ((How.CLOSE, b""), (How.REPLACE, b"<html>"), (How.REPLACE, b'{"kvs":[')):
            rule = scene.proxy.inject(When.AFTER, how, times=0, reply=reply, status=200)
            for name, read in reads.items():
                with pytest.raises(Unavailable):
                    print(name, how, await read())
            assert rule.hits >= len(reads)
            scene.proxy.clear()
        scene.storage = patient
        for name, read in reads.items():
            assert await read(), name
        with pytest.raises(NotFound):
            await scene.storage.get(f"{scene.root}/r/nothing")
    finally:
        await hasty.aclose()


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("settling", [False, True])
async def test_a_cancelled_write_leaves_nothing_and_harms_no_later_call(
    etcd: EtcdServer, etcd_root: str, name: str, *, settling: bool
) -> None:
    """Promise 6: cancelled while its reply is under way, and while its lost reply is being settled."""
    if settling and name == "set":
        return  # it has nothing to settle by
    before = Footprint.now()
    async with scene_at(etcd, etcd_root) as scene:
        await scene.prepare(exists=name != "create")
        await scene.storage.current_revision()
        used = Footprint.now()
        if settling:
            scene.proxy.inject(When.AFTER, How.CLOSE, matches=is_write)
            held = scene.proxy.inject(When.BEFORE, How.PASS, held=True, skip=int(name == "swap"))  # it reads first
        else:
            held = scene.proxy.inject(When.AFTER, How.PASS, held=True, matches=is_write)
        writing = asyncio.create_task(WRITES[name](scene))
        await held.hit()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        scene.proxy.clear()
        assert await scene.storage.exists(f"{scene.root}/r/guard")
        assert len(await scene.written()) == 1
        assert not (left := Footprint.now().tasks - used.tasks), f"left behind: {left}"
    await before.is_all_that_is_left()
