"""A plug-in with a mistake: its controller fails with a worker's password among its local variables.

It also does what an installation with a collector of traces does: every span of the daemon goes out, here to a file.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from controllers.workers.kind import LabWorker
from lrm.controller import Context, Controller, Result
from lrm.plugin import Plugin, PluginContext
from lrm.secrets import Secrets

LEAK_ANNOTATION = "test.neuroglia.io/leak"
SPANS_ENV = "SPANS_FILE"
"""Names the file that spans are added to."""


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
    traces = TracerProvider(shutdown_on_exit=False)
    trace.set_tracer_provider(traces)
    with Path(os.environ[SPANS_ENV]).open("a") as file:
        traces.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=file)))
        try:
            yield (Leaky(context.secrets),)
        finally:
            traces.shutdown()


plugin = Plugin(name="leaky", kinds=(), controllers=controllers)
