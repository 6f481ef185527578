"""The law of removal: whatever sequence of lists a CML gives, no record goes without its proofs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.cml.inventory import Inventory
from controllers.cml.models import Lab
from controllers.labs.history import first_status, mark_missing, observe
from controllers.labs.kind import LabRecord, LabRecordSpec, record_name
from controllers.labs.sync import LISTS_TO_REMOVE, LISTS_TO_REMOVE_MANY, MANY_OF, difference
from lrm.resource import ObjectMeta

START = datetime(2026, 1, 1, tzinfo=UTC)
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


def removed(found_for: list[LabRecord], inventory: Inventory) -> list[str]:
    found = difference(found_for, [r.spec.lab_id for r in found_for], inventory)
    return [r.record.spec.lab_id for r in found.removals]


def test_a_listed_lab_without_a_record_gets_one_and_no_other_does() -> None:
    found = difference([record(IDS[0])], [IDS[0]], listing(IDS[:3]))
    assert [made.id for made in found.create] == IDS[1:3]
    assert [(r.spec.lab_id, seen.id) for r, seen in found.seen] == [(IDS[0], IDS[0])]
    assert found.orphans == 0


def test_a_listed_lab_whose_record_went_while_we_looked_gets_none() -> None:
    assert difference([], [IDS[0]], listing(IDS[:1])).create == ()


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
    found = difference(known, [], inventory)
    assert {t.lists for t in found.tombstones} == (set() if removes else {before + 1})


def test_without_proof_nothing_is_removed_or_marked() -> None:
    known = [record(i, missing=9) for i in IDS]
    found = difference(known, IDS, listing([], complete=False, absent=IDS))
    assert (found.orphans, found.create, found.seen) == (0, (), ())


def test_a_lab_that_is_shown_is_there_whatever_the_list_says() -> None:
    found = difference([record(IDS[0], missing=1)], [], listing([], shown=[IDS[0]]))
    assert found.orphans == 0
    assert len(found.seen) == 1


def test_a_listed_lab_whose_data_could_not_be_read_is_neither_seen_nor_missing() -> None:
    found = difference([record(IDS[0], missing=1)], [], listing([IDS[0]], shown=[]))
    assert (found.orphans, found.seen) == (0, ())


def test_records_that_are_being_deleted_are_left_alone_and_not_counted() -> None:
    dying = [record(i, deleting=True) for i in IDS[:7]]
    known = dying + [record(i) for i in IDS[7:12]]
    found = difference(known, [], listing(IDS[9:12], absent=IDS[:9]))
    assert [r.record.spec.lab_id for r in found.removals] == IDS[7:9]
    assert not found.cautious
    assert difference(dying, [], listing(IDS[:7])).create == (), "they still have their records"


@dataclass(frozen=True)
class Look:
    """One list of a CML: what it holds, whether it proves anything, which ids answered 404."""

    ids: frozenset[str]
    complete: bool
    absent: frozenset[str]


looks = st.builds(
    Look,
    ids=st.frozensets(st.sampled_from(IDS)),
    complete=st.booleans(),
    absent=st.frozensets(st.sampled_from(IDS)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(looks, min_size=1, max_size=9))
def test_no_record_goes_without_its_proofs_whatever_the_sequence_of_lists(sequence: list[Look]) -> None:
    """Judged from the sequence itself, not from what the records remember of it."""
    records: dict[str, LabRecord] = {}
    since: dict[str, int] = {}
    for step, look in enumerate(sequence):
        absent = look.absent - look.ids if look.complete else frozenset()
        inventory = listing(sorted(look.ids), complete=look.complete, absent=sorted(absent))
        found = difference(records.values(), set(records), inventory)
        lacking = set(records) - look.ids
        many = len(records) >= MANY_OF and 2 * len(lacking) > len(records)
        for removal in found.removals:
            gone = removal.record.spec.lab_id
            assert look.complete, "an unproven list removed a record"
            assert gone not in look.ids
            proofs = _lists_in_a_row_without(gone, sequence[since[gone] : step + 1])
            if many:
                assert proofs >= LISTS_TO_REMOVE_MANY
            else:
                assert proofs >= LISTS_TO_REMOVE or gone in absent
        expected = {
            i
            for i in (lacking if look.complete else set())
            if (i in absent and not many)
            or _lists_in_a_row_without(i, sequence[since[i] : step + 1])
            >= (LISTS_TO_REMOVE_MANY if many else LISTS_TO_REMOVE)
        }
        assert {r.record.spec.lab_id for r in found.removals} == expected, "what is proven does go"
        now = START + timedelta(minutes=step)
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
        for removal in found.removals:
            del records[removal.record.spec.lab_id]
        assert look.ids <= set(records)


def _lists_in_a_row_without(lab_id: str, sequence: list[Look]) -> int:
    """Complete lists, from the last one backwards, that lack a lab, up to the last list that had it."""
    count = 0
    for look in reversed(sequence):
        if lab_id in look.ids:
            break
        count += look.complete
    return count
