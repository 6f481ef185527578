"""Gets one text from a web server, for topologies that templates name by address.

Promises: one GET within a deadline, at most so many bytes, no redirect followed, no cookie, no credentials, no proxy
from the environment, and every failure as one of the three errors below. Which addresses may be asked is the caller's
to decide, before it calls.
"""

from __future__ import annotations

import asyncio
import ssl

import httpx

from storage.clock import Clock

_CONNECT = 5.0
"""Seconds."""


class FetchError(Exception):
    """Base; the texts name no address: who calls knows it."""


class FetchNotFound(FetchError):  # noqa: N818 - it says what happened
    """The server says that there is no such thing: 404 or 410."""


class FetchRefused(FetchError):  # noqa: N818 - it says what happened
    """What the server answers will not do, however often it is asked: a redirect, a refusal, too much, no text."""


class FetchUnavailable(FetchError):  # noqa: N818 - it says what happened
    """No usable answer now."""


async def fetch_text(url: str, *, most: int, timeout: float, clock: Clock) -> str:
    """The text at an http or https address, UTF-8; `most` is in bytes, `timeout` in seconds. Raises `FetchError`s."""
    try:
        async with clock.timeout(timeout):
            body = await _body_at(url, most, timeout)
    except TimeoutError:
        raise FetchUnavailable(f"no whole answer within {timeout:g} s") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise FetchRefused(f"the address cannot be asked: {error}") from None
    except httpx.TimeoutException:
        raise FetchUnavailable("the server does not answer in time") from None
    except httpx.ConnectError as error:
        raise FetchUnavailable(f"no connection to the server: {error}"[:300]) from None
    except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        raise FetchUnavailable(f"the answer broke off: {error}"[:300]) from None
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FetchRefused("the answer is not UTF-8") from None


async def _body_at(url: str, most: int, timeout: float) -> bytes:
    """Counted as it comes, after any compression: a small answer may unfold to a large one."""
    context = await asyncio.to_thread(ssl.create_default_context)
    headers = {"User-Agent": "lrm", "Accept-Encoding": "identity"}
    limits = httpx.Timeout(timeout, connect=_CONNECT)
    body = bytearray()
    async with (
        httpx.AsyncClient(verify=context, trust_env=False, follow_redirects=False, timeout=limits) as http,
        http.stream("GET", url, headers=headers) as response,
    ):
        _judge(response.status_code)
        async for chunk in response.aiter_bytes(64 * 1024):
            body += chunk
            if len(body) > most:
                raise FetchRefused(f"more than {most} bytes")
    return bytes(body)


def _judge(status: int) -> None:
    if status in (404, 410):
        raise FetchNotFound(f"the server answers {status}")
    if status >= 500 or status in (408, 425, 429):
        raise FetchUnavailable(f"the server answers {status}")
    if 300 <= status < 400:
        raise FetchRefused(f"the server answers {status}: redirects are not followed")
    if status != 200:
        raise FetchRefused(f"the server answers {status}")
