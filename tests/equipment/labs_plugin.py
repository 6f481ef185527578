"""The controllers' plug-in without the workers' controller: for daemons whose workers a test puts there itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from controllers.cml.sessions import CmlSessions
from controllers.labs.controller import LabsController
from controllers.labs.imports import LabImportsController
from controllers.labs.imports_kind import LAB_IMPORT
from controllers.labs.kind import LAB_RECORD
from controllers.labs.records import LabRecordsController
from controllers.labs.routes import add_labs_routes
from controllers.plugin import ControllersSettings
from controllers.workers.kind import LAB_WORKER
from lrm.controller import Controller
from lrm.plugin import Plugin, PluginContext


@asynccontextmanager
async def _controllers(context: PluginContext) -> AsyncIterator[Sequence[Controller[Any]]]:
    settings: ControllersSettings = context.settings
    async with (
        CmlSessions(settings, context.secrets, context.clock) as sessions,
        asyncio.TaskGroup() as tasks,
    ):
        closing = tasks.create_task(sessions.run())
        try:
            with context.offers.offering(sessions):
                yield (
                    LabsController(cache=context.cache, sessions=sessions, settings=settings, clock=context.clock),
                    LabRecordsController(cache=context.cache, sessions=sessions, settings=settings),
                    LabImportsController(cache=context.cache, sessions=sessions, settings=settings),
                )
        finally:
            closing.cancel()


plugin = Plugin(
    name="labs",
    kinds=(LAB_WORKER, LAB_RECORD, LAB_IMPORT),
    controllers=_controllers,
    settings=ControllersSettings,
    routes=(add_labs_routes,),
)
