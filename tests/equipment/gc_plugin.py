"""A plug-in for tests of garbage collection in a real daemon: the kinds of `gc_scene`, and nobody reconciles them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from equipment.gc_scene import KINDS
from lrm.controller import Controller
from lrm.plugin import Plugin, PluginContext


@asynccontextmanager
async def controllers(_context: PluginContext) -> AsyncIterator[Sequence[Controller[Any]]]:
    yield ()


plugin = Plugin(name="collected", kinds=KINDS, controllers=controllers)
