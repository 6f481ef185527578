"""The judge is judged: a history that keeps every promise passes, and each way to break one is found.

A small true history is made by hand; every test spoils one thing in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from equipment.history import (
    LABEL,
    Attempt,
    Change,
    Delivered,
    History,
    Listing,
    Mark,
    Read,
    Ruled,
    Stretch,
    Told,
    Write,
    check,
)

PREFIX, LEADERS = "/x/r/gadgets/n/", "/x/leader/"
FINALIZER = "test/finalizer"


def gadget(
    op: str,
    *,
    seen: str = "",
    term: int = 0,
    serial: str = "",
    finalizers: tuple[str, ...] = (FINALIZER,),
    deleting: bool = False,
    labels: dict[str, str] | None = None,
) -> bytes:
    metadata: dict[str, Any] = {"name": "a", "uid": "u", "finalizers": list(finalizers), "labels": labels or {}}
    if deleting:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    status = {"seenOp": seen, "term": term, "serial": serial}
    return json.dumps({"metadata": metadata, "spec": {"op": op}, "status": status}).encode()


class Line:
    """Builds the changes of a history, each knowing what was there before."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self._latest: dict[str, Change] = {}

    def add(self, revision: int, key: str, value: bytes | None) -> None:
        before = self._latest.get(key)
        there = before is not None and before.value is not None
        created = before.create_revision if before and there else revision
        change = Change(
            revision,
            key,
            value,
            create_revision=created if value is not None else 0,
            previous=before.value if before else None,
            previous_revision=before.revision if before and there else 0,
        )
        self._latest[key] = change
        self.changes.append(change)


def true_history() -> History:
    """Created, led by term 11, changed, taken over by term 16, labelled, deleted; all told rightly."""
    line, a = Line(), f"{PREFIX}a"
    line.add(11, f"{LEADERS}gadgets", b"{}")
    line.add(11, f"{LEADERS}recorder", b'{"identity": "lrm-1-x"}')
    line.add(12, a, gadget("op1", finalizers=()))
    line.add(13, a, gadget("op1"))
    line.add(14, a, gadget("op1", seen="op1", term=11, serial="s1"))
    line.add(15, f"{LEADERS}gadgets", None)
    line.add(15, f"{LEADERS}recorder", None)
    line.add(16, f"{LEADERS}gadgets", b"{}")
    line.add(16, f"{LEADERS}recorder", b'{"identity": "lrm-2-x"}')
    line.add(17, a, gadget("op2", seen="op1", term=11, serial="s1"))
    line.add(18, a, gadget("op2", seen="op2", term=16, serial="s2"))
    line.add(19, a, gadget("op2", seen="op2", term=16, serial="s2", labels={LABEL: "op3"}))
    deleted = gadget("op2", seen="op2", term=16, serial="s2", labels={LABEL: "op3"}, deleting=True)
    line.add(20, a, deleted)
    line.add(21, a, None)
    told = [
        Told("ADDED", "a", 12, "op1"),
        *(Told("MODIFIED", "a", revision, "op1") for revision in (13, 14)),
        *(Told("MODIFIED", "a", revision, "op2") for revision in (17, 18, 19, 20)),
        Told("DELETED", "a", 21, "op2"),
    ]
    return History(
        prefix=PREFIX,
        leaders=LEADERS,
        base=10,
        changes=line.changes,
        writes=[
            Write("create", "a", "op1", 1.0, 1.1, "done", 12),
            Write("replace", "a", "op9", 1.2, 1.3, "refused", expected=12),
            Write("replace", "a", "op2", 2.0, 2.1, "done", 17, expected=14),
            Write("label", "a", "op3", 3.0, 3.1, "done", 19),
            Write("patch", "a", "op4", 3.2, 9.0, "unknown"),
            Write("delete", "a", "", 4.0, 4.1, "done", 20),
        ],
        reads=[
            Read("a", 0.5, 0.6, 0),
            Read("a", 2.2, 2.3, 18, "op2"),
            Read("a", 3.05, 3.2, 18, "op2"),
            Read("a", 5.0, 5.1, 0),
        ],
        listings=[Listing(0.1, 0.2, 11, {}), Listing(2.5, 2.6, 18, {"a": 18}), Listing(5.0, 5.1, 21, {})],
        watchers={
            "whole": [Stretch(11, told, listed=True)],
            "resumed": [
                Stretch(11, told[:3], listed=True),
                Stretch(14, [], through=16),
                Stretch(16, told[3:5]),
                Stretch(18, told[4:]),
            ],
            "listed again": [Stretch(11, told[:2], listed=True), Stretch(17, told[4:], listed=True)],
        },
        marks=[
            *(Mark("gadgets", *rest) for rest in ((11, 11, 1.05), (16, 11, 1.5), (21, 16, 6.0))),
            *(Mark("recorder", *rest) for rest in ((12, 11, 1.3), (17, 16, 2.5), (21, 16, 6.0))),
        ],
        # The first one dies after 14 with its bookmark at 12: the second one is told 13 and 14 again.
        deliveries=[
            *(Delivered(t.revision / 10, "lrm-1", "p1", t.type, "a", t.revision) for t in told[:3]),
            *(Delivered(t.revision / 10 + 0.3, "lrm-2", "p2", t.type, "a", t.revision) for t in told[1:]),
        ],
        attempts=[
            Attempt(1.4, 11, "a", 13),
            Attempt(2.2, 16, "a", 17),
            Attempt(3.3, 16, "a", 19),
            Attempt(4.2, 16, "a", 20),
        ],
        ruled=[
            Ruled("/x/claim/", ("workers",)),
            Ruled("/x/r/workers/", ("workers",), shared=True),
            Ruled("/x/r/workers/", ("labs",), fields=("labs",)),
        ],
    )


