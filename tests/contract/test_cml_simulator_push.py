"""The push channel: who gets in, what is told to whom and when, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import WSCloseCode, WSMsgType

from controllers.cml.simulator import Account, Machine, Options, Simulator
from controllers.cml.simulator.websocket import AUTH_SECONDS, NOISE_SECONDS, QUEUE
from equipment.waiting import until
from lrm.testing import VirtualClock

OPTIONS = Options(boot_bad_gateway=0, boot_not_ready=0, accounts=(Account("student", "s"),))


@asynccontextmanager
async def pushing(name: str = "i-1") -> AsyncIterator[tuple[Simulator, Machine, VirtualClock, aiohttp.ClientSession]]:
    clock = VirtualClock()
    async with Simulator.run(OPTIONS, clock=clock) as simulator, aiohttp.ClientSession() as http:
        yield simulator, simulator.machine(name), clock, http


async def channel(
    http: aiohttp.ClientSession, simulator: Simulator, machine: Machine, user: str = "admin"
) -> aiohttp.ClientWebSocketResponse:
    """An open channel whose first frame has been accepted."""
    found = machine.directory.named(user)
    assert found is not None
    token = machine.directory.open_session(found, simulator.clock.now())
    before = set(machine.listeners)
    socket = await http.ws_connect(f"{simulator.url_of(machine.name)}/ws/ui")
    await socket.send_json({"token": token, "client_uuid": ""})
    await until(lambda: set(machine.listeners) - before, "the channel is accepted")
    return socket


async def closing_code(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    async with asyncio.timeout(30):
        while (await socket.receive()).type not in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING):
            pass
    return socket.close_code


async def test_each_state_is_told_when_it_comes_though_nobody_asks() -> None:
    async with pushing() as (simulator, machine, clock, http):
        socket = await channel(http, simulator, machine)
        lab = machine.add_lab("told", nodes=1)
        machine.start(lab)
        (node,) = lab.nodes

        async def hear() -> tuple[Any, ...]:
            message = await socket.receive_json(timeout=30)
            assert message["lab_id"] == lab.id
            return message["event_type"], message["event"], message["element_type"], message["element_id"]

        assert await hear() == ("lab_event", "created", "lab", lab.id)
        assert await hear() == ("state_change", "QUEUED", "node", node)
        message = await socket.receive_json(timeout=30)
        assert (message["event"], message["data"]) == ("state", {"state": "STARTED"})
        await clock.advance(0.5)
        assert await hear() == ("state_change", "STARTED", "node", node)
        await clock.advance(2)
        assert await hear() == ("state_change", "BOOTED", "node", node)
        machine.stop(lab)
        await clock.advance(0.5)
        assert await hear() == ("state_change", "STOPPED", "node", node), "a stop is no news until it has happened"
        assert (await socket.receive_json(timeout=30))["data"] == {"state": "STOPPED"}
        machine.wipe(lab)
        await clock.advance(0.2)
        assert await hear() == ("state_change", "DEFINED_ON_CORE", "node", node)
        assert (await socket.receive_json(timeout=30))["data"] == {"state": "DEFINED_ON_CORE"}
        machine.remove(lab)
        assert await hear() == ("lab_event", "deleted", "lab", lab.id)


@pytest.mark.parametrize(
    "first", ["no json", "[]", '{"client_uuid": ""}', '{"token": "x.y.z"}', '{"token": null}', b"\xff"]
)
async def test_a_channel_without_a_valid_first_frame_is_closed(first: str | bytes) -> None:
    """The header alone is not enough either."""
    async with pushing() as (simulator, machine, _, http):
        token = machine.directory.open_session(machine.admin, simulator.clock.now())
        header = {"Authorization": f"Bearer {token}"}
        socket = await http.ws_connect(f"{simulator.url_of('i-1')}/ws/ui", headers=header)
        await (socket.send_str(first) if isinstance(first, str) else socket.send_bytes(first))
        assert await closing_code(socket) == WSCloseCode.POLICY_VIOLATION
        assert not machine.listeners


async def test_a_channel_that_says_nothing_is_closed_in_time() -> None:
    async with pushing() as (simulator, machine, clock, http):
        socket = await http.ws_connect(f"{simulator.url_of('i-1')}/ws/ui")
        await until(lambda: machine.counts["GET /ws/ui"], "the channel is open")
        await clock.advance(AUTH_SECONDS)
        assert await closing_code(socket) == WSCloseCode.POLICY_VIOLATION


async def test_only_those_who_may_see_a_lab_hear_of_it() -> None:
    async with pushing() as (simulator, machine, _, http):
        admin = await channel(http, simulator, machine)
        student = await channel(http, simulator, machine, "student")
        user = machine.directory.named("student")
        assert user is not None
        hidden = machine.add_lab("hidden")
        shown = machine.add_lab("shown", owner=user.id)
        machine.remove(hidden)
        machine.remove(shown)
        heard = [(await admin.receive_json(timeout=30))["lab_id"] for _ in range(4)]
        assert heard == [hidden.id, shown.id, hidden.id, shown.id]
        heard = [(await student.receive_json(timeout=30))["lab_id"] for _ in range(2)]
        assert heard == [shown.id, shown.id]


async def test_a_filter_narrows_the_channel_to_one_lab_and_widens_it_again() -> None:
    async with pushing() as (simulator, machine, _, http):
        socket = await channel(http, simulator, machine)
        one, two = machine.add_lab("one"), machine.add_lab("two")
        assert [(await socket.receive_json(timeout=30))["lab_id"] for _ in range(2)] == [one.id, two.id]
        (open_channel,) = machine.listeners
        await socket.send_json({"lab_filter": two.id})
        await until(lambda: open_channel.lab_filter == two.id, "the filter is set")  # type: ignore[attr-defined]
        machine.force(one, "STARTED")
        machine.force(two, "STARTED")
        assert (await socket.receive_json(timeout=30))["lab_id"] == two.id
        await socket.send_json({"lab_filter": None})
        await until(lambda: open_channel.lab_filter == "", "the filter is gone")  # type: ignore[attr-defined]
        machine.force(one, "STOPPED")
        assert (await socket.receive_json(timeout=30))["lab_id"] == one.id
        await socket.send_str("nonsense")
        assert await closing_code(socket) == WSCloseCode.INVALID_TEXT


async def test_a_channel_ends_with_its_session_and_with_its_machine() -> None:
    async with pushing() as (simulator, machine, clock, http):
        first, second = [await channel(http, simulator, machine) for _ in range(2)]
        machine.directory.close_sessions()
        machine.add_lab("unheard")
        await clock.advance(NOISE_SECONDS)
        assert await closing_code(first) == await closing_code(second) == WSCloseCode.POLICY_VIOLATION
        third = await channel(http, simulator, machine)
        machine.power_off()
        assert await closing_code(third) == WSCloseCode.GOING_AWAY
        await until(lambda: not machine.listeners, "every channel is forgotten")
        machine.power_on()
        fourth = await channel(http, simulator, machine)
        simulator.fleet.forget("i-1")
        assert await closing_code(fourth) == WSCloseCode.GOING_AWAY


async def test_a_reader_that_falls_behind_is_closed_and_holds_up_nobody() -> None:
    async with pushing() as (simulator, machine, _, http):
        slow = await channel(http, simulator, machine)
        for n in range(QUEUE + 2):
            machine.add_lab(str(n))
        other = await channel(http, simulator, machine)
        machine.add_lab("last")
        assert (await other.receive_json(timeout=30))["event"] == "created"
        assert await closing_code(slow) == WSCloseCode.TRY_AGAIN_LATER


async def test_a_client_that_vanishes_is_forgotten_without_a_fuss(caplog: pytest.LogCaptureFixture) -> None:
    async with pushing() as (simulator, machine, clock, http):
        first, second = [await channel(http, simulator, machine) for _ in range(2)]
        first._conn.transport.abort()  # type: ignore[union-attr]
        for n in range(10):
            machine.add_lab(str(n))
        await clock.advance(NOISE_SECONDS)
        assert (await second.receive_json(timeout=30))["event"] == "created"
        await until(lambda: len(machine.listeners) == 1, "the lost channel is forgotten")
    assert caplog.records == []


async def test_there_is_noise_that_a_reader_must_bear() -> None:
    async with pushing() as (simulator, machine, clock, http):
        socket = await channel(http, simulator, machine)
        for _ in range(2):
            await clock.advance(NOISE_SECONDS)
            assert (await socket.receive_json(timeout=30))["event_type"] == "ping"


async def test_a_stop_of_the_simulator_closes_open_channels_at_once() -> None:
    async with aiohttp.ClientSession() as http:
        async with Simulator.run(OPTIONS) as simulator:
            machine = simulator.machine("i-1")
            socket = await channel(http, simulator, machine)
            before = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - before < 20
        assert await closing_code(socket) == WSCloseCode.GOING_AWAY
        assert [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "simulator" in repr(t)] == []


async def test_faults_strike_the_channel_too() -> None:
    async with pushing() as (simulator, _, _, http):
        simulator.faults.add("status", status=403, path="/ws/ui", times=1)
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await http.ws_connect(f"{simulator.url_of('i-1')}/ws/ui")
        assert refused.value.status == 403
        fault = simulator.faults.add("drop", path="/ws/ui")
        with pytest.raises(aiohttp.ClientError):
            await http.ws_connect(f"{simulator.url_of('i-1')}/ws/ui")
        simulator.faults.clear(fault)
        async with http.get(f"{simulator.url_of('i-1')}/ws/ui") as answer:
            assert answer.status == 400, "no upgrade was asked for"
