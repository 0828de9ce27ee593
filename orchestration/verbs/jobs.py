"""`latentzoom jobs [ID] [--follow]`: jobs of a Ray cluster, one job's state, or its log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.command_line import Flag, parse, plain_help
from pipeline.common_options import answer
from pipeline.redact import redact


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """List a cluster's jobs, or look at one."""

    job: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[ID]")] = ""
    """One job; without it all are listed."""
    follow: Flag = False
    """Print its log until it ends; its exit status is passed on."""
    address: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """The cluster's head; without it RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom jobs")
    from orchestration import jobs
    from orchestration.verbs.submit import follow_to_end

    address = jobs.default_address(arguments.address)
    client = jobs.connect(address)
    if not arguments.job:
        with jobs.user_errors(address):
            found = [job for job in client.list_jobs() if job.submission_id]
        text = jobs.table(found) if found else f"no jobs at {address}"
        answer(text, [jobs.facts(job) for job in jobs.newest_first(found)])
        return 0
    with jobs.user_errors(address):
        details = client.get_job_info(arguments.job)
    if arguments.follow:
        return follow_to_end(client, address, arguments.job)
    message = [redact(details.message)] if details.message else []
    answer("\n".join([jobs.table([details]), *message]), jobs.facts(details))
    return 0
