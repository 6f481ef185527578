"""Bookmarks in Redis: one small JSON value a watcher, moved by a script that judges and writes in one step.

On one line of the store's history (cluster and epoch) a bookmark never goes back and is never moved for an older term;
one of another line is replaced whole. Nobody renewing it for a week, it goes. Every question ends within `timeout` and
raises `RedisFailed`, whatever is wrong with Redis; a value that is no bookmark counts as none and is replaced.
Two installations may share a Redis if their etcd roots differ: keys are `{root}:bookmark:{watcher}` without the root's
first slash, hence `lrm:bookmark:{watcher}` where nothing else is set. Called by `lrm.bookmarks`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, ResponseError

from storage.base import Line
from storage.clock import Clock
from storage.errors import RedisFailed

T = TypeVar("T")

EXPIRES_SECONDS = 7 * 24 * 3600
"""A bookmark that nobody has renewed for so long is gone: its watcher no longer exists."""

_SCAN_COUNT = 1000
_MOST = 2**53
"""Redis' scripts count in doubles: from here on not every integer has one."""

_SAVE = """
local function whole(n)
  return type(n) == 'number' and n == math.floor(n) and n >= 0 and n < 9007199254740992
end
local function bookmark(text)
  if type(text) ~= 'string' then return nil end
  local ok, value = pcall(cjson.decode, text)
  if ok and type(value) == 'table' and whole(value.revision) and whole(value.term) then return value end
  return nil
end
local function one_line(a, b) return a.cluster_id == b.cluster_id and a.epoch == b.epoch end
local function save(key, text, replaces, seconds)
  local held, new, replaced = bookmark(redis.pcall('GET', key)), bookmark(text), bookmark(replaces)
  local disproved = held and replaced and one_line(held, replaced)
    and held.revision == replaced.revision and held.term == replaced.term
  if held and one_line(held, new) and not disproved then
    if held.term > new.term then return 'older term' end
    if held.revision > new.revision then
      redis.call('EXPIRE', key, seconds)
      return 'behind'
    end
  end
  redis.call('SET', key, text, 'EX', seconds)
  return 'saved'
end
local outcomes = {}
for i, key in ipairs(KEYS) do
  outcomes[i] = save(key, ARGV[2 * i], ARGV[2 * i + 1], ARGV[1])
end
return outcomes
"""
_SAVE_SHA = hashlib.sha1(_SAVE.encode(), usedforsecurity=False).hexdigest()

_FORGET = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

Outcome = Literal["saved", "behind", "older term"]
"""What became of a save; `behind`: Redis holds a later revision of the same line, which stays."""


