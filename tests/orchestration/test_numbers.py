"""A number that cannot be is a mistake of whoever wrote it: one line and exit status 2, whatever verb and option."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_pictures import make_pictures
from tiny_bundle import make_bundle

from orchestration.cli import VERBS, main
from orchestration.kinds import kinds
from pipeline.errors import UserError
from pipeline.options import options_of
from preprocess import cli as preprocess_cli
from preprocess.config import PreprocessConfig

LINES = {
    "demo": "--workdir demo",
    "preprocess check": "photos --size 32",
    "preprocess reencode": "shards again --autoencoder model",
    "preprocess verify": "shards",
    "preprocess": "photos new --size 32",
    "train": "autoencoder --preset debug --data shards --run-dir run --local --no-tracking",
    "average": "run --length 0.1 --out averaged",
    "evaluate": "--model model --data photos --task sr --scales 2 --sizes 32 --out report",
    "promote": "faces --tracking-uri sqlite:///mlflow.db",
    "generate": "--model model --out made",
    "upscale": "photos/000.png large.png --scale 2",
    "serve": "--port 0",
    "pipeline": "--preset debug --source folder --source-url photos --workdir work --local",
    "plan": "own --preset debug --images 1000",
    "bench": "--only decode",
    "import released": "a.ckpt --model-config a.yaml --out imported",
}
"""A command that would do its work, by the verb or its kind."""
WORK = [
    "orchestration.demo.chain.open_demo",
    "preprocess.run.preprocess",
    "preprocess.check.check",
    "preprocess.shards.verify.verify",
    "training.cli.train_here",
    "training.post_hoc.make_average",
    "orchestration.verbs.evaluate.run",
    "orchestration.verbs.promote.judge",
    "orchestration.pictures.generating.run",
    "orchestration.pictures.upscaling.run",
    "orchestration.serve.settings.Settings.make_server",
    "orchestration.chain.job.rehearse_stages",
    "orchestration.verbs.bench.run",
    "pipeline.importing.latent_diffusion.import_checkpoint",
]
"""What is not begun: to come here is to have taken the number."""
TAKES_NEGATIVE = {"--seed", "--max-failures"}
NONSENSE = ("nan", "inf", "-inf", "1" + 24 * "0")


def numeric() -> Iterator[tuple[str, str, str]]:
    """(verb with its kind, option, kind of its value) of every option that is a number, or several. All kinds of source
    have the options of one dataclass, so one of them stands for it."""
    for verb in VERBS:
        for kind, options in kinds(verb).items():
            if options is PreprocessConfig and kind != "folder":
                continue
            for option in options_of(options):
                if option.is_number:
                    yield f"{verb} {kind}".strip(), option.name, option.kind


ASKED = list(numeric())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    make_pictures(folder / "photos", 3)
    make_bundle(folder / "model")
    words = ["folder", str(folder / "photos"), str(folder / "shards"), "--size", "32"]
    assert preprocess_cli.main(words) == 0
    return folder


@pytest.mark.parametrize("command", dict.fromkeys(command for command, *_ in ASKED))
def test_no_number_is_a_defect(folder, monkeypatch, capsys, command):
    def begun(*_, **__):
        raise UserError("begun")

    for place in WORK:
        monkeypatch.setattr(place, begun)
    monkeypatch.chdir(folder)
    line = LINES.get(command) or LINES[command.split()[0]]
    for name, kind in [(name, kind) for one, name, kind in ASKED if one == command]:
        values = ["0", "-1", *NONSENSE]
        if kind == "list":
            values = [two for one in values for two in (one, f"{one},{one}", f"1,{one}")]
        wrong = []
        for value in values:
            begins = line.split()
            if name in begins:
                place = begins.index(name)
                del begins[place : place + 2]
            if name in ("--width", "--height", "--longest", "--megapixels") and command == "upscale":
                begins = begins[:-2]
            try:
                status = main([*command.split(), *begins, f"{name}={value}"])
            except SystemExit as end:
                status = end.code
            said = [one for one in capsys.readouterr().err.splitlines() if not one.startswith("latentzoom: note")]
            is_nonsense = any(one in NONSENSE for one in value.split(","))
            must = is_nonsense or ("-1" in value.split(",") and name not in TAKES_NEGATIVE)
            is_refused = status == 2 and len(said) == 1 and said[0] != "latentzoom: error: begun"
            if status not in (0, 1, 2) or (status == 2 and len(said) != 1) or (must and not is_refused):
                wrong.append((f"{name}={value}", status, said))
        assert wrong == []


@pytest.mark.parametrize("value", ["1" + 24 * "0", "NaN", "-Infinity", "1e999", "[8, 1e999]"])
def test_no_number_of_a_setting_is_a_defect(folder, monkeypatch, capsys, value):
    monkeypatch.chdir(folder)
    for setting in ("autoencoder.global_batch", "autoencoder.lr", "model.image_size"):
        assert main(["train", *LINES["train"].split(), "--dry-run", "--set", f"{setting}={value}"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
