"""One set of habits: what every verb shares, at the boundary. Nothing here imports torch."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from orchestration import cli
from orchestration.cli import VERBS, main
from orchestration.kinds import kinds
from pipeline.command_line import parse
from pipeline.common_options import Common, answer, in_force, split
from pipeline.errors import UserError
from pipeline.options import options_of

ROOT = Path(__file__).resolve().parents[2]
ALL = {f"{verb} {kind}".strip(): options for verb in VERBS for kind, options in kinds(verb).items()}


@pytest.fixture
def verb(monkeypatch):
    """A verb `stand-in` that does what a test says; it is given the words."""

    def install(work):
        module = type(sys)("stand_in")
        module.main = work
        monkeypatch.setitem(sys.modules, "stand_in", module)
        monkeypatch.setitem(VERBS, "stand-in", ("stand_in", "for tests"))

    return install


def asked(kind, words, common=Common()):  # noqa: B008
    with in_force(common):
        return parse(kind, words, prog="latentzoom VERB")


def test_json_is_alone_on_standard_output(verb, capsys):
    def work(words):
        print("on the way")
        answer("two lines\nfor people", {"psnr": float("inf"), "sizes": (1, 2)})
        return 1

    verb(work)
    assert main(["stand-in", "--json"]) == 1
    found = capsys.readouterr()
    assert json.loads(found.out) == {"psnr": None, "sizes": [1, 2]} and "on the way" in found.err
    assert main(["stand-in", "--quiet"]) == 1
    assert capsys.readouterr().out == "two lines\nfor people\n"
    assert main(["--quiet", "stand-in"]) == 1
    assert capsys.readouterr().out == "two lines\nfor people\n"
    assert main(["stand-in"]) == 1
    assert capsys.readouterr().out == "on the way\ntwo lines\nfor people\n"


def test_every_verb_that_reports_has_an_answer():
    """serve has none: it goes on until it is stopped."""
    doing = {"upscale": "orchestration.pictures.upscaling", "generate": "orchestration.pictures.generating"}
    doing |= {"export": "orchestration.exporting", "submit": "orchestration.cluster.submitting"}
    doing |= {"train": "training.cli", "preprocess": "preprocess.cli"}
    for name, (module, _) in VERBS.items():
        text = (ROOT / f"{doing.get(name, module).replace('.', '/')}.py").read_text()
        assert ("answer(" in text) == (name != "serve"), name


@pytest.mark.parametrize("option", ["--quiet", "--json"])
@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["help"],
        ["--completion", "bash"],
        ["upscale", "--help"],
        ["import", "--help"],
        ["import", "ldm", "--help"],
        ["preprocess", "--help"],
        ["preprocess", "folder", "--help"],
        ["train", "--help"],
        ["submit", "--help"],
        ["upscale", "a.png", "b.png", "--scale", "2", "--show-config"],
        ["import", "onnx", "a", "--out", "b", "--show-config"],
    ],
    ids=" ".join,
)
def test_what_was_asked_for_is_on_standard_output(words, option, capsys):
    def said():
        found = capsys.readouterr()
        assert found.err == ""
        return found.out

    def run(*line):
        with contextlib.suppress(SystemExit):
            main(list(line))

    run(*words)
    text = said()
    assert len(text) > 50
    for line in ([*words, option], [option, *words]):
        run(*line)
        assert said() == text


@pytest.mark.parametrize(
    "words",
    [
        ["preprocess", "folder", "a", "b", "--lr-sizes", "16", "32", "--show-config"],
        ["demo", "--work", "a", "--show-config"],
        ["preprocess", "folder", "a", "b", "--plan", "--show-config"],
    ],
)
def test_quiet_says_no_notes(words, capsys):
    for line, is_said in ((words, True), (["--quiet", *words], False), ([*words, "--quiet"], False)):
        with pytest.raises(SystemExit):
            main(line)
        assert ("note: " in capsys.readouterr().err) == is_said


def test_quiet_shows_no_progress(verb, capsys):
    from pipeline.progress import Progress

    def work(words):
        with Progress("draw", 2) as progress:
            progress.update(2)
        print("latentzoom: warning: it stays", file=sys.stderr)
        return 0

    verb(work)
    assert main(["stand-in", "--quiet"]) == 0
    assert capsys.readouterr().err == "latentzoom: warning: it stays\n"
    assert main(["stand-in"]) == 0
    assert "draw  2/2" in capsys.readouterr().err


def test_a_defect_of_ours_is_one_line_and_70(verb, capsys, tmp_path, monkeypatch):
    def work(words):
        raise KeyError("s3://me:hunter22@host/x")

    verb(work)
    monkeypatch.setenv("LATENTZOOM_CACHE", str(tmp_path))
    assert main(["stand-in", "--data", "s3://me:hunter22@host/x"]) == 70
    said = capsys.readouterr().err
    (log,) = (tmp_path / "logs").iterdir()
    assert said.count("\n") == 1 and str(log) in said and "report" in said and "Traceback" not in said
    held = log.read_text()
    assert "Traceback" in held and "KeyError" in held and "latentzoom stand-in" in held
    assert "hunter22" not in held + said
    file = tmp_path / "mine.log"
    assert main(["stand-in", "--log-file", str(file)]) == 70
    assert str(file) in capsys.readouterr().err and "Traceback" in file.read_text()


@pytest.mark.parametrize("module", ["preprocess", "training.cli"])
def test_a_defect_is_one_line_without_latentzoom_before_the_verb(module, tmp_path):
    """Of a command that is started as a module of its own, too."""
    broken = "import pipeline.command_line as c, runpy, sys; c.parse = lambda *_, **__: {}['x']; "
    words = ["verify" if module == "preprocess" else "decoder", "shards", "--url", "s3://me:hunter22@host/x"]
    broken += f"sys.argv[1:] = {words}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    environment = {**os.environ, "LATENTZOOM_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, env=environment)
    (log,) = (tmp_path / "logs").iterdir()
    assert done.returncode == 70 and done.stderr.count("\n") == 1 and str(log) in done.stderr, done.stderr
    held = log.read_text()
    assert "Traceback" in held and f"latentzoom {module.split('.')[0].replace('training', 'train')} " in held
    assert "hunter22" not in held + done.stderr


def test_a_crash_report_that_cannot_be_written_is_said(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTZOOM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    verb(lambda words: 1 // 0)
    assert main(["stand-in"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_the_log_file_holds_what_is_said_and_logged(verb, capsys, tmp_path):
    import logging

    def work(words):
        print("an answer")
        print("\r\x1b[Kmoving", file=sys.stderr)
        print("latentzoom: warning: mind, password is in http://a:hunter22@b/", file=sys.stderr)
        logging.getLogger("latentzoom").info("step 7")
        logging.getLogger("latentzoom").warning("loss is odd")
        raise UserError("it is no picture")

    verb(work)
    file = tmp_path / "logs/run.log"
    assert main(["stand-in", "--log-file", str(file), "--url", "http://a:hunter22@b/"]) == 2
    held, found = file.read_text(), capsys.readouterr()
    for text in (
        "latentzoom stand-in",
        "an answer",
        "INFO latentzoom: step 7",
        "loss is odd",
        "error: it is no picture",
    ):
        assert text in held
    assert "hunter22" not in held and "moving" not in held and "step 7" not in found.err
    assert "it is no picture" in found.err and found.out == "an answer\n"
    assert not logging.getLogger("latentzoom").handlers
    assert main(["stand-in", "--log-file", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_verbose_shows_where_a_mistake_came_from(verb, capsys):
    def work(words):
        try:
            int("x")
        except ValueError as error:
            raise UserError("give a number") from error

    verb(work)
    assert main(["stand-in", "--verbose"]) == 2
    said = capsys.readouterr().err
    assert "invalid literal" in said and said.endswith("latentzoom: error: give a number\n")
    assert main(["stand-in", "--verbose", "--quiet"]) == 2


EVALUATE = ["--model", "m", "--data", "d", "--task", "sr", "--scales", "2"]
TRAIN = ["train", "denoiser", "--preset", "debug", "--data", "d", "--run-dir", "r"]
PIPELINE = ["pipeline", "--preset", "debug", "--source", "folder", "--source-url", "d", "--workdir", "w"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["doctor", "--only", "kernels"], "--only is an option of --gpu"),
        (["doctor", "--device", "cpu"], "--device is an option of --gpu"),
        (["doctor", "--out", "there"], "--out is an option of --gpu"),
        (["evaluate", *EVALUATE, "--workers", "-1"], "--workers -1 is not allowed"),
        (["evaluate", *EVALUATE, "--workers", "1", "--gpus-per-worker", "-1"], "--gpus-per-worker -1 is not allowed"),
        (["promote", "m", "--workers", "-1"], "--workers -1 is not allowed"),
        ([*PIPELINE, "--evaluate-workers", "-1"], "--evaluate-workers -1 is not allowed"),
        ([*PIPELINE, "--preprocess-workers", "-1"], "--preprocess-workers -1 is not allowed"),
        ([*TRAIN, "--local", "--threads", "-1"], "--threads -1 is not allowed"),
        (["upscale", "a.png", "b.png", "--scale", "2", "--device", "cpu:7"], "--device cpu:7 is not allowed"),
        (["upscale", "-q", "a.png", "b.png", "--scale", "2"], "latentzoom upscale has no option -q ("),
        (["jobs", "-f"], "latentzoom jobs has no option -f ("),
        ([*TRAIN, "-x=3"], "latentzoom train has no option -x ("),
    ],
)
def test_what_cannot_be_meant_is_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    found = capsys.readouterr()
    assert said in found.err and found.err.count("\n") == 1 and not found.out


def test_words_with_a_dash_may_be_values(tmp_path):
    upscale = ALL["upscale"]
    assert asked(upscale, ["a.png", "-", "--scale", "2"]).pictures == ("a.png", "-")
    assert asked(upscale, ["a.png", "-5", "--seed", "-1"]).pictures == ("a.png", "-5")
    for words in (["-ob.png"], ["-o=b.png"], ["-o", "b.png"], ["--out=b.png"]):
        assert asked(upscale, [*words, "a.png"]).out == "b.png"
    file = tmp_path / "settings.yaml"
    file.write_text("pictures: [a.png, b.png]\n")
    assert asked(upscale, ["-o=b.png", "c.png"], Common(config=str(file))).pictures == ("c.png",)


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["upscal"], "did you mean upscale?"),
        (["upscale", "a.png", "b.png", "--scael", "2"], "no option --scael; did you mean --scale?"),
        (["upscale", "--quite"], "did you mean --quiet?"),
        (["preprocess", "foldr"], "did you mean folder?"),
        (["preprocess", "folder", "a", "b", "--val-fracton=0.1"], "did you mean --val-fraction?"),
        (["import", "difusers"], "did you mean diffusers?"),
        (["train", "decodr", "--preset", "debug", "--data", "d", "--run-dir", "r"], "did you mean decoder?"),
        (["train", "decoder", "--preset", "debgu", "--data", "d", "--run-dir", "r"], "did you mean debug?"),
        (["submit", "trian"], "did you mean train?"),
        (["--completion", "bsh"], "did you mean bash?"),
        (["bench", "--only", "kernl"], "did you mean kernel?"),
        (["upscale", "a.png", "b.png", "--scale", "2", "--look", "faithfull"], "did you mean faithful?"),
        (["promote", "m", "--primary", "lpipss"], "did you mean lpips"),
        (["evaluate", *EVALUATE, "--protocols", "div2"], "did you mean div2k?"),
        (["evaluate", *EVALUATE, "--dataset", "div2"], "did you mean div2k?"),
    ],
)
def test_unknown_names_suggest_the_near_one(words, near, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert near in said and said.count("\n") == 1


def needed(kind):
    """The words that a dataclass cannot do without."""
    words = []
    for option in options_of(kind):
        if option.default is dataclasses.MISSING:
            value = "debug" if option.field == "preset" else option.choices[0] if option.choices else "7"
            words += [value] if option.kind == "positional" else [option.name, value]
    return words


@pytest.mark.parametrize("command", ALL)
def test_what_show_config_prints_can_be_fed_in_again(command, capsys, tmp_path):
    kind, words = ALL[command], needed(ALL[command])
    want = asked(kind, words)
    with pytest.raises(SystemExit) as end:
        asked(kind, words, Common(show_config=True))
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert {o.field for o in options_of(kind)} == {n.replace("-", "_").replace("from", "from_step").replace("dry_run", "plan" if command.startswith("preprocess") else "dry_run") for n in yaml.safe_load(text)}  # fmt: skip # noqa: E501
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    again = asked(kind, [], Common(config=str(file)))
    if hasattr(want, "whole"):
        assert again.whole() == want.whole()
        want, again = (dataclasses.replace(one, set=()) for one in (want, again))
    assert again == want


def printed(capsys, *words):
    """What a whole command line prints that prints and does nothing else."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    found = capsys.readouterr()
    assert (end.value.code, found.err) == (0, "")
    return found.out


