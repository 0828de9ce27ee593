"""One way to write and read command lines: a dataclass of options, parsed by tyro, with help that speaks of files and
numbers, not of Python. A list is one word with commas; an option that may stand several times is `Repeated`; settings
of a file hold before those of the line; an unknown name suggests a known one."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from pipeline.common_options import COMMON, did_you_mean, now, out
from pipeline.errors import UserError
from pipeline.options import check_complete, is_union, option_name, options_of, spelled

Options = TypeVar("Options")
_LARGEST = 1 << 63
"""Whole numbers of 64 bits are below it: what takes a count or a size takes no more."""
_METAVARS: dict[Any, str] = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A switch that is off unless its option is given."""
Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
"""An option that may be given several times, for values that may hold commas."""
Device = Annotated[str, tyro.conf.arg(metavar="DEVICE")]
"""The field `device`: see `parse`."""


def parse(
    kind: type[Options], words: Sequence[str], *, prog: str, description: str = "", common: bool = True
) -> Options:
    """What the words of a command line ask for, over the settings of --config. Raises `UserError` for unknown names,
    for what is missing and for what `kind` does not allow; `SystemExit` where the rest is wrong (2), and for --help and
    --show-config (0).
    common: whether the common options belong to this command."""
    options = options_of(kind)
    asked = with_settings(kind, words, prog) if common else spelled(options, words, prog)
    check_complete(options, asked, prog)
    text = inspect.cleandoc(description or str(kind.__doc__ or ""))
    if common:
        text += f"\n\nOptions of every verb: {', '.join(COMMON)} (latentzoom --help says more)."
    arguments = _tyro(kind, asked, prog, text)
    device = getattr(arguments, "device", None)
    if isinstance(device, str) and device and not re.fullmatch(r"cpu(:0)?|(cuda|mps|xpu)(:\d+)?", device):
        raise UserError(f"--device {device} is not allowed; use cpu, cuda or cuda:1")
    if common and now().show_config:
        from pipeline import settings_file

        print(settings_file.shown(options, arguments, prog), end="", file=out())
        raise SystemExit(0)
    return arguments


def with_settings(kind: type, words: Sequence[str], prog: str) -> list[str]:
    """The words in today's spelling, after those that the settings of --config amount to."""
    options = options_of(kind)
    asked = spelled(options, words, prog)
    if not now().config:
        return asked
    from pipeline import settings_file

    return settings_file.before(options, now().config, asked, prog)


def _tyro(kind: type[Options], words: Sequence[str], prog: str, description: str) -> Options:
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out()):  # for --help
            return tyro.cli(kind, prog=prog, args=words, description=description)
    except SystemExit as end:
        error: BaseException | None = end
        while error is not None:  # what is wrong with a value: one line is enough
            if isinstance(error, UserError):
                raise error from None
            error = error.__context__
        sys.stderr.write(said.getvalue())
        raise


def kind_of(words: Sequence[str], kinds: Sequence[str], prog: str) -> tuple[str, list[str]]:
    """The first word, which names one of `kinds`, and the others."""
    if not words or words[0] not in kinds:
        said = f"unknown kind {words[0]!r}{did_you_mean(words[0], kinds)}" if words else "which kind?"
        raise UserError(f"{said} Use `{prog} KIND ...` with one of {', '.join(kinds)}")
    return words[0], list(words[1:])


def plain_help(options: type[Options]) -> type[Options]:
    """Decorates a dataclass that tyro parses. A field without a metavar of its own gets one by its type; an empty
    default is not shown (the field's text says what happens then), any other as a person types it."""
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(options, include_extras=True)
    for name, hint in hints.items():
        if name in fields:
            options.__annotations__[name] = _described(hint, fields[name])
    return options


