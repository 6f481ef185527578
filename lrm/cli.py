"""The command line.

Exit codes: 0 done; 1 it did not work, and one sentence says why; 2 the command or the settings are wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import signal
import sys
from collections.abc import Coroutine, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
import yaml

if TYPE_CHECKING:
    from lrm.plugin import Plugin
    from lrm.settings import LrmSettings, Settings

S = TypeVar("S", bound="LrmSettings")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Lab Resource Manager: workers, labs and lab instances on Cisco Modeling Labs, declared in YAML.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the settings.")
token_app = typer.Typer(no_args_is_help=True, help="Tokens for the API.")
app.add_typer(config_app, name="config")
app.add_typer(token_app, name="token")


class Role(StrEnum):
    """What a token may do."""

    VIEWER = "viewer"
    MANAGER = "manager"
    ADMIN = "admin"
    CONTROLLER = "controller"


def main() -> None:
    """The entry point."""
    app()


@app.command()
def serve() -> None:
    """Run the daemon with the settings of LRM_… and LRM_CONFIG."""
    from lrm.api.app import ApiError
    from lrm.daemon import run_daemon
    from lrm.election import Deposed
    from lrm.limits import raise_open_files
    from lrm.logs import configure_logs

    settings, plugins = _configuration()
    configure_logs(settings.log_format, settings.log_level, instance=settings.instance_id)
    raise_open_files()
    try:
        _run(run_daemon(settings, plugins))
    except (ApiError, Deposed) as error:
        _fail(str(error))


@app.command()
def dev(
    port: Annotated[int, typer.Option(help="Port of the API; 0 takes a free one.")] = 0,
    data_dir: Annotated[
        Path | None, typer.Option(help="Keep everything here; else a directory that goes at the end.")
    ] = None,
    simulator: Annotated[
        list[str] | None,
        typer.Option(
            help="More options of a simulator, such as 'aws --delay 10', with which each state on a worker's way is"
            " there to be seen; `lrm simulate NAME --help` lists them. May be repeated."
        ),
    ] = None,
) -> None:
    """Start etcd, Redis, simulated AWS and CML, and one daemon; all end with this command."""
    from lrm.devstack import DevStack, ProcessError

    plugins = _plugins()

    async def until_ended() -> str:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        starting = asyncio.create_task(_start_and_wait())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return starting.result() if starting.done() else ""
        finally:
            for task in (starting, stopping):
                task.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)

    async def _start_and_wait() -> str:
        async with DevStack(plugins, port=port, data_dir=data_dir, simulators=simulator or ()) as stack:
            typer.echo(f"logs in {stack.data_dir / 'logs'}")
            for name, value in sorted(stack.environment.items()):
                if name.endswith(("_URL", "_ENDPOINTS", "_TEMPLATE")):
                    typer.echo(f"  {name}={value}")
            typer.echo(f"ready {stack.url}")
            sys.stdout.flush()
            return await stack.wait()

    try:
        ended = _run(until_ended())
    except ProcessError as error:
        _fail(str(error))
    if ended:
        _fail(ended)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def simulate(context: typer.Context, name: Annotated[str, typer.Argument(help="Which: aws, cml, …")]) -> None:
    """Run one simulator in the foreground; `lrm simulate NAME --help` lists its options."""
    services = {s.name: s for p in _plugins() for s in p.dev_services}
    if name not in services:
        listed = "\n".join(f"  {s.name:8} {s.help}" for s in services.values())
        typer.echo(f"lrm simulate NAME [OPTIONS], where NAME is one of\n{listed}", err=name not in {"--help", "-h"})
        raise typer.Exit(0 if name in {"--help", "-h"} else 2)
    services[name].main(context.args)


@app.command("restore-done")
def restore_done() -> None:
    """Declare that etcd was restored from a backup: daemons then read everything anew and trust no old bookmark.

    Run it once after each restore, when etcd answers; daemons may run or not.
    """
    import uuid

    from lrm.daemon import open_storage
    from lrm.settings import Settings
    from storage.clock import SystemClock
    from storage.errors import OutcomeUnknown, StorageError

    settings = _checked(Settings)

    async def begin_epoch() -> str:
        storage = open_storage(settings, SystemClock())
        try:
            before = await storage.line()
            epoch = str(uuid.uuid4())
            revision = await storage.set(f"{settings.etcd_root}/epoch", epoch.encode())
        finally:
            await storage.aclose()
        return (
            f"{settings.etcd_root}/epoch is now {epoch} (it was {before.epoch or 'not set'}), revision {revision}.\n"
            "Every running daemon notices within some 20 seconds, reads everything anew, and goes on; watches end and "
            "begin again. Bookmarks of before no longer count: event consumers get one RESYNC and the current state."
        )

    try:
        typer.echo(_run(begin_epoch()))
    except OutcomeUnknown as error:
        _fail(f"the new epoch may have been written; run it again: {error}")
    except (StorageError, OSError) as error:
        _fail(f"no new epoch was written: {error}")


@app.command("version")
def version_() -> None:
    """Print the version."""
    from importlib.metadata import version

    typer.echo(f"lrm {version('lrm')}")


@config_app.command("check")
def config_check() -> None:
    """Say whether the settings are possible, and which LRM_ variables nothing reads."""
    settings, plugins = _configuration()
    classes = [type(settings), *(p.settings for p in plugins)]
    known = {f"LRM_{name.upper()}" for cls in classes for name in cls.model_fields} | {"LRM_CONFIG", "LRM_CRASH_AT"}
    strangers = sorted(name for name in os.environ if name.startswith("LRM_") and name not in known)
    for name in strangers:
        typer.echo(f"{name} is no setting of lrm or its plug-ins", err=True)
    if strangers:
        raise typer.Exit(2)
    typer.echo("the settings are fine")


@config_app.command("show")
def config_show() -> None:
    """Print every setting with its value; secrets are masked."""
    settings, plugins = _configuration()
    shown: set[str] = set()
    for part in (settings, *(p.settings() for p in plugins)):
        values = part.model_dump(mode="json")
        for name, info in type(part).model_fields.items():
            if name in shown:
                continue
            shown.add(name)
            value = yaml.safe_dump({name: values[name]}).strip()
            typer.echo(f"# {info.description or ''}")
            typer.echo(value)


@token_app.command("create")
def token_create(
    name: Annotated[str, typer.Argument(help="Who or what will use it; audit lines carry it.")],
    role: Annotated[Role, typer.Option(help="What it may do.")] = Role.VIEWER,
    namespace: Annotated[list[str] | None, typer.Option(help="Limit it to a namespace; repeat for more.")] = None,
) -> None:
    """Make a token: prints the token once, and the entry for the tokens file (which keeps its hash only)."""
    token = secrets.token_urlsafe(32)
    entry: dict[str, Any] = {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest(), "role": role.value}
    if namespace:
        entry["namespaces"] = namespace
    typer.echo(f"token (shown only now): {token}", err=True)
    typer.echo(yaml.safe_dump([entry], sort_keys=False).strip())


def _configuration() -> tuple[Settings, list[Plugin]]:
    """The daemon's settings and its plug-ins, all settings checked; exit 2 with each mistake on a line."""
    from lrm.settings import Settings

    settings = _checked(Settings)
    plugins = _plugins(settings.plugins)
    for plugin in plugins:
        _checked(plugin.settings)
    if settings.auth_tokens_file is None and not _is_loopback(settings.api_host):
        typer.echo(f"LRM_API_HOST is {settings.api_host}: other than loopback needs LRM_AUTH_TOKENS_FILE", err=True)
        raise typer.Exit(2)
    return settings, plugins


def _checked(cls: type[S]) -> S:
    from pydantic import ValidationError

    try:
        return cls()
    except ValidationError as error:
        for mistake in error.errors(include_url=False, include_context=False, include_input=False):
            where = "LRM_" + "_".join(str(p) for p in mistake["loc"]).upper() if mistake["loc"] else "settings"
            typer.echo(f"{where}: {mistake['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(2) from None
    except (FileNotFoundError, yaml.YAMLError) as error:
        typer.echo(f"LRM_CONFIG: {error}", err=True)
        raise typer.Exit(2) from None


def _plugins(modules: Sequence[str] = ()) -> list[Plugin]:
    from lrm.plugin import PluginError, load_plugins

    try:
        return load_plugins(modules)
    except PluginError as error:
        _fail(str(error))


def _is_loopback(host: str) -> bool:
    from ipaddress import ip_address

    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    import uvloop

    return uvloop.run(work)


def _fail(message: str) -> NoReturn:
    typer.echo(f"lrm: {message}", err=True)
    raise typer.Exit(1)
