"""What CML tells, as far as lrm uses it: frozen models that take anything a CML of any version sends.

Promises that no answer of the right outer shape makes a model raise: unknown fields are ignored, missing, null or
wrongly typed ones take their default, times are read in both formats or become None, and statuses and states stay the
free strings that they are. Whether the outer shape is right (an object, an array) is the client's to check.
Called by the client and by whoever reads its results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeGuard, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LAB_STATES = frozenset({"DEFINED_ON_CORE", "STOPPED", "STARTED"})
"""The states a lab can rest in; anything else is kept and is on its way to somewhere."""


_LAB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_EMPHASIS = re.compile(r"\*\*(?!\s)([^*\n]*[^*\s])\*\*")


def is_lab_id(value: object) -> TypeGuard[str]:
    """Whether a value is the id of a lab: a lowercase UUID."""
    return isinstance(value, str) and _LAB_ID.fullmatch(value) is not None


def parse_time(value: object) -> datetime | None:
    """A time in ISO format, or with a space and no zone (which is UTC), or seconds since 1970; None for all else."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value.strip())
        elif isinstance(value, int | float) and not isinstance(value, bool):
            moment = datetime.fromtimestamp(value, UTC)
        elif isinstance(value, datetime):
            moment = value
        else:
            return None
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < 2**63 else 0
    return int(_number(value))


def _count_or_none(value: object) -> int | None:
    return None if value is None or isinstance(value, bool) else _count(value)


def _number_or_none(value: object) -> float | None:
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list | tuple) else ()


def _ids(value: object) -> tuple[str, ...]:
    """Ids from a list of strings or of objects that carry one: groups come in both forms."""
    if not isinstance(value, list | tuple):
        return ()
    found = (v.get("id") if isinstance(v, Mapping) else v for v in value)
    return tuple(v for v in found if isinstance(v, str))


def _object(value: object) -> object:
    return value if isinstance(value, Mapping | BaseModel) else {}


def _objects(value: object) -> list[object]:
    return [v for v in value if isinstance(v, Mapping | BaseModel)] if isinstance(value, list | tuple) else []


def _object_map(value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {}
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Mapping | BaseModel)}


