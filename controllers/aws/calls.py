"""One AWS service for asyncio: boto3's blocking calls, made in a few threads, each with a deadline.

Promises: nothing blocks the event loop; every call ends by its `timeout` (seconds, on the given clock) and raises one
of `controllers.aws.errors`; an answer that AWS did not number is an error, for proxies and portals answer too. Reads
are tried three times by botocore, ever slower while AWS throttles (its adaptive mode); what creates or changes is
tried once. After a timeout `AwsUnavailable` means that nothing was sent, and nothing will be; `AwsOutcomeUnknown` that
it was. An account that does not answer holds up no other. Endpoints are boto3's own business (AWS_ENDPOINT_URL, …),
credentials that of `accounts`. Called by the modules `ec2` and `cloudwatch`.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

from botocore import xform_name
from botocore.config import Config

from controllers.aws.accounts import Accounts, Making
from controllers.aws.errors import (
    AwsAuthError,
    AwsError,
    AwsOutcomeUnknown,
    AwsServerError,
    AwsUnavailable,
    Effect,
    from_botocore,
    no_answer,
)
from controllers.aws.place import Place
from controllers.aws.threads import Abandoned, Threads, Ticket
from storage.clock import Clock

CREATE_TIMEOUT = 6.0
"""The longest that a creating call may take, seconds: a leader's lease must outlive it."""
READ_TIMEOUT = 20.0
WRITE_TIMEOUT = 60.0
IN_FLIGHT = 8
"""Calls to one service of one account at once."""

_MAX_PAGES = 1000


class AwsCalls:
    """The calls of one service in all places; used on one event loop, by any number of tasks."""

    def __init__(self, service: str, clock: Clock, accounts: Accounts) -> None:
        """`accounts` may be those of other services, too; whoever made them closes them."""
        self._service = service
        self._clock = clock
        self._accounts = accounts
        # An account whose calls hang has none of the others' threads.
        self._threads = {name: Threads(IN_FLIGHT, f"{service} {name}".rstrip()) for name in accounts.names}
        self._current = threading.local()

    def close(self) -> None:
        """Take no more calls; those whose callers have left end by their socket timeout."""
        for threads in self._threads.values():
            threads.close()

    @property
    def busy(self) -> int:
        """Calls in threads now, those whose callers have left included."""
        return sum(threads.busy for threads in self._threads.values())

    async def call(
        self, effect: Effect, place: Place, operation: str, request: Mapping[str, Any], timeout: float
    ) -> dict[str, Any]:
        """One call and its whole answer. Raises `AwsError`."""
        self._accounts.check(place)
        threads, ticket = self._threads[place.account], Ticket()

        def work() -> dict[str, Any]:
            return self._carry_out(effect, place, operation, request, ticket)

        if timeout <= 0:
            raise AwsUnavailable("DeadlineExceeded", "no time was left to ask", operation=operation, place=place)
        try:
            async with self._clock.timeout(timeout):
                answer = await threads.run(work)
        except TimeoutError:
            if ticket.abandon():
                raise no_answer(
                    effect, "DeadlineExceeded", f"no answer within {timeout:.3g} s", operation=operation, place=place
                ) from None
            raise AwsUnavailable(
                "DeadlineExceeded", f"not sent within {timeout:.3g} s", operation=operation, place=place
            ) from None
        except asyncio.CancelledError:
            ticket.abandon()
            raise
        if not answer.get("ResponseMetadata", {}).get("RequestId"):
            # botocore takes any XML for an answer, of a captive portal too, with nothing in it.
            kind: type[AwsError] = AwsOutcomeUnknown if effect is Effect.CREATING else AwsServerError
            raise kind("NoAnswer", "the answer is not from AWS", operation=operation, place=place)
        return answer

    def renew_credentials(self, place: Place) -> None:
        """Have the account's credentials read anew, unless they just were, although AWS does not refuse them."""
        self._accounts.refused(place)

    async def pages(
        self, place: Place, operation: str, request: Mapping[str, Any], part: str, deadline: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Every page of a read until `deadline` (monotonic), each with `part` in it; raises rather than end early."""
        token, seen = "", set[str]()
        for _ in range(_MAX_PAGES):
            more = {"NextToken": token} if token else {}
            answer = await self.call(
                Effect.READ, place, operation, {**request, **more}, deadline - self._clock.monotonic()
            )
            if part not in answer:
                raise AwsServerError("NoAnswer", f"the answer lacks {part}", operation=operation, place=place)
            yield answer
            token = str(answer.get("NextToken") or "")
            if not token:
                return
            if token in seen:
                break
            seen.add(token)
        raise AwsServerError("EndlessPages", "the pages do not come to an end", operation=operation, place=place)

    def _carry_out(
        self, effect: Effect, place: Place, operation: str, request: Mapping[str, Any], ticket: Ticket
    ) -> dict[str, Any]:
        """The call itself, in a thread. Raises `AwsError`: nothing of botocore ever reaches a task; and `Abandoned`."""
        self._current.ticket = ticket
        try:
            making = Making(_CONFIGS[effect], self._prepare)
            client = self._accounts.client(place, self._service, effect, making)
            answer: dict[str, Any] = getattr(client, xform_name(operation))(**request)
        except Abandoned:
            raise
        except Exception as error:  # noqa: BLE001 - urllib3's and socket's own get through botocore
            told = error
            if not isinstance(error, AwsError):
                told = from_botocore(error, effect, operation=operation, place=place, sent=ticket.sent)
            if isinstance(told, AwsAuthError):
                self._accounts.refused(place)
            raise told from None
        finally:
            self._end_parse()
        return answer

    def _prepare(self, client: Any) -> None:
        events = client.meta.events
        events.register(f"before-send.{self._service}", self._before_send)
        events.register(f"before-parse.{self._service}", self._begin_parse)
        events.register(f"response-received.{self._service}", self._end_parse)

    def _before_send(self, **_: Any) -> None:
        """Called by botocore before each attempt, in the calling thread; returning None lets it go on."""
        ticket: Ticket = self._current.ticket
        ticket.begin_send()

    def _begin_parse(self, **_: Any) -> None:
        """Called by botocore before it parses an answer.

        Eight parsing threads would keep the event loop waiting; so would the cycle collector, which a page's hundred
        thousand new objects would send through all that lives, in vain.
        """
        _PARSING.acquire()
        self._current.parses = True
        self._current.collects = gc.isenabled()
        gc.disable()

    def _end_parse(self, **_: Any) -> None:
        if getattr(self._current, "parses", False):
            self._current.parses = False
            if self._current.collects:
                gc.enable()
            _PARSING.release()


_PARSING = threading.Lock()
"""Held while an answer of any service is parsed."""


def _config(connect: float, read: float, **retries: Any) -> Config:
    return Config(
        connect_timeout=connect,
        read_timeout=read,
        retries=retries,  # type: ignore[arg-type]  # the stub knows no keyword form
        max_pool_connections=IN_FLIGHT,
        user_agent_extra="lrm",
    )


_CONFIGS = {
    Effect.READ: _config(4, 15, mode="adaptive", total_max_attempts=3),
    Effect.CREATING: _config(2, CREATE_TIMEOUT, mode="standard", total_max_attempts=1),
    Effect.REPEATABLE: _config(4, WRITE_TIMEOUT, mode="standard", total_max_attempts=1),
}
