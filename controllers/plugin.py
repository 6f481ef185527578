"""The plug-in that makes lrm a Lab Resource Manager: its kinds, their controllers, their simulators.

lrm finds `plugin` by the entry point group `lrm.plugins`. The composition root of everything that knows of EC2 and
CML: the outside clients are opened here, shared by the controllers, and closed when the daemon stops.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from controllers.admission import place_admission
from controllers.aws.accounts import Accounts
from controllers.aws.cloudwatch import CloudWatch
from controllers.aws.ec2 import Ec2
from controllers.aws.settings import AwsSettings
from controllers.cml.sessions import CmlSessions
from controllers.containers import openapi as containers_openapi
from controllers.containers.collector import Collector
from controllers.containers.routes import add_log_routes
from controllers.containers.runtime import ContainerRuntime
from controllers.imports.controller import ImportsController
from controllers.imports.kind import LAB_WORKER_IMPORT
from controllers.instances import openapi as instances_openapi
from controllers.instances.admission import admission as instance_admission
from controllers.instances.allocations import Allocations, AllocationsController
from controllers.instances.cml_runtime import CmlRuntime
from controllers.instances.controller import InstancesController
from controllers.instances.deadlines import DeadlinesController
from controllers.instances.ended import ended
from controllers.instances.fetches import Fetches
from controllers.instances.kind import LAB_INSTANCE_REQUEST, LabInstanceRequest
from controllers.instances.phases import WAITING, Phase
from controllers.instances.placing import Placing
from controllers.instances.routes import add_instance_routes
from controllers.instances.runtime import Runtime
from controllers.instances.settings import InstanceSettings
from controllers.instances.strays import StrayLabs
from controllers.labs import openapi as labs_openapi
from controllers.labs.controller import LabsController
from controllers.labs.imports import LabImportsController
from controllers.labs.imports_kind import LAB_IMPORT
from controllers.labs.kind import LAB_RECORD
from controllers.labs.measures import LabMeasures
from controllers.labs.push import LabsPush
from controllers.labs.records import LabRecordsController
from controllers.labs.routes import add_labs_routes
from controllers.labs.settings import LabsSettings
from controllers.metrics.controller import FleetMetrics
from controllers.metrics.settings import MetricsSettings
from controllers.metrics.sources import Sources
from controllers.pools.controller import PoolsController
from controllers.pools.demand import ObservedDemand
from controllers.pools.kind import LAB_WORKER_POOL
from controllers.pools.settings import PoolSettings
from controllers.sweep.settings import SweepSettings
from controllers.sweep.sweep import Sweep
from controllers.workers import openapi as workers_openapi
from controllers.workers.claims import Claims
from controllers.workers.cml_side import CmlSide
from controllers.workers.controller import WorkersController
from controllers.workers.kind import LAB_WORKER
from controllers.workers.provisioning import Provisioner
from controllers.workers.routes import add_workers_routes
from controllers.workers.settings import WorkerSettings
from lrm.admission import Admission
from lrm.cache import Cache
from lrm.client import Client
from lrm.controller import Controller, Hints, Key
from lrm.led import Led
from lrm.plugin import DevPlan, DevService, Plugin, PluginContext
from storage.clock import Clock


class ControllersSettings(
    WorkerSettings, LabsSettings, MetricsSettings, PoolSettings, SweepSettings, InstanceSettings, AwsSettings
):
    """Everything that the kinds' controllers can be told."""


def admission(settings: ControllersSettings, cache: Cache, clock: Clock) -> Admission:
    """What the API says of the kinds' objects before they are stored."""
    return {**instance_admission(settings, cache, clock), **place_admission(settings)}


