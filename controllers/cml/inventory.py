"""The labs of one CML, in two calls, and the proof that lets a lab's absence mean something.

`list_labs` joins the tiles (all data in one call, eventually consistent) with `GET /labs?show_all`, the authority on
which labs exist; it asks for single labs only where a tile lacks. `read_inventory` adds the proof.
An inventory is complete when the ids came as one whole JSON array of well-formed ids, with 200, under a session that
CML called an admin's and whose identity was the expected one before, and is so after, the list. A token is accepted
only by the CML that signed it, so the same session before and after is that proof, without a request; after a
re-login the new session proves itself anew; and when labs came or went, CML is asked for its identity once more.
An error raises and never becomes an empty inventory. Called by the labs controller and by `find_labs_by_title`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controllers.cml.errors import (
    CmlBadAnswer,
    CmlError,
    CmlIdentityMismatch,
    CmlNotFound,
    CmlRefused,
)
from controllers.cml.models import Lab, is_lab_id

if TYPE_CHECKING:
    from controllers.cml.client import CmlClient

_CONCURRENCY = 8
_MAX_PROBES = 32
"""Missing labs asked for one by one; more at once is a case for the controller's half rule, not for short cuts."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What a session sees. `ids` are the authority; each has its data in `labs`, or a reason in `unread`."""

    ids: frozenset[str]
    labs: dict[str, Lab]
    gone: frozenset[str]
    """Ids that were listed, and for which CML answered 404 a moment later; in neither of the others."""
    malformed: int
    """How many items of the list were not ids of labs."""
    unread: dict[str, str]
    """Listed labs for which CML had no usable answer, with what it said: there, but nothing is known of them."""
    why_no_tiles: str = ""
    """Why every lab had to be asked for alone, if so."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """The labs of one CML, by id. Only a `complete` one says anything about labs that are not in it."""

    labs: dict[str, Lab]
    ids: frozenset[str]
    complete: bool
    why_incomplete: str = ""
    absent: frozenset[str] = field(default_factory=frozenset)
    """Ids for which CML itself answered 404 under the proven session; empty unless complete."""
    unread: dict[str, str] = field(default_factory=dict)
    """Listed labs whose data CML could not give, with its reason; they exist."""
    identity: str = ""
    why_no_tiles: str = ""


async def read_inventory(client: CmlClient, expected_identity: str | None, known: Collection[str] = ()) -> Inventory:
    """All labs of a CML, with the proof of completeness.

    `known` are the ids the caller has records of: those that the list lacks are asked for one by one (at most 32)
    and end up in `absent` on a 404. A steady cycle is two requests. Raises `CmlIdentityMismatch` and every other
    `CmlError`; never returns less than CML said.
    """
    session = client.session
    before = await client.proven_session()
    fresh = session is None or session.serial != before.serial or session.identity is None
    if expected_identity and before.identity != expected_identity.strip().lower():
        raise CmlIdentityMismatch(expected_identity, before.identity or "")
    listing = await client.list_labs()
    missing = sorted(i for i in set(known) - listing.ids - listing.gone if is_lab_id(i))
    absent, present = await _probe(client, missing[:_MAX_PROBES])
    # When labs came or went, or nothing is known of earlier, the cached proof is not enough: a copy of our CML may have
    # taken the address and believe the token, or the user may be no admin any more (CML then answers 403 here).
    earlier = client.last_complete
    doubt = bool(missing or listing.gone) or (not fresh if earlier is None else listing.ids != earlier)
    after = await client.proven_session(again=doubt)
    if after.identity != before.identity:
        raise CmlIdentityMismatch(before.identity or "", after.identity or "")
    why = _why_incomplete(
        (not expected_identity, "the worker's identity is not known yet"),
        (before.admin is not True or after.admin is not True, "the session is not proven to be an admin's"),
        # One re-login in between leaves two sessions, both proven; a third between them would be unproven.
        (after.serial - before.serial > 1, "the session changed more than once"),
        (listing.malformed > 0, f"{listing.malformed} items of the list are not ids of labs"),
        (bool(present), f"the list lacks {len(present)} labs that CML has"),
    )
    if not why:
        client.last_complete = listing.ids
    return Inventory(
        labs=listing.labs,
        ids=listing.ids,
        complete=not why,
        why_incomplete=why,
        absent=frozenset() if why else listing.gone | absent,
        unread=listing.unread,
        identity=after.identity or "",
        why_no_tiles=listing.why_no_tiles,
    )


async def list_labs(client: CmlClient) -> Listing:
    """Ids and data of every visible lab. Tiles come first, so that the ids are the newer of the two."""
    tiles: dict[str, Lab] = {}
    why_no_tiles = ""
    try:
        tiles = await client.tiles()
    except (CmlBadAnswer, CmlNotFound, CmlRefused) as error:
        why_no_tiles = str(error)
    answer = await client.lab_ids_answer(show_all=True)
    listed = answer.array()
    ids = frozenset(i for i in listed if is_lab_id(i))
    lone = await _fetch(client, sorted(ids - tiles.keys()))
    labs = {i: tiles[i] for i in ids if i in tiles} | lone.labs
    return Listing(
        ids=ids - lone.gone,
        labs=labs,
        gone=frozenset(lone.gone),
        malformed=sum(1 for i in listed if not is_lab_id(i)),
        unread={i: str(error) for i, error in lone.unread.items()},
        why_no_tiles=why_no_tiles,
    )


@dataclass(slots=True)
class _Lone:
    """Labs asked for alone: their data, the ids that CML answered with 404, and the labs it could not tell of."""

    labs: dict[str, Lab] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    unread: dict[str, CmlError] = field(default_factory=dict)


async def _probe(client: CmlClient, ids: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Ask for labs that should not exist: those that do not, and those that do. No usable answer raises: of a lab
    that is to be forgotten, doubt is worse than delay.
    """
    asked = await _fetch(client, ids)
    for error in asked.unread.values():
        raise error
    return frozenset(asked.gone), frozenset(asked.labs)


async def _fetch(client: CmlClient, ids: Iterable[str]) -> _Lone:
    """Ask for labs alone, a few at a time. One lab that CML stumbles over does not hide the others; the first error
    that is not of one lab ends it.
    """
    lone = _Lone()
    left = iter(ids)

    async def fetch_some() -> None:
        for lab_id in left:
            try:
                lone.labs[lab_id] = await client.lab(lab_id)
            except CmlNotFound:
                lone.gone.add(lab_id)
            except (CmlBadAnswer, CmlRefused) as error:
                lone.unread[lab_id] = error

    failed: CmlError | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_CONCURRENCY):
                group.create_task(fetch_some())
    except* CmlError as errors:
        failed = next(iter(_leaves(errors)))
    if failed is not None:
        raise failed
    return lone


def _leaves(group: BaseExceptionGroup[CmlError]) -> Iterable[CmlError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _why_incomplete(*rules: tuple[bool, str]) -> str:
    return "; ".join(why for broken, why in rules if broken)
