"""The whole table by which a lost write is judged; each row says why."""

from __future__ import annotations

import pytest

from storage.base import Entry, Event, Guard
from storage.settle import GuardGone, Made, Own, Refused, Unsettled, Verdict, judge

KEY = "/k"
GUARD = Guard("/leader", 3)
UPDATE, DELETE, CREATE = Own("update", b"mine"), Own("delete"), Own("create", b"mine")
LEASED = Own("create", b"mine", lease=7)


def entry(revision: int, value: bytes = b"mine", *, created: int = 5, lease: int = 0) -> Entry:
    return Entry(KEY, value, revision, created, lease)


def put(revision: int, value: bytes = b"mine", *, created: int = 5, lease: int = 0) -> Event:
    return Event("put", entry(revision, value, created=created, lease=lease))


def gone(revision: int) -> Event:
    return Event("delete", Entry(KEY, b"", revision, 0))


ROWS = [
    # expected, own, history, current, guards gone, verdict, why
    (10, UPDATE, [put(12)], entry(12), [], Made(put(12)), "our bytes are the first thing that happened"),
    (10, UPDATE, [put(12), put(13, b"x")], entry(13, b"x"), [], Made(put(12)), "and were overwritten since"),
    (10, UPDATE, [put(12), gone(13)], None, [], Made(put(12)), "and were deleted since"),
    (10, UPDATE, [put(12, b"x")], entry(12, b"x"), [], Refused(entry(12, b"x")), "another was first"),
    (10, UPDATE, [put(12, b"x"), put(13)], entry(13), [], Refused(entry(13)), "our bytes came later, from another"),
    (10, UPDATE, [gone(12)], None, [], Refused(None), "it was deleted first"),
    (
        10,
        UPDATE,
        [gone(12), put(13, created=13)],
        entry(13, created=13),
        [],
        Refused(entry(13, created=13)),
        "recreated",
    ),
    (10, UPDATE, [put(12)], entry(12), [GUARD], Made(put(12)), "made before the guard went"),
    (10, UPDATE, [put(12, b"x")], entry(12, b"x"), [GUARD], Refused(entry(12, b"x")), "the key comes before the guard"),
    (
        10,
        UPDATE,
        [],
        entry(10, b"old"),
        [GUARD],
        GuardGone(GUARD),
        "the key has not moved and the guard is gone for ever",
    ),
    (10, UPDATE, [], entry(10, b"old"), [], Unsettled, "still where it was: the write may yet arrive"),
    (10, UPDATE, [], entry(12), [], Unsettled, "the current value alone proves nothing"),
    (10, UPDATE, None, entry(12), [], Unsettled, "nor does it when history is compacted"),
    (10, UPDATE, None, None, [GUARD], Unsettled, "a guard says nothing about a key that has moved"),
    (
        10,
        UPDATE,
        None,
        entry(10, b"old"),
        [GUARD],
        GuardGone(GUARD),
        "history is not needed while the key stands still",
    ),
    (
        10,
        UPDATE,
        [put(9), put(12, b"x")],
        entry(12, b"x"),
        [],
        Refused(entry(12, b"x")),
        "events before count for nothing",
    ),
    (10, DELETE, [gone(12)], None, [], Made(gone(12)), "it was deleted first"),
    (10, DELETE, [gone(12), put(13, created=13)], entry(13), [], Made(gone(12)), "and created anew by another"),
    (10, DELETE, [put(12, b"x")], entry(12, b"x"), [], Refused(entry(12, b"x")), "it was written first"),
    (10, DELETE, [put(12, b"x"), gone(13)], None, [], Refused(None), "another deleted a newer value"),
    (10, DELETE, [], entry(10), [], Unsettled, "it may yet arrive"),
    (10, DELETE, [], entry(10), [GUARD], GuardGone(GUARD), "it cannot any more"),
    (10, DELETE, [], None, [], Unsettled, "absent, but by whose hand was not seen"),
    (10, DELETE, None, None, [], Unsettled, "absent, and nobody can tell any more"),
    (10, CREATE, [put(12, created=12)], entry(12, created=12), [], Made(put(12, created=12)), "our uid is in it"),
    (10, CREATE, [put(12, created=12), gone(13)], None, [], Made(put(12, created=12)), "created, then deleted"),
    (
        10,
        CREATE,
        [put(12, b"x", created=12), gone(13), put(14, created=14)],
        None,
        [],
        Made(put(14, created=14)),
        "late",
    ),
    (10, CREATE, None, entry(12, created=12), [], Made(put(12, created=12)), "compacted, but it stands there"),
    (10, CREATE, None, None, [], Unsettled, "compacted: it may have been there"),
    (10, CREATE, [], None, [], Unsettled, "not seen: it may yet arrive"),
    (
        10,
        CREATE,
        [put(12, b"x", created=12)],
        entry(12, b"x", created=12),
        [],
        Unsettled,
        "another's; ours may yet arrive",
    ),
    (10, CREATE, [], None, [GUARD], Unsettled, "the guard may have held when it was made"),
    (10, CREATE, [], entry(9, created=9), [], Unsettled, "it was there before we asked"),
    (10, CREATE, [put(12, created=11)], entry(12, created=11), [], Unsettled, "an update is not a creation"),
    (10, LEASED, [put(12, b"z", created=12, lease=7)], None, [], Made(put(12, b"z", created=12, lease=7)), "our lease"),
    (10, LEASED, [put(12, created=12, lease=8)], None, [], Unsettled, "same bytes under another's lease are another's"),
    (10, LEASED, [put(12, created=12)], None, [], Unsettled, "same bytes without a lease are another's"),
]


@pytest.mark.parametrize(
    ("expected", "own", "history", "current", "guards", "verdict", "why"), ROWS, ids=[f"{i}" for i in range(len(ROWS))]
)
def test_every_row_of_the_table(  # noqa: PLR0917 - a row has seven columns
    expected: int,
    own: Own,
    history: list[Event] | None,
    current: Entry | None,
    guards: list[Guard],
    verdict: Verdict | type[Unsettled],
    why: str,
) -> None:
    judged = judge(expected, own, history, current, guards)
    if isinstance(verdict, type):
        assert isinstance(judged, verdict), why
        assert judged.why
    else:
        assert judged == verdict, why


def test_asking_again_is_pointless_only_when_the_history_of_a_moved_key_is_gone() -> None:
    compacted = judge(10, UPDATE, None, entry(12), [])
    waiting = judge(10, UPDATE, [], entry(10), [])
    assert isinstance(compacted, Unsettled)
    assert compacted.final
    assert isinstance(waiting, Unsettled)
    assert not waiting.final
