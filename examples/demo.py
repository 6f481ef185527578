"""The whole story in about a minute: YAML in, a worker Ready, its labs mirrored, students' labs run, all gone again.

`make demo` runs this against `lrm dev`: a real etcd, a real Redis, simulated AWS and CML, one daemon. It only uses what
a user has (the API, the EC2 API, the CML API), prints what it sees as it happens, and exits with 0 only if every
claim was observed and no process was left behind. A lab in a container is shown where a Docker engine answers
(LRM_DOCKER_HOST, DOCKER_HOST or its usual socket) and has, or can get, the image (LRM_DEMO_IMAGE, else busybox).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx
import orjson

from demo_stage import NotShown, Story, out, running

MANIFESTS = Path(__file__).parent / "manifests"
GROUP = "/apis/lab.neuroglia.io/v1"
WORKERS = f"{GROUP}/namespaces/default/labworkers"
RECORDS = f"{GROUP}/namespaces/default/labrecords"
REQUESTS = f"{GROUP}/namespaces/default/labinstancerequests"
USUAL_SOCKET = Path("/var/run/docker.sock")
IMAGE = "busybox:1.36"
WORKER = "ccna-1"
PATH_TO_READY = ["ProvisioningEC2", "EC2Ready", "Starting", "Licensing", "Ready"]
ROUTER = {
    "node_definition": "iol-xe",
    "y": 0,
    "interfaces": [{"id": "i0", "type": "physical", "label": "e0/0", "slot": 0}],
}
TOPOLOGY = {
    "lab": {"version": "0.3.0", "description": "Two routers back to back", "notes": ""},
    "nodes": [{"id": "n0", "label": "R1", "x": 0, **ROUTER}, {"id": "n1", "label": "R2", "x": 200, **ROUTER}],
    "links": [{"id": "l0", "n1": "n0", "i1": "i0", "n2": "n1", "i2": "i0"}],
}


class Cml:
    """A CML user with a browser: what happens on the worker behind lrm's back."""

    def __init__(self, url: str, password: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v0", timeout=10)
        token = (
            self.http.post("/authenticate", json={"username": "admin", "password": password}).raise_for_status().json()
        )
        self.http.headers["Authorization"] = f"Bearer {token}"

    def import_lab(self, title: str) -> str:
        reply = self.http.post("/import", params={"title": title}, json=TOPOLOGY).raise_for_status()
        return str(reply.json()["id"])

    def put(self, lab: str, verb: str) -> None:
        self.http.put(f"/labs/{lab}/{verb}").raise_for_status()

    def state(self, lab: str) -> str:
        reply = self.http.get(f"/labs/{lab}/state")
        return "" if reply.status_code == 404 else str(reply.raise_for_status().json())

    def delete(self, lab: str) -> None:
        self.http.delete(f"/labs/{lab}").raise_for_status()

    def titled(self, title: str) -> list[str]:
        """Ids of the labs of a title."""
        ids = self.http.get("/labs", params={"show_all": "true"}).raise_for_status().json()
        return [i for i in ids if self.http.get(f"/labs/{i}").raise_for_status().json()["lab_title"] == title]


def tell(story: Story, stack: dict[str, Any]) -> None:
    """The story itself. Raises `NotShown`."""
    environment = stack["environment"]
    with httpx.Client(base_url=stack["url"], timeout=15) as api:
        instance = worker_becomes_ready(story, api, environment)
        cml_url = environment["LRM_CML_URL_TEMPLATE"].format(
            instance_id=instance, name=WORKER, public_ip="", private_ip=""
        )
        cml = Cml(cml_url, environment["CML_PASSWORD"])
        with closing(cml.http):
            labs_are_mirrored(story, api, cml)
            a_student_gets_a_lab(story, api, cml)
        a_student_gets_a_container(story, api, environment)
        worker_goes(story, api, instance, environment)


def worker_becomes_ready(story: Story, api: httpx.Client, environment: dict[str, str]) -> str:
    story.chapter(f"1. POST {MANIFESTS.name}/labworker.yaml")
    post(story, api, (MANIFESTS / "labworker.yaml").read_text())
    seen = follow_phases(story, api, "Ready")
    missing = [p for p in PATH_TO_READY if p not in seen]
    if missing:
        raise NotShown(f"the worker went {' → '.join(seen)}, without {', '.join(missing)}")
    worker = api.get(f"{WORKERS}/{WORKER}").raise_for_status().json()
    instance = str(worker["status"]["ec2"]["instanceId"])
    live = live_instances(environment)
    if live != {instance: "running"}:
        raise NotShown(f"EC2 has {live}, not just {instance} running")
    story.claim(f"[bold]{WORKER}[/bold] is Ready on {instance}, CML {worker['status']['cml']['version']}, licensed")
    return instance


def labs_are_mirrored(story: Story, api: httpx.Client, cml: Cml) -> None:
    story.chapter("2. Somebody imports three labs in CML")
    labs = {title: cml.import_lab(title) for title in ("OSPF basics", "BGP at the edge", "IPv6 first steps")}
    story.until("three LabRecords", lambda: len(records(api)) == 3)
    for name, record in sorted(records(api).items()):
        status = record["status"]
        story.line(
            f"{name}: {status['title']!r}, {status['state']}, {status['nodeCount']} nodes, {status['linkCount']} link"
        )
    story.claim("three labs in CML, three LabRecords")

    story.chapter("3. One is started, one is deleted, behind lrm's back")
    ospf, bgp, ipv6 = labs["OSPF basics"], labs["BGP at the edge"], labs["IPv6 first steps"]
    cml.put(ospf, "start")
    record = story.until("the start of a lab", lambda: of_lab(api, ospf, "STARTED"))
    change = record["status"]["operationHistory"][-1]
    story.claim(
        f"OSPF basics: {change['previousState']} → {change['newState']}, in its history since {change['timestamp']}"
    )
    cml.delete(bgp)
    story.until("a record that goes with its lab", lambda: of_lab(api, bgp) is None)
    story.claim("BGP at the edge: gone from CML, so its record is gone")

    story.chapter(f"4. DELETE the record of {ospf[:8]}…: the lab itself goes (stop, wipe, delete)")
    name = of_lab(api, ospf)["metadata"]["name"]
    api.delete(f"{RECORDS}/{name}").raise_for_status()
    states = [cml.state(ospf)]

    def gone() -> bool:
        state = cml.state(ospf)
        if state != states[-1]:
            states.append(state)
            story.line(f"in CML: {state or 'not found'}")
        return not state and of_lab(api, ospf) is None

    story.until("a lab deleted through its record", gone)
    if cml.state(ipv6) == "" or of_lab(api, ipv6) is None:
        raise NotShown("the third lab should have been left alone")
    story.claim("OSPF basics: gone from CML and from lrm; IPv6 first steps untouched")


def a_student_gets_a_lab(story: Story, api: httpx.Client, cml: Cml) -> None:
    story.chapter("5. POST labinstancerequest.yaml: a student asks for a lab")
    post(story, api, (MANIFESTS / "labinstancerequest.yaml").read_text())
    request = until_phase(story, api, "ann-ospf", "Running")
    title = f"lrm-{request['metadata']['uid']}"
    labs = cml.titled(title)
    states = [cml.state(lab) for lab in labs]
    story.check(f"one lab of ann's on {WORKER}, STARTED", states == ["STARTED"], states)
    held = api.get(f"{WORKERS}/{WORKER}").raise_for_status().json()["status"].get("allocations", {})
    story.check("its place is reserved there", list(held) == [request["metadata"]["uid"]], held)
    story.line(f"ann works at {request['status']['accessUrl']}")
    stop(api, "ann-ospf")
    until_phase(story, api, "ann-ospf", "Completed")
    story.check("her lab is gone from CML", cml.titled(title) == [])

    def given_back() -> bool:
        return not api.get(f"{WORKERS}/{WORKER}").raise_for_status().json()["status"].get("allocations")

    story.until("a place that is given back", given_back)
    story.claim("and her place was given back")


def a_student_gets_a_container(story: Story, api: httpx.Client, environment: dict[str, str]) -> None:
    host = environment.get("LRM_DOCKER_HOST", "")
    story.chapter("6. POST labinstancerequest-container.yaml: another one asks for a container")
    if not host:
        story.line("not shown: no Docker engine answers here (LRM_DOCKER_HOST, DOCKER_HOST or its usual socket)")
        return
    image = os.environ.get("LRM_DEMO_IMAGE", IMAGE)
    post(story, api, (MANIFESTS / "labinstancerequest-container.yaml").read_text().replace(IMAGE, image))
    request = until_phase(story, api, "bob-web", "Running", "Failed", seconds=90)
    uid, status = request["metadata"]["uid"], request["status"]
    if status["phase"] == "Failed" and status["failure"]["reason"].startswith("Image"):
        story.line(f"not shown: the engine cannot get the image: {status['errorMessage']}")
        return
    story.check("bob's container is Running", status["phase"] == "Running", status.get("errorMessage"))
    said = httpx.get(status["accessUrl"], timeout=10).raise_for_status().text.strip()
    story.check(f"it answers at {status['accessUrl']}: {said!r}", said == "hello, bob", said)
    stop(api, "bob-web")
    until_phase(story, api, "bob-web", "Completed")
    with engine(host) as docker:
        query = {"all": "true", "filters": f'{{"label":["lrm/uid={uid}"]}}'}
        left = docker.get("/containers/json", params=query).raise_for_status().json()
        nets = docker.get("/networks", params={"filters": query["filters"]}).raise_for_status().json()
    story.check("his container and its network are gone", left == [] and nets == [], (left, nets))


def post(story: Story, api: httpx.Client, manifest: str) -> None:
    reply = api.post(GROUP, content=manifest, headers={"Content-Type": "application/yaml"})
    if reply.status_code != 200:
        raise NotShown(f"the manifest was refused: {reply.status_code} {reply.text}")
    for item in reply.json()["items"]:
        story.line(f"{item['kind']}/{item['name']} {item['result']}")


def stop(api: httpx.Client, name: str) -> None:
    patch = {"spec": {"desiredPhase": "Stopped"}}
    headers = {"Content-Type": "application/merge-patch+json"}
    api.patch(f"{REQUESTS}/{name}", content=orjson.dumps(patch), headers=headers).raise_for_status()


def until_phase(story: Story, api: httpx.Client, name: str, *phases: str, seconds: float = 30) -> dict[str, Any]:
    """A lab instance when it stands there; its phases are told as they pass."""
    told: list[str] = []

    def there() -> dict[str, Any] | None:
        request: dict[str, Any] = api.get(f"{REQUESTS}/{name}").raise_for_status().json()
        phase = request["status"]["phase"]
        if [phase] != told[-1:]:
            told.append(phase)
            story.line(f"{name}: {phase:<12} {reason(request['status'])}")
        return request if phase in phases else None

    found: dict[str, Any] = story.until(f"{name} {' or '.join(phases)}", there, seconds)
    return found


def engine_here() -> str:
    """Where a Docker engine answers; empty where none does."""
    named = os.environ.get("LRM_DOCKER_HOST") or os.environ.get("DOCKER_HOST", "")
    host = named or (f"unix://{USUAL_SOCKET}" if USUAL_SOCKET.exists() else "")
    if not host:
        return ""
    try:
        with engine(host) as docker:
            docker.get("/_ping").raise_for_status()
    except httpx.HTTPError:
        return ""
    return host


def engine(host: str) -> httpx.Client:
    """The engine's API; `host` as DOCKER_HOST has it."""
    socket = host.removeprefix("unix://") if host.startswith("unix://") else None
    base = "http://engine" if socket else host.replace("tcp://", "http://", 1)
    return httpx.Client(base_url=base, transport=httpx.HTTPTransport(uds=socket), timeout=10)


def worker_goes(story: Story, api: httpx.Client, instance: str, environment: dict[str, str]) -> None:
    story.chapter("7. DELETE the worker")
    api.delete(f"{WORKERS}/{WORKER}").raise_for_status()
    follow_phases(story, api, None)
    state = instance_states(environment).get(instance)
    if state not in {"terminated", None}:
        raise NotShown(f"{instance} is {state}, not terminated")
    story.claim(f"{instance} is terminated and the worker is gone")
    left = story.until("no record left", lambda: not records(api))
    story.claim("no LabRecord is left" if left else "")


def follow_phases(story: Story, api: httpx.Client, goal: str | None) -> list[str]:
    """Print the worker's phases as the watch tells them, until `goal` (None: until it is deleted)."""
    seen: list[str] = []
    query = {"watch": "true", "fieldSelector": f"metadata.name={WORKER}", "timeoutSeconds": "40"}
    before = time.monotonic()
    with api.stream("GET", WORKERS, params=query, timeout=httpx.Timeout(10, read=45)) as reply:
        for line in reply.raise_for_status().iter_lines():
            event = orjson.loads(line)
            if event["type"] == "ERROR":
                raise NotShown(f"the watch ended: {event['object']}")
            if event["type"] == "DELETED":
                if goal is None:
                    return seen
                raise NotShown("the worker is gone")
            status = event["object"].get("status", {})
            if event["type"] == "BOOKMARK" or status.get("phase") == (seen[-1] if seen else ""):
                continue
            now = time.monotonic()
            story.line(f"{status['phase']:<16} {reason(status)}  [dim]+{now - before:.1f} s[/dim]")
            before = now
            seen.append(status["phase"])
            if seen[-1] == goal:
                return [step["to"] for step in status["phaseHistory"]]
            if seen[-1] == "Failed":
                raise NotShown(f"the worker failed: {status}")
    raise NotShown(f"the worker did not get to {goal or 'its end'} within 40 s; last seen: {seen[-1:]}")


def reason(status: dict[str, Any]) -> str:
    ready = next((c for c in status.get("conditions", []) if c["type"] == "Ready"), None)
    return ready["reason"] if ready else ""


def records(api: httpx.Client) -> dict[str, dict[str, Any]]:
    items = api.get(RECORDS).raise_for_status().json()["items"]
    return {item["metadata"]["name"]: item for item in items}


def of_lab(api: httpx.Client, lab: str, state: str = "") -> Any:
    found = [r for r in records(api).values() if r["spec"]["labId"] == lab]
    return found[0] if found and (not state or found[0]["status"]["state"] == state) else None


def instance_states(environment: dict[str, str]) -> dict[str, str]:
    ec2 = boto3.client(
        "ec2",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )
    reservations = ec2.describe_instances()["Reservations"]
    return {i["InstanceId"]: i["State"]["Name"] for r in reservations for i in r["Instances"]}


def live_instances(environment: dict[str, str]) -> dict[str, str]:
    return {i: s for i, s in instance_states(environment).items() if s != "terminated"}


@contextmanager
def dev_stack(story: Story, folder: Path) -> Iterator[dict[str, Any]]:
    """`lrm dev` for as long as the block lasts; afterwards nothing that it started is running. Raises `NotShown`."""
    story.chapter("0. lrm dev")
    log = folder / "lrm-dev.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "lrm", "dev", "--data-dir", str(folder / "data")],
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env={**os.environ, **({"LRM_DOCKER_HOST": host} if (host := engine_here()) else {})},
        )
    pids: dict[str, int] = {"lrm dev": process.pid}
    try:
        if process.stdout is None or not any(line.startswith("ready ") for line in process.stdout):
            raise NotShown(f"lrm dev did not become ready:\n{log.read_text()[-2000:]}")
        stack = orjson.loads((folder / "data" / "dev.json").read_bytes())
        stack["environment"]["LRM_DOCKER_HOST"] = host
        pids |= stack["pids"]
        pids |= {f"child {pid}": pid for parent in list(pids.values()) for pid in children(parent)}
        story.line(f"ready at {stack['url']}: " + ", ".join(sorted(stack["pids"])))
        yield stack
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    left = {name: pid for name, pid in pids.items() if running(pid)}
    if left:
        raise NotShown(f"processes were left behind: {left}")
    story.claim(f"lrm dev has ended, and so have all {len(pids) - 1} processes that it started")


def children(pid: int) -> list[int]:
    """The child processes of a process, and theirs (Linux; elsewhere none are known)."""
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            found += [int(child), *children(int(child))]
    return found


def main() -> int:
    story = Story()
    out.print("[bold]lrm[/bold]: declare it in YAML, and it is made so, kept so, and cleaned up")
    with tempfile.TemporaryDirectory(prefix="lrm-demo-") as folder:
        data = Path(folder)
        try:
            with dev_stack(story, data) as stack:
                tell(story, stack)
        except (NotShown, httpx.HTTPError) as error:
            out.print(f"\n[bold red]not shown[/bold red]: {error}")
            for log in sorted((data / "data" / "logs").glob("lrm*.log")):
                out.print(f"\nthe end of {log.name}:\n{log.read_text()[-4000:]}", markup=False)
            return 1
    seconds = time.monotonic() - story.started
    out.print(f"\n[bold green]all {story.shown} claims were observed[/bold green] in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
