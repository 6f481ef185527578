"""The simulated AWS: an HTTP server that plays EC2's instances itself, with what CloudWatch tells of them, and passes
everything else on to moto.

Point `AWS_ENDPOINT_URL` at it. Signatures are not checked; the region and, from the key, the account (`worlds`) are
read from them. DescribeTags is about
instances only when it is filtered by their ids or by `resource-type`; else moto answers it. For tests and demos, on
loopback.
Called by `lrm dev` and by tests (`AwsShim.run`), and by `python -m controllers.aws.simulator`.
"""

from __future__ import annotations

import re
import tempfile
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import aiohttp
import structlog
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from controllers.aws.simulator import cloudwatch
from controllers.aws.simulator.control import Control
from controllers.aws.simulator.faults import Faults
from controllers.aws.simulator.instances import ACCOUNT, Instances
from controllers.aws.simulator.moto import ACCOUNT_HEADER, Catalogue, run_moto
from controllers.aws.simulator.wire import CloudError, answer, error_answer, flag, query_error, tree
from controllers.aws.simulator.worlds import World, Worlds
from storage.clock import Clock, SystemClock

_LARGEST = 16 * 1024 * 1024
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "content-length", "server", "date"}
)
_PASS_SECONDS = 60.0

_NAMES_ONE = re.compile(r"InstanceId|ResourceId|Filter\.\d+\.Value")
_INSTANCE_ID = re.compile(r"i-[0-9a-f]{8,17}")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShimOptions:
    """How the simulator is run. Without `data_dir` nothing is kept; without `moto_url` moto is started as a child."""

    host: str = "127.0.0.1"
    port: int = 0
    data_dir: Path | None = None
    moto_url: str = ""
    delay: float = 1.0
    """How long pending, stopping and shutting-down last, seconds."""
    describe_lag: float = 0.0
    """How long a new instance is unknown to describes, seconds."""
    amis: tuple[str, ...] = ()
    """Images that exist beside moto's and the demo's."""
    key_names: tuple[str, ...] = ()
    """Key pairs that exist beside moto's and the demo's."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A request, as far as it matters here; `parameters` only for EC2."""

    service: str
    region: str
    action: str
    parameters: Mapping[str, str]
    access_key: str
    authorization: str
    request_id: str
    content_type: str


class AwsShim:
    """A running simulator; made by `run`."""

    def __init__(self, options: ShimOptions, clock: Clock, session: aiohttp.ClientSession, moto_url: str) -> None:
        self.moto_url = moto_url
        self.url = ""
        self.faults = Faults()
        self.calls: Counter[str] = Counter()
        self.calls_in: Counter[tuple[str, str, str]] = Counter()
        """Calls by account, region and action."""
        self.worlds = Worlds(clock, options.data_dir, delay=options.delay, describe_lag=options.describe_lag)
        self._clock = clock
        self._session = session
        self._catalogue = Catalogue(session, moto_url, options.amis, options.key_names)

    @property
    def instances(self) -> Instances:
        """Those of the account of whoever does not say another one."""
        return self.worlds.of(ACCOUNT).instances

    @classmethod
    @asynccontextmanager
    async def run(cls, options: ShimOptions | None = None, *, clock: Clock | None = None) -> AsyncIterator[AwsShim]:
        """Start it, with moto unless that is given, and stop both at the end of the block."""
        options = options or ShimOptions()
        clock = clock or SystemClock()
        async with AsyncExitStack() as stack:
            logs = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrm-aws-")))
            moto_url = options.moto_url or await stack.enter_async_context(run_moto(logs / "moto.log", clock))
            session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    auto_decompress=False, timeout=aiohttp.ClientTimeout(total=_PASS_SECONDS), trust_env=False
                )
            )
            shim = cls(options, clock, session, moto_url.rstrip("/"))
            stack.callback(shim.worlds.close)
            # What a test or a demo has still open at the end is cut, not waited for.
            runner = web.AppRunner(shim._app(), auto_decompress=False, access_log=None, shutdown_timeout=0.1)
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            site = web.TCPSite(runner, options.host, options.port)
            await site.start()
            port = runner.addresses[0][1]
            shim.url = f"http://{options.host}:{port}"
            yield shim

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=_LARGEST)
        app.add_routes(Control(self.worlds, self.faults, self.calls, self.moto_url).routes())
        app.add_routes([web.route("*", "/{path:.*}", self._serve)])
        return app

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        call = _read_call(request, body)
        try:
            account = self.worlds.account_of(call.access_key)
        except CloudError as error:
            return _refuse(call, error)
        if call.action:
            self.calls[call.action] += 1
            self.calls_in[account, call.region, call.action] += 1
        fault = self.faults.take(call.action, call.region, account) if call.action else None
        if fault is not None and fault.kind != "slow-reply":
            await self._clock.sleep(fault.seconds)
        if fault is not None and fault.kind == "dropped":
            return _drop(request)
        if fault is not None and fault.refusal is not None:
            return _refuse(call, fault.refusal)
        reply = await self._carry_out(request, call, body, self.worlds.of(account))
        if fault is not None and fault.kind == "slow-reply":
            await self._clock.sleep(fault.seconds)
        return _drop(request) if fault is not None and fault.kind == "lost-reply" else reply

    async def _carry_out(self, request: web.Request, call: _Call, body: bytes, world: World) -> web.StreamResponse:
        if not call.service and call.action in world.api.actions | {"RunInstances": None}:
            return _refuse(call, CloudError("AuthFailure", "The request is not signed", 401))
        try:
            if (wanted := cloudwatch.about_instances(call.action, call.content_type, body)) is not None:
                return _json(call, world.metrics.get_metric_data(call.region, wanted))
            content = await self._simulate(call, world) if call.service == "ec2" else None
        except CloudError as error:
            return _refuse(call, error)
        if content is None:
            return await self._pass_on(request, call, body, world.account)
        return _xml(answer(call.action, call.request_id, content), 200)

    async def _simulate(self, call: _Call, world: World) -> dict[str, Any] | None:
        """The content of the answer to a call that is about instances; None for the others, which are moto's."""
        if call.action == "RunInstances":
            if (earlier := world.api.replayed(call.region, call.parameters)) is not None:
                return earlier
            await self._catalogue.check(call.parameters, call.authorization, world.account)
            _refuse_dry_run(call)
            return world.api.launch(call.region, call.parameters)
        about_instances = _about_instances(call)
        acts = world.api.actions.get(call.action)
        if call.action in ("CreateTags", "DeleteTags", "DescribeTags") and not about_instances:
            return None
        if acts is None:
            if about_instances:
                raise CloudError("UnsupportedOperation", f"The simulator does not play {call.action} on instances")
            return None
        _refuse_dry_run(call)
        return acts(call.region, tree(call.parameters))

    async def _pass_on(self, request: web.Request, call: _Call, body: bytes, account: str) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        headers[ACCOUNT_HEADER] = account
        target = f"{self.moto_url}{request.raw_path}"
        try:
            async with self._session.request(
                request.method, URL(target, encoded=True), headers=headers, data=body, allow_redirects=False
            ) as reply:
                content = await reply.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            _log.warning("moto does not answer", error=str(error))
            return _refuse(call, CloudError("Unavailable", "The simulator's moto does not answer", 503))
        if call.service == "sts" and reply.status == 200:
            self.worlds.assumed(call.parameters, content)
        passed = [(name, value) for name, value in reply.headers.items() if name.lower() not in _HOP_BY_HOP]
        return web.Response(status=reply.status, headers=CIMultiDict(passed), body=content)