def _described(hint: Any, field: dataclasses.Field[Any]) -> Any:
    plain, notes = (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())
    if any(note is tyro.conf.Suppress for note in notes):
        return hint
    # Defaults of these two kinds tyro checks with a package that takes a tenth of a second to import: of the older
    # spelling of `float | None` it does it itself.
    if isinstance(plain, types.UnionType):
        plain = typing.Union[typing.get_args(plain)]  # noqa: UP007
    given = next((note for note in notes if hasattr(note, "help_behavior_hint")), None)
    has_default = field.default is not dataclasses.MISSING
    takes_several = any(note in (tyro.conf.Positional, tyro.conf.UseAppendAction) for note in notes)
    is_sequence = takes_several and typing.get_origin(plain) is tuple
    parser = [] if is_sequence else _parser(plain, option_name(field.name, given))
    described: Any = tyro.conf.arg(
        metavar=getattr(given, "metavar", None) or _metavar(plain),
        help=getattr(given, "help", None),
        help_behavior_hint=_default(field.default) if has_default else None,
        name=getattr(given, "name", None),
        aliases=getattr(given, "aliases", None),
    )
    kept = [note for note in notes if note is not given and not isinstance(note, _SPEC)]
    if plain == tuple[str, ...] and tyro.conf.Positional in kept:
        return Annotated[(tuple, *kept, _WORDS, described)]
    return Annotated[(plain, *kept, *parser, described)]


_SPEC = tyro.constructors.PrimitiveConstructorSpec
_WORDS = _SPEC(
    nargs="*",
    metavar="[TEXT ...]",
    instance_from_str=lambda words: tuple(words),
    is_instance=lambda value: isinstance(value, tuple) and all(isinstance(word, str) for word in value),
    str_from_instance=lambda value: list(value),
)


def _parser(plain: Any, option: str) -> list[Any]:
    """For numbers, for one of several words, for lists, and for what may be left out: how one word becomes a value, and
    what is said where it is none."""
    kinds = [kind for kind in typing.get_args(plain) if kind is not type(None)] if is_union(plain) else [plain]
    kind, choices = kinds[0], typing.get_args(kinds[0]) if typing.get_origin(kinds[0]) is typing.Literal else ()
    is_words = bool(choices) and all(isinstance(choice, str) for choice in choices)
    is_list = typing.get_origin(kind) is tuple
    if len(kinds) != 1 or not (is_union(plain) or is_words or is_list or plain in (int, float)):
        return []
    convert = _list_of(kind) if is_list else _one_of(kind, choices, is_words)
    return [
        _SPEC(
            nargs=1,
            metavar=_metavar(plain) or "VALUE",
            instance_from_str=lambda words: _said(option, convert, words[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [_word(value)],
            choices=None if is_words or is_list else choices or None,
        )
    ]


def _said(option: str, convert: Callable[[str], Any], word: str) -> Any:
    try:
        return convert(word)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _one_of(kind: Any, choices: tuple[Any, ...], is_words: bool) -> Callable[[str], Any]:
    def parsed(word: str) -> Any:
        if is_words and word not in choices:
            near = did_you_mean(word, [choice for choice in choices if choice])
            raise ValueError(f"{word!r} is none of {', '.join(choice for choice in choices if choice)}{near}")
        try:
            value = word if choices else kind(word)
        except ValueError:
            raise ValueError(f"{word!r} is not a {'whole ' if kind is int else ''}number") from None
        if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            raise ValueError(f"{word!r} is too large a number")
        return value

    return parsed


def _list_of(kind: Any) -> Callable[[str], tuple[Any, ...]]:
    inner = typing.get_args(kind)
    one = _one_of(inner[0], (), False)

    def parsed(word: str) -> tuple[Any, ...]:
        try:
            values = tuple(one(part.strip()) for part in word.split(",") if part.strip())
        except ValueError as error:
            what = "numbers" if inner[0] in (int, float) else "values"
            raise ValueError(f"{error}; give a list of {what} with commas between them") from None
        if Ellipsis not in inner and len(values) != len(inner):
            raise ValueError(f"{word!r} has {len(values)} values; give {len(inner)} with commas between them")
        return values

    return parsed


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(plain: Any) -> str | None:
    """None where tyro's own words do: choices and flags."""
    if is_union(plain):
        kinds = [kind for kind in typing.get_args(plain) if kind is not type(None)]
        return _metavar(kinds[0]) if len(kinds) == 1 else None
    if typing.get_origin(plain) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(plain))) + "}"
    if typing.get_origin(plain) is tuple:
        inner = [kind for kind in typing.get_args(plain) if kind is not Ellipsis]
        words = [_metavar(kind) or "VALUE" for kind in inner]
        return f"{words[0]},..." if Ellipsis in typing.get_args(plain) else ",".join(words)
    return _METAVARS.get(plain)


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool) or value in ("", ()):
        return "" if not value else "(on by default)"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"(default: {value:g})" if isinstance(value, float) else f"(default: {value})"
