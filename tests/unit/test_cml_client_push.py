"""The push channel as the client keeps it: what counts as a hint, who is told the token, and how a channel ends."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSCloseCode, web

from controllers.cml.client import CmlClient, Credentials, Timeouts, TlsPolicy
from controllers.cml.errors import (
    CmlBadAnswer,
    CmlCircuitOpen,
    CmlClosed,
    CmlError,
    CmlFingerprintMismatch,
    CmlForbidden,
    CmlIdentityMismatch,
    CmlNotReady,
    CmlTimeout,
    CmlUnreachable,
)
from controllers.cml.push import tells_of_labs
from controllers.cml.simulator import Machine, Options, Simulator
from equipment.certificates import make
from equipment.scripted_cml import PASSWORD, USERNAME, ScriptedCml, page, silence
from equipment.waiting import until

OTHER = "564d4a4c-0000-4000-8000-00000000000b"
AT_ONCE = Options(boot_bad_gateway=0, boot_not_ready=0, node_queued=0, node_boot=0)


class Listening:
    """A client that listens in a task."""

    def __init__(self, client: CmlClient) -> None:
        self.opened = 0
        self.heard = 0
        self.task = asyncio.create_task(client.listen(self._open, self._hear))

    def _open(self) -> None:
        self.opened += 1

    def _hear(self) -> None:
        self.heard += 1

    async def end(self) -> CmlError:
        """What the channel ended with."""
        async with asyncio.timeout(30):
            with pytest.raises(CmlError) as caught:
                await self.task
        return caught.value


@asynccontextmanager
async def listening(machine_options: Options = AT_ONCE) -> AsyncIterator[tuple[Machine, CmlClient, Listening]]:
    async with Simulator.run(machine_options) as simulator:
        machine = simulator.machine("i-1")
        credentials = Credentials(machine_options.username, machine_options.password)
        async with CmlClient(simulator.url_of("i-1"), credentials) as client:
            ear = Listening(client)
            try:
                await until(lambda: ear.task.done() or (ear.opened and machine.listeners), "the channel is open")
                yield machine, client, ear
            finally:
                ear.task.cancel()
                await asyncio.wait([ear.task])


def server_context(folder: Path) -> ssl.SSLContext:
    """A server's, with a key and a leaf of its own."""
    made, context = make(folder).server, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.cert, made.key)
    return context


@pytest.mark.parametrize(
    ("message", "told", "why"),
    [
        ({"event_type": "lab_event", "event": "created", "element_type": "lab"}, True, "a new lab"),
        ({"event_type": "Lab_Event", "event": "MODIFIED", "element_type": "Lab"}, True, "in another spelling"),
        ({"event_type": "lab_element_event", "event": "created", "element_type": "link"}, True, "one more link"),
        ({"event_type": "state_change", "event": "STARTED", "element_type": "lab"}, True, "a lab's state"),
        ({"event_type": "state_change", "event": "BOOTED", "element_type": "node"}, True, "labs follow their nodes"),
        ({"event_type": "state_change", "event": "STARTED", "element_type": "interface"}, False, "goes with its node"),
        ({"event_type": "state_change", "event": "STARTED", "element_type": "Link"}, False, "goes with its nodes"),
        ({"event_type": "lab_stats"}, False, "the load of a lab, all the time"),
        ({"event_type": "System_Stats"}, False, "the load of the host, all the time"),
        ({"event_type": "ping"}, False, "nothing"),
        ({"event_type": "something_new"}, True, "what is not known is worth a look"),
        ({}, True, "so is what says nothing"),
        ({"event_type": None, "element_type": 7}, True, "whatever it is made of"),
    ],
)
def test_what_is_a_reason_to_look(message: dict[str, Any], told: bool, why: str) -> None:
    assert tells_of_labs(message) is told, why


async def test_a_change_of_a_lab_is_heard_and_the_hosts_load_is_not() -> None:
    async with listening() as (machine, _, ear):
        machine.push({"event_type": "system_stats", "data": {}})
        lab = machine.add_lab("new")
        await until(lambda: ear.heard == 1)
        machine.force(lab, "STARTED")
        await until(lambda: ear.heard > 1)
        assert ear.opened == 1


async def test_an_expired_token_ends_the_channel_and_the_next_is_opened_under_a_new_one() -> None:
    async with listening() as (machine, client, ear):
        before = client.session
        machine.directory.close_sessions()
        machine.push({})  # CML looks at its tokens now and then
        assert isinstance(await ear.end(), CmlUnreachable)
        again = Listening(client)
        await until(lambda: again.opened and machine.listeners)
        assert before is not None
        assert client.session is not None
        assert client.session.serial == before.serial + 1
        again.task.cancel()


