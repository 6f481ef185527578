"""What a record's user wants of its lab and has not had yet: an operation, or else desiredState.

Promises: an operation is wanted once for its id, of which the last ones are known (`PAST_OPERATIONS`); desiredState
once for each change of it, not again because the spec moved for an operation. The newer wish replaces the older one; of
two that are first seen together the operation goes first. Pure; called by the lab-records controller, and by the
endpoints that wait for an operation's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from controllers.labs.desired import DEFINED_ON_CORE, STARTED, STOPPED
from controllers.labs.kind import (
    DESIRED_STATE,
    ENDED,
    PAST_OPERATIONS,
    SUPERSEDED,
    Acting,
    LabRecord,
    Operation,
    OperationOutcome,
)

TARGETS: Mapping[str, str] = {"Start": STARTED, "Stop": STOPPED, "Wipe": DEFINED_ON_CORE}
"""Where each verb brings a lab."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A state that the lab is to be brought to; by desiredState where there is no operation."""

    state: str
    operation: Operation | None = None

    def acting(self, record: LabRecord) -> Acting | None:
        """How far this wish has come; the steps of another one do not count."""
        acting = record.status.acting
        if acting is None or acting.operation != (self.operation.id if self.operation else ""):
            return None
        return acting if self.operation or acting.generation == record.metadata.generation else None


def open_operation(record: LabRecord) -> Operation | None:
    """The operation that is to be carried out, None when there is none or it has ended."""
    operation = record.spec.operation
    return operation if operation is not None and not _ended(record, operation.id) else None


def open_wish(record: LabRecord) -> Wish | None:
    """What is to be done next, None when nothing is."""
    operation, wanted, status = open_operation(record), record.spec.desired_state, record.status
    if operation is not None:
        return Wish(TARGETS[operation.verb], operation)
    if wanted is None or status.observed_generation == record.metadata.generation:
        return None
    return Wish(wanted) if wanted != status.acted_state or _under_way(record) else None


def unsettled(record: LabRecord) -> bool:
    """Whether a wish is open, or the end of one is not noted yet."""
    return open_wish(record) is not None or record.status.observed_generation != record.metadata.generation


def tell_operation(record: LabRecord, operation: Operation, result: str, message: str, now: datetime) -> None:
    """Note what has become of an operation; `at` moves only with the result."""
    old = record.status.operation
    same = old is not None and (old.id, old.result) == (operation.id, result)
    at = old.at if old is not None and same else now
    _put(record, OperationOutcome(id=operation.id, verb=operation.verb, result=result, message=message[:500], at=at))


def withdraw(record: LabRecord, now: datetime) -> None:
    """Note the end of an operation that the spec does not name any more; of one that it names again, the old end."""
    told, asked = record.status.operation, record.spec.operation
    if told is not None and told.result not in ENDED:
        record.status.operation = told.model_copy(
            update={"result": SUPERSEDED, "message": "it was withdrawn from the spec", "at": now}
        )
    again = _past(record, asked.id) if asked is not None else None
    if again is not None:
        _put(record, again)


def outcome_of(record: LabRecord, operation_id: str) -> OperationOutcome | None:
    """What the record tells of an operation, None when it is not told of yet; a lost one is Superseded."""
    told, asked = record.status.operation, record.spec.operation
    if told is not None and told.id == operation_id:
        return told
    past = _past(record, operation_id)
    if past is not None:
        return past
    if asked is not None and asked.id == operation_id:
        return None
    at = told.at if told is not None else record.metadata.creation_timestamp
    if at is None:
        return None
    return OperationOutcome(id=operation_id, verb="", result=SUPERSEDED, message="another took its place", at=at)


def _under_way(record: LabRecord) -> bool:
    """Whether the desiredState that was taken up last still is what this generation wants."""
    told = record.status.condition(DESIRED_STATE)
    return told is not None and told.status == "Unknown" and told.observed_generation == record.metadata.generation


def _put(record: LabRecord, outcome: OperationOutcome) -> None:
    """Tell of this operation; the one that was told of becomes the newest of the past."""
    status, old = record.status, record.status.operation
    status.operation = outcome
    if old is None or old.id == outcome.id:
        return
    if old.result not in ENDED:
        old = old.model_copy(update={"result": SUPERSEDED, "message": "another took its place", "at": outcome.at})
    past = [p for p in status.past_operations if p.id not in (old.id, outcome.id)]
    status.past_operations = [*past, old.model_copy(update={"message": old.message[:100]})][-PAST_OPERATIONS:]


def _past(record: LabRecord, operation_id: str) -> OperationOutcome | None:
    return next((past for past in record.status.past_operations if past.id == operation_id), None)


def _ended(record: LabRecord, operation_id: str) -> bool:
    told = record.status.operation
    if told is not None and told.id == operation_id:
        return told.result in ENDED
    return _past(record, operation_id) is not None