@asynccontextmanager
async def controllers(context: PluginContext) -> AsyncIterator[Sequence[Controller[Any] | Led]]:
    """Open the clients of EC2 and CML, give the controllers, close the clients at the end."""
    settings: ControllersSettings = context.settings
    hints = Hints()
    accounts = Accounts(settings.aws_accounts, context.clock, regions=settings.aws_regions)
    async with (
        Ec2(context.clock, accounts) as ec2,
        CloudWatch(context.clock, accounts) as cloud_watch,
        CmlSessions(settings, context.secrets, context.clock) as sessions,
        _containers(context, hints) as containers,
        Fetches(context.clock, hints) as fetches,
        asyncio.TaskGroup() as tasks,
        AsyncExitStack() as offered,
    ):
        offered.enter_context(context.offers.offering(sessions))
        closing = tasks.create_task(sessions.run(), name="close CML clients")
        unsubscribe = context.cache.subscribe(sessions.on_update)
        metrics = FleetMetrics(
            Sources(
                ec2,
                cloud_watch,
                sessions,
                context.clock,
                installation=context.installation,
                at_once=settings.metrics_cml_at_once,
            ),
            Client(context.storage, context.registry, context.clock),
            context.cache,
            context.clock,
            settings,
        )
        context.telemetry.observe(metrics.observe)
        sweep = Sweep(
            ec2,
            context.storage,
            context.cache,
            context.clock,
            settings,
            installation=context.installation,
            root=context.root,
            youngest=settings.worker_trace_timeout,
        )
        context.telemetry.observe(sweep.observe)
        measures = LabMeasures(context.telemetry.meter)
        labs = LabsController(
            cache=context.cache,
            sessions=sessions,
            settings=settings,
            clock=context.clock,
            measures=measures,
            is_ended=lambda record: ended(record, context.cache, context.installation),
        )
        push = LabsPush(
            cache=context.cache,
            sessions=sessions,
            hints=labs.hints,
            clock=context.clock,
            measures=measures,
            enabled=settings.labs_push,
        )
        context.telemetry.observe(push.observe)
        claims = Claims(context.storage, context.root)
        try:
            yield (
                WorkersController(
                    Provisioner(ec2, settings, context.installation),
                    CmlSide(sessions, context.secrets, settings),
                    claims,
                    settings,
                ),
                labs,
                push,
                LabRecordsController(cache=context.cache, sessions=sessions, settings=settings, measures=measures),
                LabImportsController(cache=context.cache, sessions=sessions, settings=settings),
                PoolsController(context.cache, ObservedDemand(context.cache), settings),
                ImportsController(ec2, claims, context.installation),
                metrics,
                sweep,
                *_instances(context, sessions, containers, fetches, hints),
            )
        finally:
            unsubscribe()
            closing.cancel()


@asynccontextmanager
async def _containers(context: PluginContext, hints: Hints) -> AsyncIterator[ContainerRuntime]:
    """The runtime for containers, which routes may read logs from."""

    def waiting() -> Iterable[Key]:
        # One that is being made may have no container yet that a hint could tell of.
        for phase in (*WAITING, Phase.PROVISIONING):
            for request in context.cache.by_index(LabInstanceRequest, "phase", phase.value):
                if request.spec.runs_in == "Container":
                    yield request.namespace, request.name

    async with ContainerRuntime(
        context.settings, context.installation, hints, context.clock, waiting=waiting, health=context.health
    ) as containers:
        context.telemetry.observe(containers.observe)
        with context.offers.offering(containers):
            yield containers


def _instances(
    context: PluginContext, sessions: CmlSessions, containers: ContainerRuntime, fetches: Fetches, hints: Hints
) -> Sequence[Controller[Any] | Led]:
    """What runs lab instances."""
    settings: ControllersSettings = context.settings
    cache, clock, installation = context.cache, context.clock, context.installation
    allocations = Allocations(cache)
    runtimes: dict[str, Runtime] = {
        "CML": CmlRuntime(
            cache,
            sessions,
            settings,
            fetches=fetches,
            installation=installation,
            late_import=settings.labs_import_settle,
        ),
        "Container": containers,
    }
    placing = Placing(cache, allocations, settings, clock, engine=containers.told, hints=hints)
    collectors = []
    if containers.engine is not None:
        collectors.append(Collector(containers.engine, cache, clock, observe_only=settings.observe_only))
        context.telemetry.observe(collectors[0].observe)
    return (
        *collectors,
        InstancesController(cache, placing, runtimes, settings, hints=hints),
        DeadlinesController(),
        AllocationsController(cache, allocations, placing.promised),
        StrayLabs(
            cache,
            sessions,
            Client(context.storage, context.registry, clock),
            clock,
            settings,
            installation=installation,
            observe_only=settings.observe_only,
        ),
    )


