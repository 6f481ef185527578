"""The AWS accounts that the settings name: their credentials, and boto3's clients in each of them.

Promises: an account's name means what `LRM_AWS_ACCOUNTS` says and nothing else: one that is not there is refused, and
a profile without credentials of its own never becomes the daemon's own account. Nobody is asked in a region that may
not be named, and memory follows what is asked: a client that nobody has used for long goes. A role's credentials are
got at the first call and renewed before they end, in the thread of the call that needs them. Credentials that AWS
refuses are read anew, at most every 30 s, so that a file that somebody has renewed is taken without a restart. No
account waits for another's credentials. Called by `controllers.aws.calls`, in its threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import CredentialProvider, CredentialResolver, DeferredRefreshableCredentials
from botocore.exceptions import ClientError, ProfileNotFound

from controllers.aws.errors import (
    AwsAccountForbidden,
    AwsAuthError,
    AwsBadInput,
    AwsError,
    AwsNotFound,
    AwsServerError,
    AwsUnavailable,
    AwsUnknownAccount,
    AwsUnknownRegion,
    AwsWrongAccount,
    Effect,
    from_botocore,
)
from controllers.aws.parsing import Parsers
from controllers.aws.place import Place
from controllers.aws.regions import LOADER, known_regions
from controllers.aws.settings import AwsAccount
from storage.clock import Clock

_CREDENTIALS_KEPT = 30.0
"""Seconds before credentials are read again, however often AWS refuses them."""
_CLIENTS_KEPT = 900.0
"""Seconds for which a client that is not used stays when others are made: each takes 1 to 2 MB."""
_SESSION_NAME = "lrm"
"""Under which the account's own log of calls shows who assumed the role."""
_PROFILES_OWN = frozenset(
    {
        "assume-role",
        "assume-role-with-web-identity",
        "config-file",
        "custom-process",
        "login",
        "shared-credentials-file",
        "sso",
    }
)
"""How botocore gets what the profile itself says. All else, of which it knows ever more, may be the daemon's own."""
_STS = Config(connect_timeout=2, read_timeout=3, retries={"mode": "standard", "total_max_attempts": 1})
"""Together less than a creating call may take: its signature waits for a role's credentials."""

# It would tell with its traceback each failure that is raised to whoever made the call, and told there once.
logging.getLogger("botocore.credentials").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Making:
    """How a client is made; `prepare` is called with a new one."""

    config: Config
    prepare: Callable[[Any], None]


class Accounts:
    """All of them, for all services of a daemon; the methods are for any thread, and only `client` waits."""

    def __init__(
        self,
        accounts: Mapping[str, AwsAccount],
        clock: Clock,
        *,
        regions: Collection[str] = (),
        endpoint_url: str | None = None,
    ) -> None:
        """`regions`: those that may be named; none: all that botocore knows."""
        self._regions = frozenset(regions) or known_regions()
        self._meanings = dict(accounts)
        self._accounts = {
            name: _Account(meaning, clock, endpoint_url) for name, meaning in {"": None, **accounts}.items()
        }

    @property
    def names(self) -> frozenset[str]:
        """Of all accounts, the daemon's own, which is empty, included."""
        return frozenset(self._accounts)

    def knows(self, place: Place) -> bool:
        """Whether the account has a meaning and the region may be named."""
        return place.account in self._accounts and place.region in self._regions

    def check(self, place: Place) -> None:
        """Raise `AwsUnknownAccount` or `AwsUnknownRegion` where nobody may be asked."""
        if place.account not in self._accounts:
            message = f"the settings know no AWS account {place.account!r} (LRM_AWS_ACCOUNTS)"
            raise AwsUnknownAccount("UnknownAccount", message, place=place)
        if place.region not in self._regions:
            message = f"{place.region!r} is not among the AWS regions that may be named (LRM_AWS_REGIONS)"
            raise AwsUnknownRegion("UnknownRegion", message, place=place)

    def check_named(self, place: Place, namespace: str) -> None:
        """Raise `AwsAccountForbidden` where objects of the namespace may not name the account."""
        meaning = self._meanings.get(place.account)
        if meaning is not None and not meaning.serves(namespace):
            message = f"namespace {namespace!r} may not name the AWS account {place.account!r} (LRM_AWS_ACCOUNTS)"
            raise AwsAccountForbidden("AccountForbidden", message, place=place)

    def client(self, place: Place, service: str, effect: Effect, making: Making) -> Any:
        """The client of a service for calls of this class in a place. Raises `AwsError` and what botocore raises."""
        return self._of(place).client(place, service, effect, making)

    def refused(self, place: Place) -> None:
        """Have the next call read the account's credentials anew: boto3 reads a file once."""
        self._of(place).forget()

    def close(self) -> None:
        """Close idle connections."""
        for account in self._accounts.values():
            account.close()

    def _of(self, place: Place) -> _Account:
        self.check(place)
        return self._accounts[place.account]


