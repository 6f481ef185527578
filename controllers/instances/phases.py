"""The life of a LabInstanceRequest: its phases, which may follow which, and the words of its conditions.

    Pending ⇄ Scheduling → Provisioning → Running → Stopping → Completed
                                           Running → Timeout → Completed

Failed follows every phase but Completed. Back to Pending goes what lost its worker and may begin again; Failed is left
when the spec changes or the retry annotation does, and not before its own cleanup is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Phase(StrEnum):
    """Where an instance stands."""

    PENDING = "Pending"
    """Waits: for its time, for a quota, for a place, or for the delay before another try."""
    SCHEDULING = "Scheduling"
    """A place is chosen and being reserved."""
    PROVISIONING = "Provisioning"
    """It has a place, and is being made and started there."""
    RUNNING = "Running"
    STOPPING = "Stopping"
    """Asked to end before its time."""
    TIMEOUT = "Timeout"
    """Its time is over; it is being cleaned up."""
    COMPLETED = "Completed"
    FAILED = "Failed"


_STEPS: dict[Phase, tuple[Phase, ...]] = {
    Phase.PENDING: (Phase.SCHEDULING, Phase.STOPPING),
    Phase.SCHEDULING: (Phase.PROVISIONING, Phase.PENDING, Phase.STOPPING),
    Phase.PROVISIONING: (Phase.RUNNING, Phase.PENDING, Phase.STOPPING),
    Phase.RUNNING: (Phase.STOPPING, Phase.TIMEOUT, Phase.PENDING),
    Phase.STOPPING: (Phase.COMPLETED,),
    Phase.TIMEOUT: (Phase.COMPLETED,),
    Phase.COMPLETED: (),
    Phase.FAILED: (Phase.PENDING,),
}

TRANSITIONS: Mapping[str, frozenset[str]] = {
    phase.value: frozenset(steps) | ({Phase.FAILED} if phase not in (Phase.COMPLETED, Phase.FAILED) else frozenset())
    for phase, steps in _STEPS.items()
}

WAITING = frozenset({Phase.PENDING, Phase.SCHEDULING})
"""Without a place."""
PLACED = frozenset({Phase.PROVISIONING, Phase.RUNNING, Phase.STOPPING, Phase.TIMEOUT})
"""Something of it may exist outside. Of a Failed one too, until CleanupCompleted."""
FINAL = frozenset({Phase.COMPLETED, Phase.FAILED})


class Conditions:
    """Condition types."""

    READY = "Ready"
    """Whether it can be worked with now."""
    WORKER_ASSIGNED = "WorkerAssigned"
    """Whether it has a place; while it has none, why."""
    RESOURCES_ALLOCATED = "ResourcesAllocated"
    """Whether what it needs is reserved there."""
    CLEANUP_COMPLETED = "CleanupCompleted"
    """Whether nothing of it is left outside; from its end on."""
    TIMED_OUT = "TimedOut"
    """Only of what has outlived its duration."""


class Reasons:
    """Reasons of conditions, phase changes and failures."""

    # why it waits
    NOT_YET_DUE = "NotYetDue"
    QUOTA_EXCEEDED = "QuotaExceeded"
    NO_WORKERS_AVAILABLE = "NoWorkersAvailable"
    """No worker of its track serves."""
    NO_MATCHING_TRACK = "NoMatchingTrack"
    """No worker at all has its track."""
    NO_CAPACITY_AVAILABLE = "NoCapacityAvailable"
    """Workers serve that could take it, and are full."""
    WORKER_NOT_LICENSED = "WorkerNotLicensed"
    """It would fit where a licence is missing: too many nodes for an unlicensed CML."""
    TOO_LARGE = "TooLarge"
    """No worker that serves could take it even when empty."""
    NO_MATCHING_POOL = "NoMatchingPool"
    ENGINE_UNAVAILABLE = "EngineUnavailable"
    """It wants a container, and no engine is configured or answers."""
    ENGINE_FAILED = "EngineFailed"
    """The engine tried what it was asked for and failed, in its own words; it is asked again."""
    BACKING_OFF = "BackingOff"
    OBSERVE_ONLY = "ObserveOnly"
    CLOCK_JUMPED = "ClockJumped"
    # on its way
    SCHEDULED = "Scheduled"
    """A place was found."""
    PREPARING = "Preparing"
    TOPOLOGY_UNAVAILABLE = "TopologyUnavailable"
    """Its topology cannot be read now, from a file or an address; it is asked for again."""
    PROVISIONING = "Provisioning"
    RUNNING = "Running"
    NOT_RUNNING = "NotRunning"
    WORKER_AWAY = "WorkerAway"
    """Its worker or engine does not answer; nothing is concluded from that."""
    UNHEALTHY = "Unhealthy"
    """Its container's health check fails."""
    LAB_STOPPED = "LabStopped"
    """Its lab is there in CML and does not run: somebody stopped it, or its CML was restarted."""
    STARTED_AGAIN = "StartedAgain"
    """Of a stopped lab, where its restartPolicy asks for it."""
    # its end
    STOP_REQUESTED = "StopRequested"
    DELETING = "Deleting"
    DURATION_ELAPSED = "DurationElapsed"
    EXITED = "Exited"
    """Its container ended by itself with exit code 0."""
    CLEANED_UP = "CleanedUp"
    CLEANING_UP = "CleaningUp"
    CLEANUP_FAILED = "CleanupFailed"
    # failures
    TEMPLATE_INVALID = "TemplateInvalid"
    TEMPLATE_NOT_FOUND = "TemplateNotFound"
    TEMPLATE_FORBIDDEN = "TemplateForbidden"
    """A file or an address that is not on the list of those allowed."""
    IMAGE_NOT_FOUND = "ImageNotFound"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    REFUSED = "Refused"
    """The engine or the CML refuses it for good, in its own words."""
    CONTAINER_FAILED = "ContainerFailed"
    """The container ended with another exit code than 0."""
    OUT_OF_MEMORY = "OutOfMemory"
    ENGINE_RESTARTED = "EngineRestarted"
    """Its container ended with its engine: by no fault of its own, as with a worker that is lost."""
    CONTAINER_LOST = "ContainerLost"
    """Somebody else removed it."""
    LAB_LOST = "LabLost"
    WORKER_LOST = "WorkerLost"
    PROVISIONING_TIMEOUT = "ProvisioningTimeout"
    STOPPING_TIMEOUT = "StoppingTimeout"
    RETRY = "Retry"
    SPEC_CHANGED = "SpecChanged"
