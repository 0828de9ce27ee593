"""`latentzoom submit VERB ... --address http://HEAD:8265`: any verb as a Ray job. Only the address changes."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline import storage
from pipeline.command_line import Flag, Repeated, parse, plain_help
from pipeline.common_options import answer, did_you_mean, now, out, split
from pipeline.errors import UserError
from pipeline.options import named, options_of

NOT_AS_JOBS = ("submit", "jobs", "stop", "demo")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Run a latentzoom verb as a job of a Ray cluster: follow its log, pass its exit status on."""

    address: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """The head, http://HEAD:8265; without it RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    detach: Flag = False
    """Return once the job is submitted."""
    working_dir: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Code to send; without it this folder if it is latentzoom's own, else nothing ('': nothing)."""
    env: Annotated[Repeated, tyro.conf.arg(metavar="NAME[=VALUE]")] = ()
    """Environment of the job (no secrets). May be given several times."""
    submission_id: Annotated[str, tyro.conf.arg(metavar="ID")] = ""
    """Name of the job; a second job of the same name is refused."""


def parsed(words: list[str]) -> tuple[Arguments, list[str]]:
    """What is asked of submit itself, and the verb with its own words."""
    options = options_of(Arguments)
    own, command = [], []
    left = iter(words)
    for word in left:
        option = named(options, word)
        if option is None and word not in ("-h", "--help"):
            command.append(word)
            continue
        own.append(word)
        if option is not None and option.kind != "flag" and "=" not in word:
            own += list(itertools.islice(left, 1))
    usage = "latentzoom submit VERB [the verb's options] [submit's own options]"
    arguments = parse(Arguments, own, prog="latentzoom submit", description=f"{Arguments.__doc__}\n\n{usage}")
    return arguments, command[command[:1] == ["--"] :]


def main(argv: list[str]) -> int:
    from orchestration import jobs
    from orchestration.cli import VERBS

    arguments, command = parsed(argv)
    allowed = [verb for verb in VERBS if verb not in NOT_AS_JOBS]
    if not command or command[0] not in (*allowed, "--version"):
        said = f"no verb {command[0]!r}{did_you_mean(command[0], allowed)}." if command else "which verb?"
        raise UserError(f"{said} Use `latentzoom submit VERB ...` with one of {', '.join(allowed)}")
    command = with_settings(command)
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
    if arguments.detach:
        text = f"job {job} at {address}\nfollow it: latentzoom jobs {job} --follow --address {address}"
        answer(text, {"job": job, "address": address})
        return 0
    print(f"job {job} at {address}", flush=True)
    return follow_to_end(client, address, job)


def with_settings(command: list[str]) -> list[str]:
    """The command with the settings of its --config written out: that file is here, and not on the cluster."""
    from orchestration.kinds import kind_of
    from pipeline import settings_file

    verb, *words = command
    if verb == "import" or not (common := split(words)[0]).config:
        return command
    rest = [word for word in words if word not in _config_words(words)]
    kind, place = kind_of(verb, rest)
    first, rest = rest[:place], rest[place:]
    options = options_of(kind)
    return [verb, *first, *settings_file.before(options, common.config, rest, " ".join(["latentzoom", verb, *first]))]


def _config_words(words: list[str]) -> list[str]:
    place = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--config")
    return words[place : place + (1 if "=" in words[place] else 2)]


def follow_to_end(client: object, address: str, job: str) -> int:
    """Print the log until the job ends; Ctrl-C leaves it running."""
    from orchestration import jobs

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
    print(f"job {job} {details.status.value}, exit status {status}{why}", file=sys.stderr)
    if now().json:
        answer("", jobs.facts(details))
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


def _environment(assignments: Sequence[str]) -> dict[str, str]:
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
