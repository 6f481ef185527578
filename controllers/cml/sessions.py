"""The CML clients of a daemon: one per worker, shared by all controllers, so that one login and one breaker serve all.

`client_for(worker)` promises a client for exactly the worker's present instance, address, credentials and TLS rules,
expecting the identity that the status holds. A worker that changed gets a new one; the old client is closed by `run`
(or at the end), and calls under way on it end with `CmlClosed`. No I/O but the reading of a secret. Secrets are read
each time, so that a rotated password is taken. `turns` names workers whose CML fell silent, or was heard again, to
whichever caller. Called by the workers' and the labs' controllers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import structlog

from controllers.cml.client import CmlClient, Timeouts
from controllers.cml.errors import CmlError
from controllers.cml.session import Credentials
from controllers.cml.tls import TlsPolicy
from controllers.workers.kind import TRUST_ANNOTATION, LabWorker
from controllers.workers.settings import WorkerSettings
from lrm.cache import CacheUpdate
from lrm.controller import Hints
from lrm.secrets import SecretRefused, Secrets
from storage.clock import Clock

log = structlog.get_logger(__name__)


class CmlNoAddress(CmlError):  # noqa: N818 - errors here are named for what happened
    """The worker has no instance, or that has no address, so there is nobody to ask."""


class CmlNoCredentials(CmlError):  # noqa: N818 - errors here are named for what happened
    """No password is referred to, or the reference cannot be read; the text names the reference only."""


@dataclass(frozen=True, slots=True)
class _Terms:
    """All that a client is made of; another value needs another client."""

    instance_id: str
    base_url: str
    credentials: Credentials
    verify: bool
    ca_file: str
    fingerprint: str
    trust_new: bool


def base_url(worker: LabWorker, template: str) -> str:
    """Where the worker's CML answers, without /api/v0. Raises `CmlNoAddress`."""
    ec2, cml = worker.status.ec2, worker.spec.cml
    if ec2.instance_id is None:
        raise CmlNoAddress("the worker has no instance")
    if cml.api_base_url is not None:
        return cml.api_base_url
    if template:
        values = {
            "instance_id": ec2.instance_id,
            "public_ip": ec2.public_ip or "",
            "private_ip": ec2.private_ip or "",
            "name": worker.name,
        }
        missing = [name for name, value in values.items() if not value and f"{{{name}}}" in template]
        if missing:
            raise CmlNoAddress(f"the instance has no {missing[0]} yet")
        return template.format_map(values)
    address = ec2.private_ip if cml.use_private_ip else ec2.public_ip or ec2.private_ip
    if not address:
        raise CmlNoAddress("the instance has no address yet")
    return f"https://[{address}]" if ":" in address else f"https://{address}"


def trust_pending(worker: LabWorker) -> bool:
    """Whether a person has asked to take another CML at this address for the worker's, and it was not done yet."""
    wish = worker.metadata.annotations.get(TRUST_ANNOTATION, "")
    return wish not in ("", worker.status.cml.trusted)


class CmlSessions:
    """See the module."""

    def __init__(
        self, settings: WorkerSettings, secrets: Secrets, clock: Clock, *, timeouts: Timeouts | None = None
    ) -> None:
        """`timeouts` are the clients'; their own unless given."""
        self.turns = Hints()
        """Workers that are worth a look now, by what became of anybody's calls."""
        self._timeouts = timeouts
        self._settings = settings
        self._secrets = secrets
        self._clock = clock
        self._clients: dict[str, tuple[_Terms, CmlClient]] = {}
        # Not bounded by a number: at most one client per change of a worker, and `run` takes them at once.
        self._retired: asyncio.Queue[CmlClient] = asyncio.Queue()

    def client_for(self, worker: LabWorker) -> CmlClient:
        """The client for a worker as it is now. Raises `CmlNoAddress`, `CmlNoCredentials`, `CmlInvalid`."""
        terms = self._terms(worker)
        held = self._clients.get(worker.uid)
        if held is not None and held[0] != terms:
            self.retire(worker.uid)
            held = None
        identity = worker.status.cml.identity
        if held is None:
            policy = TlsPolicy(
                verify=terms.verify,
                ca_file=terms.ca_file,
                fingerprint=terms.fingerprint,
                known=(identity.fingerprint or "") if identity else "",
                trust_new=terms.trust_new,
            )
            client = CmlClient(
                terms.base_url,
                terms.credentials,
                tls=policy,
                clock=self._clock,
                timeouts=self._timeouts,
                allow_plain_http=self._settings.cml_allow_plain_http,
                turned=partial(self.turns.tell, (worker.namespace, worker.name)),
            )
            self._clients[worker.uid] = held = (terms, client)
        held[1].expect_identity(identity.product_uuid if identity and not terms.trust_new else None)
        return held[1]

    def retire(self, uid: str) -> None:
        """Give a worker's client up; the next call for it makes another."""
        held = self._clients.pop(uid, None)
        if held is not None:
            self._retired.put_nowait(held[1])

    def on_update(self, update: CacheUpdate) -> None:
        """Subscribed to the cache: a worker that is gone needs no client."""
        for change in update.changes:
            if change.type == "DELETED" and change.item.kind.model is LabWorker and change.item.resource is not None:
                self.retire(change.item.resource.uid)

    async def run(self) -> None:
        """Close clients that were given up, until cancelled."""
        while True:
            await _close(await self._retired.get())

    async def aclose(self) -> None:
        """Close every client."""
        for uid in list(self._clients):
            self.retire(uid)
        while not self._retired.empty():
            await _close(self._retired.get_nowait())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _terms(self, worker: LabWorker) -> _Terms:
        cml = worker.spec.cml
        if cml.password_from is None:
            raise CmlNoCredentials("spec.cml.passwordFrom names no password")
        try:
            password = self._secrets.read(cml.password_from)
        except SecretRefused as error:
            raise CmlNoCredentials(str(error)) from error
        return _Terms(
            instance_id=worker.status.ec2.instance_id or "",
            base_url=base_url(worker, self._settings.cml_url_template),
            credentials=Credentials(cml.username, password),
            verify=cml.tls.verify,
            ca_file=cml.tls.ca_file or "",
            fingerprint=cml.tls.fingerprint or "",
            trust_new=trust_pending(worker),
        )


async def _close(client: CmlClient) -> None:
    try:
        await client.aclose()
    except (OSError, RuntimeError) as error:
        # Nothing is lost: the peer sees the connection end either way.
        log.warning("cml.client_close_failed", client=repr(client), error=type(error).__name__)
