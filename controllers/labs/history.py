"""How what CML tells of a lab enters its record's status, and what is remembered of the change.

Promises: a lab that is as it was leaves its status equal, so nothing is written; a change of state, title, node count
or link count is one entry of `operationHistory`, which keeps the last N; all else is refreshed in silence. What CML
did not tell keeps its last value, and learning a value for the first time is not a change. Pure; called by the sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from controllers.cml.models import Lab
from controllers.labs.kind import MISSING, PRESENT, READY, FieldChange, LabOperation, LabRecordStatus

REMEMBERED = {"state": "state", "title": "title", "node_count": "nodeCount", "link_count": "linkCount"}
"""The fields whose changes are history, with the names under which the history has them."""


def first_status(lab: Lab, *, instance_id: str, now: datetime) -> LabRecordStatus:
    """The status of a lab that was not known; generation 1 wants nothing of it, so it counts as acted on."""
    status = LabRecordStatus(phase=PRESENT, first_seen_at=now, observed_generation=1)
    for name, value in news(status, lab, instance_id):
        setattr(status, name, value)
    status.set_condition(READY, status=True, reason="InCML", message="the lab is in CML's list", now=now)
    return status


def news(status: LabRecordStatus, lab: Lab, instance_id: str) -> list[tuple[str, Any]]:
    """The fields of a status that differ from what CML tells, with CML's values; empty for a lab as it was."""
    return [(name, value) for name, value in _told(lab, instance_id) if getattr(status, name) != value]


def is_news(status: LabRecordStatus, lab: Lab, instance_id: str) -> bool:
    """Whether a status has to be written for what CML tells: something differs, or the lab was missing."""
    was_missing = status.missing_since is not None or status.last_synced_at is not None
    return was_missing or bool(news(status, lab, instance_id))


def observe(status: LabRecordStatus, lab: Lab, *, instance_id: str, now: datetime, keep: int) -> None:
    """Bring a status up to what CML tells of the lab."""
    changed: dict[str, FieldChange] = {}
    before = status.state
    for name, value in news(status, lab, instance_id):
        old = getattr(status, name)
        if name in REMEMBERED and old not in (None, ""):
            changed[REMEMBERED[name]] = FieldChange(old=old, new=value)
        setattr(status, name, value)
    if changed:
        entry = LabOperation(timestamp=now, previous_state=before, new_state=status.state, changed_fields=changed)
        status.operation_history = [*status.operation_history, entry][-keep:]
    mark_listed(status, now=now)
    status.last_synced_at = None


def mark_listed(status: LabRecordStatus, *, now: datetime) -> None:
    """Take a tombstone away: the lab is in the list. When it was last seen stays, until its data are read as well."""
    if status.missing_since is not None or status.phase != PRESENT:
        status.missing_since, status.missing_lists, status.missing_counted_at = None, 0, None
        status.enter(PRESENT, "InCMLAgain", now)
        status.set_condition(READY, status=True, reason="InCML", message="the lab is in CML's list again", now=now)


def mark_missing(status: LabRecordStatus, lists: int, *, seen: datetime | None, now: datetime) -> None:
    """Write down that so many complete lists in a row lack the lab, and when it was last seen."""
    counted = status.missing_counted_at
    if lists != status.missing_lists or counted is None or counted > now:
        # A time in the future is of a clock that was set back: from now on the time between lists is taken from here.
        status.missing_counted_at = now
    if status.missing_since is None:
        status.missing_since, status.last_synced_at = now, status.last_synced_at or seen
        status.enter(MISSING, "NotInList", now)
        status.set_condition(
            READY, status=False, reason="Missing", message="a complete list of CML's labs lacks it", now=now
        )
    status.missing_lists = lists


def _told(lab: Lab, instance_id: str) -> Iterator[tuple[str, Any]]:
    """What CML tells of a lab, as status fields; None and an empty title or state are "not told"."""
    yield "instance_id", instance_id
    yield "groups", sorted(_storable(group) for group in lab.groups)
    texts = {
        "title": lab.title or None,
        "state": lab.state or None,
        "description": lab.description,
        "notes": lab.notes,
        "owner": lab.owner,
        "owner_username": lab.owner_username,
        "owner_fullname": lab.owner_fullname,
    }
    for name, text in texts.items():
        if text is not None:
            yield name, _storable(text)
    others = {
        "node_count": lab.node_count,
        "link_count": lab.link_count,
        "cml_created_at": lab.created,
        "modified_at": lab.modified,
    }
    for name, value in others.items():
        if value is not None:
            yield name, value


def _storable(text: str) -> str:
    """The text without lone surrogates, which no store of JSON takes; everything else, controls too, is kept."""
    return text.encode("utf-8", "replace").decode()