Text = Annotated[str, BeforeValidator(_text)]
MaybeText = Annotated[str | None, BeforeValidator(_text_or_none)]
Number = Annotated[float, BeforeValidator(_number)]
MaybeNumber = Annotated[float | None, BeforeValidator(_number_or_none)]
Count = Annotated[int, BeforeValidator(_count)]
MaybeCount = Annotated[int | None, BeforeValidator(_count_or_none)]
Flag = Annotated[bool | None, BeforeValidator(_flag)]
Moment = Annotated[datetime | None, BeforeValidator(parse_time)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Ids = Annotated[tuple[str, ...], BeforeValidator(_ids)]
T = TypeVar("T")
Part = Annotated[T, BeforeValidator(_object)]
Parts = Annotated[tuple[T, ...], BeforeValidator(_objects)]
PartMap = Annotated[dict[str, T], BeforeValidator(_object_map)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class SystemInformation(_Model):
    """`GET /system_information`; `ready` means that at least one compute can start nodes."""

    version: Text = ""
    ready: Annotated[bool, BeforeValidator(lambda v: v is True)] = False
    features: Texts = ()


class Cpu(_Model):
    """Processors; `percent` of all of them together, None where CML did not say."""

    count: Count = 0
    percent: MaybeNumber = None
    model: Text = ""


class Space(_Model):
    """Memory or disk in bytes; None where CML did not say."""

    used: MaybeCount = None
    free: MaybeCount = None
    total: MaybeCount = None


class Domains(_Model):
    """What runs on one compute."""

    total_nodes: Count = 0
    running_nodes: Count = 0
    allocated_cpus: Count = 0
    allocated_memory: Count = 0


class Usage(_Model):
    """Load of one compute, or of all."""

    cpu: Part[Cpu] = Cpu()
    memory: Part[Space] = Space()
    disk: Part[Space] = Space()
    dominfo: Part[Domains] = Domains()


class ComputeStats(_Model):
    """One compute host."""

    hostname: Text = ""
    is_controller: Flag = None
    stats: Part[Usage] = Usage()


class ControllerStats(_Model):
    """The controller's own disk."""

    disk: Part[Space] = Space()


class SystemStats(_Model):
    """`GET /system_stats`."""

    computes: PartMap[ComputeStats] = {}
    totals: Part[Usage] = Field(default=Usage(), alias="all")
    controller: Part[ControllerStats] = ControllerStats()

    @property
    def running_nodes(self) -> int:
        """Nodes running on all computes."""
        return sum(c.stats.dominfo.running_nodes for c in self.computes.values())


class ComputeHealth(_Model):
    """One compute's checks; None is "not told"."""

    hostname: Text = ""
    is_controller: Flag = None
    valid: Flag = None
    admission_state: Text = ""
    kvm_vmx_enabled: Flag = None
    enough_cpus: Flag = None
    lld_connected: Flag = None
    lld_synced: Flag = None
    libvirt: Flag = None
    fabric: Flag = None
    device_mux: Flag = None
    refplat_images_available: Flag = None
    docker_shim: Flag = None


class ControllerHealth(_Model):
    """The controller's checks."""

    valid: Flag = None
    core_connected: Flag = None
    nodes_loaded: Flag = None
    images_loaded: Flag = None


class SystemHealth(_Model):
    """`GET /system_health`; a second opinion on the licence."""

    valid: Flag = None
    is_licensed: Flag = None
    is_enterprise: Flag = None
    computes: PartMap[ComputeHealth] = {}
    controller: Part[ControllerHealth] = ControllerHealth()


class Attempts(_Model):
    """When something was tried with the licence server, and how it went."""

    succeeded: Moment = None
    attempted: Moment = None
    scheduled: Moment = None
    status: Text = ""
    failure: Text = ""
    success: Text = ""


class Registration(_Model):
    """Registration with Smart Licensing; `status` is a free string, `COMPLETED` the only known success."""

    status: Text = ""
    smart_account: MaybeText = None
    virtual_account: MaybeText = None
    expires: Moment = None
    register_time: Part[Attempts] = Attempts()
    renew_time: Part[Attempts] = Attempts()


class Authorization(_Model):
    """Authorization by Smart Licensing; `IN_COMPLIANCE` is the only known success."""

    status: Text = ""
    expires: Moment = None
    renew_time: Part[Attempts] = Attempts()


class LicensedFeature(_Model):
    """One licensed feature."""

    id: Text = ""
    name: Text = ""
    in_use: Count = 0
    status: Text = ""
    min: Count = 0
    max: Count = 0


class Udi(_Model):
    """What identifies the installation."""

    hostname: Text = ""
    product_uuid: Text = ""


class ProductLicense(_Model):
    """The product licence in force."""

    active: Text = ""
    is_enterprise: Flag = None


class Licensing(_Model):
    """`GET /licensing`."""

    registration: Part[Registration] = Registration()
    authorization: Part[Authorization] = Authorization()
    features: Parts[LicensedFeature] = ()
    udi: Part[Udi] = Udi()
    product_license: Part[ProductLicense] = ProductLicense()

    @property
    def is_registered(self) -> bool:
        return self.registration.status == "COMPLETED"

    @property
    def is_licensed(self) -> bool:
        """Registered and in compliance; every other pair of statuses is not, whatever it says."""
        return self.is_registered and self.authorization.status == "IN_COMPLIANCE"


class Lab(_Model):
    """A lab, from its tile or by itself; None is "not told here", an empty text is an empty text."""

    id: Text = ""
    title: Text = Field(default="", alias="lab_title")
    description: MaybeText = Field(default=None, alias="lab_description")
    notes: MaybeText = Field(default=None, alias="lab_notes")
    state: Text = ""
    owner: MaybeText = None
    owner_username: MaybeText = None
    owner_fullname: MaybeText = None
    node_count: MaybeCount = None
    link_count: MaybeCount = None
    groups: Ids = ()
    created: Moment = None
    modified: Moment = None

    @property
    def is_settled(self) -> bool:
        """Whether the state is one that a lab rests in."""
        return self.state in LAB_STATES


class NodeState(_Model):
    """A node of any visible lab, as `GET /nodes` tells it."""

    id: Text = ""
    lab_id: Text = ""
    label: Text = ""
    node_definition: Text = ""
    state: Text = ""
    boot_progress: Text = ""
    compute_id: MaybeText = None

    @property
    def is_booted(self) -> bool:
        return self.state == "BOOTED"


class ImportResult(_Model):
    """The new lab's id, and CML's warnings, which are Markdown, without its marks of emphasis."""

    id: Text = ""
    warnings: Annotated[Texts, AfterValidator(lambda told: tuple(_EMPHASIS.sub(r"\1", text) for text in told))] = ()


class TelemetryEvent(_Model):
    """One thing that somebody or something did."""

    category: Text = ""
    timestamp: Moment = None
    data: Annotated[dict[str, Any], BeforeValidator(lambda v: v if isinstance(v, dict) else {})] = {}
