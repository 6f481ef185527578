"""Logging in and out, and who am I."""

from __future__ import annotations

import orjson

from controllers.cml.simulator.accounts import User
from controllers.cml.simulator.bodies import Credentials
from controllers.cml.simulator.routing import Call, RefusalError, Reply, Route, ok


def _login(call: Call) -> tuple[User, str]:
    given = call.body(Credentials)
    machine = call.machine
    user = machine.directory.check(given.username, given.password)
    if user is None:
        raise RefusalError(403, "Authentication failed!")
    if machine.maintenance and not machine.admin_rights(user):
        raise RefusalError(403, "The system is in maintenance mode: only administrators may log in.")
    token = machine.directory.open_session(user, machine.clock.now())
    machine.record("user_activity", {"user_id": user.id, "action": "login"})
    return user, token


def authenticate(call: Call) -> Reply:
    return ok(_login(call)[1])


def auth_extended(call: Call) -> Reply:
    user, token = _login(call)
    return ok(
        {
            "username": user.username,
            "id": user.id,
            "token": token,
            "admin": call.machine.admin_rights(user),
            "error": None,
        }
    )


def authok(call: Call) -> Reply:
    return ok(f"OK: {call.user.username}")


def authentication(call: Call) -> Reply:
    return ok({"username": call.user.username, "id": call.user.id, "admin": call.admin})


def logout(call: Call) -> Reply:
    if call.flag("clear_all_sessions"):
        call.machine.directory.close_sessions(call.user.id)
    else:
        call.machine.directory.close_session(call.token)
    call.machine.record("user_activity", {"user_id": call.user.id, "action": "logout"})
    return ok(value=True)


def session_timeout(call: Call) -> Reply:
    return Reply(200, orjson.dumps(call.machine.session_timeout))


def set_session_timeout(call: Call) -> Reply:
    call.require_admin()
    text = call.params["timeout"]
    if not text.isdecimal() or not 300 <= int(text) <= 604800:
        raise RefusalError(400, "The timeout must be from 300 to 604800 seconds.")
    call.machine.session_timeout = int(text)
    return ok("OK")


ROUTES = (
    Route("POST", "/authenticate", authenticate, "anyone"),
    Route("POST", "/auth_extended", auth_extended, "anyone"),
    Route("GET", "/authok", authok),
    Route("GET", "/authentication", authentication, since=(2, 10)),
    Route("DELETE", "/logout", logout),
    Route("GET", "/web_session_timeout", session_timeout),
    Route("PATCH", "/web_session_timeout/{timeout}", set_session_timeout),
)
