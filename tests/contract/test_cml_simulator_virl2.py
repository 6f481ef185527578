"""Cisco's own client against the simulator: the peer that nobody here wrote.

It runs in a thread of its own, as it blocks; the simulator runs on real time with short waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from virl2_client import ClientLibrary
from virl2_client.exceptions import APIError, LabNotFound
from virl2_client.virl2_client import DiagnosticsCategory

from controllers.cml.simulator import Account, Options, Simulator
from equipment.waiting import until

FAST = Options(
    boot_bad_gateway=0,
    boot_not_ready=0,
    registration=0.2,
    node_queued=0.05,
    node_boot=0.2,
    node_stop=0.1,
    node_wipe=0.1,
    accounts=(Account("student", "student-secret"),),
)
VERSIONS = ["2.8.1+build.1", "2.9.1+build.7", "2.10.0+build.3"]

TOPOLOGY = """
lab:
  version: 0.3.0
  title: two routers
  description: a pair
  notes: |-
    for a test
nodes:
  - id: n0
    label: r0
    node_definition: iosv
    x: 0
    y: 0
    configuration: hostname r0
    tags: [core]
    interfaces:
      - {id: i0, type: loopback, label: Loopback0}
      - {id: i1, type: physical, slot: 0}
  - id: n1
    label: r1
    node_definition: iosv
    x: 200
    y: 0
    interfaces:
      - {id: i0, type: physical, slot: 0}
links:
  - {id: l0, n1: n0, i1: i1, n2: n1, i2: i0}
"""


@pytest.fixture(params=VERSIONS)
async def simulator(request: pytest.FixtureRequest) -> AsyncIterator[Simulator]:
    options = Options(**{name: getattr(FAST, name) for name in FAST.__dataclass_fields__} | {"version": request.param})
    async with Simulator.run(options) as running:
        yield running


@contextlib.contextmanager
def connected(
    url: str, username: str = "admin", password: str = "admin-secret", *, raises: bool = True
) -> Iterator[ClientLibrary]:
    client = ClientLibrary(
        url,
        username,
        password,
        ssl_verify=False,
        allow_http=True,
        raise_for_auth_failure=raises,
        convergence_wait_time=0.02,
    )
    client.auto_sync_interval = 0.0
    try:
        yield client
    finally:
        client._session.close()


async def in_thread(work: Callable[[], None]) -> None:
    async with asyncio.timeout(60):
        await asyncio.to_thread(work)


async def test_a_lab_is_imported_started_stopped_wiped_and_removed(simulator: Simulator) -> None:
    """The life of a lab with the client's own waiting, at an instance's address."""

    def work() -> None:
        with connected(f"{simulator.url_of('i-0abc')}/") as client:
            assert client.is_system_ready()
            lab = client.import_lab(TOPOLOGY, title="renamed")
            lab.wait_time = 0.02
            assert (lab.title, lab.description, lab.notes) == ("renamed", "a pair", "for a test")
            assert lab.state() == "DEFINED_ON_CORE"
            assert [n.label for n in lab.find_nodes_by_tag("core")] == ["r0"]
            assert lab.get_node_by_label("r0").configuration == "hostname r0"
            assert lab.owner == "admin"
            lab.start(wait=True)
            assert lab.state() == "STARTED"
            assert {n.state for n in lab.nodes()} == {"BOOTED"}
            assert {k.state for k in lab.links()} == {"STARTED"}
            assert all(n.is_booted() for n in lab.nodes())
            lab.sync_statistics()
            assert lab.get_node_by_label("r0").statistics["cpu_usage"] > 0
            assert lab.sync_events() is True
            with pytest.raises(APIError):
                lab.remove()
            with pytest.raises(APIError):
                lab.wipe(wait=False)
            lab.stop(wait=True)
            assert lab.state() == "STOPPED"
            with pytest.raises(APIError):
                lab.remove()
            lab.wipe(wait=True)
            assert lab.state() == "DEFINED_ON_CORE"
            lab_id = lab.id
            lab.remove()
            assert client.get_lab_list(show_all=True) == []
            with pytest.raises(LabNotFound):
                client.join_existing_lab(lab_id)

    await in_thread(work)
    assert simulator.machine("i-0abc").labs == {}


async def test_labs_are_found_listed_and_downloaded(simulator: Simulator) -> None:
    """What the client reads: tiles by title, all labs, a download that imports again."""
    machine = simulator.machine()
    mine = machine.add_lab("wanted", nodes=3, running=True)
    student = machine.directory.named("student")
    assert student is not None
    machine.add_lab("another's", nodes=1, owner=student.id)

    def work() -> None:
        with connected(simulator.url) as client:
            assert [lab.id for lab in client.find_labs_by_title("wanted")] == [mine.id]
            assert {lab.title for lab in client.all_labs(show_all=True)} == {"wanted", "another's"}
            assert client.get_lab_list() == [mine.id]
            text = client.join_existing_lab(mine.id).download()
            again = client.import_lab(text, title="again")
            assert [n.label for n in again.nodes()] == ["r0", "r1", "r2"]
            assert len(again.links()) == 2
        with connected(simulator.url, "student", "student-secret") as client:
            assert [lab.title for lab in client.all_labs(show_all=True)] == ["another's"]
            with pytest.raises(LabNotFound):
                client.join_existing_lab(mine.id)

    await in_thread(work)


async def test_a_lab_is_built_piece_by_piece(simulator: Simulator) -> None:
    """Nodes, interfaces, links, conditions and properties through the client's objects."""

    def work() -> None:
        with connected(simulator.url) as client:
            lab = client.create_lab("built", description="d")
            lab.wait_time = 0.02
            a = lab.create_node("a", "iosv", 0, 0, wait=False)
            b = lab.create_node("b", "unmanaged_switch", 10, 10, populate_interfaces=True, wait=False)
            link = lab.connect_two_nodes(a, b)
            link.set_condition(bandwidth=1000, latency=5, loss=0, jitter=0)
            assert link.get_condition()["latency"] == 5
            link.remove_condition()
            a.label, a.ram = "aa", 1024
            lab.title, lab.notes = "rebuilt", "changed"
            lab.sync()
            assert (lab.title, lab.notes, lab.get_node_by_label("aa").ram) == ("rebuilt", "changed", 1024)
            a.start(wait=True)
            assert (a.state, lab.state()) == ("BOOTED", "STARTED")
            a.stop(wait=True)
            a.wipe(wait=True)
            lab.remove_link(link)
            lab.remove_node(a)
            assert [n.label for n in lab.nodes()] == ["b"]
            lab.remove()

    await in_thread(work)


