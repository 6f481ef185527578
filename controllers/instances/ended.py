"""Which LabRecords are of labs that lrm made for lab instances and removes by itself: that such a lab goes is no news.

Promises that a lab which its request still wants is never one of them: it is missed like any other. A lab is known by
its id, which its request keeps; else by its title; and where a student has given it another one, by its notes' mark.
Pure reading of the cache; called by the sync of labs for records that a complete list lacks.
"""

from __future__ import annotations

from controllers.instances.kind import LabInstanceRequest, over
from controllers.instances.marks import read_mark, uid_of_title
from controllers.instances.phases import Phase
from controllers.labs.kind import LabRecord
from lrm.cache import Cache

_ENDING = frozenset({Phase.STOPPING, Phase.TIMEOUT})


def ended(record: LabRecord, cache: Cache, installation: str) -> bool:
    """Whether the lab was an instance's that is over, ends, has another lab, or is forgotten and was this lrm's."""
    titled, mark = uid_of_title(record.status.title), read_mark(record.status.notes)
    ours = mark is not None and mark.installation == installation and titled in (None, mark.uid)
    request = _request(cache, "lab", record.spec.lab_id)
    if request is None:
        request = _request(cache, "uid", titled or (mark.uid if mark is not None and ours else ""))
        if request is None:
            return ours
        if mark is not None and titled is None:
            # A student's copy bears the mark too: only that of an earlier try tells of a lab that the request had.
            return mark.attempt < request.status.attempt
    ref = request.status.worker_ref
    if ref is None or request.deleting or over(request) or request.phase in _ENDING:
        return True
    if (ref.namespace, ref.name) != (record.namespace, record.spec.worker_ref):
        return True
    return request.status.cml_lab_id not in (None, record.spec.lab_id)


def _request(cache: Cache, index: str, value: str) -> LabInstanceRequest | None:
    return next(iter(cache.by_index(LabInstanceRequest, index, value)), None)
