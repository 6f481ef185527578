"""What every resource has: metadata, a desired spec, an observed status with phase, history and conditions.

The shapes are Kubernetes' (API conventions), so that its tools work. `resourceVersion` is the store's revision and is
never part of the stored value.
"""

from __future__ import annotations

from datetime import datetime
from typing import Generic, Literal, TypeVar

from pydantic import Field

from lrm.model import Model, Timestamp

HISTORY_LENGTH = 50
"""Phase changes that a status keeps."""

RETRY_ANNOTATION = "lab.neuroglia.io/retry"
"""A new value lets a Failed object try again."""
RECONCILE_ANNOTATION = "lab.neuroglia.io/reconcile-now"
"""A new value asks for a reconcile at once, with fresh observations."""
PAUSE_ANNOTATION = "lab.neuroglia.io/paused"
"""No controller touches the object while it is there and not "false": neither reconciled nor cleaned up."""
PROTECT_ANNOTATION = "lab.neuroglia.io/protect"
"""Refuses deletion while it is there and not "false"."""


class OwnerReference(Model):
    """Whom an object belongs to; the owner lives in the same namespace."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class ObjectMeta(Model):
    """Kubernetes' ObjectMeta, the part that lrm uses."""

    name: str = ""
    generate_name: str | None = None
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    deletion_grace_period_seconds: int | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: list[str] = Field(default_factory=list)
    owner_references: list[OwnerReference] = Field(default_factory=list)


ConditionStatus = Literal["True", "False", "Unknown"]


class Condition(Model):
    """One observation about an object; `last_transition_time` moves only when `status` does."""

    type: str
    status: ConditionStatus
    reason: str
    message: str = ""
    last_transition_time: Timestamp
    observed_generation: int | None = None


class PhaseChange(Model):
    """One step of an object's life."""

    source: str = Field(alias="from")
    to: str
    at: Timestamp
    reason: str


class Status(Model):
    """What is observed; each kind adds its own fields and narrows `phase`."""

    observed_generation: int = 0
    phase: str = ""
    conditions: list[Condition] = Field(default_factory=list)
    phase_history: list[PhaseChange] = Field(default_factory=list)

    def enter(self, phase: str, reason: str, now: datetime) -> None:
        """Go to a phase and remember when and why; being there already changes nothing."""
        if phase == self.phase:
            return
        change = PhaseChange(source=self.phase, to=phase, at=now, reason=reason)
        self.phase_history = [*self.phase_history, change][-HISTORY_LENGTH:]
        self.phase = phase

    def condition(self, kind: str) -> Condition | None:
        """The condition of a type, if it was ever set."""
        return next((c for c in self.conditions if c.type == kind), None)

    def set_condition(
        self, kind: str, status: bool | None, reason: str, message: str, *, now: datetime, generation: int | None = None
    ) -> None:
        """Set a condition; None is Unknown. Its transition time moves only if its status does."""
        word: ConditionStatus = "Unknown" if status is None else "True" if status else "False"
        old = self.condition(kind)
        since = old.last_transition_time if old and old.status == word else now
        new = Condition(
            type=kind,
            status=word,
            reason=reason,
            message=message,
            last_transition_time=since,
            observed_generation=generation,
        )
        self.conditions = [new if c.type == kind else c for c in self.conditions] if old else [*self.conditions, new]


SpecT = TypeVar("SpecT", bound=Model, covariant=True)  # noqa: PLC0105 - read through Resource[...]
StatusT = TypeVar("StatusT", bound=Status, covariant=True)  # noqa: PLC0105 - read through Resource[...]


class Resource(Model, Generic[SpecT, StatusT]):
    """An object of some kind; subclasses name spec and status and give `api_version` and `kind` their defaults."""

    api_version: str
    kind: str
    metadata: ObjectMeta
    spec: SpecT
    status: StatusT

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        return self.metadata.namespace

    @property
    def uid(self) -> str:
        return self.metadata.uid

    @property
    def revision(self) -> int:
        """The store's revision of this state; 0 before it was stored."""
        return int(self.metadata.resource_version or 0)

    @property
    def deleting(self) -> bool:
        """Whether deletion was asked for; the object stays while finalizers do."""
        return self.metadata.deletion_timestamp is not None

    @property
    def paused(self) -> bool:
        """Whether controllers are to leave the object alone."""
        return self.metadata.annotations.get(PAUSE_ANNOTATION, "false") != "false"

    def as_owner(self, *, controller: bool = True) -> OwnerReference:
        """The reference that makes another object belong to this one."""
        return OwnerReference(
            api_version=self.api_version,
            kind=self.kind,
            name=self.name,
            uid=self.uid,
            controller=controller,
            block_owner_deletion=True,
        )


AnyResource = Resource[Model, Status]
"""A resource of which only the common parts matter."""