@dataclass(frozen=True, slots=True)
class SavedBookmark:
    """Everything up to `revision` of that line was handled, says the leader of `term`."""

    cluster_id: str
    epoch: str
    revision: int
    term: int
    saved_at: str

    def same_history(self, line: Line) -> bool:
        """Whether its revision means the same on a line."""
        return (self.cluster_id, self.epoch) == (line.cluster_id, line.epoch)

    def encode(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> SavedBookmark | None:
        """None for what is no bookmark."""
        try:
            value = orjson.loads(raw)
            found = cls(**{name: value[name] for name in cls.__slots__})
        except (orjson.JSONDecodeError, TypeError, KeyError, IndexError):
            return None
        numbers = all(type(n) is int and 0 <= n < _MOST for n in (found.revision, found.term))
        texts = all(type(t) is str for t in (found.cluster_id, found.epoch, found.saved_at))
        return found if numbers and texts else None


@dataclass(frozen=True, slots=True)
class Save:
    """A bookmark to write; `replaces` is one that was proved to be of another line though it does not look so."""

    watcher: str
    bookmark: SavedBookmark
    replaces: SavedBookmark | None = None


class RedisBookmarks:
    """The bookmarks of one installation; connects at the first call, reconnects by itself. Raises ValueError."""

    def __init__(self, url: str, clock: Clock, *, root: str = "/lrm", timeout: float = 1.0) -> None:
        """`url` as redis clients take it (ValueError if it is none); `timeout` seconds for each call."""
        self._clock = clock
        self._timeout = timeout
        self._prefix = f"{root.strip('/')}:bookmark:"
        self._client = Redis.from_url(
            url,
            protocol=2,
            # The timeout is ours: with one of its own the client sends by `asyncio.wait_for`, which up to Python 3.11
            # can swallow a cancellation, and then a daemon that stops waits for ever.
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),  # the next save is the retry
            decode_responses=False,
        )
        self._password = str(self._client.connection_pool.connection_kwargs.get("password") or "")

    def key(self, watcher: str) -> str:
        """Where a watcher's bookmark lies."""
        return self._prefix + watcher

    async def load(self, watcher: str) -> SavedBookmark | None:
        """The bookmark, None when there is none. Raises `RedisFailed`."""
        return (await self._load([self.key(watcher)]))[0]

    async def save(self, saves: Sequence[Save]) -> list[Outcome]:
        """Write bookmarks in one round trip, each judged on its own. Raises `RedisFailed`: then any may be written."""
        keys = [self.key(s.watcher) for s in saves]
        values = [v for s in saves for v in (s.bookmark.encode(), s.replaces.encode() if s.replaces else b"")]
        outcomes = await self._within(self._run([len(keys), *keys, EXPIRES_SECONDS, *values]))
        if not isinstance(outcomes, list) or len(outcomes) != len(saves):
            raise RedisFailed("redis answered the script that saves bookmarks with something else")
        return [_outcome(outcome) for outcome in outcomes]

    async def all(self) -> dict[str, SavedBookmark]:
        """Every bookmark of this installation, by watcher: one question for each thousand keys that Redis holds.

        Raises `RedisFailed`.
        """
        found: dict[str, SavedBookmark] = {}
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", self._prefix) + "*"
        cursor = 0
        while True:
            cursor, keys = await self._within(self._scan(cursor, pattern))
            names = [key.decode("utf-8", "backslashreplace") for key in keys if isinstance(key, bytes)]
            for name, saved in zip(names, await self._load(names), strict=True):
                if saved:
                    found[name.removeprefix(self._prefix)] = saved
            if not cursor:
                return found

    async def _scan(self, cursor: int, pattern: str) -> tuple[int, list[Any]]:
        following, keys = await self._client.scan(cursor, match=pattern, count=_SCAN_COUNT)
        return following, keys

    async def forget(self, watcher: str, bookmark: SavedBookmark) -> None:
        """Delete a bookmark if it still is this one. Raises `RedisFailed`."""
        await self._within(self._client.eval(_FORGET, 1, self.key(watcher), bookmark.encode()))

    async def aclose(self) -> None:
        """Close every connection; one whose peer hangs is left to the operating system."""
        with suppress(RedisFailed):
            await self._within(self._client.aclose())

    async def _run(self, arguments: Sequence[Any]) -> Any:
        """The script's answer; `arguments` are the number of keys, the keys, and the rest."""
        try:
            return await self._client.evalsha(_SAVE_SHA, *arguments)
        except NoScriptError:  # it was restarted, or another one has taken over
            return await self._client.eval(_SAVE, *arguments)

    async def _load(self, keys: Sequence[str]) -> list[SavedBookmark | None]:
        """The bookmarks at keys; to MGET a value of another kind is none."""

        async def ask() -> list[SavedBookmark | None]:
            values = zip(keys, await self._client.mget(keys), strict=True)
            return [SavedBookmark.decode(value) if isinstance(value, bytes) else None for _, value in values]

        return await self._within(ask()) if keys else []

    async def _within(self, call: Awaitable[T]) -> T:
        """A call's answer within the timeout; every failure is a `RedisFailed`."""
        try:
            async with self._clock.timeout(self._timeout):
                return await call
        except TimeoutError:
            raise RedisFailed(f"redis did not answer within {self._timeout:g} s") from None
        except RedisFailed:
            raise
        except Exception as error:  # noqa: BLE001 - a peer that speaks no Redis raises whatever its bytes lead to
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> RedisFailed:
        """Its refusals are told in its words (they say what to do), the rest by class; never a password."""
        said = f": {error}"[:200] if isinstance(error, ResponseError) else ""
        if self._password:
            said = said.replace(self._password, "***")
        return RedisFailed(f"redis: {type(error).__name__}{said}")


class ProcessBookmarks:
    """Bookmarks of an installation without Redis: they last as long as the process."""

    def __init__(self) -> None:
        self._saved: dict[str, SavedBookmark] = {}

    async def load(self, watcher: str) -> SavedBookmark | None:
        return self._saved.get(watcher)

    async def save(self, saves: Sequence[Save]) -> list[Outcome]:
        """A process is its own only writer, and its terms only grow."""
        self._saved |= {s.watcher: s.bookmark for s in saves}
        return ["saved"] * len(saves)

    async def all(self) -> dict[str, SavedBookmark]:
        return dict(self._saved)

    async def forget(self, watcher: str, bookmark: SavedBookmark) -> None:
        if self._saved.get(watcher) == bookmark:
            del self._saved[watcher]

    async def aclose(self) -> None:
        """Nothing is open."""


def _outcome(answer: Any) -> Outcome:
    match answer:
        case b"saved":
            return "saved"
        case b"behind":
            return "behind"
        case b"older term":
            return "older term"
    raise RedisFailed("redis answered the script that saves bookmarks with something else")
