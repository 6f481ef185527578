"""The labs' endpoints served over a `LabsWorld`: the same store, cache and CML, and a small client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from controllers.labs.openapi import OPERATIONS
from controllers.labs.routes import add_labs_routes
from equipment.api import FixedStatus, Served
from equipment.described import Described
from equipment.labs_world import LabsWorld
from lrm.api.app import Api, serve
from lrm.api.settings import ApiSettings
from lrm.client import Client
from lrm.fanout import Fanout
from lrm.offers import Offers


@asynccontextmanager
async def labs_api(world: LabsWorld, **settings: Any) -> AsyncIterator[Served]:
    """`settings` are the API's."""
    fanout, offers, status = Fanout(world.cache, world.clock), Offers(), FixedStatus()
    described = Described()
    client = Client(world.storage, world.registry, world.clock)
    api = Api(
        storage=world.storage,
        registry=world.registry,
        cache=world.cache,
        client=client,
        fanout=fanout,
        clock=world.clock,
        settings=ApiSettings(port=0, **settings),
        status=status,
        routes=(add_labs_routes, described),
        operations=OPERATIONS,
        offers=offers,
    )
    with offers.offering(world.sessions):
        async with serve(api) as site, aiohttp.ClientSession() as session:
            yield Served(site.url, api, world.storage, world.registry, world.cache, client, fanout, session, status)
    described.check()


def labs_path(rest: str = "", worker: str = "w1", region: str = "us-east-1") -> str:
    return f"/api/v1/workers/region/{region}/workers/{worker}/labs{rest}"
