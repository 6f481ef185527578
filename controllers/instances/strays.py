"""Finds labs in CML that were made for instances and are nobody's any more, and has them deleted.

A lab is left behind where its worker was lost and came back, or where CML carried an import out so late that another
was made. Its LabRecord tells of it; deleting that deletes the lab, by the rules of all labs. Promises: none is deleted
whose request may be using it; two looks in a row, some time apart, must agree, each on a cache that holds everything
written before; a lab that no request claims must bear this installation's mark, read from CML at that moment; nothing
is concluded while a LabInstanceRequest cannot be decoded, nor of unclaimed labs that are too many: a store that was
restored has forgotten requests, not labs. A `Led` under the instances' lock.
"""

from __future__ import annotations

from typing import Any

import structlog

from controllers.cml.errors import CmlError
from controllers.cml.sessions import CmlSessions
from controllers.instances.kind import INSTANCES, LabInstanceRequest
from controllers.instances.marks import read_mark, uid_of_title
from controllers.instances.settings import InstanceSettings
from controllers.labs.homes import Home, home_of
from controllers.labs.kind import LabRecord
from controllers.sweep.judge import are_too_many
from lrm.cache import Cache
from lrm.client import Client
from lrm.election import Term
from lrm.errors import CacheBehind, LrmError, NotLeading
from lrm.resource import PROTECT_ANNOTATION
from storage.clock import Clock
from storage.errors import StorageError

log = structlog.get_logger(__name__)

_UNCLAIMED = "no LabInstanceRequest claims it"


class StrayLabs:
    """See the module."""

    name = "instances-strays"
    lock_name = INSTANCES

    def __init__(
        self,
        cache: Cache,
        sessions: CmlSessions,
        client: Client,
        clock: Clock,
        settings: InstanceSettings,
        *,
        installation: str,
        observe_only: bool,
    ) -> None:
        self._cache = cache
        self._sessions = sessions
        self._client = client
        self._clock = clock
        self._settings = settings
        self._installation = installation
        self._observe_only = observe_only
        self._suspects: dict[str, str] = {}
        """Why each was one at the last look, by uid of the record."""
        self._removed = 0
        self._error = ""
        self._stopping = False

    async def run(self, term: Term) -> None:
        """Look again and again until the term is lost (returns) or the task is cancelled."""
        await self._cache.catch_up(self.name)
        self._suspects.clear()
        while not self._stopping:
            try:
                async with self._clock.timeout(self._settings.instances_rest_interval):
                    await term.wait_lost()
                    return
            except TimeoutError:
                await self._turn(term)

    async def drain(self, seconds: float) -> None:  # noqa: ARG002 - a turn is short, and may end anywhere
        """Begin no look more."""
        self._stopping = True

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "lock": self.lock_name,
            "suspects": len(self._suspects),
            "removed": self._removed,
            "error": self._error,
        }

    async def _turn(self, term: Term) -> None:
        """One look; a defect is logged, and costs this turn only."""
        try:
            await self.look(term)
        except NotLeading:
            return
        except (StorageError, CacheBehind) as error:
            self._error = str(error)
            log.warning("instances.strays_not_looked_for", error=self._error)
        except Exception as error:
            self._error = repr(error)
            log.exception("instances.strays_defect")

    async def look(self, term: Term) -> None:
        """Find the strays of now; delete those that were strays at the last look as well."""
        await self._cache.barrier()
        found = self._found()
        before, self._suspects = self._suspects, {record.uid: why for record, why in found}
        for record, why in found:
            if before.get(record.uid) == why:
                await self._remove(record, why, term)

    def _found(self) -> list[tuple[LabRecord, str]]:
        """The strays of now, each with why it is one."""
        items = self._cache.items(self._cache.registry.of(LabInstanceRequest))
        unread = next((i for i in items if i.resource is None), None)
        if unread is not None:
            self._told(f"LabInstanceRequest {unread.namespace}/{unread.name} cannot be decoded: any lab may be its own")
            return []
        labs = [r for r in self._cache.all(LabRecord) if uid_of_title(r.status.title) and not r.deleting]
        found = [(record, why) for record in labs if (why := self._why_stray(record))]
        unclaimed = sum(why == _UNCLAIMED for _, why in found)
        if are_too_many(unclaimed, len(labs)):
            self._told(
                f"{unclaimed} of {len(labs)} labs have no LabInstanceRequest: none is removed, look at the store"
            )
            return [(record, why) for record, why in found if why != _UNCLAIMED]
        self._told("")
        return found

    def _told(self, error: str) -> None:
        if error and error != self._error:
            log.error("instances.strays_in_doubt", error=error)
        self._error = error

    def _why_stray(self, record: LabRecord) -> str:
        """Why a lab is nobody's; empty for one that may be somebody's, or was never an instance's."""
        uid = uid_of_title(record.status.title)
        if uid is None or record.metadata.annotations.get(PROTECT_ANNOTATION, "false") != "false":
            return ""
        request = next(iter(self._cache.by_index(LabInstanceRequest, "uid", uid)), None)
        if request is None:
            return _UNCLAIMED
        ref, own = request.status.worker_ref, request.status.cml_lab_id
        if ref is None:
            return f"{request.name} has no place any more"
        owners = {"", *(owner.uid for owner in record.metadata.owner_references)}
        if (ref.namespace, ref.name) != (record.namespace, record.spec.worker_ref) or ref.uid not in owners:
            return f"{request.name} has its place on {ref.name}"
        # While it is not known which lab is its own, each of them may be.
        return f"{request.name} has another lab" if own not in (None, record.spec.lab_id) else ""

    async def _remove(self, record: LabRecord, why: str, term: Term) -> None:
        """Look at the lab itself, then at everything once more, then delete its record."""
        if self._observe_only or not await self._is_ours(record, term):
            return
        await self._cache.barrier()
        current = self._cache.get(LabRecord, record.namespace, record.name)
        if current is None or current.uid != record.uid or current.deleting or self._why_stray(current) != why:
            return
        try:
            await self._client.bind(owner=INSTANCES, fence=term).delete(current, retry=False)
        except NotLeading:
            raise
        except LrmError as error:  # it has changed meanwhile: the next look decides
            log.info("instances.stray_not_removed", record=record.name, error=str(error))
            return
        self._removed += 1
        log.warning("instances.stray_removed", record=record.name, title=record.status.title, why=why)

    async def _is_ours(self, record: LabRecord, term: Term) -> bool:
        """Whether CML says now that the lab bears its title, and, where no request claims it, our mark."""
        home = home_of(record, self._cache)
        if not isinstance(home, Home) or home.worker.spec.observe_only:
            return False
        try:
            term.check()
            lab = await self._sessions.client_for(home.worker).lab(record.spec.lab_id)
        except CmlError as error:
            log.info("instances.stray_not_seen", record=record.name, error=str(error))
            return False
        uid = uid_of_title(lab.title)
        if uid is None or lab.title != record.status.title:
            return False
        if self._cache.by_index(LabInstanceRequest, "uid", uid):
            return True
        mark = read_mark(lab.notes or "")
        return mark is not None and (mark.installation, mark.uid) == (self._installation, uid)
