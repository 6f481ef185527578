"""The door for kinds and controllers: a plug-in hands lrm one `Plugin`; lrm never imports it by name of its own.

Plug-ins are found by the entry point group `lrm.plugins`, or by the modules that the setting `plugins` names (each has
an attribute `plugin`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lrm.admission import Admission
from lrm.api.operations import Operation
from lrm.bookmarks import Bookmarks
from lrm.cache import Cache
from lrm.controller import Controller
from lrm.errors import LrmError
from lrm.events import Events
from lrm.kind import Kind
from lrm.led import Led
from lrm.offers import Offers
from lrm.outside import OutsideHealth
from lrm.registry import Registry
from lrm.secrets import Secrets
from lrm.settings import LrmSettings
from lrm.telemetry import Telemetry
from storage.base import Storage
from storage.clock import Clock


@dataclass(frozen=True)
class PluginContext:
    """What a plug-in's controllers are built from."""

    settings: Any
    """An instance of the plug-in's own settings class."""
    storage: Storage
    registry: Registry
    cache: Cache
    clock: Clock
    secrets: Secrets
    installation: str
    """The installation's uuid, which everything outside carries."""
    root: str
    """Key prefix of the installation, for claims."""
    bookmarks: Bookmarks
    """For event consumers; controllers have theirs without asking."""
    telemetry: Telemetry
    """For measurements of the plug-in's own."""
    health: OutsideHealth
    """For telling which parties outside answer."""
    events: Events
    """For what is led and is no controller: `events.recorder(name, term)`; a controller's context has its own."""
    offers: Offers = field(default_factory=Offers)
    """For what the plug-in's routes read the outside with: `with context.offers.offering(thing): yield …`."""


@dataclass(frozen=True)
class DevPlan:
    """What `lrm dev` tells a development service before it starts it."""

    ports: Mapping[str, int]
    """Service name → port on 127.0.0.1, its own and the others'."""
    data_dir: Path

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.ports[service]}"


@dataclass(frozen=True)
class DevService:
    """A simulator: `lrm simulate NAME …` runs it in the foreground, `lrm dev` as a child process."""

    name: str
    help: str
    main: Callable[[Sequence[str]], None]
    """Runs it with command-line arguments (without the program's name) until it is ended."""
    arguments: Callable[[DevPlan], list[str]]
    """The arguments under `lrm dev`."""
    environment: Callable[[DevPlan], dict[str, str]] = field(default=lambda _plan: {})
    """What the daemon needs in its environment to use it."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that suit a simulator, as environment; whoever starts `lrm dev` may have set others."""
    ready_path: str = "/"
    """Answers (any status below 500) when it is ready."""


Controllers = Callable[[PluginContext], AbstractAsyncContextManager[Sequence[Controller[Any] | Led]]]
"""Opens the plug-in's outside clients, gives its controllers and what else it does under a lock (event consumers), and
closes the clients at the end."""


@dataclass(frozen=True)
class Plugin:
    """Everything that one plug-in brings."""

    name: str
    kinds: tuple[Kind[Any], ...]
    controllers: Controllers
    settings: type[LrmSettings] = LrmSettings
    routes: tuple[Callable[..., None], ...] = ()
    """Called with the aiohttp application and lrm's `Api`."""
    operations: tuple[Operation, ...] = ()
    """What the routes take and answer; `/openapi/v3` tells it."""
    admission: Callable[[Any, Cache, Clock], Admission] = lambda _settings, _cache, _clock: {}
    """Called once with the plug-in's settings."""
    dev_services: tuple[DevService, ...] = ()


class PluginError(LrmError):
    """A plug-in cannot be loaded."""


def load_plugins(modules: Sequence[str]) -> list[Plugin]:
    """The plug-ins of the named modules, else of every entry point. Raises `PluginError` naming the one at fault."""
    if modules:
        return [_checked(name, lambda name=name: import_module(name).plugin) for name in modules]  # type: ignore[misc]
    return [_checked(point.name, point.load) for point in sorted(entry_points(group="lrm.plugins"))]


def _checked(name: str, load: Callable[[], Any]) -> Plugin:
    try:
        plugin = load()
    except (ImportError, AttributeError) as error:
        raise PluginError(f"plug-in {name} cannot be loaded: {error}") from error
    if not isinstance(plugin, Plugin):
        raise PluginError(f"plug-in {name} is a {type(plugin).__name__}, not an lrm.plugin.Plugin")
    return plugin
