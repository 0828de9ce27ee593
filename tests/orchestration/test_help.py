"""Help and argument mistakes come at once and without Python in them."""

import subprocess
import sys

import pytest
from fresh_commands import answers

from orchestration.cli import VERBS


@pytest.fixture(scope="module")
def helps():
    lines = {verb: [verb, "--help"] for verb in VERBS}
    lines |= {
        f"import {kind}": ["import", kind, "--help"] for kind in ("released", "ldm", "diffusers", "hub-folder", "onnx")
    }
    lines["preprocess folder"] = ["preprocess", "folder", "--help"]
    return dict(zip(lines, answers(list(lines.values()))))


@pytest.mark.parametrize("verb", ["upscale", "generate"])
def test_help_of_what_is_used_most_comes_at_once(verb):
    """Under a third of a second. tyro itself imports typeguard, which imports asyncio and ssl, for types that
    `plain_help` spares it."""
    program = "import sys\nfrom orchestration.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    program += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program, verb, "--help"], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "tyro" in loaded and not loaded & {"typeguard", "asyncio", "ssl", "numpy", "PIL", "fsspec", "torch", "rich"}


def test_no_help_imports_what_takes_seconds(helps):
    for verb, (status, text, _, heavy) in helps.items():
        assert status in (0, None) and not heavy and len(text) > 50, verb


@pytest.mark.parametrize(
    "word", ["None", "default: ''", "default: )", "PATH PATH", "{None}", "typing.", "STR", "FLOAT"]
)
def test_no_help_speaks_python(helps, word):
    assert [verb for verb, (_, text, _, _) in helps.items() if word in text] == []


@pytest.mark.parametrize("verb", ["upscale", "generate", "evaluate"])
def test_help_says_where_a_model_comes_from(helps, verb):
    text = " ".join(helps[verb][1].replace("│", " ").split())
    assert "`latentzoom train`, `import` or `demo` made" in text and "models:/NAME@" in text


def test_every_option_is_explained(helps):
    for verb in ("upscale", "generate", "evaluate", "register", "promote"):
        lines = [line.strip("│ ") for line in helps[verb][1].splitlines()]
        for line, following in zip(lines, lines[1:]):
            is_bare = line.startswith("--") and "  " not in line
            assert not (is_bare and following.startswith(("--", "╰", "(default"))), f"{verb}: {line}"


def test_argument_mistakes_come_before_what_takes_seconds(tmp_path):
    mistakes = [
        ["upscale"],
        ["upscale", "--scale", "x", "a.png", "b.png"],
        ["upscale", "--scale", "2", "no-such.png", "b.png"],
        ["upscale", "--scale", "2", "--width", "3", "a.png", "b.png"],
        ["upscale", "--nonsense"],
        ["generate", "--model", "m", "--size", "axb"],
        ["generate", "--model", "m", "--num", "0"],
        ["evaluate", "--task", "nothing"],
        ["nothing"],
    ]
    for line, (status, _, said, heavy) in zip(mistakes, answers(mistakes)):
        assert status == 2 and said.strip() and not heavy and "Traceback" not in said, line
        assert "<class" not in said and "NoneType" not in said, line