def _simulate_aws(arguments: Sequence[str]) -> None:
    from controllers.aws.simulator.__main__ import options, run
    from lrm.processes import ProcessError

    try:
        asyncio.run(run(options(arguments)))
    except (ProcessError, OSError) as error:
        sys.exit(f"the simulated AWS cannot start: {error}")


def _simulate_cml(arguments: Sequence[str]) -> None:
    from controllers.cml.simulator import main

    code = main(arguments)
    if code:
        sys.exit(code)


def _aws_environment(plan: DevPlan) -> dict[str, str]:
    # Credentials of no account: a slip of the endpoint must not reach a real one.
    return {
        "AWS_ENDPOINT_URL": plan.url("aws"),
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "lrm-dev",
        "AWS_SECRET_ACCESS_KEY": "lrm-dev",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


_AWS_PACE = {
    "LRM_WORKER_POLL_INTERVAL": "0.5",
    "LRM_WORKER_REST_INTERVAL": "2",
    "LRM_WORKER_EXAMINE_INTERVAL": "10",
    "LRM_METRICS_REFRESH_INTERVAL": "5",
    # The simulated EC2 is of one mind at once; a launch that it does not show was not made.
    "LRM_WORKER_TRACE_TIMEOUT": "20",
    "LRM_WORKER_GONE_AFTER": "5",
    "LRM_POOL_INTERVAL": "1",
}
_CML_PACE = {"LRM_LABS_REFRESH_INTERVAL": "1", "LRM_LABS_STEP_INTERVAL": "0.5"}


def _cml_environment(plan: DevPlan) -> dict[str, str]:
    return {
        "LRM_CML_URL_TEMPLATE": f"{plan.url('cml')}/{{instance_id}}",
        "LRM_SECRETS_ALLOW": "CML_PASSWORD,CML_LICENSE_TOKEN",
        "CML_PASSWORD": "admin-secret",
        "CML_LICENSE_TOKEN": "ZGVtby10b2tlbg==",
    }


DEV_SERVICES = (
    DevService(
        name="aws",
        help="EC2's instances played exactly, everything else by moto",
        main=_simulate_aws,
        arguments=lambda plan: [
            *("--port", str(plan.ports["aws"])),
            *("--data-dir", str(plan.data_dir / "aws")),
            *("--delay", "1"),
        ],
        environment=_aws_environment,
        settings=_AWS_PACE,
        ready_path="/_shim/health",
    ),
    DevService(
        name="cml",
        help="Cisco Modeling Labs, one machine at the root and one for each instance id",
        main=_simulate_cml,
        arguments=lambda plan: [
            *("--port", str(plan.ports["cml"])),
            *("--boot-bad-gateway", "2", "--boot-not-ready", "2"),
            *("--registration", "2"),
            *("--ec2-state-url", f"{plan.url('aws')}/_shim/instances"),
        ],
        environment=_cml_environment,
        settings=_CML_PACE,
        ready_path="/_sim/instances",
    ),
)
"""Started in this order by `lrm dev`: the CML simulator asks the AWS one which machines run."""

plugin = Plugin(
    name="controllers",
    kinds=(LAB_WORKER, LAB_RECORD, LAB_IMPORT, LAB_WORKER_POOL, LAB_WORKER_IMPORT, LAB_INSTANCE_REQUEST),
    controllers=controllers,
    settings=ControllersSettings,
    admission=admission,
    dev_services=DEV_SERVICES,
    routes=(add_instance_routes, add_log_routes, add_labs_routes, add_workers_routes),
    operations=(
        *containers_openapi.OPERATIONS,
        *instances_openapi.OPERATIONS,
        *labs_openapi.OPERATIONS,
        *workers_openapi.OPERATIONS,
    ),
)
