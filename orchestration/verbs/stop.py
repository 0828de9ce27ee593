"""`latentzoom stop ID`: stop a job. What it finished stays; the same command, submitted again, continues."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.command_line import parse, plain_help
from pipeline.common_options import answer, note


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Stop a job of a Ray cluster."""

    job: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    """As `latentzoom jobs` lists it."""
    address: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """The cluster's head; without it RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom stop")
    from orchestration.cluster import jobs

    address = jobs.default_address(arguments.address)
    client = jobs.connect(address)
    with jobs.user_errors(address):
        client.stop_job(arguments.job)
    note(f"{arguments.job} was asked to stop; a training stage writes a checkpoint first")
    while not (details := jobs.details(client, address, arguments.job)).status.is_terminal():
        time.sleep(0.3)
    answer(f"{arguments.job} {details.status.value}", jobs.facts(details))
    return 0