def test_a_history_that_keeps_every_promise_passes() -> None:
    assert check(true_history()) == []


def _write(number: int, **change: Any) -> Callable[[History], None]:
    def spoil(history: History) -> None:
        history.writes[number] = replace(history.writes[number], **change)

    return spoil


def _change(at: int, **change: Any) -> Callable[[History], None]:
    def spoil(history: History) -> None:
        history.changes = [replace(c, **change) if c.revision == at else c for c in history.changes]

    return spoil


def _forget(revision: int) -> Callable[[History], None]:
    def spoil(history: History) -> None:
        history.changes = [c for c in history.changes if c.revision != revision]

    return spoil


def _watch(name: str, stretch: int, *, told: Callable[[list[Told]], list[Told]]) -> Callable[[History], None]:
    def spoil(history: History) -> None:
        found = history.watchers[name][stretch]
        found.told = told(found.told)

    return spoil


def _add(*changes: Change) -> Callable[[History], None]:
    def spoil(history: History) -> None:
        history.changes = sorted([*history.changes, *changes], key=lambda c: c.revision)

    return spoil


def _set(**values: Any) -> Callable[[History], None]:
    def spoil(history: History) -> None:
        for name, value in values.items():
            setattr(history, name, value)

    return spoil


_WORKER = b'{"metadata":{"finalizers":["f"]},"spec":{},"status":{"phase":"%s"}}'

