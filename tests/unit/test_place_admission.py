"""Which regions and accounts a worker, a pool and an import may name, by the settings and by what botocore knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from controllers.aws.settings import AwsAccount
from controllers.imports.kind import LabWorkerImport, LabWorkerImportSpec
from controllers.plugin import ControllersSettings, plugin
from controllers.pools.kind import LabWorkerPool, LabWorkerPoolSpec
from controllers.workers.kind import LabWorker
from controllers.workers.spec import LabWorkerSpec
from lrm.admission import Admission, admit
from lrm.cache import Cache
from lrm.registry import Registry
from lrm.resource import AnyResource, ObjectMeta
from storage.clock import SystemClock
from storage.memory import MemoryStorage

ROLE = "arn:aws:iam::111122223333:role/lrm"


def a_worker(meta: ObjectMeta, **place: str) -> LabWorker:
    return LabWorker(metadata=meta, spec=LabWorkerSpec(**place))


def a_pool(meta: ObjectMeta, **place: str) -> LabWorkerPool:
    spec = LabWorkerPoolSpec.model_validate({"labTrack": "ccna", "template": {"spec": place}})
    return LabWorkerPool(metadata=meta, spec=spec)


def an_import(meta: ObjectMeta, **place: str) -> LabWorkerImport:
    return LabWorkerImport(metadata=meta, spec=LabWorkerImportSpec(**place, tags={"a": "b"}))


KINDS: list[tuple[Callable[..., AnyResource], str]] = [
    (a_worker, "spec"),
    (a_pool, "spec.template.spec"),
    (an_import, "spec"),
]


def admission(**settings: Any) -> Admission:
    clock = SystemClock()
    return plugin.admission(
        ControllersSettings(**settings), Cache(MemoryStorage(), Registry(plugin.kinds), clock), clock
    )


@pytest.mark.parametrize(("make", "spec"), KINDS)
def test_only_a_region_that_exists_or_is_set_can_be_named(make: Callable[..., AnyResource], spec: str) -> None:
    meta = ObjectMeta(name="new", namespace="default")
    rules, made_up = admission(), make(meta, region="aa-abc-1")
    for region in ("us-east-1", "cn-north-1", "us-gov-west-1"):
        assert admit(rules, make(meta, region=region), None) == ([], [])
    [cause], _ = admit(rules, made_up, None)
    assert (cause.field, cause.reason) == (f"{spec}.region", "FieldValueNotSupported")
    assert admit(rules, made_up, made_up) == ([], []), "what is stored stands in no other change's way"
    assert len(admit(rules, made_up, make(meta, region="us-east-1"))[0]) == 1
    set_to = admission(aws_regions=("aa-abc-1",))
    assert admit(set_to, made_up, None) == ([], [])
    assert len(admit(set_to, make(meta, region="us-east-1"), None)[0]) == 1


@pytest.mark.parametrize(("make", "spec"), KINDS)
def test_only_namespaces_that_are_set_can_name_an_account(make: Callable[..., AnyResource], spec: str) -> None:
    accounts = {"exams": AwsAccount(role_arn=ROLE, namespaces=("exams", "staff")), "all": AwsAccount(role_arn=ROLE)}
    rules = admission(aws_accounts=accounts)

    def named(account: str, namespace: str) -> AnyResource:
        return make(ObjectMeta(name="new", namespace=namespace), region="us-east-1", account=account)

    for account, namespace in (("exams", "exams"), ("exams", "staff"), ("all", "classes"), ("", "classes")):
        assert admit(rules, named(account, namespace), None) == ([], [])
    [cause], _ = admit(rules, named("exams", "classes"), None)
    assert (cause.field, cause.reason) == (f"{spec}.account", "FieldValueForbidden")
    assert len(admit(rules, named("exams", "classes"), named("", "classes"))[0]) == 1, "nor later"
