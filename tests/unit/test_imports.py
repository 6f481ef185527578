"""Which existing instances become workers: the choice as a table, names, and what an import may ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from controllers.aws.ec2 import Ec2Instance
from controllers.imports.kind import LAB_WORKER_IMPORT, LabWorkerImport, worker_of
from controllers.imports.selection import plan
from controllers.workers.kind import LAB_WORKER, LabWorker
from controllers.workers.spec import LabWorkerSpec
from lrm.errors import Invalid
from lrm.resource import ObjectMeta

OURS, THEIRS = "installation-1", "installation-2"
ID = "i-0000000000000000a"
AMI = "ami-12345678"
FREE = Ec2Instance(id=ID, state="running", image_id=AMI, instance_type="c5.metal", tags={"track": "ccna"})


def an_import(**spec: Any) -> LabWorkerImport:
    document = {
        "apiVersion": "lab.neuroglia.io/v1",
        "kind": "LabWorkerImport",
        "metadata": {"name": spec.pop("name", "old")},
        "spec": {"region": "us-east-1", "instanceIds": [ID], **spec},
    }
    made, _ = LAB_WORKER_IMPORT.parse(document)
    causes = list(LAB_WORKER_IMPORT.validate(made, None))
    if causes:
        raise Invalid("import", causes)
    return made


def a_worker(name: str = "w1", *, names: str | None = None, has: str | None = None, uid: str = "uid-w1") -> LabWorker:
    aws = {"instanceId": names} if names else {"amiId": AMI}
    worker = LabWorker(
        metadata=ObjectMeta(name=name, uid=uid),
        spec=LabWorkerSpec.model_validate({"region": "us-east-1", "aws": aws}),
    )
    worker.status.ec2.instance_id = has
    return worker


def choose(
    of: LabWorkerImport, *found: Ec2Instance, workers: tuple[LabWorker, ...] = (), claimed_by: str = ""
) -> tuple[list[str], list[str]]:
    """The names of workers to be, and why the others are left alone."""
    chosen = plan(of, {i.id: i for i in found}, workers, {ID: claimed_by} if claimed_by else {}, OURS)
    return [one.worker for one in chosen.imports], [one.reason for one in chosen.skipped]


@pytest.mark.parametrize(
    ("found", "workers", "why"),
    [
        ((replace(FREE, state="terminated"),), (), "Terminated"),
        ((replace(FREE, state="shutting-down"),), (), "Terminated"),
        ((replace(FREE, tags={"lrm/installation": THEIRS}),), (), "AnotherInstallation"),
        ((FREE,), (a_worker(names=ID),), "HasWorker: default/w1"),
        ((FREE,), (a_worker(has=ID),), "HasWorker: default/w1"),
        (
            (replace(FREE, tags={"lrm/uid": "uid-w1", "lrm/installation": OURS}),),
            (a_worker(),),
            "HasWorker: default/w1",
        ),
        ((FREE,), (a_worker("old-0000000000000000a"),), "NameTaken"),
        ((), (), "NotFound"),
    ],
)
def test_an_instance_that_has_ended_or_is_anothers_is_left_alone(
    found: tuple[Ec2Instance, ...], workers: tuple[LabWorker, ...], why: str
) -> None:
    assert choose(an_import(), *found, workers=workers) == ([], [why])


def test_a_claimed_instance_is_left_alone() -> None:
    assert choose(an_import(), FREE, claimed_by="other/w9") == ([], ["Claimed: other/w9"])


def test_what_fits_is_imported_also_when_it_is_stopped_or_was_once_ours() -> None:
    for instance in (FREE, replace(FREE, state="stopped"), replace(FREE, tags={"lrm/installation": OURS})):
        assert choose(an_import(), instance) == (["old-0000000000000000a"], [])


def test_named_instances_must_fit_the_rest_too() -> None:
    for spec in ({"amiId": "ami-87654321"}, {"tags": {"track": "ccnp"}}):
        assert choose(an_import(**spec), FREE) == ([], ["DoesNotMatch"])
    assert choose(an_import(amiId=AMI, tags={"track": "ccna"}), FREE)[1] == []


def test_a_repeat_finds_its_own_workers_and_the_limit_counts_them() -> None:
    several = [replace(FREE, id=f"i-0000000000000000{n}") for n in range(4)]
    of = an_import(instanceIds=[], tags={"track": "ccna"}, limit=2, namePrefix="lab")
    made, left = choose(of, *several)
    assert (made, left) == (["lab-00000000000000000", "lab-00000000000000001"], ["LimitReached"] * 2)
    last = a_worker("lab-00000000000000003", names=several[3].id)
    again, left = choose(of, *several, workers=(last,))
    assert again == ["lab-00000000000000003", "lab-00000000000000000"]
    assert left == ["LimitReached"] * 2


def test_the_worker_adopts_keeps_its_instance_and_looks_like_the_template() -> None:
    template = {
        "metadata": {"labels": {"from": "import"}, "annotations": {"a": "b"}},
        "spec": {"labTrack": "ccna", "cml": {"username": "root"}, "autoLicense": False, "observeOnly": True},
    }
    worker = worker_of(an_import(template=template), FREE)
    assert (worker.spec.aws.instance_id, worker.spec.aws.instance_type) == (ID, "c5.metal")
    assert (worker.spec.deletion_policy, worker.spec.retains, worker.spec.observe_only) == ("Retain", True, True)
    assert (worker.spec.lab_track, worker.spec.cml.username, worker.spec.auto_license) == ("ccna", "root", False)
    assert worker.metadata.labels == {"from": "import"}
    assert worker.metadata.annotations == {"a": "b", "lab.neuroglia.io/imported-by": "old"}
    assert worker.metadata.owner_references == []


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"instanceIds": []}, "spec"),
        ({"instanceIds": ["i-xyz"]}, "spec.instanceIds"),
        ({"amiId": "nonsense"}, "spec.amiId"),
        ({"region": "mars"}, "spec.region"),
        ({"tags": {"k": "a\\b"}}, "spec.tags"),
        ({"namePrefix": "Upper"}, "spec.namePrefix"),
        ({"namePrefix": "a" * 46}, "spec.namePrefix"),
        ({"name": "a" * 46}, "spec.namePrefix"),
        ({"limit": 0}, "spec.limit"),
        ({"template": {"spec": {"region": "us-east-1"}}}, "spec.template.spec.region"),
        ({"template": {"metadata": {"labels": {"no good": "x"}}}}, "spec.template.metadata.labels"),
    ],
)
def test_what_an_import_cannot_ask_for_is_refused_with_its_field(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        an_import(**spec)
    assert any(cause.field.startswith(field) for cause in refused.value.causes), refused.value.causes


def test_the_example_is_an_import() -> None:
    text = (Path(__file__).parents[2] / "examples/manifests/labworkerimport.yaml").read_text()
    made, warnings = LAB_WORKER_IMPORT.parse(yaml.safe_load(text))
    assert list(LAB_WORKER_IMPORT.validate(made, None)) == warnings == []
    worker = worker_of(made, FREE)
    assert list(LAB_WORKER.validate(worker, None)) == []
