"""What etcd and each of its members say about themselves, and sentences for people about it.

Never raises for a store that cannot be reached: that is what it reports. Members are asked one by one at the endpoints
that we were given, at the same time. Called by `storage.etcd`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

from storage.base import Health, Member
from storage.errors import StorageError, StoreReset
from storage.etcd_errors import LostReply, NotDone
from storage.etcd_gateway import Gateway
from storage.etcd_wire import Json, entries, header_revision, number, one_key

_FIXED = {(3, 4): 42, (3, 5): 28}
"""First releases without stale reads after a pause, lost deletes at a compaction and unchecked nested writes."""


async def health(gateway: Gateway, epoch_key: str, read: Callable[[str, Json], Awaitable[Json]]) -> Health:
    """Ask the store for a linearizable read and each member for its status, all at once."""
    async with asyncio.TaskGroup() as group:
        head = group.create_task(_head(epoch_key, read))
        asked = [group.create_task(_member(gateway, endpoint)) for endpoint in gateway.endpoints]
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


async def _member(gateway: Gateway, endpoint: str) -> Member:
    try:
        status = await gateway.call_member(endpoint, "/maintenance/status", {}, gateway.request_timeout / 2)
    except (LostReply, NotDone, StorageError) as error:
        return Member(endpoint, error=str(error) or type(error).__name__)
    leader = number(status, "leader")
    version = str(status.get("version") or "")
    own = number(status.get("header") or {}, "member_id")
    try:
        answer = await gateway.call_member(
            endpoint, "/maintenance/alarm", {"action": "GET"}, gateway.request_timeout / 2
        )
    except (LostReply, NotDone, StorageError) as error:
        return Member(endpoint, version, leader == own, number(status, "dbSize"), error=f"alarms: {error}")
    alarms = tuple(dict.fromkeys(_alarm(a) for a in answer.get("alarms") or ()))
    return Member(endpoint, version, leader=leader == own, db_size=number(status, "dbSize"), alarms=alarms)


def _alarm(fields: dict[str, Any]) -> str:
    return str(fields.get("alarm") or "NONE")


def _notes(member: Member) -> list[str]:
    notes = []
    if member.error:
        notes.append(f"Member {member.endpoint} cannot be asked: {member.error}.")
    if old := version_note(member.version):
        notes.append(old)
    if "NOSPACE" in member.alarms:
        notes.append("The store is out of space: compact, defragment, then disarm the alarm.")
    if "CORRUPT" in member.alarms:
        notes.append("A member has found its data corrupt: replace it.")
    return notes


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
