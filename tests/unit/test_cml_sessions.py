"""The shared pool of CML clients: one per worker, made anew when what it stands on changes."""

from __future__ import annotations

from typing import Any

import pytest

from controllers.cml.sessions import CmlNoAddress, CmlNoCredentials, CmlSessions, base_url, trust_pending
from controllers.workers.kind import TRUST_ANNOTATION, LabWorker
from controllers.workers.settings import WorkerSettings
from controllers.workers.status import Identity
from lrm.secrets import Secrets
from storage.clock import SystemClock


def a_worker(**cml: Any) -> LabWorker:
    worker = LabWorker.model_validate(
        {
            "metadata": {"name": "w1", "uid": "u-1"},
            "spec": {
                "region": "us-east-1",
                "aws": {"amiId": "ami-12345678"},
                "cml": {"passwordFrom": {"env": "SESSIONS_PASSWORD"}, **cml},
            },
        }
    )
    worker.status.ec2.instance_id = "i-0123456789abcdef0"
    worker.status.ec2.public_ip, worker.status.ec2.private_ip = "198.51.100.7", "10.0.0.7"
    return worker


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> CmlSessions:
    monkeypatch.setenv("SESSIONS_PASSWORD", "one")
    return CmlSessions(WorkerSettings(), Secrets(["SESSIONS_PASSWORD"]), SystemClock())


@pytest.mark.parametrize(
    ("cml", "template", "expected"),
    [
        ({}, "", "https://198.51.100.7"),
        ({"usePrivateIp": True}, "", "https://10.0.0.7"),
        ({}, "http://sim/{instance_id}", "http://sim/i-0123456789abcdef0"),
        ({}, "https://{name}.{public_ip}/{private_ip}", "https://w1.198.51.100.7/10.0.0.7"),
        ({"apiBaseUrl": "https://cml.example"}, "http://sim/{instance_id}", "https://cml.example"),
    ],
)
def test_the_address_is_the_specs_else_the_templates_else_the_instances(
    cml: dict[str, Any], template: str, expected: str
) -> None:
    assert base_url(a_worker(**cml), template) == expected


def test_without_instance_or_address_there_is_nobody_to_ask() -> None:
    worker = a_worker()
    worker.status.ec2.public_ip = worker.status.ec2.private_ip = None
    with pytest.raises(CmlNoAddress, match="no address"):
        base_url(worker, "")
    with pytest.raises(CmlNoAddress, match="no public_ip"):
        base_url(worker, "https://{public_ip}")
    worker = a_worker(apiBaseUrl="https://cml.example")
    worker.status.ec2.instance_id = None
    with pytest.raises(CmlNoAddress, match="no instance"):
        base_url(worker, "")


async def test_one_client_serves_until_address_password_instance_or_rules_change(
    sessions: CmlSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sessions:
        worker = a_worker()
        first = sessions.client_for(worker)
        assert sessions.client_for(worker) is first
        worker.status.cml.identity = Identity(product_uuid="a", fingerprint="0" * 64)
        assert sessions.client_for(worker) is first, "to know who it is changes nothing"
        clients = [first]

        def changed() -> bool:
            clients.append(sessions.client_for(worker))
            return clients[-1] is not clients[-2] and sessions.client_for(worker) is clients[-1]

        worker.status.ec2.public_ip = "198.51.100.8"
        assert changed()
        monkeypatch.setenv("SESSIONS_PASSWORD", "two")
        assert changed()
        worker.status.ec2.instance_id = "i-0123456789abcdef1"
        assert changed()
        worker.spec.cml.tls.verify = False
        assert changed()
        worker.metadata.annotations[TRUST_ANNOTATION] = "yes"
        assert changed()


async def test_a_secret_that_may_not_be_read_is_told_by_its_name(sessions: CmlSessions) -> None:
    async with sessions:
        with pytest.raises(CmlNoCredentials, match="env OTHER"):
            sessions.client_for(a_worker(passwordFrom={"env": "OTHER"}))
        worker = a_worker()
        worker.spec.cml.password_from = None
        with pytest.raises(CmlNoCredentials, match="names no password"):
            sessions.client_for(worker)


def test_trust_is_asked_for_once_per_value() -> None:
    worker = a_worker()
    assert not trust_pending(worker)
    worker.metadata.annotations[TRUST_ANNOTATION] = "a"
    assert trust_pending(worker)
    worker.status.cml.trusted = "a"
    assert not trust_pending(worker)
    worker.metadata.annotations[TRUST_ANNOTATION] = "b"
    assert trust_pending(worker)
