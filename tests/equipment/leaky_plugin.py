"""A plug-in with a mistake: its controller fails with a worker's password among its local variables."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from controllers.workers.kind import LabWorker
from lrm.plugin import Plugin, PluginContext
from lrm.reconcile import Context, Controller, Result
from lrm.secrets import Secrets

LEAK_ANNOTATION = "test.neuroglia.io/leak"


class Leaky(Controller[LabWorker]):
    name = "leaky"
    lock_name = "leaky"
    model = LabWorker

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    async def reconcile(self, resource: LabWorker, ctx: Context) -> Result:
        reference = resource.spec.cml.password_from
        if LEAK_ANNOTATION not in resource.metadata.annotations or reference is None:
            return Result.done()
        password = self._secrets.read(reference)
        ctx.log.debug("leaky.about_to_fail", characters=len(password))
        raise RuntimeError("a mistake of a plug-in's")


@asynccontextmanager
async def controllers(context: PluginContext) -> AsyncIterator[Sequence[Controller[Any]]]:
    yield (Leaky(context.secrets),)


plugin = Plugin(name="leaky", kinds=(), controllers=controllers)