@pytest.mark.parametrize("command", ALL)
def test_settings_go_round_on_the_whole_command_line(command, capsys, tmp_path):
    """`parse` alone does not see how the command reads its words before."""
    name = command.split()
    text = printed(capsys, *name, *needed(ALL[command]), "--show-config")
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    for words in (["--config", str(file), *name], [*name, f"--config={file}"], [*name, "--config", str(file)]):
        assert printed(capsys, *words, "--show-config") == text


@pytest.mark.parametrize("name", ["settings.yaml", "settings.toml"])
def test_settings_of_a_file_hold_until_the_command_line_says_otherwise(name, tmp_path):
    from training.cli import Arguments

    text = {
        "settings.yaml": "stage: decoder\npreset: debug\ndata: D\nrun_dir: R\nworkers: 1:4\nlocal: true\n"
        "set:\n  decoder:\n    lr: 1e-6\n    sizes: [8, 16]\n",
        "settings.toml": 'stage = "decoder"\npreset = "debug"\ndata = "D"\n"run-dir" = "R"\nworkers = "1:4"\n'
        "local = true\n[set.decoder]\nlr = 1e-6\nsizes = [8, 16]\n",
    }
    file = tmp_path / name
    file.write_text(text[name])
    found = asked(Arguments, ["--data", "E", "--set", "decoder.lr=2"], Common(config=str(file)))
    assert (found.stage, found.data, found.run_dir, found.workers, found.local) == ("decoder", "E", "R", "1:4", True)
    assert [float(s.split("=")[1]) for s in found.set if "lr" in s] == [1e-6, 2.0]
    assert "[8,16]" in "".join(found.set)
    assert asked(Arguments, ["align"], Common(config=str(file))).stage == "align"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scael: 2", "no setting 'scael'; did you mean scale?"),
        ("- 2", "a list or a text"),
        ("scale: [", "neither YAML nor TOML"),
        ("overwrite: 3", "use true or false"),
        ("scale: {a: 1}", "one value is needed"),
        ("quiet: true", "belongs on the command line"),
    ],
)
def test_a_wrong_settings_file_is_one_line(text, message, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message.replace("[", "\\[")):
        asked(ALL["upscale"], [], Common(config=str(file)))
    with pytest.raises(UserError, match="No such file"):
        asked(ALL["upscale"], [], Common(config=str(tmp_path / "none.yaml")))


