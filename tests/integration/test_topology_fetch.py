"""Topologies from a web server: one whole answer is taken; all else is told apart by whether asking again helps."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from controllers.cml.sessions import CmlSessions
from controllers.instances.cml_runtime import CmlRuntime
from controllers.instances.fetches import Fetches
from controllers.instances.kind import LabInstanceRequest, LabTemplate
from controllers.instances.runtime import NotNow, Prepared, Refused
from controllers.instances.settings import InstanceSettings
from controllers.instances.templates import load
from controllers.instances.topology import LARGEST, Topology
from controllers.workers.settings import WorkerSettings
from equipment.cml_instances_world import topology
from equipment.instances_scene import Outside, condition, instances_scene
from equipment.waiting import until
from lrm.controller import Context, Hints
from lrm.secrets import Secrets
from lrm.testing import VirtualClock


async def good(_: web.Request) -> web.Response:
    return web.Response(text="\ufeff" + topology(2))


async def moved(_: web.Request) -> web.Response:
    return web.Response(status=302, headers={"Location": "/labs/good"})


async def endless(request: web.Request) -> web.StreamResponse:
    """No length is told, so only counting helps; ends when the client has had enough."""
    response = web.StreamResponse()
    await response.prepare(request)
    while request.transport is not None and not request.transport.is_closing():
        await response.write(b"#" * 65536)
    return response


async def zipped(_: web.Request) -> web.Response:
    """Compressed although nobody asked for it: a thousand times smaller than what it unfolds to."""
    response = web.Response(body=b"#" * (LARGEST + 1))
    response.enable_compression(web.ContentCoding.gzip, strategy=0)
    return response


async def cut_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100000"})
    await response.prepare(request)
    await response.write(b"lab: ")
    if request.transport is not None:
        request.transport.abort()
    return response


async def latin(_: web.Request) -> web.Response:
    return web.Response(body=b"lab: \xe4")


def status(code: int) -> web.RouteDef:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=code)

    return web.get(f"/labs/{code}", answer)


@pytest.fixture
async def server() -> AsyncIterator[str]:
    """Base address of a server with good and bad answers below /labs/."""
    app = web.Application()
    app.add_routes([web.get(f"/labs/{f.__name__}", f) for f in (good, moved, endless, zipped, cut_off, latin)])
    app.add_routes([status(code) for code in (403, 404, 410, 429, 500, 503)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield "http://127.0.0.1:{1}".format(*runner.addresses[0])
    await runner.cleanup()


async def load_from(server: str, path: str) -> Topology:
    """As one request would; the clock stands still, so that nothing is late."""
    template = LabTemplate(topology_url=f"{server}/labs/{path}")
    async with Fetches(VirtualClock(), Hints()) as fetches:
        settings = InstanceSettings(topology_urls=(f"{server}/labs/",))
        return await load(template, settings, lambda url: fetches.text(url, "uid", ("default", "a")))


async def test_a_topology_is_taken_from_an_address_that_is_listed(server: str) -> None:
    read = await load_from(server, "good")
    assert read.nodes == 2


@pytest.mark.parametrize(
    ("path", "reason", "told"),
    [
        pytest.param("404", "TemplateNotFound", "answers 404", id="nothing there"),
        pytest.param("410", "TemplateNotFound", "answers 410", id="nothing there any more"),
        pytest.param("403", "TemplateInvalid", "answers 403", id="no credentials are sent"),
        pytest.param("moved", "TemplateInvalid", "redirects are not followed", id="a way around the list"),
        pytest.param("endless", "TemplateInvalid", "more than 524288 bytes", id="no end"),
        pytest.param("zipped", "TemplateInvalid", "more than 524288 bytes", id="small until it is unpacked"),
        pytest.param("latin", "TemplateInvalid", "not UTF-8", id="no text"),
    ],
)
async def test_an_answer_that_will_not_do_is_refused(server: str, path: str, reason: str, told: str) -> None:
    with pytest.raises(Refused, match=told) as refused:
        await load_from(server, path)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("429", "the server answers 429"),
        ("500", "the server answers 500"),
        ("503", "the server answers 503"),
        ("cut_off", "the answer broke off"),
    ],
)
async def test_a_server_in_trouble_is_asked_again_and_its_trouble_told(server: str, path: str, told: str) -> None:
    with pytest.raises(NotNow, match=f"^{server}/labs/{path}: {told}") as trouble:
        await load_from(server, path)
    assert trouble.value.reason == "TopologyUnavailable"


async def test_a_server_that_is_away_is_asked_again() -> None:
    """Nobody listens on that port: nothing is concluded about the template."""
    with pytest.raises(NotNow, match=r"lab\.yaml: no connection to the server: \S") as trouble:
        await load_from("http://127.0.0.1:9", "lab.yaml")
    assert trouble.value.reason == "TopologyUnavailable"


# Many at once


class Held:
    """A server whose answers a test lets go: each has the number of its request, over all addresses."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        """Paths, in order."""
        self.inside = 0
        self.most = 0
        """That were inside at the same time."""
        self.let_go = asyncio.Event()
        self.address = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        number, let_go = len(self.asked), self.let_go
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await let_go.wait()
        finally:
            self.inside -= 1
        return web.Response(text=f"answer {number}")


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    server = Held()
    app = web.Application()
    app.router.add_get("/{name}", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.address = "http://127.0.0.1:{1}".format(*runner.addresses[0])
    yield server
    server.let_go.set()
    await runner.cleanup()


class Askers:
    """Requests that want a text, as the controller asks for them: at once, and again when they are woken."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.hints = Hints()
        self.woken: list[str] = []
        self.hints.listen(lambda key: self.woken.append(key[1]))
        self.fetches = Fetches(clock, self.hints)

    def ask(self, url: str, name: str) -> asyncio.Task[str]:
        return asyncio.create_task(self.fetches.text(url, name, ("default", name)))

    async def not_now(self, url: str, name: str) -> NotNow:
        asked = self.ask(url, name)
        await self.clock.advance(1)
        with pytest.raises(NotNow) as error:
            await asked
        return error.value


