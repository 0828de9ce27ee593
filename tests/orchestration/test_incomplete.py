"""A command line that lacks something, or has something too much, is a mistake of whoever wrote it: one line that names
it and exit status 2, whatever verb and option."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import pytest
import tyro

from orchestration.cli import VERBS, main
from orchestration.kinds import kinds
from pipeline.command_line import Repeated, parse, plain_help
from pipeline.errors import UserError
from pipeline.options import Option, options_of


def commands() -> Iterator[tuple[str, tuple[Option, ...]]]:
    for verb in VERBS:
        for kind, options in kinds(verb).items():
            if options is not None:
                yield f"{verb} {kind}".strip(), options_of(options)


ALL = dict(commands())


def line_of(capsys, *words: str) -> str:
    """What is said of a command that is refused."""
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("latentzoom: error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("command", [command for command in ALL if not command.startswith(("submit", "jobs"))])
def test_an_option_without_its_value_is_named(capsys, command):
    for option in ALL[command]:
        if option.kind in ("value", "list", "repeated"):
            assert f"{option.name} has no value" in line_of(capsys, *command.split(), option.name)


@pytest.mark.parametrize(
    "command", [command for command, options in ALL.items() if any(option.is_required for option in options)]
)
def test_what_is_missing_is_named_all_at_once(capsys, command):
    said = line_of(capsys, *command.split())
    assert all(option.name in said for option in ALL[command] if option.is_required)


def test_a_word_too_many_is_named(capsys):
    assert "latentzoom promote has no place for 'two'" in line_of(capsys, "promote", "one", "two")
    assert "has no place for 'c'" in line_of(capsys, "preprocess", "folder", "a", "b", "c", "--size", "8")
    assert "has no place for 'x'" in line_of(capsys, "evaluate", "--model", "a", "--data", "b", "--task", "sr", "x")


@plain_help
@dataclasses.dataclass
class Some:
    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FIRST")]
    second: Annotated[str, tyro.conf.Positional] = "b"
    size: int = 0
    name: str = dataclasses.field(default_factory=str)
    quick: bool = False
    tag: Repeated = ()


@pytest.mark.parametrize(
    "words", ["x", "x y", "-- -x", "x --size -3", "--size=4 x", "x --tag a --tag b", "--quick x", "x --name=", "x -- y"]
)
def test_what_is_complete_is_taken(words):
    assert parse(Some, words.split(), prog="some", common=False).first in ("x", "-x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "some needs FIRST"),
        ("--size 4", "some needs FIRST"),
        ("x --size --quick", "--size has no value; give --size NUMBER"),
        ("x --tag", "--tag has no value"),
        ("x y z", "some has no place for 'z'"),
        ("x -- y z", "some has no place for 'z'"),
    ],
)
def test_what_is_not_is_said(words, said):
    with pytest.raises(UserError) as error:
        parse(Some, words.split(), prog="some", common=False)
    assert said.lower() in str(error.value).lower()
