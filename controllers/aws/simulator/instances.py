"""The life of simulated EC2 instances, kept in a small database so that they outlive a restart.

Promises: a client token with equal parameters gives the same reservation in its present state, for as long as EC2
would know it, and with others `IdempotentParameterMismatch`; a call is carried out wholly or not at all, and is on disk
before it is answered (the file survives a killed process, not a power cut). No method waits, so on one event loop
calls cannot overlap. States follow from the clock: no timer runs.
Called by `controllers.aws.simulator.answers`.
"""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from controllers.aws.simulator.wire import CloudError
from storage.clock import Clock

ACCOUNT = "123456789012"
"""The account of whoever does not say another one."""

CODES = {"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64, "stopped": 80}
_BECOMES = {"pending": "running", "stopping": "stopped", "shutting-down": "terminated"}
_ENDED_SHOWN = 3600.0
"""How long a terminated instance can still be described, seconds: about an hour, as in EC2."""
_TOKEN_KEPT = 24 * 3600.0
"""How long the client token of a terminated instance is remembered, seconds."""
_MAX_TAGS = 50
_ID = re.compile(r"i-[0-9a-f]{8,17}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a launch said, apart from its tags."""

    image_id: str
    instance_type: str
    key_name: str = ""
    subnet_id: str = ""
    group_ids: tuple[str, ...] = ()
    public_ip: bool = True
    profile: str = ""
    root_device: str = "/dev/sda1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One instance as of the last call that changed it; times are POSIX seconds. `state_at` says what it is now."""

    id: str
    region: str
    sequence: int
    reservation: str
    launch: Launch
    token: str
    fingerprint: str
    """Of the parameters that came with the token."""
    state: str
    due: float
    """When a passing state becomes the next one."""
    created: float
    visible: float
    """From when on it can be described: EC2 is not at once of one mind."""
    started: float
    public_ip: str
    private_ip: str
    volume: str
    reason: str = ""
    transition: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    impaired: bool = False
    vanished: bool = False
    cpu: float | None = 5.0
    """What CloudWatch tells of its processor, percent."""
    memory: float | None = None
    """What an agent on it tells CloudWatch of its memory, percent; None without an agent."""

    def state_at(self, now: float) -> str:
        """The state at a time not before the last call."""
        return _BECOMES.get(self.state, self.state) if now >= self.due else self.state

    def ended_since(self, now: float) -> float | None:
        """For how many seconds it has been terminated; None while it is not."""
        return now - self.due if self.state_at(now) == "terminated" else None


class Instances:
    """All instances of an account. `delay` is how long passing states last, `describe_lag` how long launches hide."""

    def __init__(
        self, clock: Clock, folder: Path | None, *, delay: float, describe_lag: float = 0.0, account: str = ACCOUNT
    ) -> None:
        self._clock = clock
        self.account = account
        self.delay = delay
        self.describe_lag = describe_lag
        self._file = _open(folder)
        self._all = {
            instance.id: instance
            for instance in sorted(
                (_decode(record) for (record,) in self._file.execute("SELECT record FROM instances")),
                key=lambda i: i.sequence,
            )
        }
        self._addresses = {a for i in self._all.values() for a in (i.public_ip, i.private_ip)}
        self._next = 1 + max((i.sequence for i in self._all.values()), default=0)
        self._forget()

    def close(self) -> None:
        self._file.close()

    @property
    def now(self) -> float:
        return self._clock.now().timestamp()

    def describable(self, region: str, ids: Collection[str] = ()) -> list[Instance]:
        """Those that EC2 would describe, oldest first; raises when one of `ids` is not among them."""
        now = self.now
        if ids:
            return self._known(region, ids, now, shown=True)
        return [i for i in self._all.values() if i.region == region and self._shown(i, now)]

    def everywhere(self) -> Iterator[Instance]:
        """All that exist, the terminated ones included, in every region."""
        now = self.now
        return (i for i in self._all.values() if self._exists(i, now))

    def find(self, instance_id: str) -> Instance | None:
        """One instance of any region, however new."""
        instance = self._all.get(instance_id)
        return instance if instance is not None and self._exists(instance, self.now) else None

    def replay(self, region: str, token: str, fingerprint: str) -> list[Instance]:
        """The reservation of an earlier launch with this token; none when there was none, or without a token."""
        if not token:
            return []
        same = [i for i in self._all.values() if i.region == region and i.token == token]
        if any(i.fingerprint != fingerprint for i in same):
            raise CloudError(
                "IdempotentParameterMismatch",
                "The client token you have provided is associated with a resource with different parameters.",
            )
        return same

    def run(
        self, region: str, launch: Launch, tags: Mapping[str, str], *, count: int, token: str, fingerprint: str
    ) -> list[Instance]:
        """Launch, or replay, a reservation."""
        if earlier := self.replay(region, token, fingerprint):
            return earlier
        self._forget()
        check_tags(tags)
        now = self.now
        reservation = f"r-{_hex()}"
        new: list[Instance] = []
        for _ in range(count):
            instance = Instance(
                id=f"i-{_hex()}",
                region=region,
                sequence=self._next + len(new),
                reservation=reservation,
                launch=launch,
                token=token,
                fingerprint=fingerprint,
                state="pending",
                due=now + self.delay,
                created=now,
                visible=now + self.describe_lag,
                started=now,
                public_ip=self._address("198.18", new) if launch.public_ip else "",
                private_ip=self._address("172.31", new),
                volume=f"vol-{_hex()}",
                tags=dict(tags),
            )
            new.append(instance)
        self._save(new)
        self._next += len(new)
        return new

    def start(self, region: str, ids: Collection[str]) -> list[tuple[str, Instance]]:
        """Start stopped instances; each with the state it was in before."""
        now = self.now
        changed = []
        for instance in self._known(region, ids, now):
            state = instance.state_at(now)
            if state == "stopped":
                # Stopping gave the public address away; starting brings another one.
                public = self._address("198.18", [instance]) if instance.launch.public_ip else ""
                after = replace(
                    instance,
                    state="pending",
                    due=now + self.delay,
                    started=now,
                    public_ip=public,
                    reason="",
                    transition="",
                )
            elif state in ("pending", "running"):
                after = instance
            else:
                raise CloudError(
                    "IncorrectInstanceState",
                    f"The instance '{instance.id}' is not in a state from which it can be started.",
                )
            changed.append((state, after))
        self._save(after for _, after in changed)
        return changed

    def stop(self, region: str, ids: Collection[str]) -> list[tuple[str, Instance]]:
        """Stop running instances; each with the state it was in before."""
        return self._end(region, ids, "stopping", "stopped", refused=("pending", "shutting-down", "terminated"))

    def terminate(self, region: str, ids: Collection[str]) -> list[tuple[str, Instance]]:
        """Terminate instances; each with the state it was in before."""
        return self._end(region, ids, "shutting-down", "terminated", refused=())

    def tag(self, region: str, ids: Collection[str], tags: Mapping[str, str]) -> None:
        """Add or overwrite tags."""
        check_tags(tags)
        after = [replace(i, tags={**i.tags, **tags}) for i in self._known(region, ids, self.now)]
        for instance in after:
            check_tags(instance.tags)
        self._save(after)

    def untag(self, region: str, ids: Collection[str], tags: Mapping[str, str | None]) -> None:
        """Remove tags; one given with a value only if it has that value."""
        self._save(
            replace(i, tags={k: v for k, v in i.tags.items() if k not in tags or tags[k] not in (None, v)})
            for i in self._known(region, ids, self.now)
        )

    def vanish(self, instance_id: str) -> bool:
        """Let an instance be gone as if it had never been: a fault, not an EC2 call."""
        instance = self.find(instance_id)
        if instance is not None:
            self._save([replace(instance, vanished=True, state="shutting-down", due=self.now)])
        return instance is not None

    def impair(self, instance_id: str, *, impaired: bool) -> bool:
        """Let the status checks of an instance fail, or pass again: a fault, not an EC2 call."""
        instance = self.find(instance_id)
        if instance is not None:
            self._save([replace(instance, impaired=impaired)])
        return instance is not None

    def measure(self, instance_id: str, *, cpu: float | None, memory: float | None) -> bool:
        """Set what CloudWatch tells of an instance: a wish of tests and demos, not an EC2 call."""
        instance = self.find(instance_id)
        if instance is not None:
            self._save([replace(instance, cpu=cpu, memory=memory)])
        return instance is not None

    def _end(
        self, region: str, ids: Collection[str], passing: str, final: str, refused: tuple[str, ...]
    ) -> list[tuple[str, Instance]]:
        now = self.now
        changed = []
        at = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S GMT")
        for instance in self._known(region, ids, now):
            state = instance.state_at(now)
            if state in refused:
                raise CloudError(
                    "IncorrectInstanceState",
                    f"This instance '{instance.id}' is not in a state from which it can be {final}.",
                )
            over = state in (passing, final) or state == "terminated"
            changed.append(
                (
                    state,
                    instance
                    if over
                    else replace(
                        instance,
                        state=passing,
                        due=now + self.delay,
                        reason="Client.UserInitiatedShutdown",
                        transition=f"User initiated ({at})",
                    ),
                )
            )
        self._save(after for _, after in changed)
        return changed

    def _known(self, region: str, ids: Collection[str], now: float, *, shown: bool = False) -> list[Instance]:
        """The instances of these ids, or EC2's refusal; `shown` refuses those that cannot be described yet, too."""
        for instance_id in ids:
            if not _ID.fullmatch(instance_id):
                raise CloudError("InvalidInstanceID.Malformed", f'Invalid id: "{instance_id}"')
        found = {}
        for instance_id in dict.fromkeys(ids):
            instance = self._all.get(instance_id)
            there = self._shown if shown else self._exists
            if instance is not None and instance.region == region and there(instance, now):
                found[instance_id] = instance
        missing = [instance_id for instance_id in ids if instance_id not in found]
        if missing:
            words = "ID '{}' does" if len(missing) == 1 else "IDs '{}' do"
            raise CloudError("InvalidInstanceID.NotFound", f"The instance {words.format(', '.join(missing))} not exist")
        return list(found.values())

    def _shown(self, instance: Instance, now: float) -> bool:
        return self._exists(instance, now) and now >= instance.visible

    def _exists(self, instance: Instance, now: float) -> bool:
        ended = instance.ended_since(now)
        return not instance.vanished and (ended is None or ended < _ENDED_SHOWN)

    def _address(self, network: str, besides: Iterable[Instance]) -> str:
        also = {a for i in besides for a in (i.public_ip, i.private_ip)}
        while True:
            address = f"{network}.{secrets.randbelow(256)}.{1 + secrets.randbelow(254)}"
            if address not in self._addresses and address not in also:
                return address

    def _forget(self) -> None:
        now = self.now
        old = [i.id for i in self._all.values() if (i.ended_since(now) or 0.0) > _TOKEN_KEPT]
        with self._file:
            self._file.executemany("DELETE FROM instances WHERE id = ?", [(i,) for i in old])
        for instance_id in old:
            gone = self._all.pop(instance_id)
            self._addresses -= {gone.public_ip, gone.private_ip}

    def _save(self, changed: Iterable[Instance]) -> None:
        changed = list(changed)
        with self._file:
            self._file.executemany(
                "INSERT OR REPLACE INTO instances VALUES (?, ?)", [(i.id, json.dumps(asdict(i))) for i in changed]
            )
        for instance in changed:
            before = self._all.get(instance.id)
            self._addresses -= {before.public_ip, before.private_ip} if before is not None else set()
            self._addresses |= {instance.public_ip, instance.private_ip}
            self._all[instance.id] = instance


def check_tags(tags: Mapping[str, str]) -> None:
    """EC2's rules for tags."""
    if len(tags) > _MAX_TAGS:
        raise CloudError("TagLimitExceeded", f"More than {_MAX_TAGS} tags specified")
    for key, value in tags.items():
        if key.lower().startswith("aws:"):
            raise CloudError("InvalidParameterValue", "Tag keys starting with 'aws:' are reserved for internal use")
        if not 1 <= len(key) <= 128 or len(value) > 256:
            raise CloudError("InvalidParameterValue", f"Tag key or value is too long or empty: {key[:140]!r}")


def _hex() -> str:
    return secrets.token_hex(9)[:17]


def _open(folder: Path | None) -> sqlite3.Connection:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(":memory:" if folder is None else folder / "instances.sqlite", timeout=1.0)
    try:
        # Exclusive: two simulators on one folder would each overwrite what the other knows.
        file.executescript(
            "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;"
            "CREATE TABLE IF NOT EXISTS instances (id TEXT PRIMARY KEY, record TEXT NOT NULL)"
        )
    except sqlite3.Error as error:
        file.close()
        raise OSError(f"the instances in {folder} cannot be used: {error}") from error
    return file


def _decode(record: str) -> Instance:
    values = json.loads(record)
    launch = values.pop("launch")
    return Instance(launch=Launch(**launch | {"group_ids": tuple(launch["group_ids"])}), **values)