BROKEN = [
    pytest.param(_write(2, revision=18), "where 'op2' is", id="acknowledged at the revision of another write"),
    pytest.param(_write(2, revision=16), "is not there", id="acknowledged and lost"),
    pytest.param(_write(2, expected=13), "demanded 13", id="passed on another revision than it demanded"),
    pytest.param(_write(2, outcome="refused", revision=0), "was refused and is there", id="refused and written"),
    pytest.param(_write(3, outcome="refused", revision=0), "was refused and is there", id="label refused and written"),
    pytest.param(_write(5, outcome="refused", revision=0), "asked for the end of a", id="delete refused and made"),
    pytest.param(_write(5, revision=19), "not being deleted", id="delete acknowledged and not made"),
    pytest.param(
        lambda h: h.writes.append(Write("delete", "b", "", 4.5, 4.6, "done")),
        "never went",
        id="deleted, and there",
    ),
    pytest.param(lambda h: h.writes.pop(2), "nobody who was not refused wrote op2", id="a write out of nowhere"),
    pytest.param(
        lambda h: h.writes.insert(0, Write("patch", "b", "op8", 0.1, 1.9, "done", 17)), "is not there", id="another key"
    ),
    pytest.param(
        lambda h: h.writes.append(Write("create", "a", "op2", 2.0, 2.1, "done", 17)),
        "replaced",
        id="created over one",
    ),
    pytest.param(
        _add(Change(22, f"{PREFIX}a", gadget("op1", finalizers=()), 22)), "was made 2 times", id="one write made twice"
    ),
    pytest.param(_write(2, began=3.5, ended=3.6), "which was acknowledged before", id="written in the past"),
    pytest.param(
        lambda h: h.reads.append(Read("a", 3.5, 3.6, 18, "op2")), "acknowledged before it began", id="a stale read"
    ),
    pytest.param(lambda h: h.reads.append(Read("a", 3.5, 3.6, 16)), "never was", id="a read of what never was"),
    pytest.param(lambda h: h.reads.append(Read("a", 3.5, 3.6, 19, "op1")), "told 'op1'", id="a read of another spec"),
    pytest.param(lambda h: h.reads.append(Read("b", 3.5, 3.6, 19, "op2")), "never was", id="a read of another key"),
    pytest.param(
        lambda h: h.listings.append(Listing(3.5, 3.6, 18, {"a": 18})), "had been acknowledged", id="a stale list"
    ),
    pytest.param(lambda h: h.listings.append(Listing(3.5, 3.6, 19, {})), "wrong about", id="a list that lacks one"),
    pytest.param(
        lambda h: h.listings.append(Listing(5.5, 5.6, 21, {"a": 20})), "wrong about", id="a list with one that is gone"
    ),
    pytest.param(_watch("whole", 0, told=lambda t: t[:3] + t[4:]), "event 3", id="a gap in the middle of a connection"),
    pytest.param(_watch("resumed", 2, told=lambda t: t[1:]), "event 3", id="a gap at a resume"),
    pytest.param(_watch("whole", 0, told=lambda t: t[:-1]), "told nothing after 20", id="the end is missing"),
    pytest.param(_watch("whole", 0, told=lambda t: [t[1], t[0], *t[2:]]), "event 0", id="out of order"),
    pytest.param(_watch("whole", 0, told=lambda t: [t[0], *t]), "event 1", id="a repeat without a resume"),
    pytest.param(
        _watch("resumed", 3, told=lambda t: [Told("MODIFIED", "a", 17, "op2"), *t]),
        "event",
        id="two repeated",
    ),
    pytest.param(
        _watch("whole", 0, told=lambda t: [*t[:-1], replace(t[-1], type="MODIFIED")]), "event 7", id="a wrong type"
    ),
    pytest.param(
        _watch("whole", 0, told=lambda t: [replace(t[0], marker="op2"), *t[1:]]), "event 0", id="another spec"
    ),
    pytest.param(
        lambda h: setattr(h.watchers["resumed"][1], "through", 17), "that it had everything", id="a bookmark that lies"
    ),
    pytest.param(
        lambda h: setattr(h.watchers["resumed"][3], "after", 19), "was resumed after", id="a resume somewhere else"
    ),
    pytest.param(
        _change(18, value=gadget("op2", seen="op2", term=11, serial="s2")), "under term 11", id="a write of an old term"
    ),
    pytest.param(
        _change(18, value=gadget("op2", seen="op2", term=99, serial="s2")), "under term 99", id="a term that never was"
    ),
    pytest.param(_set(changes=[]), "is not there", id="nothing at all has happened"),
    pytest.param(_forget(16), "that nobody led", id="a finalizer dropped while nobody led"),
    pytest.param(_forget(11), "that nobody led", id="a finalizer added while nobody led"),
    pytest.param(
        _add(Change(22, "/x/claim/i-1", b"w", 22)), "while nobody led workers", id="a leader's key written by nobody"
    ),
    pytest.param(
        _add(
            Change(22, "/x/r/workers/w", _WORKER.replace(b"%s", b"A"), 22),
            Change(23, "/x/r/workers/w", _WORKER.replace(b"%s", b"B"), 22, _WORKER.replace(b"%s", b"A"), 22),
        ),
        "at 23 while nobody led workers",
        id="a status written by nobody",
    ),
    pytest.param(
        _add(
            Change(22, "/x/r/workers/w", b'{"metadata":{},"spec":{},"status":{}}', 22),
            Change(
                23,
                "/x/r/workers/w",
                b'{"metadata":{},"spec":{},"status":{"labsCount":1}}',
                22,
                b'{"metadata":{},"spec":{},"status":{}}',
                22,
            ),
        ),
        "at 23 while nobody led labs",
        id="a field written by nobody who may",
    ),
    pytest.param(_forget(18), "has a gap", id="the reference itself lacks one"),
    pytest.param(_change(18, revision=9), "out of order", id="the reference itself is out of order"),
    pytest.param(lambda h: h.attempts.clear(), "was not attempted", id="no attempt at all, and the object is there"),
    pytest.param(
        lambda h: h.marks.insert(2, Mark("gadgets", 17, 16, 2.15)),
        "was not attempted",
        id="a bookmark too early",
    ),
    pytest.param(lambda h: h.marks.append(Mark("gadgets", 20, 16, 6.1)), "back to", id="a bookmark that moves back"),
    pytest.param(
        lambda h: h.marks.append(Mark("gadgets", 22, 11, 6.1)), "back to", id="a bookmark taken by an older term"
    ),
    pytest.param(_set(surprises=["a 500"]), "a 500", id="an answer that nobody may get"),
    pytest.param(lambda h: h.deliveries.pop(5), "never told of", id="an event that was not delivered"),
    pytest.param(
        lambda h: h.marks.insert(4, Mark("recorder", 14, 11, 1.35)),
        "was not delivered",
        id="a consumer's bookmark too early",
    ),
    pytest.param(
        lambda h: h.deliveries.append(replace(h.deliveries[-1], revision=22)),
        "and it is None",
        id="delivered out of nowhere",
    ),
    pytest.param(
        lambda h: h.deliveries.append(replace(h.deliveries[-1], type="ADDED")),
        "and it is Told",
        id="delivered otherwise",
    ),
    pytest.param(
        lambda h: h.deliveries.extend([h.deliveries[-2], h.deliveries[-3]]),
        "went back 2 times",
        id="delivered out of order",
    ),
]


