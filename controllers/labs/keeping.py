"""Keeps the topology of a lab that is about to be deleted, as a LabImport that waits to be asked for.

Promises: with `labs_topology_retention` set, a deletion goes on only once the topology is kept, or it is told in the
record's condition `TopologyKept` why it is not: it is too large, or CML would not give it for `labs_step_timeout` since
it first did not, whatever it answered or did not answer. The LabImport's name follows from the record's uid, so that a
repeat finds what is there. Called by the deletion, which has just seen that CML can be asked about the lab.
"""

from __future__ import annotations

from datetime import timedelta
from math import ceil

from controllers.cml.client import CmlClient
from controllers.cml.errors import CmlCircuitOpen, CmlClosed, CmlError, CmlLoginThrottled, CmlNotFound
from controllers.labs.imports_kind import (
    CONTROL,
    LAB_LABEL,
    TITLE_MOST,
    TOPOLOGY_BYTES,
    WORKER_LABEL,
    LabImport,
    LabImportSpec,
    is_reserved,
    kept_name,
)
from controllers.labs.kind import TOPOLOGY_KEPT, LabRecord
from controllers.labs.settings import LabsSettings
from lrm.controller import Context
from lrm.crashpoints import crash_point
from lrm.errors import ResourceExists
from lrm.resource import ObjectMeta
from storage.errors import TooLarge


async def keep_topology(record: LabRecord, client: CmlClient, ctx: Context, settings: LabsSettings) -> LabRecord:
    """Keep what can be kept, once; the record as it is then. Raises `CmlError` while CML may yet give it."""
    retention, told = settings.labs_topology_retention, record.status.condition(TOPOLOGY_KEPT)
    if not retention or (told is not None and told.status != "Unknown"):
        return record
    try:
        topology = await client.download(record.spec.lab_id, patient=True)
    except CmlNotFound:
        return record  # there is nothing to keep any more
    except (CmlCircuitOpen, CmlClosed, CmlLoginThrottled):
        raise  # it was not asked
    except CmlError as error:
        if told is None:
            await _told(record, ctx, None, "NotGivenYet", str(error)[:500])
            raise
        tried = ctx.clock.now() - told.last_transition_time
        if tried < timedelta(seconds=settings.labs_step_timeout) or ctx.wall_jumped:
            raise
        return await _not_kept(record, ctx, "NotGiven", str(error)[:500])
    size = len(topology.encode())
    if size > TOPOLOGY_BYTES or not topology.strip():
        message = f"it has {size} bytes; what is kept has {TOPOLOGY_BYTES} at most, and some"
        return await _not_kept(record, ctx, "TooLarge" if size > TOPOLOGY_BYTES else "Empty", message)
    copy = _copy_of(record, topology, ceil(retention))
    try:
        await ctx.client.create(copy)
    except ResourceExists:
        ctx.log.debug("lab.topology_was_kept", lab=record.spec.lab_id, labimport=copy.name)
    except TooLarge as error:  # written as JSON it may be several times as long
        return await _not_kept(record, ctx, "TooLarge", str(error)[:500])
    crash_point("labs.topology-kept")
    ctx.log.info("lab.topology_kept", lab=record.spec.lab_id, worker=record.spec.worker_ref, labimport=copy.name)
    return await _told(record, ctx, True, "Kept", f"labimport {copy.name}, for {copy.spec.ttl_seconds} s")


def _copy_of(record: LabRecord, topology: str, ttl: int) -> LabImport:
    title = CONTROL.sub("\N{REPLACEMENT CHARACTER}", record.status.title) or record.spec.lab_id
    title = f"Copy of {title}" if is_reserved(title) else title
    labels = {WORKER_LABEL: record.spec.worker_ref, LAB_LABEL: record.spec.lab_id}
    return LabImport(
        metadata=ObjectMeta(name=kept_name(record.uid), namespace=record.namespace, labels=labels),
        spec=LabImportSpec(
            worker_ref=record.spec.worker_ref,
            title=title[:TITLE_MOST],
            topology=topology,
            held=True,
            ttl_seconds=ttl,
        ),
    )


async def _not_kept(record: LabRecord, ctx: Context, reason: str, message: str) -> LabRecord:
    ctx.log.warning("lab.topology_not_kept", lab=record.spec.lab_id, worker=record.spec.worker_ref, reason=message)
    ctx.events.record(record, "Warning", "TopologyNotKept", message)
    return await _told(record, ctx, False, reason, message)


async def _told(record: LabRecord, ctx: Context, kept: bool | None, reason: str, message: str) -> LabRecord:
    now = ctx.clock.now()
    return await ctx.client.update_status(
        record, lambda r: r.status.set_condition(TOPOLOGY_KEPT, kept, reason, message, now=now)
    )
