"""`latentzoom stop ID`: stop a job. What it finished stays; the same command, submitted again, continues."""

from __future__ import annotations

import argparse
import sys
import time


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="latentzoom stop", description="Stop a job of a Ray cluster.")
    parser.add_argument("job", metavar="ID")
    parser.add_argument("--address", default="", help="default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265")
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from orchestration import jobs

    address = jobs.default_address(arguments.address)
    client = jobs.connect(address)
    with jobs.user_errors(address):
        client.stop_job(arguments.job)
    print(f"{arguments.job} was asked to stop; a training stage writes a checkpoint first", file=sys.stderr, flush=True)
    while not (details := jobs.details(client, address, arguments.job)).status.is_terminal():
        time.sleep(0.3)
    print(f"{arguments.job} {details.status.value}")
    return 0
