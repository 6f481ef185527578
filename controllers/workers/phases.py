"""The life of a LabWorker: its phases, which may follow which, and the words of its conditions.

Constants and one table; the state machine that walks it is `controller`. A phase says where the worker stands,
a condition what is known about one aspect of it, a reason why, in one stable word for programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Phase(StrEnum):
    """Where a worker stands."""

    PENDING = "Pending"
    PROVISIONING_EC2 = "ProvisioningEC2"
    EC2_READY = "EC2Ready"
    STARTING = "Starting"
    LICENSING = "Licensing"
    READY_UNLICENSED = "ReadyUnlicensed"
    READY = "Ready"
    ACTIVE = "Active"
    DRAINING = "Draining"
    UNLICENSING = "Unlicensing"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    TERMINATING_EC2 = "TerminatingEC2"
    TERMINATED = "Terminated"
    FAILED = "Failed"


SERVING = frozenset({Phase.READY, Phase.READY_UNLICENSED, Phase.ACTIVE})
"""Labs may run and be placed here."""

CML_RUNNING = SERVING | {Phase.LICENSING, Phase.DRAINING, Phase.UNLICENSING}
"""The worker's CML has answered and is expected to go on doing so."""

_STEPS: dict[Phase, tuple[Phase, ...]] = {
    # A worker that adopts starts from what it finds; to Draining or Stopped nothing is created first.
    Phase.PENDING: (Phase.PROVISIONING_EC2, Phase.STARTING, Phase.STOPPED),
    Phase.PROVISIONING_EC2: (Phase.EC2_READY, Phase.STOPPING),
    Phase.EC2_READY: (Phase.STARTING, Phase.STOPPING),
    Phase.STARTING: (Phase.LICENSING, Phase.READY_UNLICENSED, Phase.STOPPING),
    Phase.LICENSING: (Phase.READY, Phase.READY_UNLICENSED, Phase.DRAINING),
    Phase.READY_UNLICENSED: (Phase.READY, Phase.ACTIVE, Phase.LICENSING, Phase.DRAINING, Phase.STOPPED),
    Phase.READY: (Phase.ACTIVE, Phase.DRAINING, Phase.STOPPED),
    Phase.ACTIVE: (Phase.READY, Phase.READY_UNLICENSED, Phase.DRAINING, Phase.STOPPED),
    # Straight to Stopping or TerminatingEC2 where there is no licence to give back.
    Phase.DRAINING: (Phase.READY, Phase.READY_UNLICENSED, Phase.UNLICENSING, Phase.STOPPING),
    Phase.UNLICENSING: (Phase.STOPPING,),
    Phase.STOPPING: (Phase.STOPPED,),
    Phase.STOPPED: (Phase.STARTING,),
    Phase.TERMINATING_EC2: (Phase.TERMINATED,),
    Phase.TERMINATED: (),
    # To Pending only while no instance exists: a launch that was refused is made anew, it cannot be "started".
    Phase.FAILED: (Phase.PENDING, Phase.STARTING, Phase.STOPPING),
}


def _table() -> dict[str, frozenset[str]]:
    """The steps above, with what holds everywhere: failing, and the way out through Unlicensing and TerminatingEC2."""
    table: dict[str, frozenset[str]] = {}
    for phase, steps in _STEPS.items():
        following: set[str] = set(steps)
        if phase is not Phase.TERMINATED:
            following |= {Phase.FAILED, Phase.TERMINATING_EC2}
            if phase is not Phase.TERMINATING_EC2:
                following.add(Phase.UNLICENSING)
        table[phase.value] = frozenset(following - {phase})
    return table


TRANSITIONS: Mapping[str, frozenset[str]] = _table()


