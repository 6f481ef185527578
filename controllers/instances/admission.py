"""What the API says about a lab instance before it is stored, by settings and by what the cache shows.

A courtesy to people: whoever writes otherwise meets the same limits later. Quotas are decided by the scheduler, oldest
first; sources of topologies are judged here by their text, and again when they are read, by where links really lead.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from controllers.containers.plan import beyond
from controllers.instances.kind import LabInstanceRequest, LabInstanceRequestSpec
from controllers.instances.places import counts, student_of
from controllers.instances.settings import InstanceSettings
from controllers.instances.templates import file_allowed, url_allowed
from controllers.instances.topology import TopologyError, check
from lrm.admission import Admission
from lrm.cache import Cache
from lrm.errors import Cause, Forbidden
from lrm.model import rfc3339
from storage.clock import Clock

_AHEAD_MOST = timedelta(days=366)
"""By which a lab may be asked for ahead of its start."""


def admission(settings: InstanceSettings, cache: Cache, clock: Clock) -> Admission:
    """For `Plugin.admission`."""

    def admit(new: LabInstanceRequest, old: LabInstanceRequest | None) -> Iterator[Cause | str]:
        before = old.spec if old is not None else None
        causes = [*_duration(new.spec, before, settings), *_template(new.spec, before, settings)]
        if before is None or (new.spec.lab_template, new.spec.resources) != (before.lab_template, before.resources):
            causes += beyond(new.spec, settings)
        causes += _far(new.spec, before, clock)
        yield from causes
        yield from _late(new.spec, before, clock)
        if old is None and not causes:
            _check_quota(new, settings, cache)

    return {LabInstanceRequest: admit}


def _duration(
    new: LabInstanceRequestSpec, old: LabInstanceRequestSpec | None, settings: InstanceSettings
) -> Iterator[Cause]:
    longest = settings.instances_longest_minutes
    if new.duration_minutes > longest and (old is None or new.duration_minutes != old.duration_minutes):
        yield Cause("spec.durationMinutes", "FieldValueInvalid", f"at most {longest} minutes, extensions included")


def _template(
    new: LabInstanceRequestSpec, old: LabInstanceRequestSpec | None, settings: InstanceSettings
) -> Iterator[Cause]:
    template, field = new.lab_template, "spec.labTemplate"
    if old is not None and template == old.lab_template:
        return
    if template.topology_url is not None and not url_allowed(template.topology_url, settings.topology_urls):
        told = "this address is not among those that LRM_TOPOLOGY_URLS allows"
        yield Cause(f"{field}.topologyUrl", "FieldValueForbidden", told)
    if template.topology_file is not None and not file_allowed(template.topology_file, settings.topology_files):
        told = "this file is not among those that LRM_TOPOLOGY_FILES allows"
        yield Cause(f"{field}.topologyFile", "FieldValueForbidden", told)
    if template.topology is not None:
        try:
            check(template.topology)
        except TopologyError as error:
            yield Cause(f"{field}.topology", "FieldValueInvalid", str(error))


def _late(new: LabInstanceRequestSpec, old: LabInstanceRequestSpec | None, clock: Clock) -> Iterator[str]:
    """A start that is past is no mistake: then it begins at once."""
    planned = new.scheduled_start_time
    if planned is None or planned >= clock.now() or (old is not None and planned == old.scheduled_start_time):
        return
    yield f"spec.scheduledStartTime: {rfc3339(planned)} is past: the lab starts as soon as there is a place"


def _far(new: LabInstanceRequestSpec, old: LabInstanceRequestSpec | None, clock: Clock) -> Iterator[Cause]:
    """A start in another century is a slip of the pen that would count for quotas until then."""
    planned, last = new.scheduled_start_time, clock.now() + _AHEAD_MOST
    if planned is not None and planned > last and (old is None or planned != old.scheduled_start_time):
        told = f"at most {_AHEAD_MOST.days} days ahead, which is {rfc3339(last.replace(microsecond=0))} now"
        yield Cause("spec.scheduledStartTime", "FieldValueInvalid", told)


def _check_quota(new: LabInstanceRequest, settings: InstanceSettings, cache: Cache) -> None:
    """Raise `Forbidden` for one more than a student or a namespace may have."""
    most, student = settings.instances_most_per_student, student_of(new)
    if most:
        theirs = cache.by_index(LabInstanceRequest, "student", student)
        has = sum(counts(r) for r in theirs if r.namespace == new.namespace)
        if has >= most:
            raise Forbidden(f"exceeded quota: {student} has {has} lab instances in {new.namespace}, {most} are allowed")
    most = settings.instances_most_per_namespace
    if most:
        has = sum(counts(r) for r in cache.all(LabInstanceRequest, new.namespace))
        if has >= most:
            raise Forbidden(f"exceeded quota: {new.namespace} has {has} lab instances, {most} are allowed")
