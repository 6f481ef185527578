"""Which of the instances that EC2 showed are imported, and why the others are not: decided from what is known.

Pure functions; a table of tests stands on them. An instance is left alone when it has ended, when it is another's, or
when any worker has to do with it: two workers for one instance would each stop it under the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from controllers.aws.ec2 import Ec2Instance
from controllers.imports.kind import Imported, LabWorkerImport, Skipped, worker_name
from controllers.workers.decisions import INSTALLATION_TAG, KEEPABLE, UID_TAG
from controllers.workers.kind import LabWorker


class Reasons:
    """Why an instance is left alone."""

    NOT_FOUND = "NotFound"
    DOES_NOT_MATCH = "DoesNotMatch"
    TERMINATED = "Terminated"
    ANOTHER_INSTALLATION = "AnotherInstallation"
    HAS_WORKER = "HasWorker"
    CLAIMED = "Claimed"
    NAME_TAKEN = "NameTaken"
    LIMIT_REACHED = "LimitReached"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made or is there already, and what is left alone."""

    imports: tuple[Imported, ...]
    skipped: tuple[Skipped, ...]


def plan(
    of: LabWorkerImport,
    found: Mapping[str, Ec2Instance],
    workers: Sequence[LabWorker],
    claimed: Mapping[str, str],
    installation: str,
) -> Plan:
    """Choose among `found`; `workers` are all there are, `claimed` says by instance who holds it."""
    names = {w.name for w in workers if w.namespace == of.namespace}
    holders, by_uid = _holders(workers), {w.uid: w for w in workers}
    imports: list[Imported] = []
    wanted: list[Imported] = []
    skipped: list[Skipped] = []
    for instance_id in of.spec.instance_ids or found:
        one = Imported(instance_id=instance_id, worker=worker_name(of, instance_id))
        instance = found.get(instance_id)
        uid = instance.tags.get(UID_TAG, "") if instance is not None else ""
        holder = holders.get(instance_id) or by_uid.get(uid)
        if holder is not None and (holder.namespace, holder.name) == (of.namespace, one.worker):
            imports.append(one)
            continue
        told = _refusals(of, instance, holder, claimed.get(instance_id, ""), installation)
        reason = next(told, Reasons.NAME_TAKEN if one.worker in names else "")
        if reason:
            skipped.append(Skipped(instance_id=instance_id, reason=reason))
        else:
            wanted.append(one)
    room = max(of.spec.limit - len(imports), 0)
    skipped += [Skipped(instance_id=one.instance_id, reason=Reasons.LIMIT_REACHED) for one in wanted[room:]]
    return Plan((*imports, *wanted[:room]), tuple(skipped))


def _refusals(
    of: LabWorkerImport, instance: Ec2Instance | None, holder: LabWorker | None, claimant: str, installation: str
) -> Iterator[str]:
    """What speaks against an import, the most telling first."""
    if instance is None:
        yield Reasons.NOT_FOUND
        return
    if of.spec.ami_id not in (None, instance.image_id) or not of.spec.tags.items() <= instance.tags.items():
        yield Reasons.DOES_NOT_MATCH
    if instance.state not in KEEPABLE:
        yield Reasons.TERMINATED
    if instance.tags.get(INSTALLATION_TAG, "") not in ("", installation):
        yield Reasons.ANOTHER_INSTALLATION
    if holder is not None:
        yield f"{Reasons.HAS_WORKER}: {holder.namespace}/{holder.name}"
    if claimant:
        yield f"{Reasons.CLAIMED}: {claimant}"


def _holders(workers: Iterable[LabWorker]) -> dict[str, LabWorker]:
    """The workers by the instances that they name; of two that name one, the one that has it."""
    named = {w.spec.aws.instance_id: w for w in workers if w.spec.aws.instance_id}
    return {**named, **{w.status.ec2.instance_id: w for w in workers if w.status.ec2.instance_id}}
