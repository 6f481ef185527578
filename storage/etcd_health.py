"""What etcd and each of its members say about themselves, and sentences for people about it.

Never raises for a store that cannot be reached: that is what it reports. Members are asked one by one at the endpoints
that we were given, at the same time. Called by `storage.etcd`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from storage.base import Health, Member
from storage.errors import StorageError, StoreReset
from storage.etcd_errors import LostReply, NotDone
from storage.etcd_gateway import Gateway
from storage.etcd_wire import Json, entries, header_revision, number, one_key

_FIXED = {(3, 4): 42, (3, 5): 28}
"""First releases without stale reads after a pause, lost deletes at a compaction and unchecked nested writes."""

DEFAULT_QUOTA_BYTES = 2 * 1024**3
"""What etcd takes where `--quota-backend-bytes` is not set."""
RUNBOOK = "docs/runbooks/etcd-out-of-space.md"
_NEARLY_FULL = 0.8
"""Share of the quota from which on a member's size is told: left is an hour or more of writes, and compacting helps."""


async def health(
    gateway: Gateway, epoch_key: str, read: Callable[[str, Json], Awaitable[Json]], quota_bytes: int
) -> Health:
    """Ask the store for a linearizable read and each member for its status, all at once.

    `quota_bytes` is the quota of members that do not tell theirs.
    """
    async with asyncio.TaskGroup() as group:
        head = group.create_task(_head(epoch_key, read))
        asked = [group.create_task(_member(gateway, endpoint, quota_bytes)) for endpoint in gateway.endpoints]
    reply, notes = head.result()
    members = tuple(task.result() for task in asked)
    for member in members:
        notes += _notes(member)
    found = entries(reply)
    return Health(
        ok=bool(reply),
        revision=header_revision(reply),
        members=members,
        notes=tuple(dict.fromkeys(notes)),
        cluster_id=str((reply.get("header") or {}).get("cluster_id") or ""),
        epoch=found[0].value.decode("utf-8", "replace") if found else "",
    )


async def _head(epoch_key: str, read: Callable[[str, Json], Awaitable[Json]]) -> tuple[Json, list[str]]:
    """The epoch's reply, empty when there is none, and notes."""
    notes: list[str] = []
    for _ in range(2):
        try:
            return await read("/kv/range", one_key(epoch_key)), notes
        except StoreReset as reset:
            notes.append(f"{reset}.")  # The watches have been told; the second read is of the new line.
        except StorageError as error:
            notes.append(f"The store does not answer a linearizable read: {error}.")
            break
    return {}, notes


async def _member(gateway: Gateway, endpoint: str, quota_bytes: int) -> Member:
    try:
        status = await gateway.call_member(endpoint, "/maintenance/status", {}, gateway.request_timeout / 2)
    except (LostReply, NotDone, StorageError) as error:
        return Member(endpoint, error=str(error) or type(error).__name__)
    member = Member(
        endpoint,
        version=str(status.get("version") or ""),
        leader=number(status, "leader") == number(status.get("header") or {}, "member_id"),
        db_size=number(status, "dbSize"),
        db_size_in_use=number(status, "dbSizeInUse"),
        quota=number(status, "dbSizeQuota") or quota_bytes,
    )
    try:
        answer = await gateway.call_member(
            endpoint, "/maintenance/alarm", {"action": "GET"}, gateway.request_timeout / 2
        )
    except (LostReply, NotDone, StorageError) as error:
        return replace(member, error=f"alarms: {error}")
    return replace(member, alarms=tuple(dict.fromkeys(_alarm(a) for a in answer.get("alarms") or ())))


def _alarm(fields: dict[str, Any]) -> str:
    return str(fields.get("alarm") or "NONE")


def _notes(member: Member) -> list[str]:
    notes = []
    if member.error:
        notes.append(f"Member {member.endpoint} cannot be asked: {member.error}.")
    if old := version_note(member.version):
        notes.append(old)
    if "NOSPACE" in member.alarms:
        notes.append(f"The store is out of space and refuses writes: {RUNBOOK} says what to do.")
    if member.db_size >= _NEARLY_FULL * member.quota > 0:
        notes.append(
            f"The database of member {member.endpoint} has {_mib(member.db_size)} of the {_mib(member.quota)} MiB"
            f" of its quota ({_mib(member.db_size_in_use)} MiB in use): {RUNBOOK} says what to do."
        )
    if "CORRUPT" in member.alarms:
        notes.append("A member has found its data corrupt: replace it.")
    return notes


def _mib(size: int) -> str:
    return f"{size / 1024**2:.0f}" if size >= 10 * 1024**2 else f"{size / 1024**2:.1f}"


def version_note(version: str) -> str:
    """A sentence about a version that production should not run; empty for a good one."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if not match:
        return ""
    major, minor, patch = (int(part) for part in match.groups())
    if (major, minor) < (3, 4):
        return f"etcd {version} is older than 3.4, the oldest that is supported."
    if patch < _FIXED.get((major, minor), 0):
        return f"etcd {version} has bugs that are fixed in {major}.{minor}.{_FIXED[major, minor]}: upgrade it."
    return ""
