"""`python -m controllers.aws.simulator --port 5000 --data-dir DIR`: runs until SIGINT or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from controllers.aws.simulator.moto import DEMO_AMI, DEMO_KEY
from controllers.aws.simulator.server import AwsShim, ShimOptions
from lrm.processes import ProcessError


def options(arguments: Sequence[str]) -> ShimOptions:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m controllers.aws.simulator",
        description="A simulated AWS for AWS_ENDPOINT_URL: instances played exactly, everything else by moto.",
        epilog=f"The image {DEMO_AMI} and the key pair {DEMO_KEY} exist everywhere.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (a free one)")
    parser.add_argument("--data-dir", type=Path, help="folder in which instances outlive a restart (none)")
    parser.add_argument("--moto-url", default="", help="a moto that runs already (one is started)")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds that passing states last (1)")
    parser.add_argument("--describe-lag", type=float, default=0.0, help="seconds that a launch stays unseen (0)")
    parser.add_argument("--ami", action="append", default=[], help="another image that exists; may be repeated")
    parser.add_argument("--key-name", action="append", default=[], help="another key pair that exists; may be repeated")
    said = parser.parse_args(arguments)
    if said.delay < 0 or said.describe_lag < 0:
        parser.error("--delay and --describe-lag are seconds from 0 up")
    return ShimOptions(
        host=said.host,
        port=said.port,
        data_dir=said.data_dir,
        moto_url=said.moto_url,
        delay=said.delay,
        describe_lag=said.describe_lag,
        amis=tuple(said.ami),
        key_names=tuple(said.key_name),
    )


async def run(wishes: ShimOptions) -> None:
    """Serve until told to stop; prints `ready URL` when it answers."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with AwsShim.run(wishes) as shim:
        print(f"ready {shim.url}", flush=True)  # noqa: T201 - it is what a caller waits for
        await stop.wait()


def main() -> int:
    """Exit code 1, with a sentence, when it cannot start."""
    try:
        asyncio.run(run(options(sys.argv[1:])))
    except (ProcessError, OSError) as error:
        print(f"the simulated AWS cannot start: {error}", file=sys.stderr)  # noqa: T201 - a command
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
