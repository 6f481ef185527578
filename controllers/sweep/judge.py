"""Which instances nobody claims, and for how long: pure, from what EC2 and the store were heard to say.

An instance is claimed when a LabWorker has its uid tag (so does a launch whose id nobody knows yet), names its id, or
when a claim key stands for it. What EC2 did not tell completely says nothing: the suspects of such a place stay as
they were, neither confirmed nor cleared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter

from controllers.aws.ec2 import Ec2Instance
from controllers.aws.place import Place
from controllers.workers.decisions import RETAIN_TAG, UID_TAG, over
from controllers.workers.kind import LabWorker
from lrm.model import Timestamp, rfc3339

TIME: TypeAdapter[datetime] = TypeAdapter(Timestamp)
"""Reads a stored time; its errors are ValueErrors."""
SWEEPS = 2
"""Looks that must agree before a suspect is an orphan."""
_MANY = 10


@dataclass(frozen=True, slots=True)
class Suspect:
    """An instance that nobody claimed; `sweeps` looks in a row, the first at `since`."""

    instance_id: str
    place: Place
    uid: str
    """The uid tag that it carried: with another one it is another case."""
    retained: bool
    """Its tags say that it is to outlive its worker: it is told of and never ended."""
    since: datetime
    sweeps: int = 1

    @property
    def is_orphan(self) -> bool:
        return self.sweeps >= SWEEPS

    def document(self) -> dict[str, Any]:
        """As JSON; `from_document` reads it."""
        return {
            "instanceId": self.instance_id,
            "region": self.place.region,
            "account": self.place.account,
            "uid": self.uid,
            "retained": self.retained,
            "since": rfc3339(self.since),
            "sweeps": self.sweeps,
        }

    @classmethod
    def from_document(cls, told: Mapping[str, Any]) -> Suspect:
        """Raises KeyError, TypeError or ValueError for what `document` did not write."""
        return cls(
            str(told["instanceId"]),
            # A version that knew of one account only did not name it.
            Place(str(told["region"]), str(told.get("account", ""))),
            str(told["uid"]),
            bool(told["retained"]),
            TIME.validate_python(told["since"]),
            int(told["sweeps"]),
        )


@dataclass(frozen=True, slots=True)
class Claims:
    """Everything that speaks for an instance."""

    uids: frozenset[str]
    ids: frozenset[str]

    def has(self, instance: Ec2Instance) -> bool:
        return instance.id in self.ids or instance.tags.get(UID_TAG, "") in self.uids


def claims_of(workers: Iterable[LabWorker], claimed_ids: Iterable[str]) -> Claims:
    """What these workers and the claim keys say."""
    uids, ids = set[str](), set[str](claimed_ids)
    for worker in workers:
        ec2 = worker.status.ec2
        uids.add(worker.uid)
        ids.update(i for i in (worker.spec.aws.instance_id, ec2.instance_id, *ec2.surplus) if i)
    return Claims(frozenset(uids), frozenset(ids))


def is_suspect(instance: Ec2Instance, claims: Claims, *, now: datetime, youngest: float) -> bool:
    """Whether nobody claims an instance that runs for more than `youngest` seconds; one of unknown age is young."""
    return not claims.has(instance) and over(instance.launch_time, youngest, now)


def sweep(
    before: Mapping[str, Suspect],
    found: Mapping[Place, Iterable[Ec2Instance]],
    claims: Claims,
    *,
    now: datetime,
    youngest: float,
) -> dict[str, Suspect]:
    """The suspects after a look; `found` has the places that answered completely, and what they have of ours."""
    after = {s.instance_id: s for s in before.values() if s.place not in found}
    for place, instances in sorted(found.items()):
        for instance in instances:
            if not is_suspect(instance, claims, now=now, youngest=youngest):
                continue
            new = Suspect(instance.id, place, instance.tags.get(UID_TAG, ""), RETAIN_TAG in instance.tags, since=now)
            old = before.get(instance.id)
            if old is not None and (old.place, old.uid) == (new.place, new.uid):
                new = Suspect(new.instance_id, place, new.uid, new.retained, old.since, old.sweeps + 1)
            after[instance.id] = new
    return after


def are_too_many(orphans: int, found: int) -> bool:
    """Whether so many are orphans that the store is more likely to be wrong than they: it may have been restored."""
    return orphans >= _MANY and orphans * 2 > found
