"""What a list of a worker's labs means for its records: the pure difference, and the law of removal.

Promises: without a complete list (`Inventory.complete`) no record is removed and none gets a tombstone. A record that
a complete list lacks gets a tombstone, and is removed by the second such list in a row, or at once if CML also
answered 404 for its lab under the same session. When a list lacks more than half of ten or more records, the short
cut is off and removal waits for the fourth list in a row. Lists that count are some time `apart`: what is asked twice
within a moment is one look; and `apart_if_many` where so many are missing, which outlasts a CML that starts again, also
where pushes bring a list every moment. While `held`, nothing is counted or removed, and a missing lab is only marked.
A record of a lab that lrm itself has removed (`ended`) goes at the first complete list that lacks it, and is no part
of the law. A lab that is listed without its data is there. Records that are being deleted are left to their deletion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from controllers.cml.inventory import Inventory
from controllers.cml.models import Lab
from controllers.labs.kind import LabRecord

LISTS_TO_REMOVE = 2
LISTS_TO_REMOVE_MANY = 4
MANY_OF = 10
"""With fewer records than this, half of them going is an ordinary day."""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A record that this list lacks, as the list before did or not: `lists` in a row that count now, 0 while held."""

    record: LabRecord
    lists: int


@dataclass(frozen=True, slots=True)
class Removal:
    """A record whose lab is proven to be gone, and by what."""

    record: LabRecord
    proof: str


@dataclass(frozen=True, slots=True)
class Difference:
    """What is to be done so that the records mirror the list."""

    create: tuple[Lab, ...] = ()
    seen: tuple[tuple[LabRecord, Lab], ...] = ()
    """Records whose labs are in the list, changed or not."""
    listed: tuple[LabRecord, ...] = ()
    """Records with a tombstone whose labs are in the list, but without their data."""
    tombstones: tuple[Tombstone, ...] = ()
    removals: tuple[Removal, ...] = ()
    ended: tuple[LabRecord, ...] = ()
    """Records that a complete list lacks, of labs that lrm had no more use for."""
    cautious: bool = False
    """The half rule held the removals back."""

    @property
    def orphans(self) -> int:
        """Records whose labs the complete list lacks."""
        return len(self.tombstones) + len(self.removals)


def difference(
    records: Iterable[LabRecord],
    before: Collection[str],
    inventory: Inventory,
    *,
    at: datetime,
    apart: timedelta,
    apart_if_many: timedelta,
    is_ended: Callable[[LabRecord], bool] = lambda _: False,
    held: bool = False,
) -> Difference:
    """Compare a worker's records with a list of its labs that was asked for `at` this time.

    `before` holds the ids of the labs that had a record when the list was begun. A listed lab whose record has gone
    since was deleted while we looked: it is not made anew from an old picture.
    """
    known = {record.spec.lab_id: record for record in records}
    standing = [record for record in known.values() if not record.deleting]
    labs, without_data = inventory.labs, inventory.ids - inventory.labs.keys()
    create = tuple(labs[i] for i in sorted(labs) if i not in known and i not in before)
    seen = tuple((record, labs[record.spec.lab_id]) for record in standing if record.spec.lab_id in labs)
    listed = tuple(
        record for record in standing if record.spec.lab_id in without_data and record.status.missing_since is not None
    )
    if not inventory.complete:
        return Difference(create, seen, listed)
    unlisted = [r for r in standing if r.spec.lab_id not in inventory.ids and r.spec.lab_id not in labs]
    ended = tuple(record for record in unlisted if is_ended(record))
    gone = {record.spec.lab_id for record in ended}
    lacking = [record for record in unlisted if record.spec.lab_id not in gone]
    judged = len(standing) - len(ended)
    cautious = judged >= MANY_OF and len(lacking) * 2 > judged
    enough = LISTS_TO_REMOVE_MANY if cautious else LISTS_TO_REMOVE
    least = apart_if_many if cautious else apart
    tombstones, removals = [], []
    for record in lacking:
        lists = record.status.missing_lists + _counts(record, at, least)
        if held:
            tombstones.append(Tombstone(record, record.status.missing_lists))
        elif not cautious and record.spec.lab_id in inventory.absent:
            removals.append(Removal(record, "not in a complete list, and CML answers 404"))
        elif lists >= enough:
            removals.append(Removal(record, f"not in {lists} complete lists in a row"))
        else:
            tombstones.append(Tombstone(record, lists))
    return Difference(create, seen, listed, tuple(tombstones), tuple(removals), ended, cautious)


def _counts(record: LabRecord, at: datetime, apart: timedelta) -> bool:
    """Whether a list is another one for a record that it lacks; one that seems older than the last is not."""
    last = record.status.missing_counted_at or record.status.missing_since
    return last is None or at - last >= apart
