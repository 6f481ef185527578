"""Questions about LabInstanceRequests that others ask, answered from the cache's indexes.

What they give is as old as the cache; whoever decides on it writes under the object's resourceVersion.
"""

from __future__ import annotations

from collections import Counter

from controllers.instances.kind import LabInstanceRequest
from controllers.instances.phases import Phase
from lrm.cache import Cache


def by_phase(cache: Cache, phase: Phase, namespace: str = "") -> list[LabInstanceRequest]:
    """The instances that stand in a phase."""
    return _inside(cache.by_index(LabInstanceRequest, "phase", phase.value), namespace)


def by_student(cache: Cache, email: str, namespace: str = "") -> list[LabInstanceRequest]:
    """A student's instances, whatever the case of the address."""
    return _inside(cache.by_index(LabInstanceRequest, "student", email.lower()), namespace)


def on_worker(cache: Cache, namespace: str, worker: str) -> list[LabInstanceRequest]:
    """The instances that have their place on a worker, of whichever namespace."""
    return cache.by_index(LabInstanceRequest, "worker", f"{namespace}/{worker}")


def count_by_phase(cache: Cache, namespace: str = "") -> Counter[str]:
    """How many instances stand where."""
    return Counter(r.status.phase for r in cache.all(LabInstanceRequest, namespace))


def _inside(requests: list[LabInstanceRequest], namespace: str) -> list[LabInstanceRequest]:
    return [r for r in requests if not namespace or r.namespace == namespace]
