"""`latentzoom submit VERB ... --address http://HEAD:8265`: any verb as a Ray job. Only the address changes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import urllib.parse
from pathlib import Path

from pipeline import storage
from pipeline.errors import UserError

NOT_AS_JOBS = ("submit", "jobs", "stop", "demo")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parser() -> argparse.ArgumentParser:
    """Options of submit itself; everything else belongs to the verb."""
    parser = argparse.ArgumentParser(
        prog="latentzoom submit",
        usage="latentzoom submit VERB [verb's options] [--address http://HEAD:8265] [--detach] [--env NAME[=VALUE]]",
        description="Run a latentzoom verb as a job of a Ray cluster: follow its log, pass its exit status on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--address", default="", help="the head; default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265")
    add("--detach", action="store_true", help="return once the job is submitted")
    add("--working-dir", default=None, metavar="DIR", help="code to send; default: this folder if it is latentzoom's "
        "own, else nothing ('': nothing)")  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="environment of the job (no secrets)")
    add("--submission-id", default="", help="name of the job; a second job of the same name is refused")
    return parser


def main(argv: list[str]) -> int:
    from orchestration import jobs
    from orchestration.cli import VERBS

    arguments, command = parser().parse_known_args(argv)
    command = [word for i, word in enumerate(command) if not (i == 0 and word == "--")]
    allowed = [verb for verb in VERBS if verb not in NOT_AS_JOBS]
    if not command or command[0] not in (*allowed, "--version"):
        said = f"no verb {command[0]!r}" if command else "which verb?"
        raise UserError(f"{said} Use `latentzoom submit VERB ...` with one of {', '.join(allowed)}")
    jobs.check_command(command)
    for note in local_paths(command):
        print(f"note: {note}", file=sys.stderr)
    address = jobs.default_address(arguments.address)
    working_dir = own_source() if arguments.working_dir is None else arguments.working_dir
    environment = jobs.runtime_env(working_dir, {**_commit(working_dir), **_environment(arguments.env)})
    words = ["latentzoom", *command]
    client = jobs.connect(address)
    print(
        jobs.ray_command(address, environment, words, name=arguments.submission_id, detach=arguments.detach), flush=True
    )
    job = jobs.submit(
        client,
        address,
        entrypoint=shlex.join(words),
        runtime_env=environment,
        submission_id=arguments.submission_id or None,
        metadata={"latentzoom_verb": command[0]},
    )
    print(f"job {job} at {address}", flush=True)
    if arguments.detach:
        print(f"follow it: latentzoom jobs {job} --follow --address {address}")
        return 0
    return follow_to_end(client, address, job)


def follow_to_end(client: object, address: str, job: str) -> int:
    """Print the log until the job ends; Ctrl-C leaves it running."""
    from orchestration import jobs

    try:
        details = jobs.follow(client, address, job)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        print(
            f"\n{job} goes on. Follow it again: latentzoom jobs {job} --follow --address {address}\n"
            f"Stop it: latentzoom stop {job} --address {address}",
            file=sys.stderr,
        )
        return jobs.STOPPED
    status = jobs.exit_status(details)
    why = f": {details.message}" if status and details.message and details.driver_exit_code is None else ""
    print(f"job {job} {details.status.value}, exit status {status}{why}", file=sys.stderr)
    return status


def own_source() -> str:
    """This folder, when it holds latentzoom's own source; else nothing is sent."""
    from orchestration import jobs

    return str(Path.cwd()) if jobs.is_own_source(Path.cwd()) else ""


def _commit(working_dir: str) -> dict[str, str]:
    """Which commit is sent, where it is latentzoom's own source: `.git` stays here. Else the image's own holds."""
    from orchestration import jobs
    from training import commit

    folder = Path(working_dir or "/").resolve()
    found = commit.commit_of(folder) if jobs.is_own_source(folder) else ""
    return {commit.VARIABLE: found} if found else {}


def local_paths(command: list[str]) -> list[str]:
    """Arguments that exist here as local paths: the cluster has to see them as well."""
    notes = []
    for word in command[1:]:
        value = word.partition("=")[2] if word.startswith("--") else word
        if "/" in value and "://" not in value and Path(value).exists():
            absolute = storage.absolute(value)
            notes.append(f"{value} is a path of this machine; every node must see it, as {absolute}, on shared storage")
    return notes


def _environment(assignments: list[str]) -> dict[str, str]:
    """`--env`, and this shell's tracking server where the cluster can mean the same by its address."""
    from orchestration import jobs
    from pipeline.redact import url_without_secrets

    values = jobs.environment(assignments)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "MLFLOW_TRACKING_URI" in values or not uri.startswith(("http://", "https://")):
        return values
    if urllib.parse.urlsplit(uri).hostname in _LOOPBACK:
        shown = url_without_secrets(uri)
        print(f"note: MLFLOW_TRACKING_URI={shown} is this machine's own address and is not sent; the cluster's own "
              f"holds, or give --env MLFLOW_TRACKING_URI=URL", file=sys.stderr)  # fmt: skip
    elif url_without_secrets(uri) == uri:
        values["MLFLOW_TRACKING_URI"] = uri
    return values