_Key = tuple[str, str, Effect]
"""Of a client: region, service, class of calls."""


class _Account:
    """One of them: a session, and a client for each region, service and class of calls."""

    def __init__(self, meaning: AwsAccount | None, clock: Clock, endpoint_url: str | None) -> None:
        self._meaning = meaning
        self._clock = clock
        self._endpoint_url = endpoint_url
        self._signing = threading.Lock()
        """Held while a session or a client is made, for as long as a profile's program or STS takes."""
        self._lock = threading.Lock()
        """Held for a moment, while what is kept changes."""
        self._session: boto3.Session | None = None
        self._number = ""
        """Of the account whose credentials the session has; empty unless the settings say one."""
        self._since = 0.0
        self._clients: dict[_Key, Any] = {}
        self._used: dict[_Key, float] = {}
        """When each was asked for last, monotonic."""

    def client(self, place: Place, service: str, effect: Effect, making: Making) -> Any:
        key = (place.region, service, effect)
        client = self._kept(key)
        if client is not None:
            return client
        with self._signing:
            client = self._kept(key)  # somebody may have made it meanwhile
            if client is None:
                client = self._made(key, place, making)
            return client

    def _kept(self, key: _Key) -> Any:
        with self._lock:
            self._used[key] = self._clock.monotonic()
            return self._clients.get(key)

    def _made(self, key: _Key, place: Place, making: Making) -> Any:
        session = self._session
        if session is None:
            session = self._sign_in(place)
            number = self._number_of(session, place)
            with self._lock:
                self._session, self._number, self._since = session, number, self._clock.monotonic()
        if self._meaning is not None and self._number != self._meaning.number:
            message = f"the credentials are those of account {self._number}, and not of {self._meaning.number}"
            raise AwsWrongAccount("WrongAccount", message, place=place)
        create: Any = session.client  # the stubs know one overload for each service, and no name of any
        region, service, _ = key
        client = create(service, region_name=region, endpoint_url=self._endpoint_url, config=making.config)
        making.prepare(client)
        with self._lock:
            if self._session is session:  # else its credentials were refused meanwhile: it serves this call alone
                self._drop_unused()
                self._clients[key] = client
        return client

    def _drop_unused(self) -> None:
        oldest = self._clock.monotonic() - _CLIENTS_KEPT
        self._used = {key: at for key, at in self._used.items() if at >= oldest}
        # A call under way may still have one: its connections close when nobody has it.
        self._clients = {key: client for key, client in self._clients.items() if key in self._used}

    def forget(self) -> None:
        """Sign in anew at the next call, unless that was done just now. Calls under way end with what they have."""
        with self._lock:
            if self._clock.monotonic() - self._since >= _CREDENTIALS_KEPT:
                self._session = None
                self._clients.clear()

    def close(self) -> None:
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()

    def _sign_in(self, place: Place) -> boto3.Session:
        meaning = self._meaning
        if meaning is None:
            return boto3.Session(botocore_session=_core())
        core = _core(meaning.profile)
        if meaning.profile:
            _check_profile(core, meaning.profile, place)
        if meaning.role_arn:
            role = _Role(core, meaning, place, self._endpoint_url)
            core = _core(meaning.profile)
            core.register_component("credential_provider", CredentialResolver([role]))
        return boto3.Session(botocore_session=core)

    def _number_of(self, session: boto3.Session, place: Place) -> str:
        """What STS says of a profile's credentials, where that matters. Raises `AwsError`; nothing else was sent."""
        meaning = self._meaning
        if meaning is None or not meaning.number or meaning.role_arn:  # a role's number is in its name
            return meaning.number if meaning is not None else ""
        operation = "GetCallerIdentity"
        try:
            client = session.client("sts", region_name=place.region, endpoint_url=self._endpoint_url, config=_STS)
            try:
                number: str = client.get_caller_identity()["Account"]
            finally:
                client.close()
        except Exception as error:  # noqa: BLE001 - urllib3's and socket's own get through botocore
            told = from_botocore(error, Effect.READ, operation=operation, place=place)
            kind = AwsUnavailable if isinstance(told, AwsServerError) else type(told)
            raise kind(told.code, told.message, operation=operation, place=place, request_id=told.request_id) from None
        return number


