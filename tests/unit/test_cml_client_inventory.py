"""The listing of labs and its proof: two requests when all is well, and no completeness without evidence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from controllers.cml.client import CmlClient, Credentials
from controllers.cml.errors import (
    CmlBadAnswer,
    CmlError,
    CmlForbidden,
    CmlIdentityMismatch,
    CmlNotReady,
    CmlUnavailable,
    CmlUnreachable,
)
from controllers.cml.inventory import read_inventory
from equipment.scripted_cml import IDENTITY, PASSWORD, USERNAME, ScriptedCml, cut_off, hang_up, page, refusal, silence
from equipment.waiting import until

OTHER = "564d4a4c-0000-4000-8000-00000000000b"
STEADY = ["GET /populate_lab_tiles", "GET /labs"]


def lab_id(number: int) -> str:
    return f"90f84e38-a71c-4d57-8d90-{number:012x}"


def tile(number: int, **more: Any) -> dict[str, Any]:
    return {"id": lab_id(number), "lab_title": f"lab {number}", "state": "STOPPED", "node_count": 2} | more


def populate(cml: ScriptedCml, *numbers: int) -> None:
    """Have these labs, in every place where CML shows labs."""
    cml.on("GET", "/populate_lab_tiles", web.json_response({"lab_tiles": {lab_id(n): tile(n) for n in numbers}}))
    cml.on("GET", "/labs", web.json_response([lab_id(n) for n in numbers]))


def have(cml: ScriptedCml, *numbers: int) -> None:
    """Answer for these labs one by one."""
    for number in numbers:
        cml.on("GET", f"/labs/{lab_id(number)}", web.json_response(tile(number, lab_notes="alone")))


@pytest.fixture
async def cml() -> AsyncIterator[ScriptedCml]:
    async with ScriptedCml.run() as server:
        yield server


@pytest.fixture
async def client(cml: ScriptedCml) -> AsyncIterator[CmlClient]:
    async with CmlClient(cml.url, Credentials(USERNAME, PASSWORD), jitter=lambda: 0.0) as made:
        yield made


async def test_a_steady_cycle_is_two_requests_and_complete(cml: ScriptedCml, client: CmlClient) -> None:
    populate(cml, 1, 2, 3)
    first = await read_inventory(client, IDENTITY)
    assert cml.paths() == ["POST /auth_extended", "GET /licensing", *STEADY]
    cml.seen.clear()
    known = first.ids
    for _ in range(3):
        inventory = await read_inventory(client, IDENTITY, known)
        assert inventory.complete, inventory.why_incomplete
        assert inventory.ids == known == {lab_id(n) for n in (1, 2, 3)}
        assert inventory.labs[lab_id(2)].title == "lab 2"
    assert cml.paths() == STEADY * 3
    assert cml.seen[1].query == {"show_all": "true"}


async def test_an_empty_cml_of_the_right_identity_is_a_complete_inventory(cml: ScriptedCml, client: CmlClient) -> None:
    inventory = await read_inventory(client, IDENTITY)
    assert (inventory.complete, inventory.labs) == (True, {})


@pytest.mark.parametrize(
    ("tiles", "why"),
    [
        (refusal(404, "no such operation"), "a version without tiles"),
        (page(404), "a front server without tiles"),
        (refusal(400, "no"), "a refusal"),
        (refusal(500, "broken"), "an error"),
        (web.json_response([1, 2]), "a list of something"),
        (web.json_response({"lab_tiles": 5}), "a number"),
        (web.json_response({"lab_tiles": {lab_id(1): None, lab_id(2): {"id": lab_id(2)}}}), "tiles without data"),
        (web.json_response({"lab_tiles": {lab_id(1): tile(2), lab_id(2): tile(1)}}), "tiles of other labs"),
        (web.Response(text='{"lab_tiles": {'), "half a JSON"),
        (cut_off, "a body cut off"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
async def test_without_usable_tiles_each_lab_is_asked_for_alone(
    cml: ScriptedCml, client: CmlClient, tiles: Any, why: str
) -> None:
    populate(cml, 1, 2)
    have(cml, 1, 2)
    cml.on("GET", "/populate_lab_tiles", tiles)
    inventory = await read_inventory(client, IDENTITY)
    assert inventory.complete
    assert {lab.notes for lab in inventory.labs.values()} == {"alone"}, why
    assert len(inventory.labs) == 2


async def test_tiles_without_their_wrapper_and_as_a_list_are_read_too(cml: ScriptedCml, client: CmlClient) -> None:
    populate(cml, 1)
    for tiles in ({lab_id(1): tile(1)}, {"lab_tiles": [tile(1)]}):
        cml.on("GET", "/populate_lab_tiles", web.json_response(tiles))
        assert (await read_inventory(client, IDENTITY)).labs[lab_id(1)].title == "lab 1"
    assert cml.count("GET", f"/labs/{lab_id(1)}") == 0


async def test_the_ids_decide_and_tiles_only_describe(cml: ScriptedCml, client: CmlClient) -> None:
    populate(cml, 1, 2)
    have(cml, 3)
    cml.on("GET", "/labs", web.json_response([lab_id(2), lab_id(3)]))
    inventory = await read_inventory(client, IDENTITY)
    assert inventory.ids == inventory.labs.keys() == {lab_id(2), lab_id(3)}
    assert inventory.labs[lab_id(3)].notes == "alone"


async def test_a_listed_lab_that_is_gone_a_moment_later_is_proven_absent(cml: ScriptedCml, client: CmlClient) -> None:
    populate(cml, 1)
    cml.on("GET", "/labs", web.json_response([lab_id(1), lab_id(2)]))
    cml.on("GET", f"/labs/{lab_id(2)}", refusal(404, f"Lab not found: {lab_id(2)}"))
    inventory = await read_inventory(client, IDENTITY, {lab_id(1), lab_id(2)})
    assert inventory.complete
    assert inventory.ids == {lab_id(1)}
    assert inventory.absent == {lab_id(2)}


async def test_a_known_lab_that_the_list_lacks_is_asked_for_and_the_identity_with_it(
    cml: ScriptedCml, client: CmlClient
) -> None:
    populate(cml, 1, 2)
    await read_inventory(client, IDENTITY)
    populate(cml, 1)
    cml.on("GET", f"/labs/{lab_id(2)}", refusal(404, f"Lab not found: {lab_id(2)}"))
    cml.seen.clear()
    inventory = await read_inventory(client, IDENTITY, {lab_id(1), lab_id(2)})
    assert inventory.complete
    assert inventory.absent == {lab_id(2)}
    assert cml.paths() == [*STEADY, f"GET /labs/{lab_id(2)}", "GET /licensing"]


async def test_a_list_that_lacks_a_lab_which_cml_has_is_not_complete(cml: ScriptedCml, client: CmlClient) -> None:
    populate(cml, 1)
    have(cml, 2)
    cml.on("GET", f"/labs/{lab_id(3)}", refusal(404, "Lab not found"))
    inventory = await read_inventory(client, IDENTITY, {lab_id(n) for n in (1, 2, 3)})
    assert not inventory.complete
    assert "lacks 1 labs that CML has" in inventory.why_incomplete
    assert inventory.absent == frozenset()


async def test_a_front_servers_404_for_a_missing_lab_proves_nothing(cml: ScriptedCml, client: CmlClient) -> None:
    cml.on("GET", f"/labs/{lab_id(1)}", page(404))
    with pytest.raises(CmlBadAnswer):
        await read_inventory(client, IDENTITY, {lab_id(1)})


async def test_only_so_many_missing_labs_are_asked_for_one_by_one(cml: ScriptedCml, client: CmlClient) -> None:
    inventory = await read_inventory(client, IDENTITY, {lab_id(n) for n in range(500)})
    assert inventory.complete
    assert len(inventory.absent) == 32
    assert len([p for p in cml.paths() if p.startswith("GET /labs/")]) == 32


@pytest.mark.parametrize(
    ("listed", "why"),
    [
        ([lab_id(1), 7], "items of the list are not ids"),
        ([lab_id(1), "not-an-id"], "items of the list are not ids"),
        ([lab_id(1), lab_id(1).upper()], "items of the list are not ids"),
        ([lab_id(1), None], "items of the list are not ids"),
    ],
)
async def test_a_list_with_something_malformed_in_it_is_not_complete(
    cml: ScriptedCml, client: CmlClient, listed: Any, why: str
) -> None:
    populate(cml, 1)
    cml.on("GET", "/labs", web.json_response(listed))
    inventory = await read_inventory(client, IDENTITY)
    assert not inventory.complete
    assert why in inventory.why_incomplete
    assert inventory.ids == {lab_id(1)}


@pytest.mark.parametrize("admin", [False, None])
async def test_the_list_of_a_session_not_proven_to_be_an_admins_is_not_complete(
    cml: ScriptedCml, client: CmlClient, admin: bool | None
) -> None:
    cml.admin = admin
    inventory = await read_inventory(client, IDENTITY, {lab_id(1)})
    assert not inventory.complete
    assert "admin" in inventory.why_incomplete
    assert inventory.absent == frozenset()


async def test_without_an_expected_identity_no_inventory_is_complete(cml: ScriptedCml, client: CmlClient) -> None:
    inventory = await read_inventory(client, None)
    assert not inventory.complete
    assert "identity is not known" in inventory.why_incomplete
    assert inventory.identity == IDENTITY


async def test_another_identity_before_the_list_raises_and_nothing_is_listed(
    cml: ScriptedCml, client: CmlClient
) -> None:
    with pytest.raises(CmlIdentityMismatch):
        await read_inventory(client, OTHER)
    assert cml.count("GET", "/labs") == 0


async def test_a_cml_that_takes_the_address_in_the_middle_and_refuses_the_token_is_noticed(
    cml: ScriptedCml, client: CmlClient
) -> None:
    populate(cml, 1, 2)
    await read_inventory(client, IDENTITY)

    async def changed(_: web.Request) -> web.StreamResponse:
        cml.identity = OTHER
        cml.expire_tokens()
        cml.on("GET", "/labs", web.json_response([]))
        return refusal(401, "unknown token")

    cml.on("GET", "/labs", changed)
    with pytest.raises(CmlIdentityMismatch):
        await read_inventory(client, IDENTITY, {lab_id(1), lab_id(2)})


@pytest.mark.parametrize("known", [(1, 2), ()], ids=["with records", "without"])
async def test_a_cml_that_takes_the_address_and_believes_the_token_is_noticed_by_what_it_lacks(
    cml: ScriptedCml, client: CmlClient, known: tuple[int, ...]
) -> None:
    populate(cml, 1, 2)
    await read_inventory(client, IDENTITY)
    populate(cml, 3)
    for number in (1, 2):
        cml.on("GET", f"/labs/{lab_id(number)}", refusal(404, "Lab not found"))
    cml.identity = OTHER
    with pytest.raises(CmlIdentityMismatch):
        await read_inventory(client, IDENTITY, {lab_id(n) for n in known})


async def test_the_labs_of_a_copy_that_takes_the_address_of_an_empty_cml_are_not_taken_for_its_own(
    cml: ScriptedCml, client: CmlClient
) -> None:
    await read_inventory(client, IDENTITY)
    populate(cml, 1)
    cml.identity = OTHER
    with pytest.raises(CmlIdentityMismatch):
        await read_inventory(client, IDENTITY)


async def test_a_user_who_is_no_admin_any_more_is_noticed_by_what_the_list_lacks(
    cml: ScriptedCml, client: CmlClient
) -> None:
    populate(cml, 1, 2)
    await read_inventory(client, IDENTITY)
    populate(cml, 1)
    cml.on("GET", "/licensing", refusal(403, "admins only"))
    with pytest.raises(CmlForbidden):
        await read_inventory(client, IDENTITY)


async def test_a_session_used_for_other_things_before_proves_itself_again_at_the_first_list(
    cml: ScriptedCml, client: CmlClient
) -> None:
    await client.identity()
    cml.identity = OTHER
    with pytest.raises(CmlIdentityMismatch):
        await read_inventory(client, IDENTITY)


async def test_a_login_in_the_middle_proves_itself_anew_and_the_inventory_stays_complete(
    cml: ScriptedCml, client: CmlClient
) -> None:
    populate(cml, 1)
    await read_inventory(client, IDENTITY)
    cml.on("GET", "/labs", refusal(401, "expired"), web.json_response([lab_id(1)]))
    cml.seen.clear()
    inventory = await read_inventory(client, IDENTITY, {lab_id(1)})
    assert inventory.complete
    assert cml.paths() == [*STEADY, "POST /auth_extended", "GET /labs", "GET /licensing"]


async def test_two_logins_in_the_middle_leave_a_session_unproven_and_the_inventory_incomplete(
    cml: ScriptedCml, client: CmlClient
) -> None:
    populate(cml, 1)
    await read_inventory(client, IDENTITY)
    cml.on("GET", "/populate_lab_tiles", refusal(401, "expired"), web.json_response({"lab_tiles": {}}))
    cml.on("GET", "/labs", refusal(401, "expired"), web.json_response([]))
    inventory = await read_inventory(client, IDENTITY)
    assert not inventory.complete
    assert "changed more than once" in inventory.why_incomplete


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (page(502), CmlNotReady),
        (refusal(500, "broken"), CmlBadAnswer),
        (refusal(403, "no"), CmlForbidden),
        (web.Response(text="[]]"), CmlBadAnswer),
        (web.json_response({}), CmlBadAnswer),
        (web.json_response(None), CmlBadAnswer),
        (cut_off, CmlBadAnswer),
        (hang_up, CmlUnreachable),
        (page(200), CmlBadAnswer),
    ],
    ids=["502", "500", "403", "more than JSON", "object", "null", "cut off", "hang up", "HTML"],
)
@pytest.mark.parametrize("path", ["/labs", f"/labs/{lab_id(2)}", "/licensing"])
async def test_an_error_anywhere_raises_and_never_becomes_an_inventory(
    cml: ScriptedCml, client: CmlClient, path: str, fault: Any, error: type[CmlError]
) -> None:
    """Even of a single lab: the list lacks one that is known, and nothing can be learned about it."""
    populate(cml, 1)
    cml.on("GET", path, fault)
    with pytest.raises(error):
        await read_inventory(client, IDENTITY, {lab_id(1), lab_id(2)})


@pytest.mark.parametrize(
    "fault", [refusal(500, "broken"), refusal(400, "no"), page(200), cut_off], ids=["500", "400", "HTML", "cut off"]
)
async def test_a_listed_lab_that_cml_stumbles_over_does_not_hide_the_others(
    cml: ScriptedCml, client: CmlClient, fault: Any
) -> None:
    """Its tile is lacking and its details too: it exists, which is all that is known, and the list is complete."""
    populate(cml, 1)
    cml.on("GET", "/labs", web.json_response([lab_id(1), lab_id(2)]))
    cml.on("GET", f"/labs/{lab_id(2)}", fault)
    inventory = await read_inventory(client, IDENTITY, {lab_id(1), lab_id(2)})
    assert inventory.complete
    assert inventory.ids == {lab_id(1), lab_id(2)}
    assert (set(inventory.labs), set(inventory.unread)) == ({lab_id(1)}, {lab_id(2)})
    with pytest.raises(CmlBadAnswer):
        await client.find_labs_by_title("whatever: it could be that one's")


@pytest.mark.parametrize("fault", [page(502), hang_up], ids=["502", "hang up"])
async def test_a_cml_that_goes_away_while_single_labs_are_asked_for_raises(
    cml: ScriptedCml, client: CmlClient, fault: Any
) -> None:
    populate(cml, 1)
    cml.on("GET", "/labs", web.json_response([lab_id(1), lab_id(2)]))
    cml.on("GET", f"/labs/{lab_id(2)}", fault)
    with pytest.raises(CmlUnavailable):
        await read_inventory(client, IDENTITY)


async def test_at_most_eight_labs_are_asked_for_at_once(cml: ScriptedCml, client: CmlClient) -> None:
    numbers = range(40)
    now = most = 0

    def one(number: int) -> Any:
        async def answer(_: web.Request) -> web.StreamResponse:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.005)
            now -= 1
            return web.json_response(tile(number))

        return answer

    cml.on("GET", "/labs", web.json_response([lab_id(n) for n in numbers]))
    for number in numbers:
        cml.on("GET", f"/labs/{lab_id(number)}", one(number))
    inventory = await read_inventory(client, IDENTITY)
    assert len(inventory.labs) == 40
    assert 2 <= most <= 8


async def test_cancelling_an_inventory_in_the_middle_leaves_no_task_and_no_connection(
    cml: ScriptedCml, client: CmlClient
) -> None:
    numbers = range(20)
    cml.on("GET", "/labs", web.json_response([lab_id(n) for n in numbers]))
    for number in numbers:
        cml.on("GET", f"/labs/{lab_id(number)}", silence)
    before = asyncio.all_tasks()
    task = asyncio.create_task(read_inventory(client, IDENTITY))
    await until(lambda: sum(p.startswith("GET /labs/") for p in cml.paths()) == 8)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: cml.open_connections == 0)
    assert not [t for t in asyncio.all_tasks() - before if "RequestHandler" not in repr(t)]


async def test_labs_are_found_by_exact_title_even_if_their_tiles_are_late(cml: ScriptedCml, client: CmlClient) -> None:
    populate(cml, 1, 2)
    cml.on("GET", "/labs", web.json_response([lab_id(n) for n in (1, 2, 3)]))
    cml.on("GET", f"/labs/{lab_id(3)}", web.json_response(tile(3, lab_title="lab 2")))
    assert {lab.id for lab in await client.find_labs_by_title("lab 2")} == {lab_id(2), lab_id(3)}
    assert await client.find_labs_by_title("lab") == ()
    cml.on("GET", "/labs", page(502))
    with pytest.raises(CmlNotReady):
        await client.find_labs_by_title("lab 2")
