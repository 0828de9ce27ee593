"""`latentzoom --completion SHELL`: a script for the shell that completes verbs, their kinds, options and choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orchestration.cli import VERBS
from orchestration.kinds import kinds
from pipeline.common_options import COMMON, did_you_mean
from pipeline.errors import UserError
from pipeline.options import Option, options_of

Command = tuple[str, str, tuple[Option, ...]]
"""Verb, kind ("" where it has none), options."""


def script(shell: str) -> str:
    """What the shell sources. Raises `UserError` for another shell."""
    if shell not in SHELLS:
        said = f"no shell {shell!r}{did_you_mean(shell, SHELLS)}; " if shell else ""
        raise UserError(f"--completion: {said}use {', '.join(SHELLS)}")
    return SHELLS[shell](list(_commands()))


def _commands() -> Iterator[Command]:
    for verb in VERBS:
        for kind, options in kinds(verb).items():
            yield verb, kind, options_of(options)


def _names(options: tuple[Option, ...]) -> str:
    return " ".join([*(name for option in options for name in option.names), *COMMON, "--help"])


def _kinds_of(commands: list[Command]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for verb, kind, _ in commands:
        if kind:
            found.setdefault(verb, []).append(kind)
    return found


def _bash(commands: list[Command]) -> str:
    """The first words that are no options choose the case; what follows an option with choices is one of them, and
    after other options files are completed."""
    cases, choices = [], []
    for verb, kind, options in commands:
        cases.append(f'    "{f"{verb} {kind}".strip()}") words="{_names(options)}" ;;')
        for option in options:
            if option.choices:
                pattern = "|".join(f'"{verb} {name}"' for name in option.names)
                choices.append(f'    {pattern}) words="{" ".join(option.choices)}" ;;')
    kind_cases = [f'    {verb}) words="{" ".join(names)}" ;;' for verb, names in _kinds_of(commands).items()]
    with_kinds = "|".join(_kinds_of(commands))
    nl = "\n"
    return f"""# latentzoom --completion bash; for example in ~/.bashrc: eval "$(latentzoom --completion bash)"
_latentzoom() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" verb="" kind="" words="" i word
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${{COMP_WORDS[i]}}"
    case "$word" in -*) continue ;; esac
    if [ -z "$verb" ]; then verb="$word"
    elif [ "$verb" = submit ] && [ "${{COMP_WORDS[i-1]}}" = submit ]; then verb="$word"
    elif [ -z "$kind" ]; then case "$verb" in {with_kinds}) kind="$word" ;; esac; fi
  done
  if [ -z "$verb" ]; then
    words="{" ".join(VERBS)} --help --version --completion {" ".join(COMMON)}"
    if [ "$before" = --completion ]; then words="{" ".join(SHELLS)}"; fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    return
  fi
  if [ "$verb" = submit ] && [ "$before" = submit ]; then words="{" ".join(VERBS)}"; fi
  case "$verb $before" in
{nl.join(dict.fromkeys(choices))}
  esac
  if [ -z "$words" ] && [ -z "$kind" ]; then
    case "$verb" in
{nl.join(kind_cases)}
    esac
  fi
  if [ -z "$words" ]; then
    case "$cur" in -*) ;; *) return ;; esac
    case "$verb${{kind:+ $kind}}" in
{nl.join(cases)}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _latentzoom latentzoom
"""


def _zsh(commands: list[Command]) -> str:
    """zsh understands completions of bash."""
    return f"""# latentzoom --completion zsh; for example in ~/.zshrc: eval "$(latentzoom --completion zsh)"
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
{_bash(commands).partition(chr(10))[2]}"""


def _fish(commands: list[Command]) -> str:
    lines = ["# latentzoom --completion fish > ~/.config/fish/completions/latentzoom.fish"]
    start = f"not __fish_seen_subcommand_from {' '.join(VERBS)}"
    for verb, (_, text) in VERBS.items():
        lines.append(f"complete -c latentzoom -f -n '{start}' -a {verb} -d {_quoted(text)}")
    lines.append(f"complete -c latentzoom -n '{start}' -l version -d 'of latentzoom, torch, Ray and the device'")
    lines.append(f"complete -c latentzoom -n '{start}' -x -l completion -a '{' '.join(SHELLS)}'")
    for verb, names in _kinds_of(commands).items():
        condition = f"__fish_seen_subcommand_from {verb}; and not __fish_seen_subcommand_from {' '.join(names)}"
        lines.append(f"complete -c latentzoom -f -n '{condition}' -a '{' '.join(names)}'")
    for verb, kind, options in commands:
        condition = f"__fish_seen_subcommand_from {verb}" + (
            f"; and __fish_seen_subcommand_from {kind}" if kind else ""
        )
        for option in options:
            for name in option.names:
                long = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                if option.choices:
                    long += f" -x -a '{' '.join(option.choices)}'"
                elif option.kind not in ("flag", "pair"):
                    long += " -r"
                lines.append(f"complete -c latentzoom -n '{condition}' {long}")
    for name, (metavar, text) in COMMON.items():
        lines.append(f"complete -c latentzoom -l {name[2:]} {'-r ' if metavar else ''}-d {_quoted(text)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """For fish, whose single quotes know \\' and nothing else but \\\\."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[list[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
