"""The simulator's control surface: what exists, faults, counters and settings, over HTTP below `/_shim`.

    GET /_shim/health
    GET /_shim/instances[/ID]      {"id", "account", "state", "launch", …}; `launch` is another one after each start
    PATCH /_shim/instances/ID      {"impaired": true}: its status checks fail
                                   {"cpu": 40, "memory": null}: what CloudWatch tells of it, percent; null is nothing
    DELETE /_shim/instances/ID     it vanishes, as if it had never been
    GET, POST, DELETE /_shim/faults, DELETE /_shim/faults/ID     see `faults`
    GET, DELETE /_shim/calls       calls received, by action; DELETE counts anew
    GET, PATCH /_shim/settings     {"delay": seconds, "describe_lag": seconds}

Called by tests, by demos, and by the CML simulator, which asks whether an instance runs.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from aiohttp import web

from controllers.aws.simulator.faults import Faults
from controllers.aws.simulator.instances import Instance
from controllers.aws.simulator.worlds import World, Worlds


class Control:
    """The handlers."""

    def __init__(self, worlds: Worlds, faults: Faults, calls: Counter[str], moto_url: str) -> None:
        self._worlds = worlds
        self._faults = faults
        self._calls = calls
        self._moto_url = moto_url

    def routes(self) -> list[web.RouteDef]:
        """What belongs to an application, before AWS's own paths."""
        return [
            web.get("/_shim/health", self._health),
            web.get("/_shim/instances", self._list_instances),
            web.get("/_shim/instances/{id}", self._get_instance),
            web.patch("/_shim/instances/{id}", self._patch_instance),
            web.delete("/_shim/instances/{id}", self._delete_instance),
            web.get("/_shim/faults", self._list_faults),
            web.post("/_shim/faults", self._add_fault),
            web.delete("/_shim/faults", self._clear_faults),
            web.delete("/_shim/faults/{id:[0-9]+}", self._remove_fault),
            web.get("/_shim/calls", self._get_calls),
            web.delete("/_shim/calls", self._clear_calls),
            web.get("/_shim/settings", self._get_settings),
            web.patch("/_shim/settings", self._patch_settings),
            web.route("*", "/_shim/{path:.*}", self._nothing),
        ]

    async def _nothing(self, _: web.Request) -> web.Response:
        return _missing()

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"ok": True, "moto": self._moto_url})

    async def _list_instances(self, _: web.Request) -> web.Response:
        return web.json_response([_shown(*found) for found in self._worlds.everywhere()])

    async def _get_instance(self, request: web.Request) -> web.Response:
        found = self._worlds.find(request.match_info["id"])
        return web.json_response(_shown(*found)) if found else _missing()

    async def _patch_instance(self, request: web.Request) -> web.Response:
        wish, found = await _json(request), self._worlds.find(request.match_info["id"])
        if set(wish) == {"cpu", "memory"} and all(_is_percentage(value) for value in wish.values()):
            done = found and found[0].instances.measure(found[1].id, cpu=wish["cpu"], memory=wish["memory"])
        elif set(wish) == {"impaired"} and isinstance(wish["impaired"], bool):
            done = found and found[0].instances.impair(found[1].id, impaired=wish["impaired"])
        else:
            raise web.HTTPBadRequest(text='{"impaired": true or false}, or {"cpu": …, "memory": …} in percent or null')
        return web.json_response({}) if done else _missing()

    async def _delete_instance(self, request: web.Request) -> web.Response:
        found = self._worlds.find(request.match_info["id"])
        return web.json_response({}) if found and found[0].instances.vanish(found[1].id) else _missing()

    async def _list_faults(self, _: web.Request) -> web.Response:
        return web.json_response(self._faults.list())

    async def _add_fault(self, request: web.Request) -> web.Response:
        try:
            fault = self._faults.add(await _json(request))
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        return web.json_response(fault.describe(), status=201)

    async def _clear_faults(self, _: web.Request) -> web.Response:
        self._faults.clear()
        return web.json_response({})

    async def _remove_fault(self, request: web.Request) -> web.Response:
        return web.json_response({}) if self._faults.remove(int(request.match_info["id"])) else _missing()

    async def _get_calls(self, _: web.Request) -> web.Response:
        return web.json_response(dict(sorted(self._calls.items())))

    async def _clear_calls(self, _: web.Request) -> web.Response:
        self._calls.clear()
        return web.json_response({})

    async def _get_settings(self, _: web.Request) -> web.Response:
        return web.json_response({"delay": self._worlds.delay, "describe_lag": self._worlds.describe_lag})

    async def _patch_settings(self, request: web.Request) -> web.Response:
        wish = await _json(request)
        for name, value in wish.items():
            if name not in ("delay", "describe_lag") or type(value) not in (int, float) or not 0 <= value <= 3600:
                raise web.HTTPBadRequest(text="delay and describe_lag, in seconds, from 0 to 3600")
        self._worlds.pace(**{name: float(value) for name, value in wish.items()})
        return await self._get_settings(request)


def _shown(world: World, instance: Instance) -> dict[str, Any]:
    """What `/_shim/instances` tells; `launch` is another one after each start."""
    state = instance.state_at(world.instances.now)
    return {
        "id": instance.id,
        "account": world.account,
        "region": instance.region,
        "state": state,
        "launch": f"{instance.started:.6f}",
        "public_ip": instance.public_ip if state == "running" else "",
        "private_ip": instance.private_ip if state != "terminated" else "",
        "client_token": instance.token,
        "tags": instance.tags,
    }


def _is_percentage(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 100)


def _missing() -> web.Response:
    return web.json_response({"error": "there is none of that name"}, status=404)


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        wish = json.loads(await request.read())
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"not JSON: {error}") from error
    if not isinstance(wish, dict):
        raise web.HTTPBadRequest(text="a JSON object is needed")
    return wish
