"""The health check beside others who ask the same CML: whoever's call failed, it counts, once and for one check."""

from __future__ import annotations

import socket

import pytest
import structlog

from controllers.cml.client import CmlClient
from controllers.cml.errors import CmlCircuitOpen, CmlUnreachable
from controllers.cml.sessions import CmlSessions
from controllers.plugin import plugin
from controllers.workers.cml_side import CmlSide
from controllers.workers.kind import LabWorker
from controllers.workers.settings import WorkerSettings
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.work import Work
from lrm.cache import Cache
from lrm.client import Client
from lrm.clock import WallJumps
from lrm.controller import Context
from lrm.election import StaticElection
from lrm.events import Recorder
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from lrm.secrets import Secrets
from storage.clock import SystemClock
from storage.memory import MemoryStorage

LAB = "90f84e38-a71c-4d57-8d90-00fa8a197385"
POLL, COOL_DOWN = 5.0, 10.0


class LaterClock(SystemClock):
    """The system's, some seconds ahead."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


async def fails(client: CmlClient) -> None:
    """Somebody else's call."""
    with pytest.raises(CmlUnreachable):
        await client.stop_lab(LAB)


async def test_a_failure_of_anybodys_counts_as_one_check_and_not_sooner_than_a_poll_after_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEALTH_PASSWORD", "one")
    storage, clock, registry = MemoryStorage(), LaterClock(), Registry(plugin.kinds)
    client, secrets = Client(storage, registry, clock), Secrets(["HEALTH_PASSWORD"])
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        cml = {"passwordFrom": {"env": "HEALTH_PASSWORD"}, "apiBaseUrl": url}
        spec = LabWorkerSpec.model_validate({"region": "us-east-1", "aws": {"amiId": "ami-12345678"}, "cml": cml})
        worker = (await client.create(LabWorker(metadata=ObjectMeta(name="w1"), spec=spec))).thaw()
        worker.status.ec2.instance_id = "i-0123456789abcdef0"
        context = Context(
            client=client,
            cache=Cache(storage, registry, clock),
            clock=clock,
            term=await StaticElection(storage, clock, root="/lrm", lock_name="workers", identity="t").acquire(),
            observe_only=False,
            renew_deadline=10,
            jumps=WallJumps(clock),
            bound_log=structlog.get_logger(),
            events=Recorder(None, "workers"),
        )
        settings = WorkerSettings(worker_poll_interval=POLL)
        async with CmlSessions(settings, secrets, clock) as sessions:
            told: list[object] = []
            sessions.turns.listen(told.append)
            side, work, other = CmlSide(sessions, secrets, settings), Work(worker, context), sessions.client_for(worker)
            for _ in range(4):
                await fails(other)
            assert not told
            await fails(other)
            assert told == [("default", "w1")], "a hint to look, as the circuit opens"

            async def check(error: type[CmlUnreachable]) -> None:
                with pytest.raises(CmlUnreachable) as caught:
                    await side.check(work)
                assert type(caught.value) is error

            await check(CmlUnreachable)
            clock.ahead += POLL
            await check(CmlCircuitOpen)  # nobody was let through since
            clock.ahead += COOL_DOWN - POLL
            await fails(other)
            await check(CmlUnreachable)
            clock.ahead += COOL_DOWN
            await check(CmlUnreachable)  # let through itself: its own failure, whatever its second try meets
            assert len(told) == 1
    await storage.aclose()
