"""A session with one CML: who we are there, whether we are its admin, and which CML it is.

Promises: N callers that need a login cause one; refused credentials and a foreign CML are tried at most once a
minute; when an identity is expected, no session is handed out before `GET /licensing` has proved it under that very
session. A token is accepted only by the CML that signed it, so the proof lasts as long as the session. Early renewal
goes by the token's own `exp`. Does not replay calls. Called by the client.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import orjson

from controllers.cml.answers import Answer, describe, failure
from controllers.cml.errors import (
    CmlAuthError,
    CmlBadAnswer,
    CmlClosed,
    CmlError,
    CmlIdentityMismatch,
    CmlInvalid,
    CmlLoginThrottled,
)
from controllers.cml.models import Licensing
from controllers.cml.transport import Message, Sending, Transport
from storage.clock import Clock

BAR = 60.0
"""Seconds for which refused credentials, or a CML that is not ours, are not tried again."""
_EARLY = 60.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of a CML; the password never shows in a repr."""

    username: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.username) <= 32:
            raise CmlInvalid("a CML user name has 1 to 32 characters")
        if not self.password:
            raise CmlInvalid("the CML password is empty")


@dataclass(frozen=True, slots=True)
class Session:
    """One login. `serial` grows with each; `admin` and `identity` are None until CML has told them."""

    serial: int
    token: str = field(repr=False)
    username: str
    user_id: str = ""
    admin: bool | None = None
    identity: str | None = None
    note: str = ""
    renew_at: float = math.inf


