"""The law of removal: whatever sequence of lists a CML gives, no record goes without its proofs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.cml.inventory import Inventory
from controllers.cml.models import Lab
from controllers.labs.history import first_status, mark_listed, mark_missing, observe
from controllers.labs.kind import LabRecord, LabRecordSpec, record_name
from controllers.labs.sync import LISTS_TO_REMOVE, LISTS_TO_REMOVE_MANY, MANY_OF, Difference, difference
from lrm.resource import ObjectMeta

START = datetime(2026, 1, 1, tzinfo=UTC)
APART = timedelta(seconds=1)
APART_IF_MANY = timedelta(seconds=60)
NEXT = START + timedelta(minutes=30)
IDS = [f"{n:08x}-0000-4000-8000-000000000000" for n in range(14)]


def lab(lab_id: str, title: str = "a lab") -> Lab:
    return Lab.model_validate({"id": lab_id, "lab_title": title, "state": "STOPPED", "node_count": 1, "link_count": 0})


def record(lab_id: str, *, missing: int = 0, deleting: bool = False) -> LabRecord:
    made = LabRecord(
        metadata=ObjectMeta(name=record_name("w1", lab_id), deletion_timestamp=START if deleting else None),
        spec=LabRecordSpec(worker_ref="w1", lab_id=lab_id),
        status=first_status(lab(lab_id), instance_id="i-1", now=START),
    )
    if missing:
        mark_missing(made.status, missing, seen=START, now=START)
    return made.seal()


def listing(
    ids: list[str], *, complete: bool = True, absent: list[str] | None = None, shown: list[str] | None = None
) -> Inventory:
    return Inventory(
        labs={i: lab(i) for i in (ids if shown is None else shown)},
        ids=frozenset(ids),
        complete=complete,
        why_incomplete="" if complete else "because",
        absent=frozenset(absent or []),
        identity="u",
    )


def compare(
    records: Iterable[LabRecord],
    before: Collection[str],
    inventory: Inventory,
    at: datetime = NEXT,
    *,
    held: bool = False,
) -> Difference:
    return difference(records, before, inventory, at=at, apart=APART, apart_if_many=APART_IF_MANY, held=held)


def removed(found_for: list[LabRecord], inventory: Inventory) -> list[str]:
    found = compare(found_for, [r.spec.lab_id for r in found_for], inventory)
    return [r.record.spec.lab_id for r in found.removals]


def test_a_listed_lab_without_a_record_gets_one_and_no_other_does() -> None:
    found = compare([record(IDS[0])], [IDS[0]], listing(IDS[:3]))
    assert [made.id for made in found.create] == IDS[1:3]
    assert [(r.spec.lab_id, seen.id) for r, seen in found.seen] == [(IDS[0], IDS[0])]
    assert found.orphans == 0


def test_a_listed_lab_whose_record_went_while_we_looked_gets_none() -> None:
    assert compare([], [IDS[0]], listing(IDS[:1])).create == ()


@pytest.mark.parametrize(
    ("records", "missing", "told_absent", "before", "removes", "why"),
    [
        (5, 1, False, 0, False, "the first list makes a tombstone"),
        (5, 1, False, 1, True, "the second removes"),
        (5, 1, True, 0, True, "a 404 in the same session removes at once"),
        (5, 5, True, 0, True, "with few records all may go in a day"),
        (9, 9, True, 0, True, "nine are few"),
        (10, 5, True, 0, True, "half is not more than half"),
        (10, 6, True, 0, False, "more than half of ten: no short cut"),
        (10, 6, False, 1, False, "more than half of ten: nor the second list"),
        (10, 6, False, 2, False, "nor the third"),
        (10, 6, True, 3, True, "the fourth removes"),
        (12, 12, False, 3, True, "all of them too"),
    ],
)
def test_the_law(*, records: int, missing: int, told_absent: bool, before: int, removes: bool, why: str) -> None:
    gone, there = IDS[:missing], IDS[missing:records]
    known = [record(i, missing=before) for i in gone] + [record(i) for i in there]
    inventory = listing(there, absent=gone if told_absent else [])
    assert removed(known, inventory) == (gone if removes else []), why
    found = compare(known, [], inventory)
    assert {t.lists for t in found.tombstones} == (set() if removes else {before + 1})


def test_without_proof_nothing_is_removed_or_marked() -> None:
    known = [record(i, missing=9) for i in IDS]
    found = compare(known, IDS, listing([], complete=False, absent=IDS))
    assert (found.orphans, found.create, found.seen) == (0, (), ())


def test_a_lab_that_is_shown_is_there_whatever_the_list_says() -> None:
    found = compare([record(IDS[0], missing=1)], [], listing([], shown=[IDS[0]]))
    assert found.orphans == 0
    assert len(found.seen) == 1


def test_a_listed_lab_whose_data_could_not_be_read_is_neither_seen_nor_missing() -> None:
    found = compare([record(IDS[0], missing=1)], [], listing([IDS[0]], shown=[]))
    assert (found.orphans, found.seen) == (0, ())


@pytest.mark.parametrize("complete", [True, False])
def test_a_listed_lab_whose_data_could_not_be_read_loses_its_tombstone(complete: bool) -> None:
    """A list that has it is none of those that lack it, so what came before is no row any more."""
    known = [record(IDS[0], missing=1), record(IDS[1]), record(IDS[2], missing=1, deleting=True)]
    found = compare(known, [], listing(IDS[:3], shown=[], complete=complete))
    assert [r.spec.lab_id for r in found.listed] == [IDS[0]], "the others have none to lose, or are left alone"
    again = known[0].thaw()
    mark_listed(again.status, now=NEXT)
    found = compare([again.seal(), *known[1:]], [], listing(IDS[1:]), NEXT + timedelta(minutes=30))
    assert ([t.lists for t in found.tombstones], found.removals) == ([1], ())


@pytest.mark.parametrize(
    ("after", "lists", "why"),
    [
        (timedelta(0), 1, "the same moment"),
        (timedelta(milliseconds=999), 1, "too soon to be another look"),
        (APART, 2, "another look"),
        (timedelta(hours=-1), 1, "the clock was set back, so nothing is known of the time between"),
    ],
)
def test_lists_within_a_moment_are_one_look(after: timedelta, lists: int, why: str) -> None:
    assert removed_at(record(IDS[0], missing=1), START + after) == (lists == LISTS_TO_REMOVE), why


@pytest.mark.parametrize(("after", "lists"), [(APART, 1), (APART_IF_MANY - APART, 1), (APART_IF_MANY, 2)])
def test_where_most_are_missing_lists_within_a_longer_time_are_one_look(after: timedelta, lists: int) -> None:
    known = [record(i, missing=1) for i in IDS[:6]] + [record(i) for i in IDS[6:10]]
    found = compare(known, [], listing(IDS[6:10]), START + after)
    assert {t.lists for t in found.tombstones} == {lists}
    few = compare(known[1:], [], listing(IDS[6:10]), START + after)
    assert len(few.removals) == 5, "of nine, most may go"


def test_after_the_clock_was_set_back_the_time_between_lists_is_taken_from_there() -> None:
    back = START - timedelta(hours=1)
    marked = record(IDS[0], missing=1).thaw()
    mark_missing(marked.status, 1, seen=None, now=back)
    marked.seal()
    assert not removed_at(marked, back + APART / 2)
    assert removed_at(marked, back + APART)


def removed_at(known: LabRecord, at: datetime) -> bool:
    return bool(compare([known], [], listing([]), at).removals)


def test_while_held_nothing_is_removed_and_no_list_is_counted() -> None:
    """Neither by the number of lists nor by a 404; a missing lab is only marked, so that it is not said to be seen."""
    known = [record(IDS[0], missing=3), record(IDS[1], missing=1), record(IDS[2]), record(IDS[3])]
    found = compare(known, [], listing(IDS[3:4], absent=IDS[:3]), held=True)
    assert found.removals == ()
    assert [(t.record.spec.lab_id, t.lists) for t in found.tombstones] == list(zip(IDS, (3, 1, 0), strict=False))
    assert removed(known, listing(IDS[3:4], absent=IDS[:3])) == IDS[:3], "and then it goes on"


def test_what_lrm_itself_has_ended_goes_at_once_and_is_no_part_of_the_half_rule() -> None:
    known = [record(i) for i in IDS[:12]]
    found = difference(
        known,
        IDS,
        listing(IDS[9:12]),
        at=NEXT,
        apart=APART,
        apart_if_many=APART_IF_MANY,
        is_ended=lambda r: r.spec.lab_id != IDS[0],
    )
    assert [r.spec.lab_id for r in found.ended] == IDS[1:9], "those that are listed are there"
    assert [t.record.spec.lab_id for t in found.tombstones] == IDS[:1]
    assert (found.cautious, found.orphans) == (False, 1)


def test_records_that_are_being_deleted_are_left_alone_and_not_counted() -> None:
    dying = [record(i, deleting=True) for i in IDS[:7]]
    known = dying + [record(i) for i in IDS[7:12]]
    found = compare(known, [], listing(IDS[9:12], absent=IDS[:9]))
    assert [r.record.spec.lab_id for r in found.removals] == IDS[7:9]
    assert not found.cautious
    assert compare(dying, [], listing(IDS[:7])).create == (), "they still have their records"


@dataclass(frozen=True)
class Look:
    """One list of a CML: what it holds, whether it proves anything, which ids answered 404, and when it came."""

    ids: frozenset[str]
    unread: frozenset[str]
    complete: bool
    after: timedelta
    held: bool
    absent: frozenset[str]


looks = st.builds(
    Look,
    ids=st.frozensets(st.sampled_from(IDS)),
    unread=st.frozensets(st.sampled_from(IDS), max_size=4),
    after=st.sampled_from(
        [timedelta(minutes=30), timedelta(minutes=30), timedelta(seconds=30), timedelta(milliseconds=400)]
    ),
    held=st.sampled_from([False, False, False, True]),
    complete=st.booleans(),
    absent=st.frozensets(st.sampled_from(IDS)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(looks, min_size=1, max_size=9))
def test_no_record_goes_without_its_proofs_whatever_the_sequence_of_lists(sequence: list[Look]) -> None:
    """Judged from the sequence itself, not from what the records remember of it."""
    records: dict[str, LabRecord] = {}
    since: dict[str, int] = {}
    apart: list[timedelta] = []
    now = START
    for step, look in enumerate(sequence):
        now += look.after
        shown = sorted(look.ids - look.unread)
        absent = look.absent - look.ids if look.complete else frozenset()
        inventory = listing(sorted(look.ids), complete=look.complete, absent=sorted(absent), shown=shown)
        found = compare(records.values(), set(records), inventory, now, held=look.held)
        lacking = set(records) - look.ids
        many = len(records) >= MANY_OF and 2 * len(lacking) > len(records)
        apart.append(APART_IF_MANY if many else APART)
        past = list(zip(sequence, apart, strict=False))
        for removal in found.removals:
            gone = removal.record.spec.lab_id
            assert look.complete, "an unproven list removed a record"
            assert not look.held
            assert gone not in look.ids
            proofs = _lists_in_a_row_without(gone, past[since[gone] :])
            if many:
                assert proofs >= LISTS_TO_REMOVE_MANY
            else:
                assert proofs >= LISTS_TO_REMOVE or gone in absent
        expected = {
            i
            for i in (lacking if look.complete and not look.held else set())
            if (i in absent and not many)
            or _lists_in_a_row_without(i, past[since[i] :]) >= (LISTS_TO_REMOVE_MANY if many else LISTS_TO_REMOVE)
        }
        assert {r.record.spec.lab_id for r in found.removals} == expected, "what is proven does go"
        for made in found.create:
            records[made.id], since[made.id] = record(made.id), step
        for known, seen in found.seen:
            fresh = known.thaw()
            observe(fresh.status, seen, instance_id="i-1", now=now, keep=50)
            records[seen.id] = fresh.seal()
        for tombstone in found.tombstones:
            assert look.complete, "an unproven list made a tombstone"
            fresh = tombstone.record.thaw()
            mark_missing(fresh.status, tombstone.lists, seen=None, now=now)
            records[tombstone.record.spec.lab_id] = fresh.seal()
        for back in found.listed:
            fresh = back.thaw()
            mark_listed(fresh.status, now=now)
            records[back.spec.lab_id] = fresh.seal()
        for removal in found.removals:
            del records[removal.record.spec.lab_id]
        assert look.ids - look.unread <= set(records)


def _lists_in_a_row_without(lab_id: str, sequence: list[tuple[Look, timedelta]]) -> int:
    """Complete lists in a row that lack a lab since the last list that had it, each so long after the one before."""
    count, now, last = 0, START, None
    for look, apart in sequence:
        now += look.after
        if lab_id in look.ids:
            count, last = 0, None
        elif look.complete and look.held:
            last = last or now  # marked, not counted: the next look is another one after a while
        elif look.complete and (last is None or now - last >= apart):
            count, last = count + 1, now
    return count
