"""The LabWorkerImport: which existing EC2 instances are to become LabWorkers, and what became of that.

Pure data. An import is carried out once for each generation of its spec, and again for each new value of the
annotation `reconcile-now`. It owns nothing: the workers that it made outlive it, and each has an instance that outlives
the worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from controllers.aws.ec2 import Ec2Instance
from controllers.aws.place import Place
from controllers.workers.kind import LAB_WORKER, LabWorker
from controllers.workers.spec import AccountName, AwsSpec, LabWorkerSpec, ServiceSpec, instance_id_of, region_of
from lrm.errors import Cause
from lrm.kind import Column, Kind, metadata_causes
from lrm.model import Model, Timestamp
from lrm.resource import ObjectMeta, Resource, Status

IMPORTS = "imports"
"""The controller, its lock, and the owner of the status."""
IMPORT_ANNOTATION = "lab.neuroglia.io/imported-by"
"""On every worker that an import made: its name."""

SKIPPED_KEPT = 200
"""Instances that were left alone of which the status tells; the others are counted."""

PENDING, DONE, FAILED = "Pending", "Done", "Failed"
_ID_LENGTH = 17
"""Hex digits of an instance's id."""


class ImportMetadata(Model):
    """What each worker gets beside its name."""

    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class ImportTemplate(Model):
    """What the imported workers have in common; their machines are what they are."""

    metadata: ImportMetadata = Field(default_factory=ImportMetadata)
    spec: ServiceSpec = Field(default_factory=ServiceSpec)


class LabWorkerImportSpec(Model):
    """Which instances: those that fit everything that is said. At least one of ids, AMI and tags must be."""

    region: str
    account: AccountName = ""
    instance_ids: list[str] = Field(default_factory=list, max_length=500)
    ami_id: str | None = Field(None, pattern=r"^ami-[0-9a-zA-Z]{4,40}$")
    tags: dict[str, str] = Field(default_factory=dict, max_length=40)
    template: ImportTemplate = Field(default_factory=ImportTemplate)
    name_prefix: str | None = Field(None, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    limit: int = Field(20, ge=1, le=500)

    _known_region = field_validator("region")(region_of)

    @property
    def place(self) -> Place:
        """Where the instances are."""
        return Place(self.region, self.account)

    @field_validator("instance_ids")
    @classmethod
    def _ids(cls, values: list[str]) -> list[str]:
        return list(dict.fromkeys(instance_id_of(v) for v in values))

    @field_validator("tags")
    @classmethod
    def _tags(cls, tags: dict[str, str]) -> dict[str, str]:
        for key, value in tags.items():
            if not 1 <= len(key) <= 128 or len(value) > 256 or "\\" in value:
                limits = "a key has 1 to 128 characters, a value up to 256 and here no backslash"
                raise ValueError(f"{key[:60]!r}: {limits}")
        return tags


class Imported(Model):
    """An instance and the worker that it became, or is to become."""

    instance_id: str
    worker: str


class Skipped(Model):
    """An instance that was left alone."""

    instance_id: str
    reason: str


class LabWorkerImportStatus(Status):
    """What was found and what became of it."""

    phase: Literal["Pending", "Done", "Failed"] = "Pending"
    found: int = 0
    """Instances that EC2 showed, those that were left alone included."""
    planned: list[Imported] = Field(default_factory=list)
    """Written before the first worker is made; empty when all are."""
    imported: list[Imported] = Field(default_factory=list)
    skipped: list[Skipped] = Field(default_factory=list)
    skipped_count: int = 0
    asked: str | None = None
    """The value of the reconcile-now annotation that the last run honoured."""
    completed_at: Timestamp | None = None


class LabWorkerImport(Resource[LabWorkerImportSpec, LabWorkerImportStatus]):
    """Existing instances that are to become LabWorkers."""

    api_version: str = "lab.neuroglia.io/v1"
    kind: str = "LabWorkerImport"
    spec: LabWorkerImportSpec
    status: LabWorkerImportStatus = Field(default_factory=LabWorkerImportStatus)


def worker_name(of: LabWorkerImport, instance_id: str) -> str:
    """The name of the worker for an instance: always the same, so that a repeat meets what is there."""
    return f"{of.spec.name_prefix or of.name}-{instance_id.removeprefix('i-')}"


def worker_of(of: LabWorkerImport, instance: Ec2Instance) -> LabWorker:
    """The worker that adopts an instance; deleted, it leaves the instance as it is."""
    template = of.spec.template.thaw()
    metadata = ObjectMeta(
        name=worker_name(of, instance.id),
        namespace=of.namespace,
        labels=template.metadata.labels,
        annotations={**template.metadata.annotations, IMPORT_ANNOTATION: of.name},
    )
    spec = LabWorkerSpec(
        **{name: getattr(template.spec, name) for name in ServiceSpec.model_fields},
        region=of.spec.region,
        account=of.spec.account,
        aws=AwsSpec(instance_id=instance.id, instance_type=instance.instance_type),
        deletion_policy="Retain",
    )
    return LabWorker(metadata=metadata, spec=spec)


def validate(new: LabWorkerImport, old: LabWorkerImport | None) -> Iterator[Cause]:
    """What types cannot say."""
    del old
    spec = new.spec
    if not (spec.instance_ids or spec.ami_id or spec.tags):
        yield Cause("spec", "FieldValueRequired", "name instances by instanceIds, amiId or tags: not all of an account")
    if len(spec.name_prefix or new.name) + 1 + _ID_LENGTH > LAB_WORKER.max_name:
        longest = LAB_WORKER.max_name - 1 - _ID_LENGTH
        message = f"the workers' names begin with it (or with the import's name): at most {longest} characters"
        yield Cause("spec.namePrefix", "FieldValueTooLong", message)
    told = spec.template.metadata
    metadata = ObjectMeta(name="worker", labels=told.labels, annotations=told.annotations)
    for cause in metadata_causes(metadata, LAB_WORKER.max_name):
        yield Cause(f"spec.template.{cause.field}", cause.reason, cause.message)


def _count(of: LabWorkerImport) -> Any:
    return len(of.status.imported)


LAB_WORKER_IMPORT: Kind[LabWorkerImport] = Kind(
    model=LabWorkerImport,
    plural="labworkerimports",
    singular="labworkerimport",
    short_names=("lwi",),
    categories=("lrm",),
    columns=(
        Column("Phase", lambda i: i.status.phase, description="Whether it was carried out."),
        Column("Region", lambda i: i.spec.region, description="The AWS region that is searched."),
        Column("Account", lambda i: i.spec.account or None, description="The AWS account that is.", priority=1),
        Column("Found", lambda i: i.status.found, type="integer", description="Instances that EC2 showed."),
        Column("Imported", _count, type="integer", description="Instances that have a worker by it."),
        Column("Skipped", lambda i: i.status.skipped_count, type="integer", description="Instances left alone."),
    ),
    transitions={PENDING: frozenset({DONE, FAILED}), DONE: frozenset({PENDING}), FAILED: frozenset({PENDING})},
    initial_phase=PENDING,
    default_owner=IMPORTS,
    fields={
        "status.phase": lambda i: i.status.phase,
        "spec.region": lambda i: i.spec.region,
        "spec.account": lambda i: i.spec.account,
    },
    validate=validate,
)
