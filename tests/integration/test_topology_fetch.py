"""Topologies from a web server: one whole answer is taken; all else is told apart by whether asking again helps."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from controllers.instances.kind import LabTemplate
from controllers.instances.runtime import NotNow, Refused
from controllers.instances.settings import InstanceSettings
from controllers.instances.templates import load
from controllers.instances.topology import LARGEST
from equipment.cml_instances_world import topology
from storage.clock import SystemClock


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


def template(server: str, path: str) -> tuple[LabTemplate, InstanceSettings]:
    return LabTemplate(topology_url=f"{server}/labs/{path}"), InstanceSettings(topology_urls=(f"{server}/labs/",))


async def test_a_topology_is_taken_from_an_address_that_is_listed(server: str) -> None:
    read = await load(*template(server, "good"), SystemClock())
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
        await load(*template(server, path), SystemClock())
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
        await load(*template(server, path), SystemClock())
    assert trouble.value.reason == "TopologyUnavailable"