async def test_licensing_goes_through_its_states(simulator: Simulator) -> None:
    def work() -> None:
        with connected(simulator.url) as client:
            licensing = client.licensing
            licensing.wait_interval = 0.02
            assert licensing.status()["registration"]["status"] == "NOT_REGISTERED"
            assert licensing.set_product_license("CML_Enterprise")
            assert licensing.set_default_transport()
            assert licensing.register_wait("a-token")
            assert licensing.status()["authorization"]["status"] == "IN_COMPLIANCE"
            assert client.get_system_health()["is_licensed"] is True
            with pytest.raises(APIError):
                licensing.register("a-token")
            assert licensing.register_renew()
            assert licensing.renew_authorization()
            assert licensing.deregister() == 204
            assert client.get_system_health()["is_licensed"] is False

    await in_thread(work)


async def test_people_computes_and_diagnostics_are_served(simulator: Simulator) -> None:
    def work() -> None:
        with connected(simulator.url) as client:
            user = client.user_management.create_user(username="eve", pwd="p", fullname="Eve")
            group = client.group_management.create_group(name="class", members=[user["id"]])
            assert client.group_management.get_group(group["id"])["members"] == [user["id"]]
            assert client.user_management.user_groups(user["id"]) == [group["id"]]
            client.group_management.delete_group(group["id"])
            client.user_management.delete_user(user["id"])
            (host,) = client.system_management.compute_hosts.values()
            assert host.is_connected
            assert client.system_management.get_web_session_timeout() == 3600
            categories = [c for c in DiagnosticsCategory if c.value not in ("all", "user_list")]
            found = client.get_diagnostics(*categories)
            assert [c for c, v in found.items() if isinstance(v, dict) and "error" in v] == []
            assert client.get_system_stats()["all"]["cpu"]["count"] == 48

    await in_thread(work)


async def test_wrong_credentials_are_refused_as_such(simulator: Simulator) -> None:
    """403, which the client does not take for an expired session."""

    def work() -> None:
        with connected(simulator.url, password="wrong", raises=False) as client:
            with pytest.raises(APIError) as refused:
                client.get_lab_list()
            assert refused.value.response.status_code == 403

    await in_thread(work)
    assert simulator.machine().counts["POST /authenticate"] == 2


async def test_an_expired_session_is_opened_again_by_the_client(simulator: Simulator) -> None:
    """A 401 in the middle makes the client log in once more."""
    machine = simulator.machine()

    def work() -> None:
        with connected(simulator.url) as client:
            machine.directory.close_sessions()
            assert client.get_lab_list() == []
            assert client.logout() is True

    await in_thread(work)
    assert machine.counts["POST /authenticate"] == 2


async def test_the_client_waits_for_a_machine_that_boots() -> None:
    """502 and `ready: false` are what its own readiness loop knows."""
    options = Options(boot_bad_gateway=0, boot_not_ready=0.3)
    async with Simulator.run(options) as simulator:

        def work() -> None:
            with connected(simulator.url) as client:
                assert not client.is_system_ready(sleep=0)
                fault = simulator.faults.add("html", path="/system_information", times=1)
                assert not client.is_system_ready(sleep=0)
                assert fault.hits == 1
                assert client.is_system_ready(wait=True, max_wait=20, sleep=0.05)

        await in_thread(work)


async def test_the_clients_event_channel_hears_node_states() -> None:
    """Its listener authenticates by the first frame and gets each change of state as it happens."""
    heard: list[tuple[str, str]] = []
    async with Simulator.run(FAST) as simulator:
        machine = simulator.machine()

        def work() -> None:
            with connected(simulator.url) as client:
                client.start_event_listening()
                listener = client.event_listener
                # Its own handler is known to fail on events of joined labs: only the channel is looked at.
                listener._event_handler.handle_event = lambda e: heard.append((e.type, e.subtype))
                # The channel is open before its first frame is read, and what is told in between is not repeated.
                asyncio.run(until(lambda: machine.listeners, "the channel is authenticated"))
                lab = client.create_lab("told")
                lab.wait_time = 0.02
                lab.create_node("a", "iosv", wait=False)
                lab.start(wait=True)
                lab.stop(wait=True)
                asyncio.run(until(lambda: ("state_change", "stopped") in heard, "the stop is told"))
                # When the client closes it waits ten seconds for itself; when the host goes down it does not.
                httpx.patch(f"{simulator.url}/_sim/instances/root", json={"powered": False}).raise_for_status()
                listener._thread.join()

        await in_thread(work)
        assert not machine.listeners
    states = [event for kind, event in heard if kind == "state_change"]
    assert states == ["queued", "started", "booted", "stopped"]
    assert ("lab_event", "created") in heard
    assert ("lab_element_event", "created") in heard
