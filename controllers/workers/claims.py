"""Claims on existing instances: one key per adopted EC2 instance, so that only one worker of an installation has it.

A claim is taken by create and given up under a compare; every write carries the leader's guard. A claim whose worker
is gone, or has nothing to do with the instance any more, is taken over: that is proved by a read of the store.
Called by the workers' controller; the imports' one asks who has what.
"""

from __future__ import annotations

import orjson

from controllers.workers.kind import LabWorker
from lrm.errors import ResourceNotFound
from lrm.reconcile import Context
from storage.base import Entry, Storage
from storage.errors import AlreadyExists, Conflict, GuardFailed, NotFound


class Claims:
    """The keys `{root}/claim/ec2/{instanceId}`."""

    def __init__(self, storage: Storage, root: str) -> None:
        self._storage = storage
        self._prefix = f"{root}/claim/ec2/"

    async def take(self, instance_id: str, worker: LabWorker, ctx: Context) -> str:
        """Claim an instance for a worker; return "" when it is ours, else who has it (`namespace/name`)."""
        key = self._prefix + instance_id
        value = orjson.dumps({"uid": worker.uid, "namespace": worker.namespace, "name": worker.name})
        for _ in range(3):
            try:
                await self._storage.create(key, value, guards=ctx.guards())
            except AlreadyExists as error:
                holder = _holder(error.current)
                if holder["uid"] == worker.uid:
                    return ""
                if await self._holds(holder, instance_id, ctx):
                    return f"{holder['namespace']}/{holder['name']}"
                await self._drop(error.current, ctx)
            except GuardFailed as error:
                raise ctx.fenced(error) from error
            else:
                return ""
        return "another worker that claims it at the same time"

    async def holder(self, instance_id: str, ctx: Context) -> str:
        """Who has an instance (`namespace/name`), "" when nobody has."""
        try:
            holder = _holder(await self._storage.get(self._prefix + instance_id))
        except NotFound:
            return ""
        return f"{holder['namespace']}/{holder['name']}" if await self._holds(holder, instance_id, ctx) else ""

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
        mine = other.uid == holder["uid"]
        return mine and instance_id in (other.spec.aws.instance_id, other.status.ec2.instance_id)

    async def _drop(self, entry: Entry, ctx: Context) -> None:
        try:
            await self._storage.delete(entry.key, expected_revision=entry.revision, guards=ctx.guards())
        except Conflict:
            return  # somebody else was faster; whoever needs the claim looks again
        except GuardFailed as error:
            raise ctx.fenced(error) from error


def _holder(entry: Entry) -> dict[str, str]:
    """Whom a claim names; a value that nobody can read names nobody, and its worker cannot be found."""
    try:
        value = orjson.loads(entry.value)
    except orjson.JSONDecodeError:
        value = {}
    told = value if isinstance(value, dict) else {}
    return {part: str(told.get(part, "")) for part in ("uid", "namespace", "name")}