def _refuse_dry_run(call: _Call) -> None:
    if flag(call.parameters, "DryRun"):
        raise CloudError("DryRunOperation", "Request would have succeeded, but DryRun flag is set.", 412)


def _read_call(request: web.Request, body: bytes) -> _Call:
    """Service and region from the signature's scope, the action from where each of AWS's protocols has it."""
    authorization = request.headers.get("Authorization", "")
    scope = re.search(r"Credential=([^/,\s]+)/\d+/([^/,\s]+)/([^/,\s]+)/aws4_request", authorization)
    access_key, region, service = scope.groups() if scope else ("", "", "")
    parameters: dict[str, str] = {}
    if "x-www-form-urlencoded" in request.headers.get("Content-Type", "") or request.method == "GET":
        said = body.decode("utf-8", "replace") if request.method == "POST" else request.query_string
        parameters = dict(parse_qsl(said, keep_blank_values=True))
    action = parameters.get("Action", "")
    if not action:
        target = request.headers.get("X-Amz-Target", "")
        operation = re.search(r"/operation/(\w+)$", request.path)
        action = target.rpartition(".")[2] or (operation.group(1) if operation else "")
    request_id = str(uuid.uuid4())
    return _Call(service, region, action, parameters, access_key, authorization, request_id, request.content_type)


def _about_instances(call: _Call) -> bool:
    """Whether a call names an instance, or asks for the tags of all."""
    names = call.parameters.items()
    if call.action == "DescribeTags" and ("Filter.1.Value.1", "instance") in names:
        return True
    return any(_NAMES_ONE.match(name) and _INSTANCE_ID.fullmatch(value) for name, value in names)


def _refuse(call: _Call, error: CloudError) -> web.Response:
    if call.service in ("ec2", ""):
        return _xml(error_answer(error, call.request_id), error.status)
    if call.service == "sts":
        return _xml(query_error(error, call.request_id), error.status)
    return web.json_response(
        {"__type": error.code, "message": error.message},
        status=error.status,
        headers={"x-amzn-requestid": call.request_id, "x-amzn-query-error": f"{error.code};Sender"},
    )


def _xml(content: bytes, status: int) -> web.Response:
    return web.Response(status=status, body=content, content_type="text/xml", charset="utf-8")


def _json(call: _Call, content: dict[str, Any]) -> web.Response:
    return web.json_response(content, headers={"x-amzn-requestid": call.request_id})


def _drop(request: web.Request) -> web.Response:
    """Cut the connection; nothing of the answer arrives."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _as_is(url: str) -> Any:
    from yarl import URL

    return URL(url, encoded=True)
