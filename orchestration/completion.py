"""`latentzoom --completion SHELL`: a script for the shell that completes verbs, their kinds, options and choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orchestration.cli import VERBS
from orchestration.kinds import kinds
from pipeline.common_options import COMMON, did_you_mean
from pipeline.errors import UserError
from pipeline.options import Option, options_of, words_of

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


def _first_words(commands: list[Command]) -> dict[str, list[str]]:
    """Verb → what its first word that is no option may be: a kind, or a choice."""
    found = _kinds_of(commands)
    for verb, _, options in commands:
        first = next((option for option in options if option.kind == "positional"), None)
        if verb not in found and first is not None and (words := words_of(first)):
            found[verb] = list(words)
    return found


def _takes_value(option: Option) -> bool:
    return option.kind not in ("flag", "pair", "positional")


def _cases(found: dict[str, str]) -> str:
    """The arms of a `case` that sets `words`."""
    return "\n".join(f'    {pattern}) words="{words}" ;;' for pattern, words in found.items())


def _bash(commands: list[Command]) -> str:
    """The first words that are neither options nor an option's value choose the case: a verb, the verb that is
    submitted, a kind. The value of an option is one of its choices, else a file. A submitted verb has submit's options
    too. Bash takes an equals sign for a word of its own."""
    names, choices, valued = {}, {'" --completion"': " ".join(SHELLS)}, ['" --completion"']
    valued += [f'*" {name}"' for name, (metavar, _) in COMMON.items() if metavar]
    for verb, kind, options in commands:
        names[f'"{f"{verb} {kind}".strip()}"'] = _names(options)
        for option in filter(_takes_value, options):
            written = "|".join(f'"{verb} {name}"' for name in option.names)
            valued.append(written)
            if words := words_of(option):
                choices[written] = " ".join(words)
    first = {verb: " ".join(words) for verb, words in _first_words(commands).items()}
    of_submit = " ".join(name for verb, _, options in commands if verb == "submit" for o in options for name in o.names)
    return f"""# latentzoom --completion bash; for example in ~/.bashrc: eval "$(latentzoom --completion bash)"
_latentzoom_valued() {{
  case "$1" in
    {"|".join(dict.fromkeys(valued))}) return 0 ;;
  esac
  return 1
}}
_latentzoom() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" verb="" submit="" first="" kind="" option="" words="" i word
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${{COMP_WORDS[i]}}" option=""
    case "$word" in
    -*)
      if _latentzoom_valued "$verb $word"; then option="$verb $word"
      elif [ -n "$submit" ] && _latentzoom_valued "submit $word"; then option="submit $word"; fi
      if [ -n "$option" ]; then i=$((i + 1)); fi
      if [ "${{COMP_WORDS[i]}}" = "=" ] && [ "$i" -lt "$COMP_CWORD" ]; then i=$((i + 1)); fi
      if [ "$i" -lt "$COMP_CWORD" ]; then option=""; fi
      continue ;;
    esac
    if [ -z "$verb" ]; then verb="$word"; if [ "$verb" = submit ]; then submit=1; fi
    elif [ "$verb" = submit ]; then verb="$word"
    elif [ -z "$first" ]; then
      first="$word"
      case "$verb" in {"|".join(_kinds_of(commands))}) kind="$word" ;; esac
    fi
  done
  if [ -n "$option" ]; then
    if [ "$cur" = "=" ]; then cur=""; fi
    case "$option" in
{_cases(choices)}
    *) return ;;
    esac
  elif [ -z "$verb" ]; then words="{" ".join(VERBS)} --help --version --completion {" ".join(COMMON)}"
  else
    case "$cur" in
    -*)
      case "$verb${{kind:+ $kind}}" in
{_cases(names)}
      *) words="{" ".join(COMMON)} --help" ;;
      esac
      if [ -n "$submit" ] && [ "$verb" != submit ]; then words="$words {of_submit}"; fi ;;
    *)
      if [ "$verb" = submit ]; then words="{" ".join(VERBS)}"
      elif [ -z "$first" ]; then
        case "$verb" in
{_cases(first)}
        esac
      fi
      if [ -z "$words" ]; then return; fi ;;
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
    others = [verb for verb in VERBS if verb != "submit"]
    for verb, names in {**_first_words(commands), "submit": others}.items():
        condition = f"__fish_seen_subcommand_from {verb}; and not __fish_seen_subcommand_from {' '.join(names)}"
        lines.append(f"complete -c latentzoom -f -n '{condition}' -a '{' '.join(names)}'")
    for verb, kind, options in commands:
        condition = f"__fish_seen_subcommand_from {verb}" + (
            f"; and __fish_seen_subcommand_from {kind}" if kind else ""
        )
        for option in options:
            for name in option.names:
                long = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                if words := words_of(option):
                    long += f" -x -a '{' '.join(words)}'"
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
