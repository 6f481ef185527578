"""Whether Redis answers; nothing waits for it."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from storage.clock import Clock


async def redis_error(url: str, clock: Clock, timeout: float = 1.0) -> str:
    """Empty when Redis answers a PING within `timeout` seconds, else why not; the URL's password is not told."""
    # No timeout and no retries of the client's own: see `storage.redis_bookmarks`.
    client = Redis.from_url(url, socket_timeout=None, socket_connect_timeout=None, retry=Retry(NoBackoff(), 0))
    try:
        async with clock.timeout(timeout):
            await client.ping()
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    except (RedisError, OSError) as error:
        return f"{type(error).__name__}"
    finally:
        await client.aclose()
    return ""
