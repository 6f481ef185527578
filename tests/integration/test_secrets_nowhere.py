"""No secret is anywhere but where it was put: workers live, fail and end on a real daemon, then everything is searched.

Searched are etcd (all keys and values of all its history, and its files), Redis, the logs at debug level in both
formats with their tracebacks, the traces, every answer of the API, the audit file, and what `lrm config show` prints;
for each secret in plain, base64, URL-encoded and JSON-escaped. A control that was put into each place shows that the
search can find.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import aiohttp
import pytest
import redis

from controllers.aws.simulator import DEMO_AMI, DEMO_KEY, AwsShim, ShimOptions
from controllers.cml.simulator import Simulator
from equipment.api import tokens_file
from equipment.daemons import DaemonProcess
from equipment.leaky_plugin import LEAK_ANNOTATION, SPANS_ENV
from equipment.waiting import until
from equipment.workers_world import FAST_CML, REGION
from lrm.devservers import EtcdServer, RedisServer
from storage.clock import SystemClock
from storage.etcd import EtcdStorage

WORKERS = "/apis/lab.neuroglia.io/v1/namespaces/default/labworkers"

PASSWORD = 'Pl4nted "p\\ss/wörd+1'
WRONG_PASSWORD = 'Wr0ng "pl4nted" & p/ss+2'
TOKEN = "UGxhbnRlZCt0b2tlbi8z%3D+/a=="
BAD_TOKEN = "INVALID-pl4nted+tok/en4="
API_TOKEN = "pl4nted.api~token/+5="
UNKNOWN_TOKEN = "pl4nted.unknown~token/+6="
REDIS_PASSWORD = "r3dis:pl4nted@p/ss+7"
AWS_SECRET = "4ws/pl4nted+s3cret8"
PROFILE_SECRET = "pr0file/pl4nted+s3cret1"
TYPED = 'typed "s3cret" into/the+spec9'
SECRETS = (
    PASSWORD,
    WRONG_PASSWORD,
    TOKEN,
    BAD_TOKEN,
    API_TOKEN,
    UNKNOWN_TOKEN,
    REDIS_PASSWORD,
    AWS_SECRET,
    PROFILE_SECRET,
    TYPED,
)

CONTROL = 'Contr0l "v\\lue/äöü+0'
"""Put into an annotation, in every form: everybody may read that."""
CONTROL_NAME = "control-7f3a9c"
"""The name of the worker that has it."""

SPEED = {
    "LRM_WORKER_POLL_INTERVAL": "0.1",
    "LRM_WORKER_REST_INTERVAL": "0.3",
    "LRM_WORKER_TRACE_TIMEOUT": "60",
    "LRM_WORKER_GONE_AFTER": "1",
    "LRM_LABS_REFRESH_INTERVAL": "0.5",
    "LRM_METRICS_REFRESH_INTERVAL": "0.5",
    "LRM_SWEEP_INTERVAL": "0.5",
    "LRM_BOOKMARK_EVERY": "0.1",
}


def forms(secret: str) -> dict[str, set[bytes]]:
    """How a text may show up, by kind of writing."""
    raw = secret.encode()
    escaped = json.dumps(secret)[1:-1]
    told = {
        "plain": {secret},
        "JSON": {escaped, json.dumps(secret, ensure_ascii=False)[1:-1], json.dumps(escaped)[1:-1], repr(secret)[1:-1]},
        "URL": {quote(secret), quote(secret, safe=""), quote_plus(secret)},
    }
    found = {kind: {t.encode() for t in texts} for kind, texts in told.items()}
    found["base64"] = {
        piece for encode in (base64.b64encode, base64.urlsafe_b64encode) for piece in _inside(raw, encode)
    }
    return found


def _inside(raw: bytes, encode: Any) -> Iterator[bytes]:
    """The base64 of a text wherever it begins within a longer one, without the digits that its neighbours share."""
    for offset in range(3):
        text = bytes(encode(b"\0" * offset + raw))
        yield text[-(-offset * 8 // 6) if offset else 0 : (offset + len(raw)) * 8 // 6]


def around(haystack: bytes, secret: str) -> str:
    """Where a text is found first, for whoever must mend it."""
    places = [at for needles in forms(secret).values() for n in needles if (at := haystack.find(n)) >= 0]
    return haystack[max(0, min(places) - 200) : min(places) + 100].decode(errors="replace")


def search(haystack: bytes, secret: str) -> list[str]:
    """The kinds of writing in which a text is there."""
    return [kind for kind, needles in forms(secret).items() if any(needle in haystack for needle in needles)]


@pytest.mark.parametrize("secret", [*SECRETS, CONTROL])
def test_the_search_finds_every_form_in_the_midst_of_other_things(secret: str) -> None:
    basic = base64.b64encode(f"admin:{secret}".encode())
    texts = {
        "plain": f"a {secret} b",
        "JSON": json.dumps({"a": f"b {secret} c"}),
        "URL": f"https://h/p?token={quote(secret, safe='')}&x=1",
        "base64": f"Basic {basic.decode()}",
    }
    for kind, text in texts.items():
        assert kind in search(text.encode(), secret)
    assert search(b"nothing", secret) == []


@dataclass
class Scene:
    """A daemon with a plug-in that leaks, and everything that it may write to."""

    daemon: DaemonProcess
    shim: AwsShim
    cml: Simulator
    etcd: EtcdServer
    redis: RedisServer
    folder: Path
    places: dict[str, bytes] = field(default_factory=dict)
    said_before: int = 0

    async def ask(self, method: str, path: str, body: Any = None, token: str = API_TOKEN, **more: str) -> bytes:
        """The whole answer, kept for the search."""
        headers = {"Authorization": f"Bearer {token}", **more}
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
            session.request(method, self.daemon.url + path, json=body, headers=headers) as reply,
        ):
            answer = await reply.read()
            told = f"{reply.status} {dict(reply.headers)}\n".encode() + answer
            self.places["API"] = self.places.get("API", b"") + told
            return answer

    async def post(self, name: str, cml: dict[str, Any], *, account: str = "", **annotations: str) -> dict[str, Any]:
        aws = {"amiId": DEMO_AMI, "keyName": DEMO_KEY}
        spec = {"region": REGION, "account": account, "aws": aws, "cml": cml}
        metadata = {"name": name, "annotations": annotations}
        document = {"apiVersion": "lab.neuroglia.io/v1", "kind": "LabWorker", "metadata": metadata, "spec": spec}
        answer: dict[str, Any] = json.loads(await self.ask("POST", WORKERS, document))
        return answer

    async def reaches(self, name: str, words: str, seconds: float = 25) -> None:
        """Until the worker tells of something, anywhere in its status."""

        async def there() -> bool:
            return words in json.dumps(json.loads(await self.ask("GET", f"{WORKERS}/{name}")).get("status", {}))

        await until(there, f"{name}: {words}", seconds)

    async def patch(self, name: str, spec: dict[str, Any], **annotations: str) -> None:
        body = {"spec": spec, "metadata": {"annotations": annotations}}
        await self.ask("PATCH", f"{WORKERS}/{name}", body, **{"Content-Type": "application/merge-patch+json"})

    async def end(self, names: Iterable[str]) -> None:
        for name in names:
            await self.ask("DELETE", f"{WORKERS}/{name}")

        async def gone() -> bool:
            return not json.loads(await self.ask("GET", WORKERS))["items"]

        await until(gone, "the end of all workers", 40)

    async def restart(self, **settings: str) -> None:
        await self.daemon.end()
        self.said_before = len(self.daemon.log())
        await self.daemon.start_ready(**settings)

    def said(self) -> str:
        """What the daemon has logged since its last start."""
        return self.daemon.log()[self.said_before :]


@pytest.fixture
async def scene(server_dir: Path, tmp_path: Path, moto_url: str) -> AsyncIterator[Scene]:
    secret_files = {"wrong-password": WRONG_PASSWORD, "bad-token": BAD_TOKEN}
    for name, secret in secret_files.items():
        (tmp_path / name).write_text(secret + "\n")
    keys = f"aws_access_key_id = 111111111111\naws_secret_access_key = {PROFILE_SECRET}\n"
    (tmp_path / "credentials").write_text(f"[exams]\n{keys}")
    role = "arn:aws:iam::222222222222:role/lrm"
    accounts = {"exams": {"profile": "exams"}, "partner": {"profile": "exams", "role_arn": role}}
    digest = sha256(API_TOKEN.encode()).hexdigest()
    tokens = tokens_file(tmp_path, {"name": "the-admin", "sha256": digest, "role": "admin", "namespaces": ["*"]})
    async with (
        EtcdServer(server_dir / "etcd") as etcd,
        _guarded_redis(server_dir / "redis") as redis_server,
        AwsShim.run(ShimOptions(moto_url=moto_url, delay=0.1)) as shim,
        Simulator.run(replace(FAST_CML, password=PASSWORD, ec2_state_url=f"{shim.url}/_shim/instances")) as cml,
    ):
        daemon = DaemonProcess(
            server_dir,
            endpoint=etcd.endpoint,
            root="/lrm",
            plugins="controllers.plugin,equipment.leaky_plugin",
            AWS_ENDPOINT_URL=shim.url,
            AWS_REGION=REGION,
            AWS_ACCESS_KEY_ID="testing",
            AWS_SECRET_ACCESS_KEY=AWS_SECRET,
            AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"),
            LRM_AWS_ACCOUNTS=json.dumps(accounts),
            LRM_CML_URL_TEMPLATE=f"{cml.url}/{{instance_id}}",
            LRM_SECRETS_ALLOW=f"A_PASSWORD,A_TOKEN,{tmp_path}/*",
            LRM_REDIS_URL=f"redis://:{quote(REDIS_PASSWORD, safe='')}@127.0.0.1:{redis_server.port}/0",
            LRM_AUTH_TOKENS_FILE=str(tokens),
            LRM_AUDIT_FILE=str(tmp_path / "audit.log"),
            LRM_LOG_LEVEL="debug",
            LRM_COMPACT="false",
            A_PASSWORD=PASSWORD,
            A_TOKEN=TOKEN,
            **SPEED,
            **{SPANS_ENV: str(tmp_path / "spans")},
        )
        try:
            yield Scene(daemon, shim, cml, etcd, redis_server, tmp_path)
        finally:
            await daemon.end()


@asynccontextmanager
async def _guarded_redis(folder: Path) -> AsyncIterator[RedisServer]:
    """A Redis that wants a password; one that wants it from the start would not look ready to its starter."""
    async with RedisServer(folder) as server:
        with closing(redis.Redis(port=server.port)) as client:
            client.config_set("requirepass", REDIS_PASSWORD)
        yield server


async def _live(scene: Scene) -> None:
    """Everything that secrets are used for, done well and badly."""
    good = {"passwordFrom": {"env": "A_PASSWORD"}, "licenseTokenFrom": {"env": "A_TOKEN"}}
    written = {kind: min(texts).decode() for kind, texts in forms(CONTROL).items()}
    controls = {f"test.neuroglia.io/{kind}": text for kind, text in written.items()}
    await scene.post(CONTROL_NAME, good, **controls)
    await scene.reaches(CONTROL_NAME, '"phase": "Ready"')
    # A CML that repeats what it was sent is one to be careful with.
    invalid = json.dumps({"Input validation failed": [{"input": WRONG_PASSWORD, "message": f"no: {WRONG_PASSWORD}"}]})
    echoing = scene.cml.faults.add("status", path="/auth*", method="POST", status=403, description=invalid)
    await scene.post("wrong-password", {"passwordFrom": {"file": str(scene.folder / "wrong-password")}})
    await scene.reaches("wrong-password", "CredentialsRefused")
    del scene.cml.faults.faults[echoing.id]
    bad = {**good, "licenseTokenFrom": {"file": str(scene.folder / "bad-token")}}
    await scene.post("bad-token", bad)
    await scene.reaches("bad-token", "RegistrationFailed")
    echoing = scene.cml.faults.add(
        "status", path="/licensing/registration", method="POST", status=400, description=f"bad: {BAD_TOKEN}"
    )
    await scene.post("bad-token-told", bad)
    await scene.reaches("bad-token-told", "RegistrationRefused")
    del scene.cml.faults.faults[echoing.id]
    message = f"Credential={PROFILE_SECRET} was sent"
    denied = {"action": "AssumeRole", "fault": "error", "code": "AccessDenied", "message": message, "status": 403}
    scene.shim.faults.add({**denied, "times": 2})
    for account in ("exams", "partner"):
        await scene.post(account, {}, account=account)
    await scene.reaches("partner", "cannot be assumed")
    for account in ("exams", "partner"):
        await scene.reaches(account, '"instanceId"', 40)
    await scene.post("forbidden", {"passwordFrom": {"env": "AWS_SECRET_ACCESS_KEY"}})
    await scene.reaches("forbidden", "SecretUnavailable")


async def _misuse(scene: Scene) -> None:
    """Secrets where they do not belong, by people and by a plug-in."""
    refused = await scene.post("typed", {"password": TYPED})
    assert refused["code"] == 422, refused
    unknown = json.loads(await scene.ask("GET", WORKERS, token=UNKNOWN_TOKEN))
    assert unknown["code"] == 401
    message = f"Credential={AWS_SECRET}"
    refusal = scene.shim.faults.add(
        {"action": "*", "fault": "error", "code": "AuthFailure", "message": message, "status": 401, "times": 3}
    )
    await until(lambda: refusal.hits >= 3, "EC2's refusals")
    await scene.patch(CONTROL_NAME, {"maxConcurrentLabs": 3}, **{LEAK_ANNOTATION: "now"})
    await until(lambda: "a mistake of a plug-in's" in scene.said(), "the plug-in's mistake")


async def _gather(scene: Scene) -> dict[str, bytes]:
    """Everything that can be read, by place."""
    places = scene.places
    for path in await _paths(scene):
        await scene.ask("GET", path)
    storage = EtcdStorage([scene.etcd.endpoint], root="/lrm", instance="reader", clock=SystemClock())
    try:
        head, history = await storage.current_revision(), b""
        async with storage.watch("/", 0) as watch:
            async for batch in watch:
                history += b"".join(e.entry.key.encode() + b"\n" + e.entry.value + b"\n" for e in batch.events)
                if batch.revision >= head:
                    break
        page = await storage.list("/")
        places["etcd"] = history + b"".join(e.key.encode() + e.value for e in page.entries)
    finally:
        await storage.aclose()
    with closing(redis.Redis(port=scene.redis.port, password=REDIS_PASSWORD)) as client:
        keys = [bytes(key) for key in client.scan_iter()]
        places["Redis"] = b"".join(key + b"\n" + bytes(client.get(key) or b"") for key in keys)
    shown = subprocess.run(
        [sys.executable, "-m", "lrm", "config", "show"], env=scene.daemon.environment, capture_output=True, check=True
    )
    places["config"] = shown.stdout + shown.stderr
    await scene.daemon.end()
    places["logs"] = scene.daemon.log().encode()
    places["traces"] = (scene.folder / "spans").read_bytes()
    places["audit"] = (scene.folder / "audit.log").read_bytes()
    await scene.etcd.stop()
    files = [p.read_bytes().rstrip(b"\0") for p in scene.etcd.data_dir.rglob("*") if p.is_file()]
    places["etcd's files"] = b"".join(files)
    return places


async def _paths(scene: Scene) -> list[str]:
    """Every list of every kind, the flat ones, the documents, and the states that the daemon tells."""
    paths = ["/metrics", "/version", "/livez", "/readyz", "/api", "/apis", "/openapi/v3", "/api/v1/events"]
    paths += ["/api/lab-instances/", f"/api/v1/workers/region/{REGION}/workers"]
    words = ("health", "ready", "status", "metrics", "leader", "bookmarks", "finalizers")
    paths += [f"/api/status/{word}" for word in words]
    for group in json.loads(await scene.ask("GET", "/apis"))["groups"]:
        for version in group["versions"]:
            base = f"/apis/{version['groupVersion']}"
            resources = json.loads(await scene.ask("GET", base))["resources"]
            paths += [base, *(f"{base}/{r['name']}" for r in resources if "/" not in r["name"])]
    documents = json.loads(await scene.ask("GET", "/openapi/v3"))["paths"]
    return [*paths, *(d["serverRelativeURL"] for d in documents.values())]


async def test_no_secret_is_anywhere_but_where_it_was_put(scene: Scene) -> None:
    await scene.daemon.start_ready()
    await _live(scene)
    await _misuse(scene)
    names = [CONTROL_NAME, "wrong-password", "bad-token", "bad-token-told", "forbidden", "exams", "partner"]
    for path in await _paths(scene):
        await scene.ask("GET", path)
    for what in ("Traceback", '"level":"debug"'):
        assert what in scene.said(), what
    await scene.restart(LRM_LOG_FORMAT="console")
    await until(lambda: "a mistake of a plug-in's" in scene.said(), "the plug-in's mistake, for people")
    assert "Traceback" in scene.said()
    await scene.patch(CONTROL_NAME, {"desiredPhase": "Stopped"})
    await scene.reaches(CONTROL_NAME, '"phase": "Stopped"')
    await scene.end(names)
    places = await _gather(scene)

    controls = dict.fromkeys(("etcd", "etcd's files", "API", "logs", "traces", "audit"), CONTROL_NAME)
    controls |= {"Redis": "bookmark:workers", "config": "A_PASSWORD"}
    assert places.keys() == controls.keys()
    for place, control in controls.items():
        assert control.encode() in places[place], f"the search looks into {place}"
    for place in ("etcd", "API", "etcd's files"):
        assert {"JSON", "URL", "base64"} <= set(search(places[place], CONTROL)), f"every form can be found in {place}"
    for place, text in places.items():
        for secret in SECRETS:
            assert not search(text, secret), f"{secret} is in {place}: …{around(text, secret)}…"