def test_lists_are_one_word_with_commas_and_older_ones_are_understood(capsys):
    evaluate = ["--model", "m", "--data", "d", "--task", "sr"]
    assert asked(ALL["evaluate"], [*evaluate, "--sizes", "128,160"]).sizes == (128, 160)
    assert asked(ALL["preprocess folder"], ["--lr-sizes", "16,32", "SRC", "DST"]).lr_sizes == (16, 32)
    assert not capsys.readouterr().err
    old = asked(ALL["preprocess folder"], ["SRC", "DST", "--lr-sizes", "16", "32", "--members", "jp2", "tga"])
    assert (old.lr_sizes, old.members, old.dest) == ((16, 32), ("jp2", "tga"), "DST")
    assert "--lr-sizes 16,32" in capsys.readouterr().err
    assert asked(ALL["doctor"], ["--only", "a", "--only", "b"]).only == ("a", "b")
    assert asked(ALL["bench"], ["--only", "kernel", "sr"]).only == ("kernel", "sr")
    assert asked(ALL["preprocess folder"], ["--crop-fraction", "0.5", "1", "S", "D"]).crop_fraction == (0.5, 1.0)
    assert asked(ALL["serve"], ["--model", "a", "--model", "b"]).model == ("a", "b")


@pytest.mark.parametrize(
    ("words", "now"),
    [
        (["lineage", "m", "--as-json"], ["lineage", "m", "--json"]),
        (["plan", "ffhq", "--sampler-steps=3"], ["plan", "ffhq", "--steps=3"]),
        (["generate", "--batch", "2"], ["generate", "--batch-size", "2"]),
        (["bench", "--json", "a.json"], ["bench", "--out", "a.json"]),
        (["bench", "--json", "--quick"], ["bench", "--json", "--quick"]),
        (["submit", "--detach", "generate", "--batch", "2"], ["submit", "--detach", "generate", "--batch-size", "2"]),
    ],
)
def test_old_spellings_go_on_with_a_line(words, now, capsys):
    common, found = cli._read(words)
    if "--json" in now and "--json" not in found:
        assert common.json
        now = [word for word in now if word != "--json"]
    assert found == now
    assert ("old spelling" in capsys.readouterr().err) == (words != [*now] and "--quick" not in words)


