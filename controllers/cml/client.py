"""The CML client: one object per worker, safe for concurrent use, closed by whoever made it.

Promises a deadline on every call; retries (three tries) for reads alone; one replay after a 401, which was never
carried out; `CmlOutcomeUnknown` whenever a creating call may have been carried out without a usable answer; nothing
sent to a CML of another identity than the expected one. Keep the object as long as the worker: the login throttle,
the pinned leaf and the circuit breaker live in it. Does not wait for labs to settle: controllers look again.
"""

from __future__ import annotations

import asyncio
import enum
import random
import re
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

import orjson

from controllers.cml.answers import Answer
from controllers.cml.breaker import Breaker
from controllers.cml.calls import Caller, Timeouts
from controllers.cml.errors import CmlBadAnswer, CmlInvalid, CmlOutcomeUnknown, CmlRefused
from controllers.cml.inventory import Listing, list_labs
from controllers.cml.models import (
    ImportResult,
    Lab,
    Licensing,
    NodeState,
    SystemHealth,
    SystemInformation,
    SystemStats,
    TelemetryEvent,
    is_lab_id,
)
from controllers.cml.push import PushChannel
from controllers.cml.session import Credentials, Session, Sessions
from controllers.cml.tls import TlsPolicy
from controllers.cml.transport import Message, Transport, base_of
from storage.clock import Clock, SystemClock

__all__ = ["CmlClient", "Credentials", "Deregistration", "Timeouts", "TlsPolicy", "is_lab_id"]

_LONGEST_TITLE = 64
_AT_A_TIME = 200
"""Tiles that are read before anything else gets its turn: some five milliseconds."""
_LONGEST_HISTORY = 8 * 1024 * 1024
"""Bytes of telemetry that are read: some 50,000 events. JSON is parsed in one piece, which nothing can interrupt."""


class Deregistration(enum.Enum):
    """How a deregistration ended."""

    DONE = "done"
    SEAT_LEAKED = "seat-leaked"
    """Gone here, but Smart Licensing could not be reached: the seat stays taken there."""
    ALREADY = "already"
    """There was no registration to end."""


