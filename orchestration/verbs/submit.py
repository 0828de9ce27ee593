"""`latentzoom submit VERB ... --address http://HEAD:8265`: any verb as a Ray job. Only the address changes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated

import tyro

from orchestration.cluster.submitting import submit_command
from pipeline.command_line import Flag, Repeated, parse, plain_help
from pipeline.common_options import did_you_mean, split
from pipeline.errors import UserError
from pipeline.options import named, options_of

NOT_AS_JOBS = ("submit", "jobs", "stop", "demo")


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
    from orchestration.cli import VERBS

    arguments, command = parsed(argv)
    allowed = [verb for verb in VERBS if verb not in NOT_AS_JOBS]
    if not command or command[0] not in (*allowed, "--version"):
        said = f"no verb {command[0]!r}{did_you_mean(command[0], allowed)}." if command else "which verb?"
        raise UserError(f"{said} Use `latentzoom submit VERB ...` with one of {', '.join(allowed)}")
    return submit_command(
        with_settings(command),
        address=arguments.address,
        working_dir=arguments.working_dir,
        env=arguments.env,
        name=arguments.submission_id,
        detach=arguments.detach,
    )


def with_settings(command: list[str]) -> list[str]:
    """The command with the settings of its --config written out: that file is here, and not on the cluster."""
    from orchestration.kinds import kind_of
    from pipeline import settings_file

    verb, *words = command
    if not (common := split(words)[0]).config:
        return command
    rest = _without_config(words)
    kind, place = kind_of(verb, rest)
    first, rest = rest[:place], rest[place:]
    options = options_of(kind)
    return [verb, *first, *settings_file.before(options, common.config, rest, " ".join(["latentzoom", verb, *first]))]


def _without_config(words: list[str]) -> list[str]:
    place = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--config")
    return words[:place] + words[place + (1 if "=" in words[place] else 2) :]