def test_what_follows_a_submitted_verb_is_the_verbs():
    common, words = cli._read(["submit", "--json", "train", "--quiet", "--config", "c.yaml"])
    assert common == Common(json=True) and words == ["submit", "train", "--quiet", "--config", "c.yaml"]


def test_a_submitted_verb_takes_its_settings_along(tmp_path):
    from orchestration.verbs.submit import with_settings

    file = tmp_path / "settings.yaml"
    file.write_text("scale: 3\npictures: [a.png, out]\n")
    assert with_settings(["upscale", "--quiet", "--config", str(file)]) == [
        "upscale", "--scale=3", "--quiet", "a.png", "out",
    ]  # fmt: skip
    assert with_settings(["preprocess", "folder", f"--config={file}", "S", "D"][:2]) == ["preprocess", "folder"]
    assert with_settings(["upscale", "--config", str(file), str(file), "out"]) == [
        "upscale", "--scale=3", str(file), "out",
    ]  # fmt: skip
    file.write_text("ckpt: a.ckpt\nmodel-config: m.yaml\nout: b\n")
    assert with_settings(["import", "ldm", "--config", str(file)]) == [
        "import", "ldm", "--model-config=m.yaml", "--out=b", "a.ckpt",
    ]  # fmt: skip


def test_common_options_may_be_values_of_none():
    assert split(["--log-file=a", "x", "--", "--json"]) == (Common(log_file="a"), ["x", "--", "--json"])
    for words in (["--log-file"], ["--json=1"]):
        with pytest.raises(UserError):
            split(words)