class Conditions:
    """Condition types."""

    READY = "Ready"
    EC2_PROVISIONED = "EC2Provisioned"
    CML_READY = "CMLReady"
    LICENSED = "Licensed"
    ACCEPTING_LABS = "AcceptingLabs"
    CAPACITY_AVAILABLE = "CapacityAvailable"
    HEALTH_CHECK_PASSED = "HealthCheckPassed"
    # Those below appear only when there is something to tell for the first time.
    CML_IDENTITY_MISMATCH = "CMLIdentityMismatch"
    LICENSE_SEAT_LEAKED = "LicenseSeatLeaked"
    SURPLUS_INSTANCES = "SurplusInstances"
    CLOCK_STEADY = "ClockSteady"
    IDLE = "Idle"


class Reasons:
    """Reasons of conditions, of phase changes and of failures; AWS's and CML's own errors are named by `errors`."""

    # why a worker is where it is
    SERVING = "Serving"
    UNLICENSED = "Unlicensed"
    NOT_SERVING = "NotServing"
    DRAINING = "Draining"
    DRAINED = "Drained"
    DRAIN_TIMEOUT = "DrainTimeout"
    DRAIN_CANCELLED = "DrainCancelled"
    DELETING = "Deleting"
    STOP_REQUESTED = "StopRequested"
    START_REQUESTED = "StartRequested"
    TERMINATION_REQUESTED = "TerminationRequested"
    RETRY = "Retry"
    SPEC_CHANGED = "SpecChanged"
    CLOCK_JUMPED = "ClockJumped"
    CLOCK_STEADY = "ClockSteady"
    IDLE = "Idle"
    IN_USE = "InUse"
    NO_TELEMETRY = "NoTelemetry"
    # EC2
    LAUNCHING = "Launching"
    LAUNCH_REFUSED = "LaunchRefused"
    LAUNCH_FAILED = "LaunchFailed"
    NO_INSTANCE = "NoInstance"
    INSTANCE_RUNNING = "InstanceRunning"
    INSTANCE_NOT_RUNNING = "InstanceNotRunning"
    INSTANCE_STOPPED = "InstanceStopped"
    INSTANCE_TERMINATED = "InstanceTerminated"
    INSTANCE_NOT_FOUND = "InstanceNotFound"
    EC2_TIMEOUT = "EC2Timeout"
    STOP_TIMEOUT = "StopTimeout"
    MAX_INSTANCES = "MaxInstancesReached"
    OBSERVE_ONLY = "ObserveOnly"
    ADOPTED = "Adopted"
    ADOPTION_REFUSED = "AdoptionRefused"
    CLAIMED_BY_ANOTHER = "ClaimedByAnother"
    SURPLUS_REMOVED = "SurplusRemoved"
    # CML
    BOOTING = "Booting"
    BOOT_TIMEOUT = "BootTimeout"
    CML_READY = "CMLReady"
    CML_NOT_READY = "CMLNotReady"
    UNREACHABLE = "Unreachable"
    BAD_ANSWER = "BadAnswer"
    CREDENTIALS_REFUSED = "CredentialsRefused"
    SECRET_UNAVAILABLE = "SecretUnavailable"  # noqa: S105 - the name of a reason
    TLS_REFUSED = "TLSRefused"
    IDENTITY_MISMATCH = "IdentityMismatch"
    IDENTITY_MATCHES = "IdentityMatches"
    NO_ADDRESS = "NoAddress"
    NOT_ADMIN = "NotAdmin"
    INVALID_SETTING = "InvalidSetting"
    NOT_CHECKED = "NotChecked"
    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"
    # licence
    LICENSED = "Licensed"
    NO_LICENSE = "NoLicense"
    NO_LICENSE_WANTED = "NoLicenseWanted"
    LICENSE_REGISTERING = "Registering"
    LICENSE_REFUSED = "RegistrationRefused"
    LICENSE_FAILED = "RegistrationFailed"
    LICENSE_TIMEOUT = "LicenseTimeout"
    DEREGISTERED = "Deregistered"
    SSMS_UNREACHABLE = "LicenseServerUnreachable"
    DEREGISTRATION_FAILED = "DeregistrationFailed"
    DEREGISTRATION_UNKNOWN = "DeregistrationUnknown"
    # capacity
    CAPACITY_LEFT = "CapacityLeft"
    FULL = "Full"
