"""`latentzoom jobs [ID] [--follow]`: jobs of a Ray cluster, one job's state, or its log."""

from __future__ import annotations

import argparse

from pipeline.redact import redact


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="latentzoom jobs", description="List a cluster's jobs, or look at one.")
    parser.add_argument("job", nargs="?", default="", metavar="ID", help="one job; without it all are listed")
    parser.add_argument(
        "--follow", action="store_true", help="print its log until it ends; its exit status is passed on"
    )
    parser.add_argument("--address", default="", help="default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265")
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from orchestration import jobs
    from orchestration.verbs.submit import follow_to_end

    address = jobs.default_address(arguments.address)
    client = jobs.connect(address)
    if not arguments.job:
        with jobs.user_errors(address):
            found = [job for job in client.list_jobs() if job.submission_id]
        print(jobs.table(found) if found else f"no jobs at {address}")
        return 0
    with jobs.user_errors(address):
        details = client.get_job_info(arguments.job)
    if arguments.follow:
        return follow_to_end(client, address, arguments.job)
    print(jobs.table([details]))
    if details.message:
        print(redact(details.message))
    return 0