async def test_a_cml_that_is_switched_off_ends_the_channel() -> None:
    async with listening() as (machine, _, ear):
        machine.power_off()
        assert isinstance(await ear.end(), CmlUnreachable)


async def test_closing_the_client_ends_the_channel() -> None:
    async with listening() as (machine, client, ear):
        await client.aclose()
        assert isinstance(await ear.end(), CmlClosed)
        await until(lambda: not machine.listeners, "the server to hear of it")
        assert isinstance(await Listening(client).end(), CmlClosed)


async def test_who_gives_up_listening_leaves_no_channel() -> None:
    async with listening() as (machine, client, ear):
        ear.task.cancel()
        await until(lambda: not machine.listeners)
        assert await client.lab_ids() == (), "the client itself goes on"


async def test_another_cml_is_not_listened_to() -> None:
    async with listening() as (machine, client, first):
        first.task.cancel()
        await until(lambda: not machine.listeners)
        machine.counts.clear()
        client.expect_identity(OTHER)
        ear = Listening(client)
        assert isinstance(await ear.end(), CmlIdentityMismatch)
        assert not ear.opened
        assert not machine.counts["GET /ws/ui"]


async def test_a_leaf_that_changes_after_the_login_is_not_told_the_token(tmp_path: Path) -> None:
    """The login was answered by one server; whoever has its address now has not its key."""
    async with ScriptedCml.run(tls=server_context(tmp_path / "one")) as cml:
        port = int(cml.url.rpartition(":")[2])
        client = CmlClient(cml.url, Credentials(USERNAME, PASSWORD), tls=TlsPolicy(verify=False))
        await client.lab_ids()
    async with ScriptedCml.run(tls=server_context(tmp_path / "two"), port=port) as other, client:
        assert isinstance(await Listening(client).end(), CmlFingerprintMismatch)
        assert not other.seen


async def test_the_token_follows_no_redirect() -> None:
    async with ScriptedCml.run() as cml, ScriptedCml.run() as other:
        where = f"{other.url}/ws/ui"
        cml.on("GET", "/ws/ui", web.Response(status=302, headers={"Location": where}))
        async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD)) as client:
            ear = Listening(client)
            assert isinstance(await ear.end(), CmlBadAnswer)
        assert not other.seen
        assert not ear.opened


@pytest.mark.parametrize(
    ("status", "error"), [(200, CmlBadAnswer), (403, CmlForbidden), (404, CmlBadAnswer), (502, CmlNotReady)]
)
async def test_a_server_without_the_channel_is_told_by_its_answer(status: int, error: type[CmlError]) -> None:
    async with ScriptedCml.run() as cml, CmlClient(cml.url, Credentials(USERNAME, PASSWORD)) as client:
        cml.on("GET", "/ws/ui", page(status))
        assert type(await Listening(client).end()) is error
        assert await client.lab_ids() == ()


async def test_a_refused_token_is_not_used_again() -> None:
    async with ScriptedCml.run() as cml, CmlClient(cml.url, Credentials(USERNAME, PASSWORD)) as client:
        cml.on("GET", "/ws/ui", page(401))
        await client.lab_ids()
        await Listening(client).end()
        assert client.session is None


async def test_a_server_that_never_answers_is_given_up() -> None:
    async with ScriptedCml.run() as cml:
        cml.on("GET", "/ws/ui", silence)
        async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD), timeouts=Timeouts(read=0.3)) as client:
            assert isinstance(await Listening(client).end(), CmlTimeout)


async def test_frames_that_are_no_json_or_too_long_do_no_harm() -> None:
    """The first are passed over, the last end the channel."""

    async def talk(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        for text in ("{", "[]", "7", '{"event_type": "lab_event"}'):
            await socket.send_str(text)
        await socket.send_bytes(b'{"event_type": "lab_event"}')
        await socket.send_str('"' + "x" * 2**21 + '"')
        await socket.close(code=WSCloseCode.OK)
        return socket

    async with ScriptedCml.run() as cml, CmlClient(cml.url, Credentials(USERNAME, PASSWORD)) as client:
        cml.on("GET", "/ws/ui", talk)
        ear = Listening(client)
        assert isinstance(await ear.end(), CmlUnreachable)
        assert ear.heard == 2


async def test_an_unreachable_cml_is_not_probed_by_the_channel() -> None:
    """Calls fail fast for a while after they failed; the channel waits for one that gets through."""
    async with ScriptedCml.run() as cml:
        client = CmlClient(cml.url, Credentials(USERNAME, PASSWORD), breaker_threshold=1, breaker_cool_down=60)
        await client.lab_ids()
    async with client:
        with pytest.raises(CmlUnreachable):
            await client.lab_ids()
        assert isinstance(await Listening(client).end(), CmlCircuitOpen)