def test_no_color_is_heeded(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for value, coloured in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", value)
        with pytest.raises(SystemExit):
            asked(ALL["upscale"], ["--help"])
        assert ("\x1b[" in capsys.readouterr().out) == coloured


def test_version_names_torch_ray_and_the_device(capsys):
    assert main(["--version", "--json"]) == 0
    assert {"latentzoom", "torch", "Ray", "device"} == set(json.loads(capsys.readouterr().out))


BASH = """
{script}
complete_line() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _latentzoom; echo "${{COMPREPLY[*]}}"; }}
complete_line latentzoom ups
complete_line latentzoom upscale --sc
complete_line latentzoom upscale --dtype b
complete_line latentzoom preprocess fold
complete_line latentzoom preprocess folder --lr-
complete_line latentzoom submit gen
complete_line latentzoom submit generate --la
complete_line latentzoom --completion f
complete_line latentzoom upscale pictu
complete_line latentzoom --log-file a.log ups
complete_line latentzoom --log-file = a.log ups
complete_line latentzoom --log-file ups
complete_line latentzoom train dec
complete_line latentzoom train --preset debug dec
complete_line latentzoom train decoder dec
complete_line latentzoom submit --ad
complete_line latentzoom submit train --ad
complete_line latentzoom submit --detach train --ste
complete_line latentzoom submit --address http://head:8265 train dec
complete_line latentzoom submit train decoder --address http://head:8265 --ste
complete_line latentzoom submit --env A=b preprocess fold
complete_line latentzoom upscale --dtype = b
complete_line latentzoom upscale --dtype =
complete_line latentzoom upscale --look sh
complete_line latentzoom preprocess --qui
complete_line latentzoom submit preprocess folder --lr-
"""


def test_bash_completes_verbs_kinds_options_and_choices(capsys):
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-c", BASH.format(script=script)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.split("\n") == [
        "upscale", "--scale", "bfloat16", "folder", "--lr-sizes", "generate", "--latent-size", "fish", "",
        "upscale", "upscale", "", "decoder", "decoder", "", "--address", "--address", "--steps", "decoder", "--steps",
        "folder", "bfloat16", "float32 bfloat16 float16", "sharp", "--quiet", "--lr-sizes", "",
    ]  # fmt: skip


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_option(shell, capsys):
    assert main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    for options in ALL.values():
        for option in options_of(options):
            for name in option.names:
                assert (f"-l {name[2:]}" if shell == "fish" and name.startswith("--") else name[-1:]) in script
    assert "upscale" in script and "autoencoder decoder denoiser" in script and "faithful sharp" in script
    if shell == "fish":  # what may be submitted is a verb
        assert re.search(r"from submit; and not __fish_seen_subcommand_from demo .*' -a 'demo ", script)