@pytest.fixture
async def askers() -> AsyncIterator[Askers]:
    them = Askers(VirtualClock())
    async with them.fetches:
        yield them


async def test_those_who_want_the_same_share_a_fetch_that_began_after_they_asked(held: Held, askers: Askers) -> None:
    url = f"{held.address}/a"
    assert (await askers.not_now(url, "first")).reason == "Preparing"
    await until(lambda: held.asked == ["/a"])
    for late in ("second", "third"):
        await askers.not_now(url, late)
    await askers.not_now(url, "first")
    assert len(held.asked) == 1, "one at a time"
    first, held.let_go = held.let_go, asyncio.Event()
    first.set()
    await until(lambda: held.inside == 1 and len(held.asked) == 2)
    assert askers.woken == ["first"]
    assert (await askers.not_now(url, "second")).reason == "Preparing", "not an answer from before it asked"
    assert await askers.ask(url, "first") == "answer 1"
    held.let_go.set()
    await until(lambda: sorted(askers.woken) == ["first", "second", "third"])
    assert [await askers.ask(url, late) for late in ("second", "third")] == ["answer 2"] * 2
    assert await askers.ask(url, "first") == "answer 3", "what was taken is not given again"


async def test_a_text_that_nobody_took_within_a_minute_is_dropped(held: Held, askers: Askers) -> None:
    url = f"{held.address}/a"
    await askers.not_now(url, "first")
    held.let_go.set()
    await until(lambda: askers.woken == ["first"])
    await askers.clock.advance(60)
    assert await askers.ask(url, "first") == "answer 2"


