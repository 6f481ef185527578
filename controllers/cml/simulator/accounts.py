"""Users, groups and sessions of one machine.

Promises: a token is an HS256 JWT with the server's `exp`, valid until then, until logout, or until told to expire; two
logins never share one (the `jti` is ours, the rest of the claims is CML's). Passwords are kept as given: this is a
simulator on loopback. Not promised: LDAP, password rules, resource pools.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import orjson

MAX_SESSIONS = 10_000
"""A client that logs in for every request must not eat the simulator's memory; the oldest session goes."""


@dataclass(slots=True, eq=False)
class User:
    """One account."""

    id: str
    username: str
    password: str
    admin: bool
    created: datetime
    modified: datetime
    fullname: str = ""
    description: str = ""
    email: str = ""
    groups: list[str] = field(default_factory=list)
    opt_in: bool | None = None
    tour_version: str = ""


@dataclass(slots=True, eq=False)
class Group:
    """A group; what it may do with labs is kept with the labs."""

    id: str
    name: str
    created: datetime
    modified: datetime
    description: str = ""
    members: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Directory:
    """Accounts by id, and the sessions that are open."""

    token_seconds: float
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    users: dict[str, User] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    sessions: dict[str, tuple[str, datetime]] = field(default_factory=dict)

    def add(self, username: str, password: str, when: datetime, *, admin: bool = False, **more: Any) -> User:
        user = User(str(uuid4()), username, password, admin, when, when, **more)
        self.users[user.id] = user
        return user

    def named(self, username: str) -> User | None:
        return next((u for u in self.users.values() if u.username == username), None)

    def check(self, username: str, password: str) -> User | None:
        """The user with this name and password."""
        user = self.named(username)
        if user is None or not hmac.compare_digest(user.password.encode(), password.encode()):
            return None
        return user

    def open_session(self, user: User, when: datetime) -> str:
        expires = when + timedelta(seconds=self.token_seconds)
        self._drop_expired(when)
        while len(self.sessions) >= MAX_SESSIONS:
            del self.sessions[next(iter(self.sessions))]
        token = self._sign(
            {
                "iss": "com.cisco.virl",
                "iat": int(when.timestamp()),
                "exp": int(expires.timestamp()),
                "sub": user.id,
                "jti": secrets.token_hex(8),
            }
        )
        self.sessions[token] = (user.id, expires)
        return token

    def user_of(self, token: str, when: datetime) -> User | None:
        """Whose session this is; None when it is unknown, ended or expired."""
        found = self.sessions.get(token)
        if found is None:
            return None
        user_id, expires = found
        if when >= expires:
            del self.sessions[token]
            return None
        return self.users.get(user_id)

    def close_session(self, token: str) -> None:
        self.sessions.pop(token, None)

    def close_sessions(self, user_id: str = "") -> int:
        """End every session, or those of one user; returns how many."""
        gone = [t for t, (owner, _) in self.sessions.items() if not user_id or owner == user_id]
        for token in gone:
            del self.sessions[token]
        return len(gone)

    def remove_user(self, user: User) -> None:
        self.close_sessions(user.id)
        del self.users[user.id]
        for group in self.groups.values():
            if user.id in group.members:
                group.members.remove(user.id)

    def _drop_expired(self, when: datetime) -> None:
        # Sessions are in order of their end, as all last equally long: the first one alive ends the search.
        for token, (_, expires) in list(self.sessions.items()):
            if expires > when:
                return
            del self.sessions[token]

    def _sign(self, claims: dict[str, Any]) -> str:
        head = _b64(orjson.dumps({"typ": "JWT", "alg": "HS256"}))
        body = _b64(orjson.dumps(claims))
        signature = hmac.new(self.key, head + b"." + body, hashlib.sha256).digest()
        return (head + b"." + body + b"." + _b64(signature)).decode()


def _b64(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")
