"""A lab in the flat form that clients of the list of labs know, under exactly their keys.

A lab that the last complete list lacked is told too, in the state `Missing`: not proven to be gone, and not there.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from controllers.labs.kind import LabRecord, last_synced, shown_state
from lrm.model import rfc3339


def flat(record: LabRecord, worker_synced: datetime | None) -> dict[str, Any]:
    """Times are RFC 3339 or None; `owner` is the full name, as CML tells it."""
    status = record.status
    times = {
        "created": status.cml_created_at,
        "modified": status.modified_at,
        "last_synced": last_synced(status, worker_synced),
    }
    return {
        "id": record.spec.lab_id,
        "title": status.title,
        "description": status.description,
        "notes": status.notes,
        "state": shown_state(record),
        "owner": status.owner_fullname,
        "owner_username": status.owner_username,
        "node_count": status.node_count,
        "link_count": status.link_count,
        "groups": status.groups,
        **{name: rfc3339(time) if time is not None else None for name, time in times.items()},
    }