class _Role(CredentialProvider):
    """The credentials of a role, assumed with those of `source` when they are needed and again before they end."""

    METHOD = "assume-role"

    def __init__(
        self, source: botocore.session.Session, account: AwsAccount, place: Place, endpoint_url: str | None
    ) -> None:
        super().__init__(source)
        self._source = source
        self._account = account
        self._place = place
        self._endpoint_url = endpoint_url

    def load(self) -> DeferredRefreshableCredentials:
        return DeferredRefreshableCredentials(self._assume, self.METHOD)

    def _assume(self) -> dict[str, str]:
        """New credentials, as botocore wants them. Raises `AwsError`; the call that needed them was not sent."""
        request = {"RoleArn": self._account.role_arn, "RoleSessionName": _SESSION_NAME}
        if self._account.external_id:
            request["ExternalId"] = self._account.external_id
        try:
            client: Any = self._source.create_client(
                "sts", region_name=self._place.region, endpoint_url=self._endpoint_url, config=_STS
            )
            try:
                given = client.assume_role(**request)["Credentials"]
                return {
                    "access_key": given["AccessKeyId"],
                    "secret_key": given["SecretAccessKey"],
                    "token": given["SessionToken"],
                    "expiry_time": given["Expiration"].isoformat(),
                }
            finally:
                client.close()
        except Exception as error:  # noqa: BLE001 - urllib3's and socket's own get through botocore
            raise self._told(error) from None

    def _told(self, error: Exception) -> AwsError:
        told = from_botocore(error, Effect.READ, operation="AssumeRole", place=self._place)
        kind = type(told)
        if isinstance(told, AwsBadInput | AwsNotFound):
            kind = AwsAuthError
        elif isinstance(told, AwsServerError):
            kind = AwsUnavailable  # what was to be signed was not sent
        message = f"the role {self._account.role_arn} cannot be assumed"
        if isinstance(told, AwsAuthError) or not isinstance(error, ClientError):
            message += f": {told.message}"  # else it is AWS's own text, which quotes requests
        return kind(told.code, message, operation="AssumeRole", place=self._place, request_id=told.request_id)


def accounts_of(
    accounts: Accounts | Mapping[str, AwsAccount] | None, clock: Clock, endpoint_url: str | None
) -> Accounts:
    """Those that are shared, or some of a service's own."""
    return accounts if isinstance(accounts, Accounts) else Accounts(accounts or {}, clock, endpoint_url=endpoint_url)


def _core(profile: str = "") -> botocore.session.Session:
    core = botocore.session.Session(profile=profile or None)
    core.register_component("data_loader", LOADER)
    core.register_component("response_parser_factory", Parsers())
    return core


def _check_profile(core: botocore.session.Session, profile: str, place: Place) -> None:
    """Raise `AwsAuthError` unless the profile has credentials of its own."""
    try:
        found = core.get_credentials()
    except ProfileNotFound:
        raise AwsAuthError("ProfileNotFound", f"there is no profile {profile!r}", place=place) from None
    if found is None or found.method not in _PROFILES_OWN:
        message = f"the profile {profile!r} has no credentials of its own"
        raise AwsAuthError("NoCredentialsError", message, place=place)
