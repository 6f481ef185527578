"""How one call is made: its class, its deadline, its session, its retries, and what its failure means.

    reads        three tries on anything retryable, with backoff and jitter; a long one has a single try
    repeatable   one try; the caller looks again, and may repeat
    creating     one try; sent without a usable answer is `CmlOutcomeUnknown`, never repeated

Promises that each call ends by its deadline, logins and waiting included, and that a 401 (which CML did not carry
out) is answered by one new login and one replay, in every class. Called by the client's typed methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from controllers.cml.answers import Answer, failure
from controllers.cml.errors import (
    CmlAuthError,
    CmlCircuitOpen,
    CmlClosed,
    CmlError,
    CmlInvalid,
    CmlNotFound,
    CmlNotReady,
    CmlOutcomeUnknown,
    CmlRefused,
    CmlTimeout,
)
from controllers.cml.session import Session, Sessions
from controllers.cml.transport import Message, Sending, Transport
from storage.clock import Clock

_TRIES = 3
_FIRST_BACKOFF = 0.2


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `read` and `change` end a whole call, with logins, retries and waiting; `attempt` one try of a read."""

    connect: float = 5.0
    attempt: float = 10.0
    read: float = 25.0
    change: float = 60.0

    def __post_init__(self) -> None:
        if min(self.connect, self.attempt, self.read, self.change) <= 0:
            raise CmlInvalid("timeouts are seconds greater than zero")


class Caller:
    """Makes calls of the three classes over one transport and its sessions."""

    def __init__(
        self, transport: Transport, sessions: Sessions, clock: Clock, timeouts: Timeouts, jitter: Callable[[], float]
    ) -> None:
        self._transport = transport
        self._sessions = sessions
        self._clock = clock
        self._timeouts = timeouts
        self._jitter = jitter
        self._closed = False

    async def read(
        self, path: str, query: Mapping[str, str] | None = None, *, login: bool = True, max_body: int | None = None
    ) -> Answer:
        """GET, up to three times; `max_body` bytes are read at most, where that is less than the client's limit."""
        self._check_open()
        message = Message("GET", path, query=query or {}, read_timeout=self._timeouts.attempt, max_body=max_body)
        return await self._within(self._timeouts.read, message, Sending(), tries=_TRIES, login=login)

    async def long_read(self, path: str) -> Answer:
        """GET of what CML may take long to make: once, with the time that a change has."""
        self._check_open()
        limit = self._timeouts.change
        return await self._within(limit, Message("GET", path, read_timeout=limit), Sending())

    async def change(self, method: str, path: str, content: bytes | None = None) -> Answer:
        """A call that may be made again by whoever looked first; one try here."""
        self._check_open()
        message = Message(method, path, content=content, read_timeout=self._timeouts.change)
        return await self._within(self._timeouts.change, message, Sending())

    async def create(self, message: Message, what: str, *, timeout: float, secrets: tuple[str, ...] = ()) -> Answer:
        """A call that must not be made twice. Raises `CmlOutcomeUnknown` once it may have been carried out."""
        self._check_open()
        if timeout <= 0:
            raise CmlInvalid(f"{what} needs a timeout greater than zero")
        sending = Sending()
        problem: CmlError
        try:
            return await self._within(timeout, replace(message, read_timeout=timeout), sending, secrets=secrets)
        except CmlError as error:
            problem = error
        if sending.sent and not _is_definite(problem):
            raise CmlOutcomeUnknown(what, str(problem))
        raise problem

    async def session(self, *, again: bool = False) -> Session:
        """The current session with its identity known; `again` asks for it anew."""
        self._check_open()
        limit = self._timeouts.read
        try:
            async with self._clock.timeout(limit):
                session = await self._sessions.get(proven=True)
                return await self._sessions.prove_again(session) if again else session
        except TimeoutError:
            pass
        raise CmlTimeout(f"no proven session with CML within {limit:g} s")

    def close(self) -> None:
        """Refuse every later call."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise CmlClosed

    async def _within(
        self,
        limit: float,
        message: Message,
        sending: Sending,
        *,
        tries: int = 1,
        login: bool = True,
        secrets: tuple[str, ...] = (),
    ) -> Answer:
        try:
            async with self._clock.timeout(limit):
                return await self._tried(message, sending, tries=tries, login=login, secrets=secrets)
        except TimeoutError:
            self._transport.expired(sending)
        # Raised out here: the cancelled exchange's own errors stay behind.
        raise CmlTimeout(f"no answer from CML within {limit:g} s")

    async def _tried(
        self, message: Message, sending: Sending, *, tries: int, login: bool, secrets: tuple[str, ...]
    ) -> Answer:
        attempt = 1
        seen: CmlError | None = None
        while True:
            try:
                return await self._once(message, sending, login=login, secrets=secrets)
            except CmlCircuitOpen as error:
                # What this call itself has met says more than that it may not try again.
                raise seen or error from None
            except CmlError as error:
                if attempt == tries or not error.retryable:
                    raise
                seen = error
            sending.reset()
            # Full jitter on the upper half: callers that failed together do not come back together.
            await self._clock.sleep(_FIRST_BACKOFF * 2 ** (attempt - 1) * (0.5 + self._jitter() / 2))
            attempt += 1

    async def _once(self, message: Message, sending: Sending, *, login: bool, secrets: tuple[str, ...]) -> Answer:
        if not login:
            self._sessions.check_foreign()
            answer = await self._transport.exchange(message, sending)
            return _judged(answer, self._sessions.secrets(*secrets))
        session = await self._sessions.get()
        answer = await self._under(session, message, sending)
        if answer.status == 401:
            sending.reset()
            self._sessions.drop(session.serial)
            session = await self._sessions.get()
            answer = await self._under(session, message, sending)
        if answer.status == 401:
            self._sessions.drop(session.serial)
            raise CmlAuthError("CML refuses a session that it has just granted")
        return _judged(answer, self._sessions.secrets(session.token, *secrets))

    async def _under(self, session: Session, message: Message, sending: Sending) -> Answer:
        return await self._transport.exchange(replace(message, token=session.token), sending)


def _judged(answer: Answer, secrets: tuple[str, ...]) -> Answer:
    problem = failure(answer, secrets)
    if problem is not None:
        raise problem
    return answer


def _is_definite(problem: CmlError) -> bool:
    """Whether an answered creating call was certainly not carried out; a 500 or a 502 may come after the deed."""
    if isinstance(problem, CmlNotReady):
        return problem.status == 429
    return isinstance(problem, CmlRefused | CmlNotFound | CmlAuthError)
