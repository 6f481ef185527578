"""Claims on existing instances: one key per adopted EC2 instance, so that only one worker of an installation has it.

A claim is taken by create and given up under a compare; every write carries the leader's guard. A claim whose worker
is gone, or has nothing to do with the instance any more, is taken over: that is proved by a read of the store, and not
while this version cannot read the worker. While the sweep ends an instance the claim is the sweep's, which only the
sweep gives up.
Called by the workers' controller; the imports' one asks who has what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import orjson

from controllers.workers.kind import LabWorker
from lrm.controller import Context
from lrm.errors import ResourceNotFound, RetryLater, Undecodable
from storage.base import Entry, Storage
from storage.errors import AlreadyExists, Conflict, GuardFailed, NotFound

_PAGE = 500
_SWEEP = "sweep"
"""In place of a worker's uid."""
SWEEP_CLAIM = orjson.dumps({"uid": _SWEEP, "namespace": "", "name": ""})
"""The value of a claim that the sweep holds while it ends an instance."""


class HolderUnreadable(RetryLater):
    """Whether a claim still counts is not known: this version cannot read the worker that it names."""


class Claims:
    """The keys `{root}/claim/ec2/{instanceId}`."""

    def __init__(self, storage: Storage, root: str) -> None:
        self._storage = storage
        self._prefix = f"{root}/claim/ec2/"

    async def take(self, instance_id: str, worker: LabWorker, ctx: Context) -> str:
        """Claim an instance for a worker; return "" when it is ours, else who has it, for people to read.

        Raises `HolderUnreadable`.
        """
        key = self._prefix + instance_id
        value = orjson.dumps({"uid": worker.uid, "namespace": worker.namespace, "name": worker.name})
        for _ in range(3):
            try:
                await self._storage.create(key, value, guards=ctx.guards())
            except AlreadyExists as error:
                holder = _holder(error.current)
                if holder["uid"] == worker.uid:
                    return ""
                if holder["uid"] == _SWEEP or await self._holds(holder, instance_id, ctx):
                    return _name(holder)
                await self._drop(error.current, ctx)
            except GuardFailed as error:
                raise ctx.fenced(error) from error
            else:
                return ""
        return "another worker that claims it at the same time"

    async def everyone(self) -> dict[str, dict[str, str]]:
        """Whom the claims name, by instance, all at one revision; `holding` says which of them count."""
        found: dict[str, dict[str, str]] = {}
        token = ""
        while True:
            page = await self._storage.list(self._prefix, limit=_PAGE, continue_token=token)
            found |= {entry.key.removeprefix(self._prefix): _holder(entry) for entry in page.entries}
            token = page.continue_token
            if not token:
                return found

    async def release(self, instance_id: str, worker: LabWorker, ctx: Context) -> None:
        """Give a claim up if it is this worker's; one that is not there is fine."""
        try:
            entry = await self._storage.get(self._prefix + instance_id)
        except NotFound:
            return
        if _holder(entry)["uid"] == worker.uid:
            await self._drop(entry, ctx)

    async def _holds(self, holder: dict[str, str], instance_id: str, ctx: Context) -> bool:
        try:
            other = await ctx.client.get(LabWorker, holder["namespace"], holder["name"])
        except ResourceNotFound:
            return False
        except Undecodable as error:
            message = f"{instance_id} is claimed by {_name(holder)}, a worker that this version cannot read"
            raise HolderUnreadable(message) from error
        return _has(other, holder, instance_id)

    async def _drop(self, entry: Entry, ctx: Context) -> None:
        try:
            await self._storage.delete(entry.key, expected_revision=entry.revision, guards=ctx.guards())
        except Conflict:
            return  # somebody else was faster; whoever needs the claim looks again
        except GuardFailed as error:
            raise ctx.fenced(error) from error


def holding(claims: Mapping[str, Mapping[str, str]], workers: Iterable[LabWorker]) -> dict[str, str]:
    """Who has what, by instance and for people to read, by the claims and by workers that were read after them."""
    by_place = {(w.namespace, w.name): w for w in workers}
    found: dict[str, str] = {}
    for instance_id, holder in claims.items():
        worker = by_place.get((holder["namespace"], holder["name"]))
        if holder["uid"] == _SWEEP or (worker is not None and _has(worker, holder, instance_id)):
            found[instance_id] = _name(holder)
    return found


def _has(worker: LabWorker, holder: Mapping[str, str], instance_id: str) -> bool:
    """Whether the worker of that name is the one that claimed the instance, and still has to do with it."""
    named = instance_id in (worker.spec.aws.instance_id, worker.status.ec2.instance_id)
    return named and worker.uid == holder["uid"]


def _name(holder: Mapping[str, str]) -> str:
    if holder["uid"] == _SWEEP:
        return "the sweep, which ends it"
    return f"{holder['namespace']}/{holder['name']}"


def _holder(entry: Entry) -> dict[str, str]:
    """Whom a claim names; a value that nobody can read names nobody, and its worker cannot be found."""
    try:
        value = orjson.loads(entry.value)
    except orjson.JSONDecodeError:
        value = {}
    told = value if isinstance(value, dict) else {}
    return {part: str(told.get(part, "")) for part in ("uid", "namespace", "name")}
