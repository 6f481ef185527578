"""Every hour: are there instances of this installation that no LabWorker claims? Reported at the second look.

A host that everybody forgot bills by the hour; one that is ended by mistake takes a class with it. So: a place that
does not answer completely says nothing, a cache that is behind says nothing, one value that cannot be decoded says
nothing. An orphan is ended only by setting, after EC2 described it anew and the store was read again, never when its
tags want it kept, and only by the leader. Places (regions of accounts) that were ever used are remembered with the
suspects in one key, so that neither a change of leader nor the end of a place's last worker hides what is there. While
an orphan is ended its claim key is the sweep's, so that no worker can adopt what is about to end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import orjson
import structlog
from opentelemetry.metrics import Meter

from controllers.aws.ec2 import Ec2, Ec2Instance
from controllers.aws.errors import AwsError, Ec2NotFound
from controllers.aws.place import Place
from controllers.aws.regions import known_regions
from controllers.sweep.judge import TIME, Claims, Suspect, are_too_many, claims_of, is_suspect, sweep
from controllers.sweep.settings import SweepSettings
from controllers.workers.claims import SWEEP_CLAIM
from controllers.workers.decisions import INSTALLATION_TAG, KEEPABLE, RETAIN_TAG, UID_TAG
from controllers.workers.kind import LabWorker
from lrm.cache import Cache, CacheUpdate
from lrm.clock import WallJumps
from lrm.election import Term
from lrm.errors import CacheBehind, NotLeading
from lrm.model import rfc3339
from storage.base import Entry, Storage
from storage.clock import Clock
from storage.errors import AlreadyExists, GuardFailed, NotFound, StorageError

log = structlog.get_logger(__name__)

_RETRY = 60.0
"""Seconds until the next try where the store did not answer or the wall clock was just set; never over the interval."""
_PAGE = 500


class ProvesNothing(Exception):  # noqa: N818 - not an error: there is nothing to conclude
    """What is known is not enough to judge by."""


@dataclass
class _State:
    """What one sweep leaves to the next, whoever leads it."""

    at: datetime | None = None
    places: set[Place] = field(default_factory=set)
    suspects: dict[str, Suspect] = field(default_factory=dict)
    entry: Entry | None = None

    def value(self) -> bytes:
        return orjson.dumps(
            {
                "at": rfc3339(self.at) if self.at else None,
                # A version that knows of one account only reads this, and leaves the others alone.
                "regions": sorted(p.region for p in self.places if not p.account),
                "accounts": _by_account(self.places),
                "suspects": [self.suspects[i].document() for i in sorted(self.suspects)],
            }
        )


class Sweep:
    """See the module. It is led (`lrm.led.Led`)."""

    name = "sweep"
    lock_name = "sweep"

    def __init__(
        self,
        ec2: Ec2,
        storage: Storage,
        cache: Cache,
        clock: Clock,
        settings: SweepSettings,
        *,
        installation: str,
        root: str,
        youngest: float,
    ) -> None:
        """`youngest`: an instance is no suspect in its first so many seconds; as long as a launch may be in doubt."""
        self.error = ""
        """Why the last turn came to nothing; empty when it did not."""
        self._ec2 = ec2
        self._storage = storage
        self._cache = cache
        self._clock = clock
        self._settings = settings
        self._installation = installation
        self._key = f"{root}/sweep"
        self._claims_prefix = f"{root}/claim/ec2/"
        self._youngest = youngest
        self._jumps = WallJumps(clock)
        self._state = _State()
        self._errors: dict[Place, str] = {}
        self._refusal: dict[str, str] = {}
        """Why a sweep ended none of its orphans, under `*`."""
        self._sweeps = 0
        self._ended = 0
        self._new_place = asyncio.Event()
        self._in_hand = asyncio.Lock()
        self._leading = False
        self._stopping = False

    async def run(self, term: Term) -> None:
        """Sweep until the term is lost (returns) or the task is cancelled; a defect is logged, and tried again."""
        await self._cache.catch_up(self.name)
        unsubscribe = self._cache.subscribe(self._on_update)
        self._leading = True
        try:
            async with asyncio.TaskGroup() as tasks:
                turns = tasks.create_task(self._lead(term), name="sweeps")
                await term.wait_lost()
                turns.cancel()
        finally:
            self._leading = False
            unsubscribe()

    async def drain(self, seconds: float) -> None:
        """Begin no sweep more and let the one in hand end."""
        self._stopping = True
        try:
            async with self._clock.timeout(seconds), self._in_hand:
                return
        except TimeoutError:
            log.warning("sweep.drain_timed_out")

    def describe(self) -> dict[str, Any]:
        """Its entry in the daemon's status; suspects and orphans as the leader knows them."""
        state = self._state
        return {
            "name": self.name,
            "lock": self.lock_name,
            "sweeps": self._sweeps,
            "sweptAt": rfc3339(state.at) if state.at else None,
            "regions": [str(p) for p in sorted(state.places)],
            "suspects": sum(not s.is_orphan for s in state.suspects.values()),
            "orphans": [s.document() for s in self._orphans()],
            "ended": self._ended,
            "terminates": self._settings.sweep_terminate,
            "regionErrors": {str(p): error for p, error in sorted(self._errors.items())} | self._refusal,
            "error": self.error,
        }

    def observe(self, meter: Meter) -> None:
        """Orphans by place, told by the leader alone; and how many this daemon ended."""
        meter.create_counter("lrm_sweep_ended", description="Orphaned instances ended.").add(self._ended)
        if not self._leading:
            return
        orphans = meter.create_gauge("lrm_sweep_orphans", description="Instances that no LabWorker claims.")
        failed = meter.create_gauge("lrm_sweep_region_failed", description="1 where EC2 could not be asked last time.")
        for place in self._state.places:
            labels = place._asdict()
            orphans.set(sum(s.place == place for s in self._orphans()), labels)
            failed.set(int(place in self._errors), labels)

    def _orphans(self) -> list[Suspect]:
        return [s for _, s in sorted(self._state.suspects.items()) if s.is_orphan]

    async def _lead(self, term: Term) -> None:
        while not self._stopping:
            self._new_place.clear()
            async with self._in_hand:
                wait = await self._turn(term)
            try:
                async with self._clock.timeout(wait):
                    await self._new_place.wait()
            except TimeoutError:
                continue

    async def _turn(self, term: Term) -> float:
        """One turn; seconds until the next."""
        try:
            wait = await self._take_turn(term)
        except (NotLeading, GuardFailed) as error:
            log.info("sweep.not_leading", detail=str(error))
            term.lost()
        except (StorageError, CacheBehind, ProvesNothing) as error:
            if str(error) != self.error:
                log.warning("sweep.failed", error=str(error))
            self.error = str(error)
        except Exception as error:
            # A defect costs this turn, not the daemon and then the next leader's.
            log.exception("sweep.defect")
            self.error = repr(error)
        else:
            self.error = ""
            return wait
        return min(_RETRY, self._settings.sweep_interval)

    async def _take_turn(self, term: Term) -> float:
        """Remember the places in use, and sweep if it is due; seconds until the next turn."""
        state = await self._recall()
        used = {w.spec.place for w in self._cache.all(LabWorker) if self._ec2.knows(w.spec.place)}
        made_up = {p for p in state.places if self._is_made_up(p, state)}
        if not used <= state.places or made_up:
            state.places = used | (state.places - made_up)
            await self._write_down(state, term)
        self._state = state
        jumped = self._jumps.lately()
        wait = self._due_in(state)
        if wait > 0 or not state.places:
            return wait or self._settings.sweep_interval
        if jumped:
            raise ProvesNothing("the wall clock was set a moment ago: nothing is judged before it is steady")
        await self._sweep(state, term)
        return self._settings.sweep_interval

    def _is_made_up(self, place: Place, state: _State) -> bool:
        """Whether there cannot be anything: somebody named a region that does not exist, while any could be named."""
        exists = place.region in known_regions() or self._ec2.knows(place)
        return not exists and all(s.place != place for s in state.suspects.values())

    def _due_in(self, state: _State) -> float:
        """Seconds until the next sweep; a last one that lies in the future was no sweep."""
        now, interval = self._clock.now(), timedelta(seconds=self._settings.sweep_interval)
        if state.at is None or state.at > now:
            return 0.0
        return max(0.0, (state.at + interval - now).total_seconds())

    async def _sweep(self, state: _State, term: Term) -> None:
        """One look at everything. EC2 is asked first: whatever was launched by then had its worker before."""
        now = self._clock.now()
        for claim in await self._claim_entries():
            if claim.value == SWEEP_CLAIM:
                # Left by a sweep that was cut short, or that EC2 gave no clear answer.
                await self._unclaim(claim, term)
        found, errors = await self._everywhere(state.places, term)
        claims = await self._claims()
        suspects = sweep(state.suspects, found, claims, now=now, youngest=self._youngest)
        reported = {i for i, s in state.suspects.items() if s.is_orphan}
        after = _State(now, set(state.places), suspects, state.entry)
        await self._write_down(after, term)
        self._state, self._errors, self._refusal, self._sweeps = after, errors, {}, self._sweeps + 1
        orphans = [s for s in self._orphans() if s.place in found]
        for orphan in orphans:
            if orphan.instance_id not in reported:
                log.warning("sweep.orphan", **orphan.document())
        if self._settings.sweep_terminate and not self._settings.observe_only:
            # Two names may mean one account.
            await self._end(orphans, len({i.id for instances in found.values() for i in instances}), term)

    async def _everywhere(
        self, places: set[Place], term: Term
    ) -> tuple[dict[Place, list[Ec2Instance]], dict[Place, str]]:
        """Our instances by place, of those places that answered; and what the others said."""
        found: dict[Place, list[Ec2Instance]] = {}
        errors: dict[Place, str] = {}

        async def ask(place: Place) -> None:
            try:
                found[place] = await self._ec2.find_by_tags(
                    place, {INSTALLATION_TAG: self._installation}, states=KEEPABLE
                )
            except AwsError as error:
                errors[place] = str(error)
                log.warning("sweep.region_failed", error=str(error), **place._asdict())
            except Exception as error:
                errors[place] = repr(error)
                log.exception("sweep.region_defect", **place._asdict())

        term.check()
        async with asyncio.TaskGroup() as tasks:
            for place in places:
                tasks.create_task(ask(place))
        return found, errors

    async def _claim_entries(self) -> list[Entry]:
        entries: list[Entry] = []
        token = ""
        while True:
            page = await self._storage.list(self._claims_prefix, limit=_PAGE, continue_token=token)
            entries += page.entries
            token = page.continue_token
            if not token:
                return entries

    async def _claims(self) -> Claims:
        """What the store says now, but for the sweep's own. Raises `ProvesNothing`, `CacheBehind`, `StorageError`."""
        entries = await self._claim_entries()
        ids = [e.key.removeprefix(self._claims_prefix) for e in entries if e.value != SWEEP_CLAIM]
        await self._cache.barrier()
        items = self._cache.items(self._cache.registry.of(LabWorker))
        unread = [f"{i.namespace}/{i.name}" for i in items if i.resource is None]
        if unread:
            raise ProvesNothing(f"LabWorker {unread[0]} cannot be decoded: it may claim any instance")
        return claims_of(self._cache.all(LabWorker), ids)

    async def _end(self, orphans: list[Suspect], found: int, term: Term) -> None:
        """End the orphans, each after a look of its own. Raises what `_claims` raises, `NotLeading`."""
        if are_too_many(len(orphans), found):
            log.error("sweep.too_many", orphans=len(orphans), instances=found)
            self._refusal["*"] = f"{len(orphans)} of {found} instances are orphans: none is ended, look at the store"
            return
        for orphan in orphans:
            if self._stopping:
                return
            try:
                await self._end_one(orphan, term)
            except AwsError as error:
                self._errors[orphan.place] = str(error)
                log.warning("sweep.not_ended", instance=orphan.instance_id, error=str(error))
            except (NotLeading, StorageError, CacheBehind, ProvesNothing):
                raise
            except Exception as error:
                self._errors[orphan.place] = repr(error)
                log.exception("sweep.end_defect", instance=orphan.instance_id, **orphan.place._asdict())

    async def _end_one(self, orphan: Suspect, term: Term) -> None:
        """Claim an orphan, prove after that it still is one, end it.

        Where it is not known whether EC2 ends it, the claim stands until the next sweep: nobody is to adopt it so long.
        """
        key, sent = self._claims_prefix + orphan.instance_id, False
        try:
            claim = await self._storage.create(key, SWEEP_CLAIM, guards=(term.guard(),))
        except AlreadyExists:
            return  # somebody has just adopted it
        try:
            if await self._may_end(orphan, term):
                term.check()
                sent = True
                await self._ec2.terminate(orphan.place, orphan.instance_id)
                self._ended += 1
                log.warning("sweep.ended", **orphan.document())
        except AwsError as error:
            if not sent or error.definite_refusal:
                await self._unclaim(claim, term)
            raise
        await self._unclaim(claim, term)

    async def _unclaim(self, claim: Entry, term: Term) -> None:
        await self._storage.delete(claim.key, expected_revision=claim.revision, guards=(term.guard(),))

    async def _may_end(self, orphan: Suspect, term: Term) -> bool:
        """Whether an orphan still is one, by EC2's word and then by the store's."""
        term.check()
        try:
            instance = await self._ec2.describe_instance(orphan.place, orphan.instance_id)
        except Ec2NotFound:
            return False
        claims = await self._claims()
        if self._jumps.lately():
            return False
        tags = instance.tags
        ours = tags.get(INSTALLATION_TAG) == self._installation and tags.get(UID_TAG, "") == orphan.uid
        kept = orphan.retained or RETAIN_TAG in tags or instance.state not in KEEPABLE
        return ours and not kept and is_suspect(instance, claims, now=self._clock.now(), youngest=self._youngest)

    async def _recall(self) -> _State:
        """What the last sweep left. A value that cannot be read is begun anew: the workers name their places."""
        try:
            entry = await self._storage.get(self._key)
        except NotFound:
            return _State(places=set(self._state.places))
        try:
            return _read(entry)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("sweep.state_unreadable", key=self._key, error=str(error))
            return _State(places=set(self._state.places), entry=entry)

    async def _write_down(self, state: _State, term: Term) -> None:
        guards = (term.guard(),)
        if state.entry is None:
            state.entry = await self._storage.create(self._key, state.value(), guards=guards)
        else:
            state.entry = await self._storage.update(
                self._key, state.value(), expected_revision=state.entry.revision, guards=guards
            )

    def _on_update(self, update: CacheUpdate) -> None:
        for change in update.changes:
            worker = change.new.resource if change.new is not None else None
            if not isinstance(worker, LabWorker) or worker.spec.place in self._state.places:
                continue
            if self._ec2.knows(worker.spec.place):  # where nothing can be launched there is nothing to look for
                self._new_place.set()


def _read(entry: Entry) -> _State:
    told: Mapping[str, Any] = orjson.loads(entry.value)
    suspects = [Suspect.from_document(s) for s in told["suspects"]]
    at = TIME.validate_python(told["at"]) if told["at"] else None
    places = {Place(str(r)) for r in told["regions"]}
    for account, regions in told.get("accounts", {}).items():
        places |= {Place(str(r), account) for r in regions}
    return _State(at, places, {s.instance_id: s for s in suspects}, entry)


def _by_account(places: Iterable[Place]) -> dict[str, list[str]]:
    """The regions of each account that has a name."""
    regions: dict[str, list[str]] = {}
    for place in sorted(places):
        if place.account:
            regions.setdefault(place.account, []).append(place.region)
    return regions
