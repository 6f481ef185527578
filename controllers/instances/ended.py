"""Which LabRecords are of labs that lrm made for lab instances and removes by itself: that such a lab goes is no news.

Promises that a lab which its request still wants is never one of them: it is missed like any other. Pure reading of
the cache; called by the sync of labs for records that a complete list lacks.
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
    uid = uid_of_title(record.status.title)
    if uid is None:
        return False
    request = next(iter(cache.by_index(LabInstanceRequest, "uid", uid)), None)
    if request is None:
        mark = read_mark(record.status.notes)
        return mark is not None and (mark.installation, mark.uid) == (installation, uid)
    ref = request.status.worker_ref
    if ref is None or request.deleting or over(request) or request.phase in _ENDING:
        return True
    if (ref.namespace, ref.name) != (record.namespace, record.spec.worker_ref):
        return True
    return request.status.cml_lab_id not in (None, record.spec.lab_id)
