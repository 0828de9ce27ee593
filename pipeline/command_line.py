"""Help that speaks of files and numbers, not of Python: metavars and defaults of a dataclass of options."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

Options = TypeVar("Options")
_METAVARS: dict[Any, str] = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}


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
    described: Any = tyro.conf.arg(
        metavar=getattr(given, "metavar", None) or _metavar(plain),
        help=getattr(given, "help", None),
        help_behavior_hint=_default(field.default) if has_default else None,
        name=getattr(given, "name", None),
        aliases=getattr(given, "aliases", None),
    )
    kept = [note for note in notes if note is not given]
    if plain == tuple[str, ...] and tyro.conf.Positional in kept:
        return Annotated[(tuple, *kept, _WORDS, described)]
    return Annotated[(plain, *kept, *_parser(plain), described)]


_WORDS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[TEXT ...]",
    instance_from_str=lambda words: tuple(words),
    is_instance=lambda value: isinstance(value, tuple) and all(isinstance(word, str) for word in value),
    str_from_instance=lambda value: list(value),
)


def _parser(plain: Any) -> list[Any]:
    """For numbers, for one of several words, and for what may be left out: how one word becomes a value, and what is
    said where it is none."""
    kinds = [kind for kind in typing.get_args(plain) if kind is not type(None)] if _is_union(plain) else [plain]
    kind, choices = kinds[0], typing.get_args(kinds[0]) if typing.get_origin(kinds[0]) is typing.Literal else ()
    is_words = bool(choices) and all(isinstance(choice, str) for choice in choices)
    if len(kinds) != 1 or not (_is_union(plain) or is_words or plain in (int, float)):
        return []

    def parsed(words: list[str]) -> Any:
        if is_words and words[0] not in choices:
            raise ValueError(f"{words[0]!r} is none of {', '.join(choice for choice in choices if choice)}")
        try:
            return words[0] if choices else kind(words[0])
        except ValueError:
            raise ValueError(f"{words[0]!r} is not a {'whole ' if kind is int else ''}number") from None

    return [
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=_metavar(plain) or "VALUE",
            instance_from_str=parsed,
            is_instance=lambda value: True,
            str_from_instance=lambda value: [str(value)],
            choices=None if is_words else choices or None,
        )
    ]


def _is_union(plain: Any) -> bool:
    return typing.get_origin(plain) in (typing.Union, types.UnionType)


def _metavar(plain: Any) -> str | None:
    """None where tyro's own words do: choices and flags."""
    if _is_union(plain):
        kinds = [kind for kind in typing.get_args(plain) if kind is not type(None)]
        return _metavar(kinds[0]) if len(kinds) == 1 else None
    if typing.get_origin(plain) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(plain))) + "}"
    if typing.get_origin(plain) is tuple:
        inner = [kind for kind in typing.get_args(plain) if kind is not Ellipsis]
        words = [_metavar(kind) or "VALUE" for kind in inner]
        return f"[{words[0]} ...]" if Ellipsis in typing.get_args(plain) else " ".join(words)
    return _METAVARS.get(plain)


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool) or value in ("", ()):
        return "" if not value else "(on by default)"
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"(default: {value:g})" if isinstance(value, float) else f"(default: {value})"