class Sessions:
    """The current session of one client, made when needed."""

    def __init__(self, transport: Transport, credentials: Credentials, clock: Clock, *, login_timeout: float) -> None:
        self._transport = transport
        self._credentials = credentials
        self._clock = clock
        self._login_timeout = login_timeout
        self._lock = asyncio.Lock()
        self._serial = 0
        self._rounds = 0
        self._failure: CmlError | None = None
        self._barred: CmlError | None = None
        self._barred_until = 0.0
        self.expected: str | None = None
        self.current: Session | None = None

    def expect(self, identity: str | None) -> None:
        """Hand out no session of another CML from now on; None forgets the expectation, and a bar with it."""
        wanted = normal_identity(identity) if identity else None
        if wanted != self.expected:
            self.expected = wanted
            if isinstance(self._barred, CmlIdentityMismatch):
                self._barred = None

    def drop(self, serial: int) -> None:
        """CML refused this session; the next caller makes another. One that is already replaced stays."""
        if self.current is not None and self.current.serial == serial:
            self.current = None

    def check_bar(self) -> None:
        """Raise while credentials or identity were found wrong less than a minute ago."""
        if self._barred is None:
            return
        left = self._barred_until - self._clock.monotonic()
        if left <= 0:
            self._barred = None
        elif isinstance(self._barred, CmlIdentityMismatch):
            raise self._barred.with_traceback(None)
        else:
            raise CmlLoginThrottled(left)

    def check_foreign(self) -> None:
        """Raise while another CML is known to answer here; refused credentials are no matter without a login."""
        if isinstance(self._barred, CmlIdentityMismatch):
            self.check_bar()

    async def get(self, *, proven: bool = False) -> Session:
        """A session that may be used: not about to expire, and of the expected CML; `proven`: identity known too."""
        session = self._usable(proven=proven)
        if session is not None:
            return session
        waited_since = self._rounds
        async with self._lock:
            session = self._usable(proven=proven)
            if session is not None:
                return session
            if self._rounds != waited_since and self._failure is not None:
                # Whoever held the lock has just failed at the same thing: one answer for all who waited.
                raise self._failure.with_traceback(None)
            try:
                session = await self._renew(prove=proven or self.expected is not None)
            except CmlError as error:
                self._rounds += 1
                self._failure = error
                raise
            self._rounds += 1
            self._failure = None
            return session

    def _usable(self, *, proven: bool) -> Session | None:
        self.check_bar()
        session = self.current
        if session is None or session.renew_at <= self._clock.monotonic():
            return None
        if self.expected is not None and session.identity != self.expected:
            return None
        return None if proven and session.identity is None else session

    async def _renew(self, *, prove: bool) -> Session:
        session = self.current
        if session is None or session.renew_at <= self._clock.monotonic():
            session = await self._login()
        if not prove:
            return session
        try:
            return await self._prove(session)
        except _SessionRefusedError:
            self.drop(session.serial)
        session = await self._login()
        try:
            return await self._prove(session)
        except _SessionRefusedError:
            self.drop(session.serial)
        raise CmlAuthError("CML refuses a session that it has just granted")

    async def prove_again(self, session: Session) -> Session:
        """Ask CML for its identity under this session now, whatever is known. Raises as `get`."""
        async with self._lock:
            current = self.current
            if current is not None and current.serial == session.serial:
                try:
                    return await self._prove(replace(current, identity=None))
                except _SessionRefusedError:
                    self.drop(session.serial)
        return await self.get(proven=True)

    async def _prove(self, session: Session) -> Session:
        """Learn the identity under a session; one of another CML ends it and bars the address."""
        found = session.identity
        if found is None:
            answer = await self._ask("GET", "/licensing", token=session.token)
            if answer.status == 401:
                raise _SessionRefusedError
            error = failure(answer)
            if error is not None:
                raise error
            uuid = Licensing.model_validate(answer.mapping()).udi.product_uuid
            if not uuid.strip():
                raise CmlBadAnswer(answer.status, "a licensing status without udi.product_uuid")
            found = normal_identity(uuid)
        if self.expected is not None and found != self.expected:
            self.current = None
            mismatch = CmlIdentityMismatch(self.expected, found)
            self._bar(mismatch)
            raise mismatch
        session = replace(session, identity=found)
        if self.current is not None and self.current.serial == session.serial:
            self.current = session
        return session

    async def _login(self) -> Session:
        self.check_bar()
        self.current = None
        # From here on only the leaf that this login meets will do (see tls.py).
        self._transport.guard.arm()
        body = orjson.dumps({"username": self._credentials.username, "password": self._credentials.password})
        began = self._clock.monotonic()
        answer = await self._ask("POST", "/auth_extended", content=body)
        if answer.status == 404:
            answer = await self._ask("POST", "/authenticate", content=body)
            self._check_login(answer)
            told: Mapping[str, Any] = {"token": answer.string()}
        else:
            self._check_login(answer)
            told = answer.mapping()
        token = told.get("token")
        if not isinstance(token, str) or not _is_header_safe(token):
            raise CmlBadAnswer(answer.status, "a login without a usable token")
        if not isinstance(told.get("admin"), bool):
            told = {**told, **await self._who_am_i(token)}
        self._serial += 1
        username, user_id, admin, note = (told.get(k) for k in ("username", "id", "admin", "error"))
        self.current = Session(
            serial=self._serial,
            token=token,
            username=username if isinstance(username, str) else self._credentials.username,
            user_id=user_id if isinstance(user_id, str) else "",
            admin=admin if isinstance(admin, bool) else None,
            note=describe(orjson.dumps(note), self.secrets(token)) if isinstance(note, str) else "",
            renew_at=_renewal(token, began, self._clock),
        )
        return self.current

    def _check_login(self, answer: Answer) -> None:
        if answer.status in {400, 401, 403}:
            reason = describe(answer.body, self.secrets())
            error = CmlAuthError(f"CML refuses the credentials of {self._credentials.username!r}: {reason}")
            self._bar(error)
            raise error
        problem = failure(answer, self.secrets())
        if problem is not None:
            raise problem

    async def _who_am_i(self, token: str) -> Mapping[str, Any]:
        """What CML says of this session; an older one only says that it is valid, and admin stays unproven."""
        answer = await self._ask("GET", "/authentication", token=token)
        if answer.status == 404:
            answer = await self._ask("GET", "/authok", token=token)
            if answer.status in {200, 404}:
                return {}
        if answer.status in {401, 403}:
            error = CmlAuthError("CML refuses a session that it has just granted")
            self._bar(error)
            raise error
        problem = failure(answer)
        if problem is not None:
            raise problem
        return {k: v for k, v in answer.mapping().items() if k in {"id", "username", "admin"}}

    async def _ask(self, method: str, path: str, *, content: bytes | None = None, token: str = "") -> Answer:
        message = Message(method, path, content=content, token=token, read_timeout=self._login_timeout)
        return await self._transport.exchange(message, Sending())

    def _bar(self, error: CmlError) -> None:
        self._barred = error
        self._barred_until = self._clock.monotonic() + BAR

    def secrets(self, *more: str) -> tuple[str, ...]:
        """What a server knows of us and might say aloud in its answers."""
        token = () if self.current is None else (self.current.token,)
        return (self._credentials.password, *token, *more)

    def close(self) -> None:
        """Forget the token; later calls end with `CmlClosed`."""
        self.current = None
        self._failure = CmlClosed()


class _SessionRefusedError(CmlError):
    """401 under a session: settled in this file, never seen outside."""


def normal_identity(uuid: str) -> str:
    """A product uuid in the one form in which it is compared."""
    return uuid.strip().lower()


def _is_header_safe(token: str) -> bool:
    return 0 < len(token) <= 16384 and token.isascii() and all(33 <= ord(c) <= 126 for c in token)


def _renewal(token: str, began: float, clock: Clock) -> float:
    """When to log in again, on the monotonic clock: shortly before `exp`, or never if the token does not tell.

    The lifetime is the token's own `exp - iat`: the server's wall clock may be wrong, its difference is not.
    """
    claims = _claims(token)
    exp, iat = claims.get("exp"), claims.get("iat")
    if not _is_number(exp):
        return math.inf
    lifetime = exp - (iat if _is_number(iat) else clock.now().timestamp())
    if not math.isfinite(lifetime) or lifetime <= 0:
        return math.inf
    return float(began + lifetime - min(_EARLY, lifetime / 10))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _claims(token: str) -> dict[str, Any]:
    """The claims of a JWT, unverified (CML verifies it); empty for anything that is not one."""
    try:
        part = token.split(".")[1]
        claims = orjson.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (IndexError, ValueError):
        return {}
    return claims if isinstance(claims, dict) else {}
