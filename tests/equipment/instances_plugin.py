"""Lab instances on CML without the workers' controller: for daemons whose workers a test puts there itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from controllers.cml.sessions import CmlSessions
from controllers.instances.allocations import Allocations, AllocationsController
from controllers.instances.cml_runtime import CmlRuntime
from controllers.instances.controller import InstancesController
from controllers.instances.deadlines import DeadlinesController
from controllers.instances.fetches import Fetches
from controllers.instances.kind import LAB_INSTANCE_REQUEST
from controllers.instances.placing import Placing
from controllers.instances.strays import StrayLabs
from controllers.labs.controller import LabsController
from controllers.labs.imports_kind import LAB_IMPORT
from controllers.labs.kind import LAB_RECORD
from controllers.labs.records import LabRecordsController
from controllers.plugin import ControllersSettings
from controllers.workers.kind import LAB_WORKER
from lrm.client import Client
from lrm.controller import Controller, Hints
from lrm.led import Led
from lrm.plugin import Plugin, PluginContext


@asynccontextmanager
async def _controllers(context: PluginContext) -> AsyncIterator[Sequence[Controller[Any] | Led]]:
    settings: ControllersSettings = context.settings
    cache, clock = context.cache, context.clock
    hints = Hints()
    async with (
        CmlSessions(settings, context.secrets, clock) as sessions,
        Fetches(clock, hints) as fetches,
        asyncio.TaskGroup() as tasks,
    ):
        closing = tasks.create_task(sessions.run())
        allocations = Allocations(cache)
        placing = Placing(cache, allocations, settings, clock)
        runtime = CmlRuntime(
            cache, sessions, settings, fetches=fetches, installation=context.installation, late_import=1.0
        )
        try:
            yield (
                LabsController(cache=cache, sessions=sessions, settings=settings, clock=clock),
                LabRecordsController(cache=cache, sessions=sessions, settings=settings),
                InstancesController(cache, placing, {"CML": runtime}, settings, hints=hints),
                DeadlinesController(),
                AllocationsController(cache, allocations, placing.promised),
                StrayLabs(
                    cache,
                    sessions,
                    Client(context.storage, context.registry, clock),
                    clock,
                    settings,
                    installation=context.installation,
                    observe_only=False,
                ),
            )
        finally:
            closing.cancel()


plugin = Plugin(
    name="instances",
    kinds=(LAB_WORKER, LAB_RECORD, LAB_IMPORT, LAB_INSTANCE_REQUEST),
    controllers=_controllers,
    settings=ControllersSettings,
)
