"""Ray jobs over HTTP: submit, follow, list, stop. Token authentication throughout; the driver reserves no GPU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestration.text_table import text_table
from orchestration.tracking.outages import Silent, patiently
from pipeline.errors import UserError
from pipeline.progress import format_seconds
from pipeline.redact import carries_secret, clean, is_secret_name, redact, remember

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_OWN_SOURCE = ("pipeline", "preprocess", "training", "orchestration", "requirements.lock")
_NEVER_SENT = [".git/", ".venv/", ".env", "**/__pycache__/"]
"""Environments and secrets stay here: the cluster's image has its own."""
_STARTING, _PATIENCE_S = "No available agent", 120.0
"""What a head says in its first seconds, before an agent of its own has reported; it asks to try again later."""
STOPPED = 130
STOP_WAIT_S = 600
"""Seconds between the SIGTERM and the SIGKILL of a stopped job; Ray's own are three. A training stage writes a
checkpoint meanwhile, and everything else ends in a moment."""
_EXCEPTION_LINE = re.compile(r"^[\w.]*(Error|Exception): ")


def default_address(address: str = "") -> str:
    """`address`, else RAY_API_SERVER_ADDRESS, else this machine's head."""
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS


def token() -> str:
    """The token for the cluster, found where Ray looks: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if text := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return text
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def connect(address: str) -> JobSubmissionClient:
    """A client for the head at `address` (http://HOST:8265). Raises `UserError` when it does not answer or refuses."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address} is not an HTTP address; use http://HEAD:8265")
    from ray.job_submission import JobSubmissionClient

    with user_errors(address):
        secret = token()
        remember(secret)
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {secret}"} if secret else None)


@contextlib.contextmanager
def user_errors(address: str) -> Iterator[None]:
    """Turn what the job server says into one clear line."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        known = "refuses this token" if token() else "wants a token, and none was found"
        raise UserError(
            f"the cluster at {address} {known}; put the head's token into RAY_AUTH_TOKEN or ~/.ray/auth_token "
            "(`ray get-auth-token` on the head prints it)"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise Silent(
            f"no Ray head answers at {address}; is it running, and is the port forwarded? "
            "(kubectl port-forward service/latentzoom-head-svc 8265)"
        ) from error
    except KeyError as error:  # of an answer without what a head says
        raise UserError(f"what answers at {address} is not a Ray head; is it the right port?") from error
    except RuntimeError as error:
        kind = Silent if re.search(r"status code 50[234]", str(error)) else UserError
        raise kind(f"the cluster at {address}: {_first_line(error)}") from error
    except ValueError as error:  # what Ray refuses before it sends anything, as a folder that is too large
        raise UserError(f"nothing was sent: {_first_line(error)}") from error


def submit(client: JobSubmissionClient, address: str, *, patience_s: float = _PATIENCE_S, **job: Any) -> str:
    """Send a job → its id. A head that has only just started is asked again until it can take jobs."""
    end = time.monotonic() + patience_s
    for name in (
        "_private.runtime_env.packaging",
        "_private.runtime_env.working_dir",
        "dashboard.modules.dashboard_sdk",
    ):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # a line for every .gitignore below the folder
    with user_errors(address):
        while True:
            try:
                return client.submit_job(**job)
            except RuntimeError as error:
                if _STARTING not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(min(1.0, patience_s))


def environment(assignments: Sequence[str]) -> dict[str, str]:
    """`--env NAME` (this shell's value) and `--env NAME=VALUE`. Secrets are refused: a job's environment is shown to
    everyone who may see the job."""
    values = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        shown = (
            "and a job's environment is shown in the dashboard; put it into the cluster's own environment "
            "(infra/: Kubernetes secret `latentzoom-env`)"
        )
        if is_secret_name(name):
            raise UserError(f"--env {name} sounds like a secret, {shown}")
        if carries_secret(value if sign else os.environ.get(name, "")):
            raise UserError(f"the value of --env {name} carries a secret, {shown}")
        if not sign and name not in os.environ:
            raise UserError(f"--env {name}: this shell has no such variable; give NAME=VALUE")
        values[name] = value if sign else os.environ[name]
    return values


def check_command(command: Sequence[str]) -> None:
    """Refuse commands that carry a secret: they are shown in the dashboard and in logs."""
    pairs = zip(command, command[1:])
    options = [f"{name} {value}" for name, value in pairs if name.startswith("-") and not value.startswith("-")]
    for text in [*command, *options]:
        if carries_secret(text):
            raise UserError(
                f"{redact(text)!r} carries a secret, and a job's command is shown in the dashboard; "
                "put it into the cluster's own environment"
            )


def is_own_source(folder: Path) -> bool:
    """Whether a folder holds latentzoom's own source."""
    return (folder / "orchestration" / "cli.py").is_file() and (folder / "pipeline").is_dir()


def excludes(folder: Path) -> list[str]:
    """What of a folder is not sent, in git's words. Of latentzoom's own source only the packages go along: beside them
    lie data, runs and whatever else its users keep there."""
    others = ["/*", "!/.", *(f"!/{name}" for name in _OWN_SOURCE)] if is_own_source(folder) else []  # ".": the folder
    return [*others, *_NEVER_SENT]


def runtime_env(working_dir: str, env_vars: dict[str, str]) -> dict[str, Any]:
    """Code and environment of driver and workers. Nothing is installed at start: the image has the packages. The job's
    supervisor reads there how long a stopped job may take."""
    environment: dict[str, Any] = {}
    if working_dir:
        folder = Path(working_dir).resolve()
        if not folder.is_dir():
            raise UserError(f"--working-dir {working_dir} is not a folder of this machine")
        environment |= {"working_dir": str(folder), "excludes": excludes(folder)}
    environment["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **env_vars}
    return environment


def ray_command(
    address: str, environment: dict[str, Any], command: Sequence[str], *, name: str = "", detach: bool = False
) -> str:
    """The `ray job submit` line that does the same, for a shell that has the token where Ray looks for it.

    name: the job's, where it is to have a certain one.
    """
    words = ["ray", "job", "submit", "--address", address]
    words += ["--submission-id", name] if name else []
    rest = {k: v for k, v in environment.items() if k != "working_dir"}
    if "working_dir" in environment:
        here = Path(environment["working_dir"]) == Path.cwd()
        words += ["--working-dir", "." if here else environment["working_dir"]]
    if rest:
        words += ["--runtime-env-json", json.dumps(rest)]
    words += ["--no-wait"] if detach else []
    mode = "RAY_AUTH_MODE=token " if token() else ""  # Ray's own command uses no token from RAY_AUTH_TOKEN unasked
    return mode + shlex.join([*words, "--", *command])


def follow(client: JobSubmissionClient, address: str, job: str, out: TextIO | None = None) -> JobDetails:
    """Print a job's log until it ends; returns its details. A dropped connection is taken up again where it was, and a
    head that does not answer is waited for."""
    log = _Log(out or sys.stdout)
    while True:
        with user_errors(address):
            try:
                asyncio.run(log.tail(client, job))
            except (OSError, RuntimeError, _client_error()) as error:
                print(f"connection to {address} lost ({_first_line(error)}); trying again", file=sys.stderr)
                time.sleep(1)
        found = details(client, address, job)
        if found.status.is_terminal():
            return found
        time.sleep(0.5)


def details(client: JobSubmissionClient, address: str, job: str) -> JobDetails:
    """What the head says of a job. One that does not answer is asked again for a quarter of an hour: jobs go on."""

    def ask() -> JobDetails:
        with user_errors(address):
            return client.get_job_info(job)

    return patiently(ask, job)


def _client_error() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError


class _Log:
    """A job's log as far as it was printed. It always comes from its start; only what was not seen yet is printed."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.seen = out, 0

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        position = 0
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, self.seen - position) :]
            position += len(text)
            if fresh:
                self.out.write(fresh)
                self.out.flush()
            self.seen = max(self.seen, position)


def exit_status(details: JobDetails) -> int:
    """0 for success, the driver's own exit status, 130 for a job that was stopped, else 1."""
    if details.status.value == "SUCCEEDED":
        return 0
    if details.status.value == "STOPPED":
        return STOPPED
    code = details.driver_exit_code
    if not code:
        return 1
    return code if code > 0 else 128 - code


def table(jobs: Sequence[JobDetails]) -> str:
    """One line a job, newest first."""
    rows = [("job", "state", "exit", "started", "took", "command")]
    for job in newest_first(jobs):
        start, end = (job.start_time or 0) / 1000, (job.end_time or 0) / 1000
        code = "" if job.driver_exit_code is None else str(job.driver_exit_code)
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start)) if start else ""
        took = format_seconds((end or time.time()) - start) if start else ""
        name = job.submission_id or job.job_id or ""
        rows.append((name, job.status.value, code, began, took, redact(job.entrypoint)))
    return text_table(rows)


def newest_first(jobs: Sequence[JobDetails]) -> list[JobDetails]:
    """By the time that they started."""
    return sorted(jobs, key=lambda job: -(job.start_time or 0))


def facts(job: JobDetails) -> dict[str, Any]:
    """A job for programs: times are seconds since 1970, or null."""
    return {
        "job": job.submission_id or job.job_id or "",
        "state": job.status.value,
        "exit_status": job.driver_exit_code,
        "started": job.start_time / 1000 if job.start_time else None,
        "ended": job.end_time / 1000 if job.end_time else None,
        "command": redact(job.entrypoint),
        "message": redact(job.message or ""),
    }


def _first_line(error: BaseException) -> str:
    """What happened: of an answer that carries a whole traceback that is the traceback's own message line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("Traceback" in line for line in lines):
        lines = [line for line in lines if _EXCEPTION_LINE.match(line) and "Traceback" not in line][-1:] or lines[-1:]
    return clean(lines[0][:300]) if lines else type(error).__name__
