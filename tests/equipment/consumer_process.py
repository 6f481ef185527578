"""An event consumer as a process of its own, to be killed: every delivery becomes a line of a file.

`python -m equipment.consumer_process ENDPOINT ROOT REDIS_URL FILE`; SIGTERM is a clean stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

from equipment.widget import registry
from lrm.bookmarks import Bookmarks
from lrm.consumer import Delivery, EventConsumer
from lrm.election import StaticElection
from storage.clock import SystemClock
from storage.etcd import EtcdStorage
from storage.redis_bookmarks import RedisBookmarks


async def main(endpoint: str, root: str, redis_url: str, path: str) -> None:
    """Consume until SIGTERM."""
    clock = SystemClock()
    storage = EtcdStorage([endpoint], root=root)
    saved = RedisBookmarks(redis_url, clock, root=root)
    bookmarks = Bookmarks(saved, storage, clock, every=0.1)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def write(delivery: Delivery) -> None:
        os.write(file, f"{delivery.type} {delivery.revision} {delivery.name}\n".encode())

    consumer = EventConsumer("exports", write, storage, registry(root), clock, bookmarks)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    term = await StaticElection(storage, clock, root=root, lock_name="exports", identity=str(os.getpid())).acquire()
    tasks = [asyncio.create_task(bookmarks.run()), asyncio.create_task(consumer.run(term))]
    await stop.wait()
    await consumer.drain(5)
    for task in reversed(tasks):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await storage.aclose()
    await saved.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