class CmlClient:
    """Everything lrm asks of one CML. No I/O before the first call."""

    def __init__(
        self,
        base_url: str,
        credentials: Credentials,
        *,
        tls: TlsPolicy | None = None,
        clock: Clock | None = None,
        allow_plain_http: bool = False,
        expected_identity: str | None = None,
        timeouts: Timeouts | None = None,
        breaker_threshold: int = 5,
        breaker_cool_down: float = 10.0,
        max_body: int = 64 * 1024 * 1024,
        jitter: Callable[[], float] = random.random,
        turned: Callable[[], None] = lambda: None,
    ) -> None:
        """`turned` is called when the CML was unreachable so often that calls fail fast, and when it answers again."""
        self._base = base_of(base_url, allow_plain_http=allow_plain_http)
        self._clock = clock = clock or SystemClock()
        timeouts = timeouts or Timeouts()
        breaker = Breaker(clock, threshold=breaker_threshold, cool_down=breaker_cool_down, turned=turned)
        self._transport = Transport(
            self._base, tls or TlsPolicy(), breaker, connect_timeout=timeouts.connect, max_body=max_body
        )
        self._sessions = Sessions(self._transport, credentials, clock, login_timeout=timeouts.attempt)
        self._sessions.expect(expected_identity)
        self.last_complete: frozenset[str] | None = None
        """Ids of the last complete inventory: what came or went since makes the next one prove itself again."""
        self._calls = Caller(self._transport, self._sessions, clock, timeouts, jitter)
        self._push = PushChannel(self._base, self._transport, self._sessions, clock, open_timeout=timeouts.read)

    def __repr__(self) -> str:
        return f"<CmlClient {self._base}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections and forget the session; calls under way end with `CmlClosed`. May be repeated."""
        self._calls.close()
        self._sessions.close()
        await self._push.aclose()
        await self._transport.aclose()

    # Who is there

    @property
    def session(self) -> Session | None:
        """The current login, None before the first and after a refusal; `session.admin` is True, False or None."""
        return self._sessions.current

    @property
    def failed_at(self) -> float:
        """When the CML was last found unreachable, monotonic, by whichever call; -inf before the first."""
        return self._transport.failed_at

    @property
    def peer_fingerprint(self) -> str | None:
        """sha256 of the leaf certificate last let through; None over plain http and before the first handshake.

        Record it once `session` is there: before the first login a booting CML may still change its certificate.
        """
        return self._transport.guard.observed

    def expect_identity(self, product_uuid: str | None) -> None:
        """From now on send nothing under a session that has not proved this identity; None lifts that."""
        self._sessions.expect(product_uuid)

    def renew_session(self) -> None:
        """Log in anew at the next call: what a session may do, CML decides when it begins."""
        session = self._sessions.current
        if session is not None:
            self._sessions.drop(session.serial)

    async def identity(self) -> str:
        """The CML's product uuid, asked once per session. Raises `CmlIdentityMismatch` if another is expected."""
        return (await self.proven_session()).identity or ""

    async def proven_session(self, *, again: bool = False) -> Session:
        """The current session with its identity known; `again` asks CML now even when it is."""
        return await self._calls.session(again=again)

    # System

    async def system_information(self) -> SystemInformation:
        """Version and readiness, without a login: the probe for a CML that boots."""
        answer = await self._calls.read("/system_information", login=False)
        return SystemInformation.model_validate(answer.mapping())

    async def system_stats(self) -> SystemStats:
        return SystemStats.model_validate((await self._calls.read("/system_stats")).mapping())

    async def system_health(self) -> SystemHealth:
        return SystemHealth.model_validate((await self._calls.read("/system_health")).mapping())

    async def telemetry_events(self) -> tuple[TelemetryEvent, ...]:
        """The whole history that CML keeps; it has no filter and no pages. Raises `CmlBadAnswer` above 8 MB.

        Tens of thousands of events are read in a thread, so that no lease is late meanwhile.
        """
        answer = await self._calls.read("/telemetry/events", max_body=_LONGEST_HISTORY)
        return await asyncio.to_thread(_events, answer)

    # Licence

    async def licensing(self) -> Licensing:
        return Licensing.model_validate((await self._calls.read("/licensing")).mapping())

    async def set_product_license(self, product_license: str) -> None:
        """Choose the product, for instance `CML_Enterprise`; repeatable."""
        if not re.fullmatch(r"\w{1,20}", product_license, re.ASCII):
            raise CmlInvalid("a product licence is 1 to 20 letters, digits or underscores")
        await self._calls.change("PUT", "/licensing/product_license", content=orjson.dumps(product_license))

    async def register(self, token: str, *, reregister: bool = False, timeout: float) -> None:
        """Ask for registration; returns when CML has accepted the request, not when it is done. Creating."""
        if not re.fullmatch(r"[a-zA-Z\d+/%=-]{1,256}", token, re.ASCII):
            raise CmlInvalid("a licence token is 1 to 256 letters, digits or any of + / % = -")
        body: dict[str, str | bool] = {"token": token}
        if reregister:
            body["reregister"] = True
        message = Message("POST", "/licensing/registration", content=orjson.dumps(body))
        await self._calls.create(message, "the licence registration", timeout=timeout, secrets=(token,))

    async def deregister(self) -> Deregistration:
        """Give the licence seat back; repeatable."""
        try:
            answer = await self._calls.change("DELETE", "/licensing/deregistration")
        except CmlRefused as error:
            if error.status != 400:
                raise
            # "Already" is a 400 without a body; one with a reason is believed only when the status agrees.
            if error.description and (await self.licensing()).is_registered:
                raise
            return Deregistration.ALREADY
        return Deregistration.SEAT_LEAKED if answer.status == 202 else Deregistration.DONE

    # Labs: reads

    async def lab_ids(self, *, show_all: bool = True) -> tuple[str, ...]:
        """Ids of the labs visible to this session; only an admin's `show_all` is every lab."""
        answer = await self.lab_ids_answer(show_all=show_all)
        ids = answer.array()
        if not all(is_lab_id(i) for i in ids):
            raise CmlBadAnswer(answer.status, "a list of labs with something in it that is not a lab's id")
        return tuple(dict.fromkeys(ids))

    async def lab_ids_answer(self, *, show_all: bool = True) -> Answer:
        """The same, raw: an inventory counts what is malformed instead of refusing it."""
        return await self._calls.read("/labs", query={"show_all": "true"} if show_all else {})

    async def tiles(self) -> dict[str, Lab]:
        """Every usable tile by lab id, in one call. Undocumented, eventually consistent: proves no absence.

        Thousands of them are read with the event loop given back in between.
        """
        value = (await self._calls.read("/populate_lab_tiles")).json()
        if isinstance(value, dict):
            value = value.get("lab_tiles", value)
        if isinstance(value, list):
            value = {t["id"]: t for t in value if isinstance(t, dict) and is_lab_id(t.get("id"))}
        if not isinstance(value, dict):
            raise CmlBadAnswer(200, "lab tiles in an unknown shape")
        labs = {}
        for number, (lab_id, tile) in enumerate(value.items(), 1):
            if number % _AT_A_TIME == 0:
                await self._clock.sleep(0)
            if is_lab_id(lab_id) and isinstance(tile, dict) and tile.get("id", lab_id) == lab_id:
                lab = Lab.model_validate({**tile, "id": lab_id})
                if lab.state and isinstance(tile.get("lab_title"), str):
                    labs[lab_id] = lab
        return labs

    async def lab(self, lab_id: str) -> Lab:
        """One lab. `CmlNotFound` is CML's word that it has none of this id."""
        answer = await self._calls.read(_lab(lab_id))
        told = answer.mapping()
        lab = Lab.model_validate({"id": lab_id, **told})
        if lab.id != lab_id or not lab.state:
            raise CmlBadAnswer(answer.status, "a lab without its state, or another lab than was asked for")
        return lab

    async def lab_state(self, lab_id: str) -> str:
        return (await self._calls.read(_lab(lab_id, "/state"))).string()

    async def converged(self, lab_id: str) -> bool:
        """Whether nothing in the lab is on its way to another state; true of a stopped lab too."""
        return (await self._calls.read(_lab(lab_id, "/check_if_converged"))).boolean()

    async def node_states(self, lab_id: str) -> dict[str, str]:
        """The state of each node of one lab, by the node's id."""
        answer = await self._calls.read(_lab(lab_id, "/lab_element_state"))
        states = answer.mapping().get("nodes")
        if not isinstance(states, dict):
            raise CmlBadAnswer(answer.status, "the states of a lab's elements without those of its nodes")
        return {node: state if isinstance(state, str) else "" for node, state in states.items()}

    async def download(self, lab_id: str, *, patient: bool = False) -> str:
        """The lab as YAML that can be imported again; CML sends it raw or as a JSON string.

        `patient` gives a big lab the time of a change, in one try.
        """
        path = _lab(lab_id, "/download")
        answer = await (self._calls.long_read(path) if patient else self._calls.read(path))
        if answer.body.lstrip()[:1] == b'"':
            return answer.string()
        if answer.body.lstrip()[:1] in {b"", b"<"}:
            raise CmlBadAnswer(answer.status, "no topology")
        try:
            return answer.body.decode()
        except UnicodeDecodeError:
            pass
        raise CmlBadAnswer(answer.status, "a topology that is not UTF-8")

    async def nodes(self) -> tuple[NodeState, ...]:
        """Every node of every visible lab, without its configuration."""
        answer = await self._calls.read("/nodes", query={"operational": "true", "exclude_configurations": "true"})
        return tuple(NodeState.model_validate(n) for n in answer.array() if isinstance(n, dict))

    async def list_labs(self) -> Listing:
        """Every visible lab, ids and data (see inventory.py)."""
        return await list_labs(self)

    async def find_labs_by_title(self, title: str) -> tuple[Lab, ...]:
        """The visible labs of exactly this title, judged by the authoritative ids, not by tiles alone."""
        listing = await self.list_labs()
        if listing.unread:
            raise CmlBadAnswer(200, f"{len(listing.unread)} labs whose titles CML does not tell")
        return tuple(lab for lab in listing.labs.values() if lab.title == title)

    async def listen(self, opened: Callable[[], None], heard: Callable[[], None]) -> NoReturn:
        """Keep the push channel open until it ends, and raise why (see push.py)."""
        await self._push.listen(opened, heard)

    # Labs: changes

    async def start_lab(self, lab_id: str) -> None:
        await self._calls.change("PUT", _lab(lab_id, "/start"))

    async def stop_lab(self, lab_id: str) -> None:
        await self._calls.change("PUT", _lab(lab_id, "/stop"))

    async def wipe_lab(self, lab_id: str) -> None:
        """Destroy the disks of all nodes; CML wants the lab stopped first."""
        await self._calls.change("PUT", _lab(lab_id, "/wipe"))

    async def rename_lab(self, lab_id: str, title: str) -> None:
        """Give a lab another title; repeatable."""
        _check_title(title)
        await self._calls.change("PATCH", _lab(lab_id), content=orjson.dumps({"title": title}))

    async def delete_lab(self, lab_id: str) -> None:
        """Delete a stopped and wiped lab. A refusal's status is not defined: look at the state instead."""
        await self._calls.change("DELETE", _lab(lab_id))

    async def import_lab(self, title: str, topology: str, *, timeout: float) -> ImportResult:
        """Create a lab from YAML or JSON text. Creating, and titles are not unique: look before trying again."""
        _check_title(title)
        if not topology.strip():
            raise CmlInvalid("the topology is empty")
        what = f"the import of {title!r}"
        message = Message(
            "POST",
            "/import",
            query={"title": title},
            content=topology.encode(),
            # JSON is what the document declares; YAML goes out untyped, as CML's own client library sends it.
            content_type="application/json" if topology.lstrip().startswith("{") else "",
        )
        answer = await self._calls.create(message, what, timeout=timeout)
        try:
            result = ImportResult.model_validate(answer.mapping())
        except CmlBadAnswer as error:
            reason = error.reason
        else:
            if is_lab_id(result.id):
                return result
            reason = "an answer without the new lab's id"
        raise CmlOutcomeUnknown(what, reason)


def _events(answer: Answer) -> tuple[TelemetryEvent, ...]:
    return tuple(TelemetryEvent.model_validate(e) for e in answer.array() if isinstance(e, dict))


def _check_title(title: str) -> None:
    if not 1 <= len(title) <= _LONGEST_TITLE:
        raise CmlInvalid(f"a lab title has 1 to {_LONGEST_TITLE} characters")


def _lab(lab_id: str, rest: str = "") -> str:
    """The path of a lab; only a well-formed id becomes part of an address."""
    if not is_lab_id(lab_id):
        raise CmlInvalid(f"{str(lab_id)[:80]!r} is not the id of a lab")
    return f"/labs/{lab_id}{rest}"
