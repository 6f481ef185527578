"""What people hear of one sync: events on the records, and on the worker for labs that vanished.

Promises: at most `MOST` events of a sort for each sync, and one of the worker for all further ones, so that a CML which
is met for the first time, or loses power, does not drown what else is told. Best effort, as all events. Called by the
mirror, after the write that an event is about.
"""

from __future__ import annotations

from collections import Counter

from controllers.labs.kind import LabRecord, printable
from controllers.workers.kind import LabWorker
from lrm.cache import Cache
from lrm.events import EventType, Recorder
from lrm.owners import kind_of
from lrm.resource import AnyResource, OwnerReference

MOST = 50
"""Events of one sort that one sync tells one by one."""

CREATED, UPDATED, STATE_CHANGED, MISSING, VANISHED = "Created", "Updated", "StateChanged", "Missing", "LabVanished"
_SUMS = {
    CREATED: ("LabsCreated", "{} more labs were found and have records now"),
    UPDATED: ("LabsUpdated", "{} more labs have changed"),
    STATE_CHANGED: ("LabStatesChanged", "{} more labs have changed their state"),
    MISSING: ("LabsMissing", "{} more labs are not in CML's list"),
    VANISHED: ("LabsVanished", "{} more labs are gone from CML and were not deleted through lrm"),
}


class Telling:
    """See the module."""

    def __init__(self, events: Recorder, worker: LabWorker, cache: Cache) -> None:
        self._events = events
        self._worker = worker
        self._cache = cache
        self._told: Counter[str] = Counter()

    def created(self, record: LabRecord) -> None:
        """A lab has a record for the first time."""
        status = record.status
        nodes = "" if status.node_count is None else f", {status.node_count} nodes"
        self._tell(record, "Normal", CREATED, f"the lab {_title(record)} is {status.state}{nodes}")

    def changed(self, before: LabRecord, after: LabRecord) -> None:
        """A lab is not as it was; what its history does not remember is not told."""
        history = after.status.operation_history
        if not history or history == before.status.operation_history:
            return
        changed = dict(history[-1].changed_fields)
        state = changed.pop("state", None)
        if state is not None:
            self._tell(after, "Normal", STATE_CHANGED, f"the lab {_title(after)} went from {state.old} to {state.new}")
        if changed:
            what = ", ".join(f"{name} from {_shown(c.old)} to {_shown(c.new)}" for name, c in changed.items())
            self._tell(after, "Normal", UPDATED, f"the lab {_title(after)} changed: {what}")

    def missing(self, record: LabRecord) -> None:
        """A complete list lacks the lab for the first time."""
        self._tell(record, "Warning", MISSING, f"a complete list of CML's labs lacks {_title(record)}")

    def vanished(self, record: LabRecord, proof: str) -> None:
        """A lab is gone that nobody deleted through lrm: its record goes, so its owners are told."""
        lab = f"the lab {_title(record)} ({record.spec.lab_id})"
        message = f"{lab} is gone from CML and was not deleted through lrm: {proof}"
        if self._counts(VANISHED):
            for owner in self._owners(record):
                self._events.record(owner, "Warning", VANISHED, message)

    def close(self) -> None:
        """Tell the sums."""
        for sort, count in self._told.items():
            if count > MOST:
                reason, message = _SUMS[sort]
                self._events.record(self._worker, "Normal", reason, message.format(count - MOST))

    def _tell(self, record: LabRecord, type: EventType, sort: str, message: str) -> None:  # noqa: A002 - the field's name
        if self._counts(sort):
            self._events.record(record, type, sort, message)

    def _counts(self, sort: str) -> bool:
        """Whether one more of a sort is told by itself."""
        self._told[sort] += 1
        return self._told[sort] <= MOST

    def _owners(self, record: LabRecord) -> list[AnyResource]:
        """The worker, and whatever else the record belongs to."""
        others = (self._owner(record.namespace, o) for o in record.metadata.owner_references if o.kind != "LabWorker")
        return [self._worker, *(owner for owner in others if owner is not None)]

    def _owner(self, namespace: str, reference: OwnerReference) -> AnyResource | None:
        kind = kind_of(self._cache.registry, reference)
        item = self._cache.item(kind, namespace, reference.name) if kind else None
        found = item.resource if item else None
        return found if found is not None and found.uid == reference.uid else None


def _title(record: LabRecord) -> str:
    return f'"{printable(record.status.title)}"'


def _shown(value: str | int | None) -> str:
    return printable(value) if isinstance(value, str) else str(value)
