"""One AWS service for asyncio: boto3's blocking calls, made in a few threads, each with a deadline.

Promises: nothing blocks the event loop; every call ends by its `timeout` (seconds, on the given clock) and raises one
of `controllers.aws.errors`; an answer that AWS did not number is an error, for proxies and portals answer too. Reads
are tried three times by botocore, ever slower while AWS throttles (its adaptive mode); what creates or changes is
tried once. After a timeout `AwsUnavailable` means that nothing was sent, and nothing will be; `AwsOutcomeUnknown` that
it was. Endpoint and credentials are boto3's own business (AWS_ENDPOINT_URL, AWS_PROFILE, …); those that AWS refuses are
read anew, at most every 30 s, so that a file that somebody has renewed is taken without a restart.
Called by the services' own modules, `ec2` and `cloudwatch`.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any
from xml.etree.ElementTree import ParseError, TreeBuilder, XMLParser

import boto3
import botocore.loaders
import botocore.session
from botocore import xform_name
from botocore.config import Config
from botocore.parsers import (
    EC2QueryParser,
    QueryParser,
    ResponseParserError,
    ResponseParserFactory,
    RestXMLParser,
)

from controllers.aws.errors import (
    AwsAuthError,
    AwsError,
    AwsOutcomeUnknown,
    AwsServerError,
    AwsUnavailable,
    AwsUnknownAccount,
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
"""Calls to one service at once."""

_MAX_PAGES = 1000
_CREDENTIALS_KEPT = 30.0
"""Seconds before credentials are read again, however often AWS refuses them."""


class AwsCalls:
    """The calls of one service in all places; used on one event loop, by any number of tasks."""

    def __init__(
        self, service: str, clock: Clock, *, endpoint_url: str | None = None, profile: str | None = None
    ) -> None:
        self._service = service
        self._clock = clock
        self._endpoint_url = endpoint_url
        self._profile = profile
        self._threads = Threads(IN_FLIGHT, service)
        self._current = threading.local()
        self._clients_lock = threading.Lock()
        self._session: boto3.Session | None = None
        self._session_since = 0.0
        self._clients: dict[tuple[Place, Effect], Any] = {}

    def close(self) -> None:
        """Take no more calls and close idle connections; calls whose callers have left end by their socket timeout."""
        self._threads.close()
        for client in list(self._clients.values()):
            client.close()

    @property
    def busy(self) -> int:
        """Calls in threads now, those whose callers have left included."""
        return self._threads.busy

    async def call(
        self, effect: Effect, place: Place, operation: str, request: Mapping[str, Any], timeout: float
    ) -> dict[str, Any]:
        """One call and its whole answer. Raises `AwsError`."""
        ticket = Ticket()

        def work() -> dict[str, Any]:
            self._current.ticket = ticket
            try:
                method = getattr(self._client(place, effect), xform_name(operation))
                answer: dict[str, Any] = method(**request)
            except (Abandoned, AwsError):
                raise
            except Exception as error:  # noqa: BLE001 - urllib3's and socket's own get through botocore
                # Mapped here, in the thread, so that nothing of botocore ever reaches a task.
                told = from_botocore(error, effect, operation=operation, place=place, sent=ticket.sent)
                if isinstance(told, AwsAuthError):
                    self._forget_credentials()
                raise told from None
            finally:
                self._end_parse()
            return answer

        if timeout <= 0:
            raise AwsUnavailable("DeadlineExceeded", "no time was left to ask", operation=operation, place=place)
        try:
            async with self._clock.timeout(timeout):
                answer = await self._threads.run(work)
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

    def _client(self, place: Place, effect: Effect) -> Any:
        """The client of a place for calls of this class. Runs in a thread: making the first one takes 0.3 s."""
        if place.account:
            raise AwsUnknownAccount("UnknownAccount", f"no account is called {place.account!r}", place=place)
        with self._clients_lock:
            client = self._clients.get((place, effect))
            if client is None:
                if self._session is None:
                    core = botocore.session.Session()
                    core.register_component("data_loader", _LOADER)
                    core.register_component("response_parser_factory", _Parsers())
                    self._session = boto3.Session(profile_name=self._profile, botocore_session=core)
                    self._session_since = self._clock.monotonic()
                create: Any = self._session.client  # the stubs know one overload for each service, and no name of any
                client = create(
                    self._service, region_name=place.region, endpoint_url=self._endpoint_url, config=_CONFIGS[effect]
                )
                client.meta.events.register(f"before-send.{self._service}", self._before_send)
                client.meta.events.register(f"before-parse.{self._service}", self._begin_parse)
                client.meta.events.register(f"response-received.{self._service}", self._end_parse)
                self._clients[place, effect] = client
            return client

    def _forget_credentials(self) -> None:
        """Have the next call read them anew: boto3 reads a file once. Calls under way end with what they have."""
        with self._clients_lock:
            if self._clock.monotonic() - self._session_since >= _CREDENTIALS_KEPT:
                self._session = None
                self._clients.clear()

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


class _Parsers(ResponseParserFactory):
    """Parsers that read XML in pieces: a page of 1,000 instances in one piece stops every other thread for 0.1 s."""

    def create_parser(self, protocol_name: str) -> Any:
        parser: Any = super().create_parser(protocol_name)
        if type(parser) in (QueryParser, EC2QueryParser, RestXMLParser):
            parser._parse_xml_string_to_dom = _dom  # noqa: SLF001 - botocore has no other door
        return parser


def _dom(document: bytes) -> Any:
    parser = XMLParser(target=TreeBuilder(), encoding="utf-8")  # noqa: S314 - as botocore itself reads AWS's answers
    try:
        for start in range(0, len(document), _PIECE):
            parser.feed(document[start : start + _PIECE])
        return parser.close()
    except ParseError as error:
        raise ResponseParserError(f"the answer is no XML: {error}") from error


_PIECE = 32 * 1024
_LOADER = botocore.loaders.create_loader()
"""Reads and keeps botocore's descriptions of the services: 0.2 s and many megabytes each, once per process."""

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