async def test_of_one_server_four_are_fetched_at_a_time_and_another_answers_meanwhile(
    held: Held, server: str, askers: Askers
) -> None:
    names = [str(n) for n in range(12)]
    asked = {name: askers.ask(f"{held.address}/{name}", name) for name in names}
    await until(lambda: held.inside == 4)
    await askers.clock.advance(1)
    results = await asyncio.gather(*asked.values(), return_exceptions=True)
    assert all(isinstance(result, NotNow) for result in results)
    elsewhere = server.replace("127.0.0.1", "localhost")
    assert "node_definition" in await askers.ask(f"{elsewhere}/labs/good", "elsewhere")
    held.let_go.set()
    await until(lambda: sorted(askers.woken) == sorted(names))
    assert held.most == 4
    assert sorted(held.asked) == sorted(f"/{name}" for name in names)
    assert len({await askers.ask(f"{held.address}/{name}", name) for name in names}) == 12


async def test_what_a_server_cannot_give_now_is_told_to_all_until_it_is_asked_again(held: Held, askers: Askers) -> None:
    url = f"{held.address}/a"
    await askers.not_now(url, "first")
    await until(lambda: held.inside == 1)
    await askers.not_now(url, "second")
    await askers.clock.advance(20)
    await until(lambda: sorted(askers.woken) == ["first", "second"])
    for name in ("first", "second", "third"):
        told = await askers.not_now(url, name)
        assert (told.reason, str(told)) == ("TopologyUnavailable", f"{url}: no whole answer within 20 s")
    assert (len(held.asked), 25 < told.again <= 30) == (1, True)
    await askers.clock.advance(30)
    told = await askers.not_now(url, "first")
    assert str(told) == f"{url}: no whole answer within 20 s", "while it is tried again, nothing else is known"
    await until(lambda: len(held.asked) == 2)
    held.let_go.set()
    await until(lambda: askers.woken.count("first") == 2)
    assert await askers.ask(url, "first") == "answer 2"


class Reading(Outside):
    """Reads topologies as CML's runtime does; all else is played."""

    def __init__(self, cml: CmlRuntime) -> None:
        super().__init__()
        self._cml = cml

    async def prepare(self, request: LabInstanceRequest, ctx: Context) -> Prepared:
        runtime = self._cml if request.spec.runs_in == "CML" else super()
        return await runtime.prepare(request, ctx)


async def test_a_server_that_hangs_holds_up_only_those_who_want_something_of_it() -> None:
    """It takes connections and never says a word; two hundred want something of it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:{1}/lab.yaml".format(*silent.getsockname())
        async with instances_scene(slots={"w1": 1000}, lead=False, topology_urls=(url,)) as scene:
            sessions = CmlSessions(WorkerSettings(), Secrets(()), scene.clock)
            async with sessions, Fetches(scene.clock, scene.hints) as fetches:
                cml = CmlRuntime(
                    scene.cache, sessions, scene.settings, fetches=fetches, installation="lrm-1", late_import=60
                )
                scene.outside = Reading(cml)
                await scene.lead()
                await scene.make("before")
                await scene.until_phase("Running", "before", seconds=5)
                for n in range(200):
                    await scene.make(f"hung{n}", labTemplate={"topologyUrl": url})
                await scene.make("good")
                await scene.change("before", desired_phase="Stopped")
                await scene.until_phase("Running", "good", seconds=5)
                await scene.until_phase("Completed", "before", seconds=5)
                await scene.clock.advance(25)

                async def all_told() -> bool:
                    await scene.clock.settle()
                    hung = [await scene.get(f"hung{n}") for n in range(200)]
                    return {condition(request, "Ready") for request in hung} == {("False", "TopologyUnavailable")}

                await until(all_told, "everybody is told what the trouble is")
                told = [(kind, reason) for kind, reason, _ in await scene.told("hung199")]
                assert told == [("Normal", "Preparing"), ("Warning", "TopologyUnavailable")]
                await scene.stop()
