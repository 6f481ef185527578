"""The simulator as a process: `python -m controllers.cml.simulator --port 9000`.

It prints `ready http://…` once it answers, and stops on SIGINT or SIGTERM. Every option of `Options` has its flag.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields

from controllers.cml.simulator.options import Account, Options
from controllers.cml.simulator.server import serve

_TYPES = {"str": str, "int": int, "float": float}


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop; returns the exit code."""
    try:
        options = parse(argv)
    except ValueError as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    try:
        asyncio.run(_serve_until_signalled(options))
    except OSError as e:
        sys.stderr.write(f"error: cannot serve on {options.host}:{options.port}: {e}\n")
        return 1
    return 0


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from a command line. Raises `ValueError` for those that cannot be together."""
    parser = argparse.ArgumentParser(prog="controllers.cml.simulator", description="Simulate Cisco Modeling Labs.")
    for option in fields(Options):
        if option.name == "accounts":
            continue
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=_TYPES[str(option.type)],
            default=option.default if option.default is not MISSING else None,
            metavar=str(option.type).upper(),
            help="default: %(default)s",
        )
    parser.add_argument(
        "--account",
        action="append",
        default=[],
        type=_account,
        metavar="USER:PASSWORD[:admin]",
        help="another user; may be repeated",
    )
    values = vars(parser.parse_args(argv))
    return Options(accounts=tuple(values.pop("account")), **values)


def _account(text: str) -> Account:
    username, _, rest = text.partition(":")
    password, _, role = rest.partition(":")
    if not username or not password or role not in ("", "admin"):
        raise argparse.ArgumentTypeError(f"{text!r} is not USER:PASSWORD or USER:PASSWORD:admin")
    return Account(username, password, admin=role == "admin")


async def _serve_until_signalled(options: Options) -> None:
    loop = asyncio.get_running_loop()
    serving = loop.create_task(serve(options, _announce))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        if (current := asyncio.current_task()) is not None and current.cancelling():
            raise


def _announce(url: str) -> None:
    sys.stdout.write(f"ready {url}\n")
    sys.stdout.flush()