@pytest.mark.parametrize(
    "words",
    [
        ["orchestration.cli", "--version"],
        ["orchestration.cli", "upscale", "--help"],
        ["orchestration.cli", "import", "--help", "--quiet"],
        ["orchestration.cli", "upscale", "a.png", "b.png", "--scale", "2", "--show-config"],
        ["orchestration.cli", "--completion", "bash"],
        ["preprocess", "--help"],
        ["training.cli", "--help"],
    ],
    ids=" ".join,
)
def test_a_closed_answer_is_no_crash(words):
    end, stdout = os.pipe()
    os.close(end)
    done = subprocess.run([sys.executable, "-m", *words], stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(stdout)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("words", ["--version", "upscale --help"])
def test_no_standard_output_is_no_crash(words):
    command = f"exec {shlex.quote(sys.executable)} -m orchestration.cli {words} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")


def test_another_pipe_that_breaks_is_not_taken_for_the_answer(verb):
    """Such as the socket of a store: nobody has seen enough then."""

    def work(words):
        raise BrokenPipeError

    verb(work)
    with pytest.raises(BrokenPipeError):
        main(["stand-in"])


def test_a_command_that_was_called_by_itself_leaves_nobody_listening(monkeypatch):
    """Its handler would write INFO lines of other packages into what later commands say, or into a closed stream."""
    from training.cli import main as train

    root, before, now = logging.getLogger(), io.StringIO(), io.StringIO()
    listening = list(root.handlers), root.level
    monkeypatch.setattr(sys, "stderr", before)
    assert train(["denoiser", "--preset", "debug", "--data", "nowhere", "--run-dir", "run", "--local"]) == 2
    assert before.getvalue().startswith("latentzoom: error: ")
    before.close()
    monkeypatch.setattr(sys, "stderr", now)
    logging.getLogger("botocore").info("Found credentials in environment variables.")
    logging.getLogger("latentzoom").warning("hello")
    assert now.getvalue() == "" and (root.handlers, root.level) == listening