@pytest.mark.parametrize(("spoil", "told"), BROKEN)
def test_each_way_to_break_a_promise_is_found(spoil: Callable[[History], None], told: str) -> None:
    history = true_history()
    spoil(history)
    broken = check(history)
    assert any(told in sentence for sentence in broken), broken


def test_a_gap_that_the_consumer_is_told_of_is_none_if_the_state_is_told_whole() -> None:
    history = true_history()
    del history.deliveries[5:8]
    assert check(history) != []
    history.deliveries.insert(5, Delivered(1.9, "lrm-2", "p2", "RESYNC", "", 19))
    assert any("told anew" in sentence for sentence in check(history))
    history.deliveries.insert(6, Delivered(1.9, "lrm-2", "p2", "SYNC", "a", 19))
    assert check(history) == []


def test_after_redis_has_lost_its_memory_a_bookmark_may_begin_anew() -> None:
    history = true_history()
    history.marks.append(Mark("gadgets", 12, 16, 6.1, era=1))
    assert check(history) == []


def test_events_of_one_revision_may_be_told_again_whole_at_a_resume() -> None:
    """Two objects share a revision; the connection ends between them, and the next one begins with both."""
    history, line = History(PREFIX, LEADERS, base=10), Line()
    line.add(11, f"{PREFIX}a", gadget("op1", finalizers=()))
    line.add(11, f"{PREFIX}b", gadget("op2", finalizers=()))
    history.changes = line.changes
    history.writes = [
        Write("create", "a", "op1", 1.0, 1.1, "done", 11),
        Write("create", "b", "op2", 1.0, 1.1, "done", 11),
    ]
    first, second = Told("ADDED", "a", 11, "op1"), Told("ADDED", "b", 11, "op2")
    history.watchers = {"w": [Stretch(10, [first], listed=True), Stretch(11, [first, second])]}
    history.deliveries = [Delivered(1.1, "lrm-1", "p1", "ADDED", name, 11) for name in "ab"]
    assert check(history) == []
    history.watchers["w"].pop()
    assert check(history) != []
