"""Settings of a command in a file: YAML or TOML, one option a key, written as on the command line. `--show-config`
writes what `--config` reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.common_options import COMMON, did_you_mean, plain
from pipeline.errors import UserError, first_line
from pipeline.options import Option, named

_NOTHING = ("", "null", "~")


def before(options: Sequence[Option], file: str, words: Sequence[str], prog: str) -> list[str]:
    """`words` after those that the settings of `file` amount to: what the command line says counts. Its positionals
    replace the file's, and so do its lists; options that may be given several times are added. Raises `UserError`."""
    made: list[str] = []
    positionals: list[str] = []
    for key, value in load(file).items():
        name = "--" + str(key).strip().lstrip("-").replace("_", "-")
        option = named(options, name) or next((o for o in options if o.field == name[2:].replace("-", "_")), None)
        if option is None:
            if name in COMMON:
                raise UserError(f"{file}: {key} belongs on the command line, as {name}")
            near = did_you_mean(name[2:], [o.name.removeprefix("--") for o in options])
            raise UserError(f"{file}: {prog} has no setting {key!r}{near}")
        if option.kind == "positional":
            positionals += [_text(item) for item in _items(value)]
        else:
            made += _words(option, value, f"{file}: {key}")
    return [*made, *words, *([] if _has_positional(options, words) else positionals)]


def _has_positional(options: Sequence[Option], words: Sequence[str]) -> bool:
    left = iter(words)
    for word in left:
        option = named(options, word)
        if option is None:
            return not word.startswith("--") or word == "--"
        if option.kind not in ("flag", "pair") and "=" not in word:
            next(left, None)
    return False


def load(file: str) -> dict[str, Any]:
    """The settings of a YAML, TOML or JSON file. Scalars of YAML are text: `1:4` and `no` stay what they are."""
    import tomllib

    import yaml

    try:
        text = Path(file).read_text(encoding="utf-8")
        data = tomllib.loads(text) if file.lower().endswith(".toml") else yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is neither YAML nor TOML: {first_line(error)}") from error
    if data in (None, ""):
        return {}
    if not isinstance(data, dict):
        raise UserError(f"--config {file} is a list or a text; write one `option: value` a line")
    return data


def _words(option: Option, value: Any, where: str) -> list[str]:
    if option.kind in ("flag", "pair"):
        if (text := _text(value).lower()) not in ("true", "false", "yes", "no"):
            raise UserError(f"{where}: {text!r} is not allowed; use true or false")
        if text in ("true", "yes"):
            return [option.name]
        return [f"--no-{option.name[2:]}"] if option.kind == "pair" else []
    if option.kind == "repeated":
        return [word for item in _assignments(value) for word in (option.name, item)]
    if isinstance(value, Mapping) or (isinstance(value, list) and option.kind != "list"):
        raise UserError(f"{where}: one value is needed")
    text = ",".join(_text(item) for item in _items(value))
    if text in _NOTHING and (option.default is dataclasses.MISSING or not option.default):
        return []
    return [f"{option.name}={text}"]


def _assignments(value: Any, path: str = "") -> Iterator[str]:
    """Of a mapping, which may be nested: `align.lr=1e-6`. Else the items themselves."""
    if not isinstance(value, Mapping):
        yield from (f"{path}={_json(value)}",) if path else (_text(item) for item in _items(value))
        return
    for key, item in value.items():
        yield from _assignments(item, f"{path}.{key}" if path else str(key))


def _json(value: Any) -> str:
    """A value as `NAME=VALUE` has it: lists as JSON, whose items are text where they are no JSON themselves."""
    return f"[{','.join(_item(item) for item in value)}]" if isinstance(value, list) else _text(value)


def _item(value: Any) -> str:
    if isinstance(value, list):
        return _json(value)
    text = _text(value)
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return json.dumps(text)
    return text


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def shown(options: Sequence[Option], arguments: Any, prog: str) -> str:
    """All settings of a command as YAML. A class may have `whole()`: settings that stand for others, written out."""
    import yaml

    data = {o.name.removeprefix("--"): plain(getattr(arguments, o.field)) for o in options if o.kind != "positional"}
    data = {o.field: plain(getattr(arguments, o.field)) for o in options if o.kind == "positional"} | data
    if hasattr(arguments, "whole"):
        data |= plain(arguments.whole())
    return f"# {prog} --config FILE\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)}"
