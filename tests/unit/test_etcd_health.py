"""What is said about a member's database: early enough to act, and where it stands what to do."""

from __future__ import annotations

from typing import Any

import pytest

from lrm.testing import VirtualClock
from storage.base import Health
from storage.etcd_health import RUNBOOK, health
from storage.etcd_wire import Json

MIB = 1024**2
HEADER = {"cluster_id": "7", "member_id": "1", "revision": "5"}


class Members:
    """The part of the gateway that is asked; `status` is what the one member answers."""

    endpoints = ("http://e1:2379",)
    request_timeout = 5.0
    clock = VirtualClock()

    def __init__(self, *alarms: str, **status: Any) -> None:
        self._answers: dict[str, Json] = {
            "/maintenance/status": {"header": HEADER, "leader": "1", "version": "3.5.30", **status},
            "/maintenance/alarm": {"header": HEADER, "alarms": [{"alarm": a} for a in alarms]},
        }

    async def call_member(self, _endpoint: str, path: str, _body: Json, _timeout: float) -> Json:
        return self._answers[path]

    async def health(self, quota: int = 100 * MIB) -> Health:
        async def read(_path: str, _body: Json) -> Json:
            return {"header": HEADER}

        return await health(self, "/lrm/epoch", read, quota)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "told", "why"),
    [
        (79, "", "room for a while"),
        (80, "80 of the 100 MiB of its quota (30 MiB in use)", "from four fifths on"),
        (101, "101 of the 100 MiB", "the file may end above the quota"),
    ],
)
async def test_a_database_near_its_quota_is_told_with_the_runbook(size: int, told: str, why: str) -> None:
    found = await Members(dbSize=str(size * MIB), dbSizeInUse=str(30 * MIB)).health()
    notes = " ".join(found.notes)
    assert (told in notes, RUNBOOK in notes) == (True, bool(told)), why
    assert (found.members[0].db_size, found.members[0].db_size_in_use) == (size * MIB, 30 * MIB)


@pytest.mark.parametrize(
    ("own", "quota", "why"),
    [
        ({}, 100 * MIB, "etcd before 3.6 tells none: the setting"),
        ({"dbSizeQuota": str(8 * MIB)}, 8 * MIB, "etcd 3.6 tells it"),
        ({"dbSizeQuota": "0"}, 100 * MIB, "unset there: the setting"),
        ({"dbSizeQuota": "-1"}, -1, "etcd's quota is switched off"),
    ],
)
async def test_the_quota_is_the_members_own_where_it_tells_it(own: dict[str, str], quota: int, why: str) -> None:
    found = await Members(dbSize=str(7 * MIB), **own).health()
    assert found.members[0].quota == quota, why
    assert bool(found.notes) == (quota == 8 * MIB), why


async def test_the_alarm_names_the_runbook() -> None:
    found = await Members("NOSPACE", dbSize="1").health()
    assert found.members[0].alarms == ("NOSPACE",)
    assert found.ok
    assert any("refuses writes" in note and RUNBOOK in note for note in found.notes)
