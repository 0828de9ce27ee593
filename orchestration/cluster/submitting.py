"""A command as a job of a Ray cluster: what is sent along, and its log until it ends."""

from __future__ import annotations

import os
import shlex
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from pipeline import storage
from pipeline.common_options import answer, note, now, out

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def submit_command(
    command: list[str],
    *,
    address: str = "",
    working_dir: str | None = None,
    env: Sequence[str] = (),
    name: str = "",
    detach: bool = False,
) -> int:
    """Have a cluster run `latentzoom COMMAND...`; its exit status, or 0 as soon as the head has it where `detach`.

    address: of the head's job server; "" is RAY_API_SERVER_ADDRESS, else this machine. working_dir: code to send; None
    is this folder if it is latentzoom's own, "" sends nothing. env: NAME=VALUE, or NAME of this shell's. name: of the
    job. Raises `UserError` where the command cannot be a job, or the head does not answer."""
    from orchestration.cluster import jobs

    jobs.check_command(command)
    for line in [*local_paths(command), *unkept_results(command)]:
        note(f"note: {line}")
    address = jobs.default_address(address)
    working_dir = own_source() if working_dir is None else working_dir
    environment = jobs.runtime_env(working_dir, {**_commit(working_dir), **_environment(env)})
    words = ["latentzoom", *command]
    client = jobs.connect(address)
    print(jobs.ray_command(address, environment, words, name=name, detach=detach), flush=True)
    job = jobs.submit(
        client,
        address,
        entrypoint=shlex.join(words),
        runtime_env=environment,
        submission_id=name or None,
        metadata={"latentzoom_verb": command[0]},
    )
    if detach:
        text = f"job {job} at {address}\nfollow it: latentzoom jobs {job} --follow --address {address}"
        answer(text, {"job": job, "address": address})
        return 0
    print(f"job {job} at {address}", flush=True)
    return follow_to_end(client, address, job)


def follow_to_end(client: object, address: str, job: str) -> int:
    """Print the log until the job ends; Ctrl-C leaves it running."""
    from orchestration.cluster import jobs

    try:
        log = sys.stdout if now().json else out()
        details = jobs.follow(client, address, job, log)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        print(
            f"\n{job} goes on. Follow it again: latentzoom jobs {job} --follow --address {address}\n"
            f"Stop it: latentzoom stop {job} --address {address}",
            file=sys.stderr,
        )
        return jobs.STOPPED
    status = jobs.exit_status(details)
    why = f": {details.message}" if status and details.message and details.driver_exit_code is None else ""
    ended = f"job {job} {details.status.value}, exit status {status}{why}"
    if status:
        print(ended, file=sys.stderr)
    else:
        note(ended)
    if now().json:
        answer("", jobs.facts(details))
    return status


def own_source() -> str:
    """This folder, when it holds latentzoom's own source; else nothing is sent."""
    from orchestration.cluster import jobs

    return str(Path.cwd()) if jobs.is_own_source(Path.cwd()) else ""


def _commit(working_dir: str) -> dict[str, str]:
    """Which commit is sent, where it is latentzoom's own source: `.git` stays here. Else the image's own holds."""
    from orchestration.cluster import jobs
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


_RESULTS = {
    "evaluate": ("--out", "evaluation"),
    "promote": ("--workdir", "promotion"),
    "generate": ("--out", "generated"),
}
"""The option that names the folder of a verb's results, and its value where it is not given."""


def unkept_results(command: list[str]) -> list[str]:
    """What a job would write to its own folder on the head, which goes with it."""
    verb, *words = command
    if verb not in _RESULTS:
        return []
    option, value = _RESULTS[verb]
    for place, word in enumerate(words):
        name, equals, given = word.partition("=")
        if name == option:
            value = given if equals else "".join(words[place + 1 : place + 2])
    if "://" in value or value.startswith("/"):
        return []
    return [f"{verb} {option} {value} is in the job's own folder on the head and goes with it; give {option} URL"]


def _environment(assignments: Sequence[str]) -> dict[str, str]:
    """`--env`, and this shell's tracking server where the cluster can mean the same by its address."""
    from orchestration.cluster import jobs
    from pipeline.redact import url_without_secrets

    values = jobs.environment(assignments)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "MLFLOW_TRACKING_URI" in values or not uri.startswith(("http://", "https://")):
        return values
    if urllib.parse.urlsplit(uri).hostname in _LOOPBACK:
        shown = url_without_secrets(uri)
        note(
            f"note: MLFLOW_TRACKING_URI={shown} is this machine's own address and is not sent; the cluster's own "
            "holds, or give --env MLFLOW_TRACKING_URI=URL"
        )
    elif url_without_secrets(uri) == uri:
        values["MLFLOW_TRACKING_URI"] = uri
    return values
