"""What plug-ins bring to the API beside kinds: admission of what people store, and reads of the outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import web

from equipment.api import Served, Telescope, path_of, served, telescope
from lrm.api.call import Api
from lrm.errors import Cause, Forbidden
from lrm.offers import Offers
from storage.memory import MemoryStorage

WIDEST = 300


def admit(new: Telescope, old: Telescope | None) -> Iterator[Cause | str]:
    """A site's own limits."""
    if old is None and new.spec.site == "closed":
        raise Forbidden("exceeded quota: the site is closed")
    if new.spec.mirror.diameter_cm > WIDEST:
        yield Cause("spec.mirror.diameterCm", "FieldValueInvalid", f"at most {WIDEST} here")
    if not new.spec.tracking:
        yield "it will not follow the sky"


class Camera:
    """Something that a plug-in has open."""

    def picture(self) -> str:
        return "stars"


def add_camera(app: web.Application, api: Api) -> None:
    async def picture(_request: web.Request) -> web.Response:
        return web.json_response({"shows": api.offers.get(Camera).picture()})

    app.router.add_get("/api/camera", picture)


@pytest.fixture
async def api() -> AsyncIterator[Served]:
    async with served(MemoryStorage(), admission={Telescope: admit}, offers=Offers(), routes=(add_camera,)) as it:
        yield it


async def test_what_admission_refuses_is_refused_with_its_field_however_it_is_written(api: Served) -> None:
    wide = telescope("wide")
    wide["spec"]["mirror"]["diameterCm"] = 301
    answer = await api.post(path_of(), wide)
    assert (answer.status, list(answer.causes)) == (422, ["spec.mirror.diameterCm"])
    await api.make("small")
    answer = await api.merge(path_of("small"), {"spec": {"mirror": {"diameterCm": 301}}})
    assert (answer.status, list(answer.causes)) == (422, ["spec.mirror.diameterCm"])
    wide["metadata"]["name"] = "small"
    answer = await api.call("PUT", path_of("small"), wide)
    assert (answer.status, list(answer.causes)) == (422, ["spec.mirror.diameterCm"])
    answer = await api.post("/apis/astro.example.io/v1", wide)
    assert (answer.status, list(answer.causes)) == (422, ["[0].spec.mirror.diameterCm"])
    assert (await api.get(path_of("small"))).body["spec"]["mirror"]["diameterCm"] <= WIDEST


async def test_admission_may_forbid_what_is_right_in_form(api: Served) -> None:
    answer = await api.post(path_of(), telescope("late", site="closed"))
    assert (answer.status, answer.body["reason"]) == (403, "Forbidden")
    assert "exceeded quota" in answer.body["message"]


async def test_what_admission_only_remarks_is_a_warning(api: Served) -> None:
    answer = await api.post(path_of(), telescope("still"))
    assert answer.status == 201
    assert any("it will not follow the sky" in w for w in answer.warnings)


async def test_the_outside_is_read_only_while_a_plug_in_has_it_open(api: Served) -> None:
    closed = await api.get("/api/camera")
    assert (closed.status, closed.body["reason"]) == (503, "ServiceUnavailable")
    with api.api.offers.offering(Camera()):
        assert (await api.get("/api/camera")).body == {"shows": "stars"}
        with pytest.raises(ValueError, match="already"), api.api.offers.offering(Camera()):
            pass
        assert (await api.get("/api/camera")).status == 200, "a second one takes nothing away from the first"
    assert (await api.get("/api/camera")).status == 503
