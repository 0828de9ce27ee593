"""The documentation works as written: marked commands are run at small size, all others parse, all links exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestration import cli
from pipeline import command_line
from pipeline.command_log import CRASHED
from pipeline.common_options import COMMON, split
from pipeline.errors import STOPPED
from pipeline.old_spellings import OLD, modern

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUN_ORDER = [
    "verbs/preprocess", "verbs/train", "verbs/runs", "verbs/average", "verbs/evaluate", "verbs/register",
    "verbs/promote", "verbs/lineage", "verbs/rollback",
    "verbs/generate", "verbs/upscale", "verbs/import", "verbs/export", "verbs/pipeline", "verbs/doctor", "verbs/plan",
    "recipes", "command-line",
]  # fmt: skip
ONLY_ON_CLUSTERS = {"submit", "jobs", "stop", "demo", "bench", "serve"}


@dataclass(frozen=True)
class Command:
    page: str
    mark: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)[1:]


def commands(path: Path) -> list[Command]:
    """Lines that start with `latentzoom` in fenced blocks, continuations joined."""
    found = []
    for mark, body in re.findall(r"^```([^\n]*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        for line in body.replace("\\\n", " ").splitlines():
            if re.match(r"latentzoom [a-z]", line):
                found.append(Command(path.relative_to(ROOT).as_posix(), mark.strip(), line))
    return found


ALL = [command for page in PAGES for command in commands(page)]
README = [c for c in commands(ROOT / "README.md") if not re.search(r"[{\[]", c.line)]


def parse(words: list[str]) -> None:
    """Parse a command line as its verb does, without doing it. Raises `SystemExit` or `UserError` when it does not."""
    verb, rest = words[0], words[1:]
    assert verb in cli.VERBS, f"no verb {verb}"
    module = __import__(cli.VERBS[verb][0], fromlist=["main"])
    rest = rest[: rest.index(">")] if ">" in rest else rest
    common, rest = split(modern(verb, rest))
    if common.config:
        return  # a file that is not here
    if verb == "submit":
        parse(module.parsed(rest)[1])
    elif verb == "preprocess":
        from preprocess import cli as preprocess

        kinds = {"check": preprocess.parse_check, "reencode": preprocess.parse_reencode}
        if rest[0] in kinds:
            kinds[rest[0]](rest[1:])
        elif rest[0] != "verify":
            preprocess.parse(rest)
    elif verb == "train":
        from training.cli import Arguments
        from training.config import override
        from training.presets import get_preset

        arguments = command_line.parse(Arguments, rest, prog="latentzoom train")
        override(get_preset(arguments.preset), list(arguments.set))
    elif verb == "import":
        module.parsed(rest)
    elif verb == "pipeline":
        from orchestration.verbs.pipeline import make_job

        make_job(command_line.parse(module.Arguments, rest, prog="latentzoom pipeline"))
    else:
        command_line.parse(module.Arguments, rest, prog=f"latentzoom {verb}")


def test_there_are_marks_and_only_known_ones():
    assert len(ALL) > 40
    assert {c.mark for c in ALL} == {"console run", "console cluster"}


def test_every_block_says_whether_it_is_run():
    known = {"console run", "console cluster", "text plan", "mermaid", "diff", "python"}
    known |= {"yaml values", "json deepspeed", ""}
    for page in [*PAGES, ROOT / "README.md"]:
        for mark, body in re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            assert mark in known, f"{page.name}: {mark}"
            is_command = re.search(
                r"^(\(?umask|make|latentzoom|docker|kubectl|helm|ray|export|pip|mlflow|torchrun) ", body, re.MULTILINE
            )
            assert mark.startswith("console") == bool(is_command), f"{page.name}: ```{mark}\n{body}"


@pytest.mark.parametrize("command", [*ALL, *README], ids=lambda c: f"{c.page}: {c.line[:60]}")
def test_every_command_parses(command, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")  # for commands that rely on one
    monkeypatch.chdir(tmp_path)
    parse(command.words)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_a_page_with_an_example(verb):
    marks = {c.mark for c in commands(DOCS / "verbs" / f"{verb}.md") if verb in c.words[:1]}
    assert marks if verb in ONLY_ON_CLUSTERS else "console run" in marks


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "README.md"]:
        text = re.sub(r"^```diff\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_with_runnable_commands_is_run():
    pages = {c.page.removeprefix("docs/").removesuffix(".md") for c in ALL if c.mark == "console run"}
    assert pages == set(RUN_ORDER)


def test_the_page_of_what_verbs_share_has_all_of_it():
    text = (DOCS / "command-line.md").read_text()
    for name, (metavar, _) in COMMON.items():
        assert f"| `{f'{name} {metavar}'.strip()}` |" in text, name
    for verb, options in OLD.items():
        for old in options:
            assert re.search(rf"`{verb} (\w+ )?{old}`", text), f"{verb} {old}"
    for status in (0, 1, 2, CRASHED, STOPPED, 130):
        assert f"\n| {status} |" in text, status
