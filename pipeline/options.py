"""The options of a dataclass that tyro parses, as names and kinds: what a command line may say, before it is parsed."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.common_options import COMMON, did_you_mean, note
from pipeline.errors import UserError

Kind = Literal["flag", "pair", "value", "list", "repeated", "positional"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """field: of the dataclass. name: `--latent-size`; of a positional its metavar. kind: a flag has no value, a pair is
    a flag with a `--no-` form, a list is one word with commas. choices: allowed words, () for any. default: what holds
    without it, `dataclasses.MISSING` for none. takes_several: of a positional."""

    field: str
    name: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    metavar: str = ""
    choices: tuple[str, ...] = ()
    is_number: bool = False
    default: Any = dataclasses.MISSING
    takes_several: bool = False

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def names(self) -> tuple[str, ...]:
        """All ways to write it; () for a positional."""
        if self.kind == "positional":
            return ()
        return (self.name, *self.aliases, *([f"--no-{self.name[2:]}"] if self.kind == "pair" else []))


def options_of(kind: type) -> tuple[Option, ...]:
    """The options of a dataclass, in its order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        plain, notes = (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())
        if any(note is tyro.conf.Suppress for note in notes):
            continue
        described = next((note for note in notes if hasattr(note, "help_behavior_hint")), None)
        inner = _plain(plain)
        found.append(
            Option(
                field=field.name,
                name=option_name(field.name, described),
                kind=_kind(inner, notes),
                aliases=tuple(getattr(described, "aliases", None) or ()),
                metavar=str(getattr(described, "metavar", None) or ""),
                choices=_choices(inner),
                is_number=inner in (int, float) or any(item in (int, float) for item in typing.get_args(inner)),
                default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
                takes_several=tuple in (inner, typing.get_origin(inner)),
            )
        )
    return tuple(dataclasses.replace(o, name=o.metavar or o.field) if o.kind == "positional" else o for o in found)


def words_of(option: Option) -> tuple[str, ...]:
    """What may stand for its value, for completion: its choices, or those that its metavar lists; () for anything."""
    listed = tuple(option.metavar.split("|"))
    is_list = len(listed) > 1 and all(word == word.lower() for word in listed)
    return option.choices or (listed if is_list else ())


def option_name(field: str, described: Any) -> str:
    """How a field is written on a command line. described: its `tyro.conf.arg`, None for none."""
    return f"--{getattr(described, 'name', None) or field}".replace("_", "-")


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _plain(hint: Any) -> Any:
    if is_union(hint):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _kind(plain: Any, notes: Sequence[Any]) -> Kind:
    if any(note is tyro.conf.Positional for note in notes):
        return "positional"
    if any(note is tyro.conf.UseAppendAction for note in notes):
        return "repeated"
    if plain is bool:
        return "flag" if any(note is tyro.conf.FlagCreatePairsOff for note in notes) else "pair"
    return "list" if typing.get_origin(plain) is tuple else "value"


def _choices(plain: Any) -> tuple[str, ...]:
    if typing.get_origin(plain) is not Literal:
        return ()
    return tuple(str(choice) for choice in typing.get_args(plain) if str(choice))


def named(options: Sequence[Option], word: str) -> Option | None:
    """The option that a word of the command line names."""
    name = word.partition("=")[0]
    if name.startswith("--"):
        name = name.replace("_", "-")
    return next((option for option in options if name in option.names), None)


def spelled(options: Sequence[Option], words: Sequence[str], prog: str) -> list[str]:
    """The words in today's spelling. Lists that were written with spaces, or given several times, become one word with
    commas, with a line that says so. Raises `UserError` for an option that there is none of."""
    known = [name for option in options for name in option.names]
    has_positionals = any(option.kind == "positional" for option in options)
    made: list[str] = []
    lists: dict[str, int] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*made, word, *rest]
        option = named(options, word)
        if option is None:
            if _is_unknown(word, known):
                name = word.partition("=")[0]
                near = did_you_mean(name.replace("_", "-"), [*known, *COMMON])
                raise UserError(f"{prog} has no option {name}{near} ({prog} --help lists all)")
            made.append(word)
            continue
        if option.kind in ("flag", "pair"):
            made.append(word)
            continue
        if "=" in word:
            name, value = word.split("=", 1)
            values = [value]
        else:
            name, values = word, rest[:1]
            del rest[:1]
        if option.kind == "list" and values:
            while rest and _is_more(rest[0], option, has_positionals):
                values.append(rest.pop(0))
            if option.field in lists:
                place = lists[option.field]
                values.insert(0, made[place])
            if len(values) > 1:
                joined = ",".join(values)
                note(f"latentzoom: note: a list is one word with commas: {name} {joined}")
                values = [joined]
            if option.field in lists:
                made[lists[option.field]] = values[0]
                continue
            lists[option.field] = len(made) + 1
        made += [name, *values]
        if values and "=" in word and option.kind != "list":
            made[-2:] = _joined(name, values[0])
    for place in sorted(lists.values(), reverse=True):
        made[place - 1 : place + 1] = _joined(*made[place - 1 : place + 1])
    return made


def check_complete(options: Sequence[Option], words: Sequence[str], prog: str) -> None:
    """Raises `UserError` for an option that has lost its value, for a word too many, and where something is not given
    that has no default. words: as `spelled` gives them."""
    given: set[str] = set()
    others, rest = list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return
        if word == "--":
            others += rest
            break
        option = named(options, word) or named(options, word[:2] if word[:1] == "-" else "")
        if option is None:
            others.append(word)
            continue
        given.add(option.field)
        if option.kind in ("flag", "pair") or word not in option.names:
            continue
        if not rest or named(options, rest[0]) is not None:
            raise UserError(f"{word} has no value; give {word} {_value_of(option)} ({prog} --help says more)")
        rest.pop(0)
    places = [option for option in options if option.kind == "positional"]
    if len(others) > len(places) and not any(option.takes_several for option in places):
        raise UserError(f"{prog} has no place for {others[len(places)]!r} ({prog} --help says more)")
    required = [option for option in options if option.is_required]
    missing = [f"{o.name} {_value_of(o)}" for o in required if o.kind != "positional" and o.field not in given]
    missing += [option.name for option in places[len(others) :] if option.is_required]
    if missing:
        listed = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise UserError(f"{prog} needs {listed} ({prog} --help says more)")


def _value_of(option: Option) -> str:
    return option.metavar or "|".join(option.choices) or "VALUE"


def _is_unknown(word: str, known: Sequence[str]) -> bool:
    """Whether a word that is no option looks like one. `-5` is a value, and `-oout.png` is -o with its value."""
    if word.startswith("--"):
        return word != "--help" and not word.startswith("--tyro-")
    return word[:1] == "-" and word not in ("-", "-h") and word[:2] not in known and not _is_number(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _joined(name: str, value: str) -> list[str]:
    """An option and its value, as one word where the value would be taken for an option."""
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def _is_more(word: str, option: Option, has_positionals: bool) -> bool:
    """Whether a word after a list's first is one more of the list, as lists were written before."""
    if word.startswith("-") and not option.is_number:
        return False
    if option.is_number:
        return _is_number(word)
    return not word.startswith("--") and (not has_positionals or ("/" not in word and not Path(word).exists()))
